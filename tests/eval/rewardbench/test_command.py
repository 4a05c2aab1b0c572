"""Protects `cepo eval rewardbench`: data of every shape, honest accuracies, resume without loss, reports."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from cepo.cli.app import main
from cepo.eval.judges.journal import JudgeTask, collect_judgements, judgement_record
from cepo.eval.judges.settings import Judgement, JudgeSettings, Messages
from cepo.eval.rewardbench import command as rewardbench_module
from cepo.eval.rewardbench.command import RewardBenchJob, run_rewardbench
from cepo.eval.rewardbench.items import HUB_NAMES, PreferenceItem, judge_tasks, load_items, read_item
from cepo.eval.rewardbench.metrics import SECTIONS, MetricEstimate, measure_preferences, outcome
from cepo.train import testbed, testbed_model
from cepo.train.prompts import JUDGE_LITERALS
from tests.paths import DATA

PAIRS = DATA / "pref"
SCORES = "<scores>\\boxed{{{}, {}}}</scores>"


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(number: int, chosen: str = "good", rejected: str = "bad", **more: Any) -> dict[str, Any]:
    return {"id": number, "prompt": f"query {number}", "chosen": chosen, "rejected": rejected, **more}


def shown(messages: Messages) -> tuple[str, str, str]:
    """Query and responses of a judge prompt."""
    text = messages[0]["content"]
    parts = []
    for before, after in pairwise(JUDGE_LITERALS):
        start = text.index(before) + len(before)
        parts.append(text[start : text.index(after, start)])
    return parts[0], parts[1], parts[2]


class Rule:
    """A judge that follows a rule of (query, A, B) and remembers what it was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str, str]] = []

    def judge(self, prompts: Sequence[Messages]) -> Iterator[tuple[int, Judgement]]:
        for index, messages in enumerate(prompts):
            self.asked.append(shown(messages))
            answer = self.answer(*self.asked[-1])
            yield index, answer if isinstance(answer, Judgement) else Judgement(answer, tokens=3)


def longer(query: str, first: str, second: str) -> str:
    return SCORES.format(len(first) % 10, len(second) % 10)


def records_of(items: Sequence[PreferenceItem], answer: Any) -> dict[str, Any]:
    """The records of a judge that answers (item, chosen's place) with text, or a Judgement."""
    records = {}
    for item in items:
        for task in judge_tasks([item]):
            place = str(task.facts["chosen_at"])
            given = answer(item, place)
            judgement = given if isinstance(given, Judgement) else Judgement(given)
            records[task.key] = judgement_record(task, judgement)
    return records


def value(measures: Sequence[MetricEstimate], metric: str, scope: str = "all") -> float:
    (found,) = [measure for measure in measures if (measure.metric, measure.scope) == (metric, scope)]
    return found.estimate.value


def prefer(place: str, *, chosen: bool = True) -> str:
    """A verdict for the chosen response, which stands at `place`, or for the other."""
    return SCORES.format(*((7, 3) if (place == "A") is chosen else (3, 7)))


# Data


def test_a_row_of_rewardbench_becomes_an_item_of_one_pair() -> None:
    item = read_item(row(4, subset="hep-go", chosen_model="x", rejected_model="y"), "line 1")
    assert (item.name, item.subset, item.prompt, item.chosen, item.rejected) == (
        "4",
        "hep-go",
        "query 4",
        ("good",),
        ("bad",),
    )
    assert item.pairs == ((0, 0),)


def test_a_row_of_rewardbench_2_compares_every_chosen_with_every_rejected() -> None:
    four = read_item(
        {"id": "7", "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math"}, "line 1"
    )
    assert four.pairs == ((0, 0), (0, 1), (0, 2))
    assert len(judge_tasks([four])) == 6
    ties = read_item(
        {
            "id": "tied:1",
            "prompt": "q",
            "chosen": ["a", "b"],
            "rejected": ["c", "d"],
            "subset": "Ties",
            "num_correct": 2,
        },
        "line 1",
    )
    assert ties.pairs == ((0, 0), (0, 1), (1, 0), (1, 1))


