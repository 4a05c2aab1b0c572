"""Protects the warning of rows that repeat or contradict others: they are counted, and none is dropped."""

import json
import logging
from pathlib import Path

import pytest

from cepo.eval.rewardbench.items import load_items
from cepo.train.config import TrainConfig
from cepo.train.grpo import load_train_data
from cepo.train.repeats import warn_of_repeats

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
ROWS = [
    *({**PAIR, "id": str(number)} for number in range(3)),
    {**PAIR, "chosen": "bad", "rejected": "good"},
    {**PAIR, "prompt": "q"},
    {**PAIR, "prompt": "q", "tie": True},
]
TOLD = "2 row(s) repeat the pair of an earlier row, and 1 contradict one"


def test_evaluation_and_training_tell_the_same_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert len(load_items(source)[0]) == 5
    assert caplog.text.count(TOLD) == 1
    caplog.clear()
    run = TrainConfig("testbed", {"source": str(source)}, [{"name": "format"}], str(tmp_path / "run"))
    data = load_train_data(run, 1, room=8)
    assert len(data.train) + len(data.test) == 5
    assert caplog.text.count(TOLD) == 1


def test_rows_that_differ_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_repeats([("p", "a", "b"), ("q", "a", "b"), ("q", "b", "c")])
    assert not caplog.records
