"""Protects `cepo eval cue-flips`: accuracies of a judge by length, resumption, policies from folders."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cepo.eval.cue_flips import command as cue_flips
from cepo.eval.cue_flips.command import AGREEMENTS, FlipsJob, measure_flips
from cepo.eval.judges.settings import Judgement, Messages
from cepo.train import testbed, testbed_model
from tests.eval.judges.fake_judge import run_cepo, verdict


def follows_length(*_: Any) -> Any:
    class Judge:
        def judge(self, prompts: Sequence[Messages]) -> Iterator[tuple[int, Judgement]]:
            for place, messages in enumerate(prompts):
                _, first, second = (len(line.split()) for line in messages[0]["content"].split("\n"))
                yield place, Judgement(verdict(first, second))

    return Judge()


def test_a_judge_by_length_has_the_accuracy_of_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its accuracy is the cue's agreement, exactly; its drop is 0.8; and a second run judges nothing."""
    monkeypatch.setattr(cue_flips, "_open", follows_length)
    flips = measure_flips(FlipsJob(("lazy",), tmp_path / "out", items=40))["lazy"]
    assert {agreement: found.value for agreement, found in flips.accuracy.items()} == {
        agreement: pytest.approx(agreement) for agreement in AGREEMENTS
    }
    assert flips.drop.value == pytest.approx(0.8)
    assert flips.drop.low > 0.5
    assert (flips.with_cue.value, flips.against_cue.value, flips.unreadable) == (1.0, 0.0, 0)
    monkeypatch.setattr(cue_flips, "_open", lambda *_: pytest.fail("nothing is left to judge"))
    assert measure_flips(FlipsJob(("lazy",), tmp_path / "out", items=40))["lazy"] == flips
    assert "cue-flips" in (tmp_path / "out" / "report.html").read_text()


def test_a_folder_of_a_testbed_policy_is_a_judge(tmp_path: Path) -> None:
    """One that was never trained writes nothing readable: wrong everywhere, and counted."""
    tokenizer = testbed.build_tokenizer()
    testbed_model.build_model(tokenizer, seed=0).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    judge = str(tmp_path / "policy")
    flips = measure_flips(FlipsJob((judge,), tmp_path / "out", items=4))[judge]
    assert (flips.judgements, flips.unreadable, flips.drop.value) == (20, 20, 0.0)


def test_a_policy_that_was_trained_again_needs_another_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder has the same name; the judgements of the old weights are not those of the new ones."""
    tokenizer, judge = testbed.build_tokenizer(), str(tmp_path / "policy")
    tokenizer.save_pretrained(judge)
    monkeypatch.setattr(cue_flips, "_open", follows_length)
    testbed_model.build_model(tokenizer, seed=0).save_pretrained(judge)
    wanted = FlipsJob((judge,), tmp_path / "out", items=10)
    measure_flips(wanted)
    assert len(measure_flips(replace(wanted, judges=(judge, "lazy")))) == 2  # another judge may join
    testbed_model.build_model(tokenizer, seed=1).save_pretrained(judge)
    with pytest.raises(
        ValueError, match="50 of the 100 records in judgements.jsonl belong to rows that this run does not read"
    ):
        measure_flips(replace(wanted, judges=(judge, "lazy")))


def test_the_command_shows_one_column_per_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cue_flips, "_open", follows_length)
    arguments = ("--judge", "lazy", "--judge", "able", "--items", "10", "--output", str(tmp_path / "out"))
    assert run_cepo(monkeypatch, "eval", "cue-flips", *arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "lazy" in out
    assert "able" in out
    assert run_cepo(monkeypatch, "eval", "cue-flips", "--judge", "sleepy", "--output", str(tmp_path / "out")) == 2
    assert "judge is 'sleepy'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("judges", "items", "message"),
    [
        (
            ("sleepy",),
            4,
            "judge is 'sleepy'; expected able, lazy, hollow, decorative, copied, criteria, query, or the folder",
        ),
        (("able", "able"), 4, "expected at least one, each once"),
        (("able",), 0, "items is 0"),
    ],
)
def test_flips_are_checked(tmp_path: Path, judges: tuple[str, ...], items: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_flips(FlipsJob(judges, tmp_path / "out", items=items))