def test_messages_are_read_as_conversations() -> None:
    turns = [{"role": "user", "content": "why?"}]
    item = read_item(
        {
            "chosen": [*turns, {"role": "assistant", "content": "because"}],
            "rejected": [*turns, {"role": "assistant", "content": "no"}],
        },
        "line 1",
    )
    assert (item.prompt, item.chosen, item.rejected, item.subset) == ("why?", ("because",), ("no",), "all")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, "'rejected' is missing"),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "'rejected' holds a number"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "'prompt' is blank"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "both chosen and rejected"),
        ({"prompt": "q", "chosen": ["a", " "], "rejected": "b"}, "blank"),
        ({"prompt": "q", "chosen": ["a"], "rejected": []}, "'rejected'"),
        ({"prompt": "q", "chosen": "a\ud800", "rejected": "b"}, "surrogate"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "subset": 3}, "'subset' holds a number"),
    ],
)
def test_a_row_that_is_no_preference_says_why(broken: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_item(broken, "line 1")


def test_a_row_without_an_id_is_named_by_its_line_and_keeps_its_judgements_where_it_moves(tmp_path: Path) -> None:
    """Records had an empty id, and pages were titled with hashes."""
    first, second = ({name: value for name, value in row(number).items() if name != "id"} for number in (0, 1))
    before, _ = load_items(write_jsonl(tmp_path / "before.jsonl", [first, {**second, "id": ""}]))
    after, _ = load_items(write_jsonl(tmp_path / "after.jsonl", [row(2), first, second]))
    assert [item.name for item in before] == ["line 1", "line 2"]
    assert [item.name for item in after] == ["2", "line 2", "line 3"]
    assert [item.key for item in before] == [item.key for item in after[1:]]
    assert judge_tasks(after[1:])[0].facts["id"] == "line 2"
    folder, output = tmp_path / "out", []
    for items in (before, after[1:]):
        judged = collect_judgements(
            judge_tasks(items), folder, {"command": "eval"}, lambda: Rule(lambda *_: SCORES.format(8, 2))
        )
        output.append({record["id"] for record in judged.records.values()})
    assert output == [{"line 1", "line 2"}, {"line 2", "line 3"}]
    assert judged.resumed == 4


def test_broken_lines_are_told_by_number_and_the_rest_is_loaded(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [row(0), "{not json", row(1, rejected="good"), row(2)])
    items, problems = load_items(path)
    assert [item.name for item in items] == ["0", "2"]
    assert [number for number, _ in problems] == [2, 3]


def test_rows_of_the_same_content_are_all_kept(tmp_path: Path) -> None:
    items, _ = load_items(write_jsonl(tmp_path / "in.jsonl", [row(0), row(0), row(1)]))
    assert len({item.key for item in items}) == 3
    assert items[1].key == items[0].key + "#2"


def test_a_draw_is_seeded_keeps_the_order_and_grows_without_changing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [row(number) for number in range(40)])
    few = [item.key for item in load_items(path, limit=5)[0]]
    more = [item.key for item in load_items(path, limit=20)[0]]
    whole = [item.key for item in load_items(path)[0]]
    other = [item.key for item in load_items(path, limit=5, seed=1)[0]]
    assert set(few) < set(more) < set(whole)
    assert few == [key for key in whole if key in few]
    assert other != few


def test_subsets_are_chosen_by_name_and_unknown_ones_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [row(0, subset="x"), row(1, subset="y")])
    assert [item.name for item in load_items(path, subsets=["y"])[0]] == ["1"]
    with pytest.raises(ValueError, match="'z'.*it has x, y"):
        load_items(path, subsets=["z"])


