"""Protects `cepo augment`: nothing lost or doubled through kills and failures, all counted, and rows that train."""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cepo.counterfactual.text.filter import certainty, filter_pairs
from cepo.counterfactual.text.pairs import Pair
from cepo.eval.augment import command
from cepo.eval.augment.command import augment
from cepo.eval.augment.job import AugmentJob
from cepo.eval.judges.settings import Judgement, JudgeSettings, Messages
from cepo.files import read_jsonl, write_jsonl
from cepo.train.reward_data import load_pairs
from cepo.train.reward_scores import RewardModel
from cepo.train.reward_testbed import build_reward_model
from tests.counterfactual.text.fake_writer import SOURCES, FakeWriter
from tests.eval.judges.fake_judge import SETTINGS, run_cepo, serving
from tests.pairs import read_pair

ALL = ("original", "degrade", "upgrade", "irrelevant-by-writer", "aligned", "paraphrase")


class FakeJudge:
    """A fake writer as `open_judge` opens one; may be killed after some answers."""

    def __init__(self, writer: FakeWriter, *, kill_after: int | None = None) -> None:
        self.writer, self.kill_after = writer, kill_after

    def judge(self, prompts: Sequence[Messages]) -> Iterator[tuple[int, Judgement]]:
        for place, prompt in enumerate(prompts):
            if len(self.writer.asked) == self.kill_after:
                raise KeyboardInterrupt
            reply = self.writer.answer(prompt)
            yield place, Judgement("", error=str(reply)) if isinstance(reply, Exception) else Judgement(reply)


@pytest.fixture
def job(tmp_path: Path) -> AugmentJob:
    rows = [
        {"id": source.id, "prompt": source.prompt, "chosen": source.chosen, "rejected": source.rejected}
        for source in SOURCES
    ]
    write_jsonl(tmp_path / "data.jsonl", rows)
    return AugmentJob(str(tmp_path / "data.jsonl"), tmp_path / "out", ALL, SETTINGS, test_fraction=0.2)


def use(monkeypatch: pytest.MonkeyPatch, writer: FakeWriter, *, kill_after: int | None = None) -> FakeWriter:
    monkeypatch.setattr(command, "open_judge", lambda _: FakeJudge(writer, kill_after=kill_after))
    return writer


def pairs_of(job: AugmentJob) -> list[Pair]:
    rows, broken = read_jsonl(job.output / "pairs.jsonl")
    assert not broken
    return [read_pair(row) for _, row in rows]


