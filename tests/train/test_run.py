"""Protects what every training run shows and logs: one progress bar, and a file for all else."""

import io
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.progress import Progress
from tqdm.auto import tqdm

from cepo.train.run import _nothing_learned, _printed_to, _RunRecord, _shown, run_trainer


def test_the_bar_shows_the_tasks_and_the_causal_reward_or_the_loss() -> None:
    """A right verdict says more than a well-formed one; a fused reward's own task comes first. Small rewards differ."""
    logs = {"rewards/format_reward/mean": 0.1, "rewards/causal/mean": 0.25, "loss": 0.0}
    assert _shown(logs) == "task reward 0.1, causal reward 0.25"
    assert _shown({**logs, "rewards/argmax_reward/mean": 0.5}) == "task reward 0.5, causal reward 0.25"
    assert _shown({**logs, "causal/task": 0.75}) == "task reward 0.75, causal reward 0.25"
    assert _shown({**logs, "rewards/causal/mean": 0.0067123}) == "task reward 0.1, causal reward 0.00671"
    assert _shown({"loss": 1.5}) == "loss 1.5"
    assert _shown({"train_runtime": 3.0}) == ""


def test_a_run_that_earned_nothing_says_so() -> None:
    """Zero rewards train nothing, whatever the loss curve looks like; the causes are told where they were logged."""
    nothing = {"step": 1, "reward": 0.0, "reward_std": 0.0}
    told = _nothing_learned([{**nothing, "causal/malformed": 1.0, "completions/clipped_ratio": 0.75}, {"loss": 0.0}])
    assert told is not None
    assert "nothing was learned: 100% of the completions were malformed, 75% of the completions were cut off" in told
    assert _nothing_learned([nothing, {**nothing, "reward": 0.2}]) is None
    assert _nothing_learned([{**nothing, "reward_std": 0.1}]) is None
    assert _nothing_learned([{"step": 1, "loss": 0.3}]) is None, "a warm start has no rewards"


def test_prints_and_logs_go_to_the_file_until_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Handlers that hold the terminal's stream write to the file too, and get their stream back after an error."""
    logger = logging.getLogger("cepo.test.held")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)

    def chatter() -> None:
        with _printed_to(tmp_path / "log.txt"):
            print("printed")
            logger.warning("logged")
            raise KeyError

    with pytest.raises(KeyError):
        chatter()
    logger.removeHandler(handler)
    assert handler.stream is sys.stderr
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "log.txt").read_text().split() == ["printed", "logged"]


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_that_is_stopped_says_from_where_it_continues(saved: bool, tmp_path: Path) -> None:
    def train(resume_from_checkpoint: str | None) -> None:
        if saved:
            (tmp_path / "checkpoint-2").mkdir()
            (tmp_path / "checkpoint-2" / "cepo_complete").touch()
        raise KeyboardInterrupt

    told = f"continues from {tmp_path / 'checkpoint-2'}" if saved else "starts again, since no checkpoint is complete"
    with pytest.raises(KeyboardInterrupt, match=f"^stopped; the same command {told}$"):
        run_trainer(lambda: SimpleNamespace(add_callback=lambda _: None, train=train), tmp_path, None)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("rank", [0, 1])
def test_the_bars_of_libraries_stay_out_of_the_log(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each redraw is a line in a file. Loading the model is shown on the terminal; training has a bar of its own."""

    def build() -> Any:
        print("printed")
        list(tqdm([1], desc="Loading weights"))
        return SimpleNamespace(
            add_callback=lambda _: None, train=train, accelerator=SimpleNamespace(wait_for_everyone=lambda: None)
        )

    def train(resume_from_checkpoint: str | None) -> None:
        list(tqdm([1], desc="Writing model shards"))
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1" / "cepo_complete").touch()

    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(sys, "stderr", Terminal())
    run_trainer(build, tmp_path, None, rank=rank)
    list(tqdm([1], desc="After the run"))
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert (tmp_path / ("log.txt" if rank == 0 else "log-1.txt")).read_text() == "printed\n"
    assert ("Loading weights: 100%" in shown) == (rank == 0)
    assert "Writing" not in shown
    assert "After the run: 100%" in shown


def test_the_last_step_has_one_line_and_steps_after_it_are_not_lost(tmp_path: Path) -> None:
    """The closing summary repeats the last step, and with rare logging holds the means of the steps after it."""
    summary = {"train_runtime": 3.0, "train_loss": 0.1, "total_flos": 0.0, "epoch": 1.0}
    with Progress() as progress:
        record = _RunRecord(tmp_path, progress, None)
        for step, logs in ((1, {"loss": 0.1, "epoch": 0.5}), (1, summary), (2, {**summary, "reward": 0.7})):
            state = SimpleNamespace(global_step=step, max_steps=2, is_world_process_zero=True)
            record.on_log(None, state, None, logs=logs)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.1, "epoch": 0.5}, {"step": 2, "reward": 0.7, "epoch": 1.0}]
