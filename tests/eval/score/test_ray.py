"""Protects `cepo score --ray` and CepoScorer: the records of one process, a killed run that goes on, clear refusals."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from cepo import CepoScorer, Scoring
from cepo.eval.score.command import ScoreJob, score_file
from cepo.fusion.config import RewardConfig
from cepo.train import testbed
from tests.eval.score.records import check_alike

ray = pytest.importorskip("ray", reason="Ray is an extra, pip install 'cepo[ray]': make test-ray")

CONFIG = RewardConfig(links={"chain": 1.0, "X->Y": 1.0}, donors=1, also=("phi",), counterfactuals=1)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One cluster for all tests."""
    ray.init(num_cpus=3, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def job(judge: Path, tmp_path: Path) -> ScoreJob:
    """Rows of every kind: judgements, a malformed one, a line that is no JSON, and one without a completion."""
    items = testbed.generate_items(20, seed=9, cue_agreement=0.5)
    rows: list[Any] = [{"id": n, "prompt": one.prompt, "completion": one.completion} for n, one in enumerate(items)]
    rows[3]["task_reward"], rows[5]["completion"], rows[11]["completion"] = 0.5, "no tags", None
    rows[8]["prompt"] = [{"role": "user", "content": rows[8]["prompt"]}]
    lines = [json.dumps(row) for row in rows]
    lines.insert(7, "{broken")
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    return ScoreJob(
        model=str(judge), input=source, output=tmp_path / "plain.jsonl", config=CONFIG, batch_size=2, dtype="float64"
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_workers_write_what_one_process_writes(job: ScoreJob) -> None:
    """But for rounding, in the order of the rows, and with progress as the records come."""
    score_file(job)
    by_ray = replace(job, output=job.output.with_name("ray.jsonl"), workers=2)
    seen: list[tuple[int, int]] = []
    assert score_file(by_ray, progress=lambda done, total: seen.append((done, total))).rows == 21
    check_alike(read(by_ray.output), read(job.output), 1e-6)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert (len(seen), seen[-1]) == (11, (21, 21))  # two rows at a time


def test_a_killed_run_goes_on_by_row(job: ScoreJob) -> None:
    """With as many workers or none: no row is lost, none is there twice, and none is scored again."""
    score_file(job)
    by_ray = replace(job, output=job.output.with_name("ray.jsonl"), workers=1)
    partial = Path(f"{by_ray.output}.partial")

    def kill(done: int, total: int) -> None:
        if done >= total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_file(by_ray, progress=kill)
    written = [json.loads(line)["row"] for line in partial.read_text().splitlines()]
    assert 10 < len(set(written)) == len(written) < 21
    with pytest.raises(ValueError, match="config.seed was 0 and is 1"):
        score_file(replace(by_ray, config=replace(CONFIG, seed=1)))
    half = partial.read_bytes()
    for workers in (1, None):
        partial.write_bytes(half)
        assert score_file(replace(by_ray, workers=workers)).resumed == len(written)
        check_alike(read(by_ray.output), read(job.output), 1e-6)
        by_ray.output.unlink()


def test_cepo_scorer_adds_the_records_to_a_data_set(job: ScoreJob, judge: Path) -> None:
    """Rows of a data set, with the donors of a file, get the lines of `cepo score --donors`; the columns stay."""
    written = [json.loads(line) for line in job.input.read_text().splitlines() if line != "{broken"]
    sound = [row for row in written if isinstance(row["prompt"], str) and row["completion"]]
    rows = [{**row, "row": number} for number, row in enumerate(sound)]
    job.input.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = replace(job, donors=job.input)
    score_file(job)
    scoring = Scoring(model=str(judge), config=CONFIG, donors=job.input, dtype="float64")
    scored = ray.data.read_json(str(job.input)).map_batches(
        CepoScorer,
        fn_constructor_args=[scoring],
        batch_format="pyarrow",
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    found = sorted(scored.take_all(), key=lambda row: row["row"])
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    check_alike([json.loads(row["record"]) for row in found], read(job.output), 1e-6)


def test_a_worker_that_cannot_load_its_model_says_why(job: ScoreJob, judge: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(judge, model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="a Ray worker cannot score: model .* could not be loaded"):
        score_file(replace(job, model=str(model), workers=1))


def test_a_scorer_without_donors_or_with_another_batch_is_refused(job: ScoreJob, judge: Path) -> None:
    with pytest.raises(ValueError, match="donors is None, and a worker does not see all rows"):
        CepoScorer(Scoring(model=str(judge)))
    scorer = CepoScorer(Scoring(model=str(judge), config=RewardConfig(links={"X->Y": 1.0}, score="influence")))
    with pytest.raises(ValueError, match=r"batch is a dict; expected map_batches\("):
        scorer({"prompt": ["x"]})  # type: ignore[arg-type]
    assert "record" in scorer(pyarrow.table({"prompt": ["x"], "completion": ["y"]})).column_names