def test_the_benchmarks_are_loaded_from_the_hub_with_their_own_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(name: str, configuration: str | None, split: str) -> datasets.Dataset:
        calls.append((name, configuration, split))
        two = name.endswith("2")
        return datasets.Dataset.from_list(
            [row(0, subset="Math" if two else "hep-go") | ({"chosen": ["a"], "rejected": ["b", "c"]} if two else {})]
        )

    monkeypatch.setattr("datasets.load_dataset", load)
    assert [len(load_items(name)[0][0].pairs) for name in HUB_NAMES] == [1, 2]
    load_items("owner/name:part", split="test")
    assert calls == [
        ("allenai/reward-bench", None, "filtered"),
        ("allenai/reward-bench-2", None, "test"),
        ("owner/name", "part", "test"),
    ]


@pytest.mark.parametrize("name", ["llmbar", "rmb_helpful_dev", "humanevalpack", "math_prm", "xstest_pairs"])
def test_real_preference_files_load_whole(name: str) -> None:
    path = PAIRS / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path.name} of the shared data")
    items, problems = load_items(path)
    # Two solutions that are the same text are no preference.
    assert all("both chosen and rejected" in reason for _, reason in problems)
    assert len(items) + len(problems) == len(path.read_text(encoding="utf-8").splitlines())


def test_both_orders_are_asked_and_the_better_response_stands_where_the_record_says() -> None:
    asked = judge_tasks([read_item(row(0), "line 1")])
    assert {task.facts["chosen_at"]: shown(task.messages) for task in asked} == {
        "A": ("query 0", "good", "bad"),
        "B": ("query 0", "bad", "good"),
    }


# Measures


def items_of(subsets: Sequence[str]) -> list[PreferenceItem]:
    return [read_item(row(number, subset=subset), "line 1") for number, subset in enumerate(subsets)]


def test_a_judge_that_always_names_a_is_right_half_the_time_and_fully_biased() -> None:
    items = items_of(["x"] * 6)
    measures = measure_preferences(items, records_of(items, lambda item, place: SCORES.format(9, 1)))
    assert value(measures, "consistent") == 0.0
    assert value(measures, "average") == 0.5
    assert value(measures, "verdicts_only") == 0.5
    assert value(measures, "position_bias") == 1.0
    assert value(measures, "follows_position") == 1.0
    intervals = {one.metric: (one.estimate.low, one.estimate.high) for one in measures if one.scope == "all"}
    exact = 0.025 ** (1 / 6)  # of six items, not of their twelve judgements
    assert intervals["follows_position"] == (pytest.approx(exact), 1.0)
    assert intervals["position_bias"] == (pytest.approx(2.0 * exact - 1.0), 1.0)
    assert 0.0 <= value(measures, "single_swap") <= 1.0


def test_items_of_one_prompt_are_one_unit() -> None:
    """Ten pairs of one prompt say little about other prompts: the interval is that of the prompts."""
    items = items_of(["x"] * 20)
    of_two = [replace(item, prompt=f"prompt {place // 10}") for place, item in enumerate(items)]
    widths = []
    for asked in (items, of_two):
        records = records_of(asked, lambda item, place: prefer(place, chosen=int(item.name) < 10))
        (found,) = [
            one for one in measure_preferences(asked, records) if (one.metric, one.scope) == ("consistent", "all")
        ]
        assert (found.estimate.value, found.estimate.count) == (0.5, 20)
        widths.append(found.estimate.high - found.estimate.low)
    assert widths[0] < 0.5 < widths[1]