def test_a_killed_run_asks_no_prompt_twice_and_ends_as_one_that_was_not_killed(
    job: AugmentJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = use(monkeypatch, FakeWriter())
    unbroken = replace(job, output=job.output / "unbroken")
    augment(unbroken)
    asked: list[str] = []
    for kill_after in (3, 20, None):
        writer = use(monkeypatch, FakeWriter(), kill_after=kill_after)
        with contextlib.suppress(KeyboardInterrupt):
            summary = augment(job)
        assert (job.output / "pairs.jsonl").exists() == (kill_after is None)
        asked += writer.asked
        with (job.output / "writings.jsonl").open("a") as torn:
            torn.write('{"key": "torn')
    assert sorted(asked) == sorted(set(asked)) == sorted(whole.asked)
    assert (job.output / "pairs.jsonl").read_bytes() == (unbroken.output / "pairs.jsonl").read_bytes()
    assert summary.writer.told == f"{len(whole.asked)} answers, 23 from an earlier run"
    again = use(monkeypatch, FakeWriter())
    augment(job)
    assert not again.asked


def test_an_output_of_other_settings_or_data_is_refused_by_name(
    job: AugmentJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, FakeWriter())
    augment(job)
    for other, name in (
        (replace(job, kinds=("original", "degrade")), "kinds"),
        (replace(job, test_fraction=0.5), "test_fraction"),
        (replace(job, limit=3), "data"),
        (replace(job, writer=replace(SETTINGS, temperature=1.0)), "writer.temperature"),
        (replace(job, writer=replace(SETTINGS, model="another")), "writer.model"),
    ):
        with pytest.raises(ValueError, match=f"made with other settings: .*{name}"):
            augment(other)


def test_what_fails_is_counted_and_asked_again_alone(job: AugmentJob, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeWriter(upgrade=TimeoutError("no answer within 300 s (tried 6x)"), paraphrase="nothing"))
    summary = augment(job)
    assert summary.writer.failed == {"no answer within 300 s (tried 6x)": 16}
    assert (summary.reasons["upgrade", "no answer"], summary.reasons["paraphrase", "no edit"]) == (16, 8)
    tables = summary.tables()
    assert ["upgrade", "16", "0", "0", "16"] in tables["pairs"][1]
    assert ["upgrade", "no answer", "16"] in tables["why pairs are not kept"][1]
    assert "no answer within 300 s" in (job.output / "report.html").read_text()
    dropped = [pair for pair in pairs_of(job) if not pair.kept]
    assert len(dropped) == 24
    writer = use(monkeypatch, FakeWriter())
    summary = augment(job)
    assert len(writer.asked) == 16 + 16  # the edits that failed, and their checks
    assert not summary.writer.failed
    assert sum(not pair.kept for pair in pairs_of(job)) == 8  # bad writing is an answer, and is not asked again


def test_the_rows_train_unchanged(job: AugmentJob, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeWriter(differ='{"differ": ["accuracy"], "better": "A"}'))
    augment(job)
    made = pairs_of(job)
    read = load_pairs({"source": str(job.output / "pairs.jsonl")}, seed=9)
    assert [(pair.id, pair.tie) for pair in read.train] == [
        (pair.id, pair.tie) for pair in made if pair.kept and pair.split == "train"
    ]
    assert {pair.id for pair in read.test} == {pair.id for pair in made if pair.kept and pair.split == "test"}
    assert dict(read.left_out) == {pair.id: f"not kept: {pair.reason}" for pair in made if not pair.kept}


def test_rows_without_a_preference_are_named_and_ids_are_made_distinct(
    job: AugmentJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [
        {"id": 7, "prompt": "a", "chosen": "b", "rejected": "c"},
        {"id": 7, "prompt": "a", "chosen": "d", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c", "tie": True},
        {"prompt": "a", "chosen": "b", "rejected": "c", "kept": False, "reason": "unchanged edit"},
        {"prompt": "a", "chosen": "b"},
    ]
    write_jsonl(Path(job.data), rows)
    summary = augment(replace(job, kinds=("original", "wrong-number"), writer=JudgeSettings("")))
    made = {row[0]: row[1] for row in summary.tables()["pairs"][1]}
    assert made == {"original": "2", "wrong-number": "0"}  # none of the texts holds a number
    assert [pair.id for pair in pairs_of(job)] == ["7", "7#2"]
    assert [number for number, _ in summary.broken] == [3, 4, 5]
    assert "unchanged edit" in summary.broken[1][1]
    assert not (job.output / "writings.jsonl").exists()


def test_pairs_of_pairs_have_ids_and_differences_of_their_own(job: AugmentJob) -> None:
    """An augmented file as the data: what is made of "7" has the id of a row there, whose difference it was given."""
    texts = {"prompt": "a", "chosen": "b b", "rejected": "c"}
    write_jsonl(Path(job.data), [{"id": name, **texts} for name in ("7", "7/style", "7", "7#2")])
    augment(replace(job, kinds=("original", "style"), writer=JudgeSettings("")))
    made = pairs_of(job)
    assert len({pair.id for pair in made}) == len(made) == 8
    assert [pair.id for pair in made if pair.kind == "original"] == ["7", "7/style#2", "7#2", "7#2#2"]
    twice = [Pair("7", "p", chosen, "r") for chosen in ("one", "other")]
    found = filter_pairs(twice, lambda some: [float(len(pair.chosen)) for pair in some])
    assert [pair.base_difference for pair in found] == [3.0, 5.0]


def test_what_cannot_work_is_refused_before_anything_is_written(job: AugmentJob) -> None:
    nobody = replace(job, writer=JudgeSettings(""))
    for wrong, complaint in (
        (
            nobody,
            "degrade, upgrade, irrelevant-by-writer, aligned, paraphrase, which a model writes; name one with --writer",
        ),
        (replace(job, kinds=("original",)), "writer is 'name', but no kind needs one"),
        (replace(job, kinds=("degraded",)), "kinds holds 'degraded'; expected some of original, .*paraphrase"),
        (replace(nobody, kinds=()), "kinds holds nothing"),
        (replace(job, test_fraction=2.0), "test_fraction is 2.0"),
        (replace(job, writer=replace(SETTINGS, base_url="localhost")), "base_url"),
        (replace(job, data="nowhere.jsonl"), "nowhere.jsonl"),
    ):
        with pytest.raises(ValueError, match=complaint):
            augment(wrong)
    assert not job.output.exists()


def test_the_filter_drops_what_the_baseline_gets_right_but_no_original_and_no_test() -> None:
    differences = {0.79: True, 0.81: False, 0.2: True}  # whether a preference with this p stays
    tie_differences = {0.5: False, 0.69: False, 0.71: True, 0.29: True}
    pairs, expected, numbers = [], [], []
    for tie, cases in ((False, differences), (True, tie_differences)):
        for p, stays in cases.items():
            for kind, split in (("degrade", "train"), ("original", "train"), ("degrade", "test")):
                pairs.append(Pair(str(len(pairs)), "p", "c", "r", tie=tie, kind=kind, split=split))  # type: ignore[arg-type]
                numbers.append(-math.log(1 / p - 1))
                expected.append(stays or kind == "original" or split == "test")
    asked: list[str] = []

    def difference(some: Sequence[Pair]) -> list[float]:
        asked.extend(pair.id for pair in some)
        return [numbers[int(pair.id)] for pair in some]

    gone = Pair("x", "p", "c", "r", kept=False, reason="unchanged edit")
    found = list(filter_pairs([*pairs, gone], difference, at_once=4))
    assert [pair.kept for pair in found] == [*expected, False]
    assert [pair.base_difference for pair in found] == [*numbers, None]
    assert asked == [pair.id for pair in pairs]
    assert all(
        pair.reason.startswith("baseline is right: p is 0.")
        for pair in found
        if not pair.kept and pair is not found[-1]
    )  # type: ignore[union-attr]
    assert found[-1] == gone
    unread = next(filter_pairs([pairs[0]], lambda some: [float("nan")]))
    assert (unread.kept, unread.base_difference) == (True, None)
    assert certainty(-1e6) == 0.0
    assert certainty(1e6) == 1.0


class _Fails(BaseHTTPRequestHandler):
    """Answers honestly, but hangs up, fails or sends no JSON where a prompt is about some topics."""

    writer = FakeWriter()

    def do_POST(self) -> None:
        messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        text = messages[0]["content"]
        if "tides" in text:
            self.close_connection = True
            return
        reply = str(self.writer.answer(messages))
        payload = json.dumps({"choices": [{"message": {"content": reply}, "finish_reason": "stop"}]}).encode()
        self.send_response(500 if "bread" in text else 200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(b"<" + payload[1:] if "chess" in text else payload)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_that_hangs_up_and_fails_loses_its_own_pairs_alone(
    job: AugmentJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with exit code 2, every pair is in the file, and the table says why."""
    monkeypatch.setenv("COLUMNS", "160")
    with serving(_Fails) as address:
        server = ("--writer", "w", "--base-url", address, "--retries", "0")
        code = run_cepo(
            monkeypatch,
            *("augment", "--data", job.data, "--output", str(job.output), "--kinds", "original,degrade", *server),
        )
    shown = capsys.readouterr()
    assert code == 2
    assert "3 prompts got no answer, and no pair of theirs is kept" in shown.err
    for reason in ("the connection broke", "the server answered 500", "the answer is not JSON"):
        assert reason in shown.out
    kept = {pair.source_ids[0] for pair in pairs_of(job) if pair.kept and pair.source_ids}
    assert kept == {source.id for source in SOURCES[3:]}
    assert {pair.id for pair in pairs_of(job) if not pair.kept} == {"s0/degrade", "s1/degrade", "s2/degrade"}


def test_a_reward_models_scores_are_kept_stored_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter reads a model's folder, and a run that is started again asks it nothing twice."""
    model, tokenizer = build_reward_model("bradley-terry", seed=1)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    job = AugmentJob("testbed", tmp_path / "out", ("original", "degrade", "irrelevant"), JudgeSettings(""), limit=12)
    job = replace(job, filter_model=str(tmp_path / "model"))
    augment(job)
    whole = pairs_of(job)
    scored = [pair for pair in whole if pair.base_difference is not None]
    texts = zip(*((pair.prompt, pair.chosen, pair.rejected) for pair in scored), strict=True)
    expected = RewardModel.open(str(tmp_path / "model")).differences(*texts).values_N
    assert np.allclose([pair.base_difference for pair in scored], expected, rtol=0, atol=1e-5)
    assert {pair.reason.partition(":")[0] for pair in scored if pair.reason} == {"baseline is right"}
    scores = job.output / "differences.jsonl"
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:7]))
    asked: list[int] = []
    honest = RewardModel.differences

    def differences(self: RewardModel, *texts: Any) -> Any:
        asked.append(len(texts[0]))
        return honest(self, *texts)

    monkeypatch.setattr(RewardModel, "differences", differences)
    summary = augment(job)
    assert asked == [len(scored) - 7]
    assert [(pair.id, pair.kept) for pair in pairs_of(job)] == [(pair.id, pair.kept) for pair in whole]
    assert [pair.base_difference for pair in pairs_of(job)][:7] == [pair.base_difference for pair in whole][:7]
    header, rows = summary.tables()["p, how surely the filter's model prefers the chosen response"]
    assert header == ["kind", "scored", "0 to 0.3", "0.3 to 0.7", "0.7 to 0.8", "0.8 to 1"]
    assert sum(int(row[1]) for row in rows) == len(scored)
    assert all(int(row[1]) == sum(map(int, row[2:])) for row in rows)
    assert "Scores of the filter" in (job.output / "report.html").read_text()
