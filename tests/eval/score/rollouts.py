"""Rows of the testbed and the command line: what tests of `cepo score` share."""

import sys
from typing import Any

import pytest

from cepo.cli.app import main
from cepo.train import testbed

ITEMS = testbed.generate_items(5, seed=9, cue_agreement=0.5)
LINKS = ["Z->X", "X->Y", "Z->Y"]
WIDE = ("--dtype", "float64")
ALONE = ("--link", "X->Y", "--score", "influence")  # what a row has without rows of other prompts, its donors


def gold_rows() -> list[dict[str, Any]]:
    return [{"id": str(n), "prompt": item.prompt, "completion": item.completion} for n, item in enumerate(ITEMS)]


class Cepo:
    """Runs `cepo score` as a user would and returns its exit code and what it said on stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str]:
        self.monkeypatch.setattr(sys, "argv", ["cepo", "score", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return int(exit_.value.code or 0), self.capsys.readouterr().err