def test_measures_equal_numbers_worked_out_by_hand() -> None:
    """Four items: right twice; right once, then a tie; wrong twice; right once, then no verdict."""
    items = items_of(["x", "x", "y", "y"])
    answers = {
        ("0", "A"): prefer("A"),
        ("0", "B"): prefer("B"),
        ("1", "A"): prefer("A"),
        ("1", "B"): SCORES.format(5, 5),
        ("2", "A"): prefer("A", chosen=False),
        ("2", "B"): prefer("B", chosen=False),
        ("3", "A"): prefer("A"),
        ("3", "B"): "I like both",
    }
    measures = measure_preferences(items, records_of(items, lambda item, place: answers[item.name, place]))
    assert value(measures, "consistent") == 1 / 4
    assert value(measures, "average") == (2 + 1 + 0 + 1) / 8
    assert value(measures, "consistent", "x") == 1 / 2
    assert value(measures, "average", "y") == 1 / 4
    assert value(measures, "ties") == 1 / 8
    assert value(measures, "parse_failures") == 1 / 8
    assert value(measures, "verdicts_only") == 4 / 7
    # Decided verdicts: A, B, A, B, A, A.
    assert value(measures, "position_bias") == pytest.approx((4 - 2) / 6)
    assert value(measures, "follows_position") == 0.0
    assert value(measures, "not_judged") == 0.0
    singles = [outcome(item, records_of(items, lambda item, place: answers[item.name, place])).single for item in items]
    assert singles[0] is True
    assert singles[2] is False
    assert value(measures, "single_swap") == sum(map(bool, singles)) / 4


def test_the_single_swap_is_half_of_each_order_and_its_own_for_each_seed() -> None:
    items = items_of(["x"] * 400)
    records = records_of(items, lambda item, place: SCORES.format(9, 1))
    drawn = [[outcome(item, records, seed=seed).single for item in items] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert np.mean([bool(right) for right in drawn[0]]) == pytest.approx(0.5, abs=0.08)


def test_an_item_whose_judgement_failed_is_left_out_and_counted() -> None:
    items = items_of(["x", "x"])
    broken = Judgement("", error="the server hung")
    records = records_of(items, lambda item, place: broken if (item.name, place) == ("1", "B") else prefer(place))
    measures = measure_preferences(items, records)
    assert value(measures, "consistent") == 1.0
    assert value(measures, "not_judged") == 1 / 4
    (found,) = [measure for measure in measures if (measure.metric, measure.scope) == ("consistent", "all")]
    assert found.estimate.count == 1


def test_soft_measures_take_the_sign_of_the_expected_margin() -> None:
    """Item 0 is clear; item 1 follows the position, but less where that is wrong, so the sum over orders is right."""
    items = items_of(["x", "x"])
    soft = {("0", "A"): (7, 3), ("0", "B"): (4, 6), ("1", "A"): (8.0, 5.0), ("1", "B"): (7.0, 6.0)}
    records = records_of(items, lambda item, place: Judgement(SCORES.format(5, 5), soft=soft[item.name, place]))
    measures = measure_preferences(items, records)
    assert value(measures, "soft_average") == (2 + 1) / 4
    assert value(measures, "soft_summed") == 1.0
    assert value(measures, "expected_margin") == pytest.approx(((4 + 2) / 2 + (3 - 1) / 2) / 2)
    hard = records_of(items, lambda item, place: prefer(place))
    assert not [measure for measure in measure_preferences(items, hard) if measure.metric.startswith("soft")]


def test_best_of_four_is_right_where_the_chosen_beats_all_in_an_order() -> None:
    four = read_item(
        {"id": "0", "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math"}, "line 1"
    )
    asked = judge_tasks([four])
    lost = {("A", 2)}  # shown first, the chosen loses to the third

    def answer(task: JudgeTask) -> str:
        place, worse = str(task.facts["chosen_at"]), task.facts["pair"][1]
        return prefer(place, chosen=(place, worse) not in lost)

    records = {task.key: judgement_record(task, Judgement(answer(task))) for task in asked}
    assert outcome(four, records).right == (False, True)
    measures = measure_preferences([four], records)
    assert (value(measures, "consistent"), value(measures, "average")) == (0.0, 0.5)
    assert value(measures, "verdicts_only") == 5 / 6


def test_ties_stay_out_of_the_mean_of_rewardbench_2() -> None:
    items = items_of(["Math", "Math", "Safety", "Ties", "Ties", "Ties"])
    wrong = {"1", "3", "4", "5"}
    records = records_of(items, lambda item, place: prefer(place, chosen=item.name not in wrong))
    measures = measure_preferences(items, records)
    assert value(measures, "consistent", "mean of subsets without Ties") == (0.5 + 1.0) / 2
    assert value(measures, "consistent", "Ties") == 0.0
    assert value(measures, "consistent") == 2 / 6


def judged_items(right: Mapping[str, int], of: int) -> list[MetricEstimate]:
    """Metrics of `of` items per subset, of which so many are right in both orders."""
    items = items_of([name for name in right for _ in range(of)])
    wins = {item.name for place, item in enumerate(items) if place % of < right[item.subset]}
    return measure_preferences(items, records_of(items, lambda item, place: prefer(place, chosen=item.name in wins)))


def test_section_scores_equal_numbers_worked_out_by_hand() -> None:
    right = {"math-prm": 1, "hep-go": 3, "hep-rust": 4, "mt-bench-easy": 2, "other": 0}
    measures = judged_items(right, of=4)
    sections = {one.scope: one.estimate.value for one in measures if one.scope.startswith("section")}
    assert sections == {
        "section Chat (1 of 5 subsets)": 0.5,
        "section Reasoning (3 of 7 subsets)": pytest.approx((0.25 * 984 + 0.75 * 164 + 1.0 * 164) / (984 + 164 + 164)),
    }


def test_math_weighs_as_much_as_all_code() -> None:
    weights = dict(SECTIONS["Reasoning"])
    assert weights.pop("math-prm") == sum(weights.values()) == 984


def test_section_scores_are_those_of_the_reward_bench_package() -> None:
    pytest.importorskip("rewardbench.constants", reason="needs the package rewardbench")
    from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
    from rewardbench.utils import calculate_scores_per_section

    rng = np.random.default_rng(0)
    right = {name: int(rng.integers(6)) for name in EXAMPLE_COUNTS}
    measures = judged_items(right, of=5)
    accuracies = {name: count / 5 for name, count in right.items()}
    theirs = calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, accuracies)
    assert {name: value(measures, "consistent", f"section {name}") for name in theirs} == pytest.approx(theirs)


