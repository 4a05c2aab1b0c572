"""Protects judgements on disk: a killed run loses and doubles nothing, and never mixes settings."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cepo.eval.judges.journal import JudgeTask, collect_judgements
from cepo.eval.judges.settings import Judgement, Messages
from tests.eval.rewardbench.rule import SCORES
from tests.jsonl import read_jsonl

SAID = {"command": "eval rewardbench", "model": "m"}


def ask(path: Path, judge: Any, count: int = 4, **settings: Any) -> Any:
    asked = [JudgeTask(f"k{number}", [{"role": "user", "content": str(number)}]) for number in range(count)]
    return collect_judgements(asked, path.parent, {**SAID, **settings}, lambda: judge)


class Plain:
    def __init__(self, dies_after: int | None = None, errors: frozenset[str] = frozenset()) -> None:
        self.dies_after, self.errors, self.asked = dies_after, errors, []  # type: ignore[var-annotated]

    def judge(self, prompts: Sequence[Messages]) -> Iterator[tuple[int, Judgement]]:
        for index, messages in enumerate(prompts):
            if index == self.dies_after:
                raise KeyboardInterrupt
            text = messages[0]["content"]
            self.asked.append(text)
            yield index, Judgement("", error="no") if text in self.errors else Judgement(SCORES.format(text, 0))


def test_a_killed_run_goes_on_without_losing_or_doubling_a_row(tmp_path: Path) -> None:
    path = tmp_path / "judgements.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask(path, Plain(dies_after=2))
    with path.open("a") as file:
        file.write('{"key": "k2", "settings": "to')  # the kill came in the middle of a line
    rest = Plain()
    found = ask(path, rest)
    assert rest.asked == ["2", "3"]
    assert found.resumed == 2
    assert [record["key"] for record in read_jsonl(path)] == ["k0", "k1", "k2", "k3"]
    assert [list(found.records[f"k{number}"]["scores"]) for number in range(4)] == [[number, 0] for number in range(4)]


def test_a_doubled_line_counts_once_and_more_rows_may_come(tmp_path: Path) -> None:
    path = tmp_path / "judgements.jsonl"
    ask(path, Plain(), count=2)
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    more = Plain()
    found = ask(path, more)
    assert more.asked == ["2", "3"]
    assert found.resumed == 2
    assert [record["key"] for record in read_jsonl(path)] == ["k0", "k1", "k2", "k3"]


def test_judgements_of_rows_that_are_gone_are_refused_and_kept(tmp_path: Path) -> None:
    """Else the summary would cover fewer judgements than the file holds."""
    path = tmp_path / "judgements.jsonl"
    ask(path, Plain())
    before = path.read_text()
    with pytest.raises(
        ValueError, match="2 of the 4 records in judgements.jsonl belong to rows that this run does not read"
    ):
        ask(path, Plain(), count=2)
    assert path.read_text() == before


def test_what_failed_is_kept_with_its_reason_and_judged_anew(tmp_path: Path) -> None:
    path = tmp_path / "judgements.jsonl"
    first = ask(path, Plain(errors=frozenset({"1"})))
    assert first.records["k1"]["error"] == "no"
    assert first.records["k1"]["scores"] is None
    again = Plain()
    found = ask(path, again)
    assert again.asked == ["1"]
    assert found.records["k1"]["error"] is None
    assert sorted(record["key"] for record in read_jsonl(path)) == ["k0", "k1", "k2", "k3"]


def test_nothing_is_loaded_where_nothing_is_left_to_judge(tmp_path: Path) -> None:
    ask(tmp_path / "judgements.jsonl", Plain(), count=1)
    found = collect_judgements(
        [JudgeTask("k0", [{"role": "user", "content": "0"}])],
        tmp_path,
        SAID,
        lambda: pytest.fail("the judge was opened"),
    )
    assert (found.resumed, len(found.records)) == (1, 1)


def test_a_prompt_that_has_changed_is_refused(tmp_path: Path) -> None:
    ask(tmp_path / "judgements.jsonl", Plain(), count=2)
    changed = [JudgeTask("k0", [{"role": "user", "content": "0"}]), JudgeTask("k1", [{"role": "user", "content": "7"}])]
    with pytest.raises(ValueError, match="1 of the 2 records"):
        collect_judgements(changed, tmp_path, SAID, lambda: pytest.fail("the judge was opened"))


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    ask(tmp_path / "judgements.jsonl", Plain(), temperature=0.0)
    with pytest.raises(ValueError, match=r"temperature was 0.0 and is 0.5; name another output"):
        ask(tmp_path / "judgements.jsonl", Plain(), temperature=0.5)
