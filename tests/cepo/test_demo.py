"""Protects `cepo demo`: it runs the whole chain, and its report and measures show what happened."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import cepo.demo
import cepo.train.policy
from cepo.train.policy import load_testbed_judge


def test_the_demo_runs_the_whole_chain_and_starts_anew_when_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def barely_warm(judge: Any, *, steps: int, seed: int, **_: Any) -> tuple[Any, Any]:
        return load_testbed_judge(judge, steps=20, seed=seed, cache=tmp_path / "cache")

    monkeypatch.setattr(cepo.demo, "load_testbed_judge", barely_warm)
    monkeypatch.setattr(cepo.train.policy, "load_testbed_judge", barely_warm)
    monkeypatch.setattr(cepo.demo, "ITEMS", 24)
    monkeypatch.setattr(cepo.demo, "SCORED", 6)
    output = tmp_path / "demo"
    measures = []
    for _ in range(2):
        report = cepo.demo.run_demo(output, steps=1, seed=0, console=Console(quiet=True))
        assert report == output / "report.html"
        measures.append(json.loads((output / "measures.json").read_text()))
    page = report.read_text()
    for shown in ("Before training", "After training", "swaps followed", "Rewards (mean over"):
        assert shown in page
    assert page.count("data:image/svg+xml;base64,") == 4  # rewards, links, length, seconds
    assert (output / "grpo" / "final" / "model.safetensors").is_file()
    for moment in ("before", "after"):
        for name in ("in_distribution", "flipped", "swaps_followed", "turned", "malformed"):
            assert 0.0 <= measures[0][moment][name] <= 1.0
    first, second = ({key: m[key] for key in ("before", "after")} for m in measures)
    assert first == second  # the same seed gives the same run, weights and all