def test_the_summarys_sections_are_the_section_scores() -> None:
    """Of subsets of unlike size, so that a mean over items would be another number."""
    names = [name for weights in SECTIONS.values() for name in weights]
    items = items_of([name for place, name in enumerate(names) for _ in range(1 + place % 3)])
    records = records_of(items, lambda item, place: prefer(place, chosen=int(item.name) % 3 != 1))
    measures = measure_preferences(items, records)
    expected = [
        sum(value(measures, "consistent", name) * weight for name, weight in weights.items()) / sum(weights.values())
        for weights in SECTIONS.values()
    ]
    for section, score in zip(SECTIONS, expected, strict=True):
        assert value(measures, "consistent", f"section {section}") == pytest.approx(score)
    assert value(measures, "consistent", "mean of sections") == pytest.approx(np.mean(expected))


def test_a_section_of_which_subsets_are_missing_says_so() -> None:
    items = items_of(["llmbar-natural", "llmbar-adver-GPTOut"])
    measures = measure_preferences(items, records_of(items, lambda item, place: prefer(place, chosen=item.name == "0")))
    assert value(measures, "average", "section Chat Hard (2 of 6 subsets)") == pytest.approx(100 / 147)
    assert not [measure for measure in measures if measure.scope == "mean of sections"]


# Judgements on disk


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
    with pytest.raises(ValueError, match="2 of the 4 records in judgements.jsonl are not of the rows"):
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


# The command


def job(tmp_path: Path, data: Path, **settings: Any) -> RewardBenchJob:
    judge = JudgeSettings("name", backend="server", base_url="http://127.0.0.1:9/v1")
    return RewardBenchJob(judge, str(data), tmp_path / "out", **settings)


def test_the_whole_job_agrees_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that prefers the longer response, on data where that is right for two items of three."""
    rows = [
        row(0, "long answer", "short", subset="x"),
        row(1, "a longer one", "no", subset="x"),
        row(2, "no", "wordy", subset="y"),
        "broken",
    ]
    judge = Rule(longer)
    monkeypatch.setattr(rewardbench_module, "open_judge", lambda settings: judge)
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    heard: list[tuple[int, int, str]] = []
    summary = run_rewardbench(job(tmp_path, path), progress=lambda *what: heard.append(what))
    right = [len(a) % 10 > len(b) % 10 for a, b in (("long answer", "short"), ("a longer one", "no"), ("no", "wordy"))]
    assert len(judge.asked) == 6
    assert heard[-1][:2] == (6, 6)
    assert "judgements/s" in heard[-1][2]
    assert summary.broken[0][0] == 4
    lines = read_jsonl(tmp_path / "out" / "summary.jsonl")
    told = {(line["metric"], line["subset"]): line for line in lines}
    assert told["consistent", "all"]["value"] == pytest.approx(np.mean(right))
    assert told["consistent", "all"]["low"] <= told["consistent", "all"]["value"] <= told["consistent", "all"]["high"]
    assert told["consistent", "y"]["value"] == float(right[2])
    assert set(lines[0]) == {"metric", "subset", "value", "low", "high", "count"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "wordy" in page
    assert "Rows that were left out" in page
    assert "http-equiv" in page
    assert "<script" not in page
    again = run_rewardbench(job(tmp_path, path))
    assert len(judge.asked) == 6
    assert again.collected.resumed == 6
    assert [(m.metric, m.scope, m.estimate) for m in again.measures] == [
        (m.metric, m.scope, m.estimate) for m in summary.measures
    ]


def test_intervals_that_nothing_determines_are_null_not_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One item that is right in one order: its mean of both orders is 0.5, without an interval."""
    monkeypatch.setattr(rewardbench_module, "open_judge", lambda settings: Rule(lambda *_: SCORES.format(9, 1)))
    run_rewardbench(job(tmp_path, write_jsonl(tmp_path / "in.jsonl", [row(0, subset="x")])))
    rows = read_jsonl(tmp_path / "out" / "summary.jsonl")
    unknown = {"low": None, "high": None, "count": 1, "why": "1 prompt"}
    assert {"metric": "average", "subset": "x", "value": 0.5, **unknown} in rows


class Cepo:
    """Runs `cepo eval rewardbench` as a user would and returns its exit code, stdout and stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["cepo", "eval", "rewardbench", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        said = self.capsys.readouterr()
        return int(exit_.value.code or 0), said.out, said.err


@pytest.fixture
def cepo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cepo:
    return Cepo(monkeypatch, capsys)


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The testbed's model, untrained, with a context that a judge prompt fits into."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = testbed.build_tokenizer()
    model = testbed_model.build_model(tokenizer, seed=0)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_files_of_another_program_are_refused_and_left_alone(judge_folder: Path, tmp_path: Path, cepo: Cepo) -> None:
    data, output = write_jsonl(tmp_path / "in.jsonl", [row(0)]), tmp_path / "out"
    for name, content in {"judgements.jsonl": "hi\n", "settings.json": '{"a": 1}', "report.html": "mine"}.items():
        output.mkdir()
        (output / name).write_text(content)
        code, _, err = cepo("--model", judge_folder, "--data", data, "--output", output)
        assert code == 2
        assert f"no earlier run of this command wrote {name}" in " ".join(err.split())
        assert [(file.name, file.read_text()) for file in output.iterdir()] == [(name, content)]
        (output / name).unlink()
        output.rmdir()


def test_a_verdict_that_is_seldom_read_is_told_with_a_way_out(judge_folder: Path, tmp_path: Path, cepo: Cepo) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", [row(0)])
    arguments = ["--model", judge_folder, "--data", data, "--output", tmp_path / "out", "--max-new-tokens", 2]
    code, out, _ = cepo(*arguments, "--threads", 1)
    assert code == 0
    assert "100% of the judgements have no verdict: try a larger --max-new-tokens" in " ".join(out.split())


def test_the_command_judges_resumes_and_complains_of_broken_lines(
    judge_folder: Path, tmp_path: Path, cepo: Cepo
) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", [row(0), row(1), "broken", row(2, subset="llmbar-natural")])
    arguments = ["--model", judge_folder, "--data", data, "--output", tmp_path / "out", "--max-new-tokens", 4]
    arguments += ["--threads", 1, "--batch-size", 4]
    code, out, err = cepo(*arguments, "--force-format")
    assert code == 2
    assert "row 3: not JSON" in " ".join(err.split())
    assert "right in both orders" in out
    records = read_jsonl(tmp_path / "out" / "judgements.jsonl")
    assert len(records) == 6
    assert all(record["forced"] and record["soft"] and record["scores"] for record in records)
    assert all(record["token_ids"] for record in records)
    before = (tmp_path / "out" / "judgements.jsonl").read_bytes()
    code, out, _ = cepo(*arguments, "--force-format")
    assert code == 2
    assert (tmp_path / "out" / "judgements.jsonl").read_bytes() == before
    code, _, err = cepo(*arguments)
    assert code == 2
    assert "--force-format was true and is false" in " ".join(err.split())


def test_judgements_of_weights_that_were_overwritten_are_refused(
    judge_folder: Path, tmp_path: Path, cepo: Cepo
) -> None:
    """The folder's name is the same: a name alone would answer for the new weights with the old judgements."""
    data, model = write_jsonl(tmp_path / "in.jsonl", [row(0)]), tmp_path / "model"
    shutil.copytree(judge_folder, model)
    arguments = ["--model", model, "--data", data, "--output", tmp_path / "out", "--max-new-tokens", 2, "--threads", 1]
    assert cepo(*arguments)[0] == 0
    judged = (tmp_path / "out" / "judgements.jsonl").read_bytes()
    untrained = testbed_model.build_model(testbed.build_tokenizer(), seed=1)
    untrained.config.max_position_embeddings = 4096
    untrained.save_pretrained(model)
    code, _, err = cepo(*arguments)
    assert code == 2
    assert "made with other settings: weights has other content" in " ".join(err.split())
    assert (tmp_path / "out" / "judgements.jsonl").read_bytes() == judged


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "./nowhere"], "./nowhere"),
        (["--model", "smollm2", "--backend", "tgi"], "backend is 'tgi'"),
        (["--model", "smollm2", "--base-url", "nowhere"], "--base-url is 'nowhere'"),
        (["--model", "smollm2", "--base-url", "http://127.0.0.1:9", "--api-key-file", "none"], "--api-key-file"),
        (["--model", "smollm2", "--limit", 0], "--limit is 0"),
        (["--model", "smollm2", "--data", "none.jsonl"], "none.jsonl"),
        (["--model", "smollm2", "--subset", "z"], "'z'"),
        (["--model", "smolm2"], "did you mean smollm2?"),
        (["--model", "smollm2", "--data", "rewardbnch"], "did you mean rewardbench?"),
    ],
)
def test_arguments_that_cannot_work_end_in_one_paragraph(
    arguments: list[Any], named: str, tmp_path: Path, cepo: Cepo
) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", [row(0)])
    code, _, err = cepo("--data", data, "--output", tmp_path / "out", *arguments)
    assert code == 2
    assert named in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_server_that_answers_nothing_is_an_exit_code_of_2_and_every_row_is_listed(tmp_path: Path, cepo: Cepo) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", [row(0), row(1)])
    code, _, err = cepo(
        *("--model", "name", "--data", data, "--output", tmp_path / "out"),
        *("--base-url", "http://127.0.0.1:9/v1", "--retries", 0),
    )
    assert code == 2
    assert "4 prompts could not be judged" in " ".join(err.split())
    records = read_jsonl(tmp_path / "out" / "judgements.jsonl")
    assert len(records) == 4
    assert all("no connection" in record["error"] for record in records)
    assert (tmp_path / "out" / "report.html").is_file()
