"""Protects `cepo demo`: it runs the whole chain, and its report and measures show what happened."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import cepo.demo
import cepo.train.policy
from cepo.train.policy import load_testbed_judge
from tests.paths import ROOT


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
        printed = io.StringIO()
        report = cepo.demo.run_demo(output, steps=1, seed=0, console=Console(file=printed, width=200))
        assert report == output / "report.html"
        measures.append(json.loads((output / "measures.json").read_text()))
    page = report.read_text()
    for shown in ("flipped", "turned by the criterion alone", "effect of the chain", "before", "after"):
        assert shown in printed.getvalue()
    assert "{'" not in printed.getvalue()  # no dictionaries of TRL's
    assert "'rewards/causal/mean'" in (output / "grpo" / "log.txt").read_text()
    (sentence,) = re.findall(r"In all .* alone from [^<]*", page)
    assert sentence.strip() in " ".join(printed.getvalue().split())
    assert page.index("Before and after 1 GRPO steps") < page.index("Rewards (mean over") < page.index("After training")
    for shown in ("Before training", "After training", "swaps followed", "Rewards (mean over"):
        assert shown in page
    assert page.count("data:image/svg+xml;base64,") == 4  # before and after, rewards, length, seconds
    assert (output / "grpo" / "final" / "model.safetensors").is_file()
    for moment in ("before", "after"):
        for name in ("in_distribution", "flipped", "swaps_followed", "turned", "malformed"):
            assert 0.0 <= measures[0][moment][name] <= 1.0
    first, second = ({key: m[key] for key in ("before", "after")} for m in measures)
    assert first == second  # the same seed gives the same run, weights and all


def test_every_recorded_seed_is_counted() -> None:
    """Protects the demo's honesty: the sentence beside its result is of all recorded runs of the same rewards."""
    recorded = ROOT / "benchmarks" / "results" / "testbed-worlds.jsonl"
    rows = [row for row in map(json.loads, recorded.read_text().splitlines()) if row["world"] == "lazy"]
    runs = [row for row in rows if row["arm"] == "effect chain"]
    seeds = {row["seed"] for row in runs}
    starts = [row["flipped"] for row in rows if row["arm"] == "untrained" and row["seed"] in seeds]
    ends = [row["flipped"] for row in runs]
    before, after = cepo.demo._recorded("effect chain")
    sentence = cepo.demo._other_seeds(before, after, seed=16, steps=60)
    assert len(seeds) == len(runs) == len(starts) >= 10
    assert f"all {len(runs)} recorded runs" in sentence
    assert f"{sum(starts) / len(starts):.2f} to {sum(ends) / len(ends):.2f} on average" in sentence
    assert f"between {min(ends):.2f} and {max(ends):.2f}" in sentence
    assert "one run, with seed 16." in sentence
    assert 16 not in seeds
    assert "40 steps each, where this run took 60" in sentence
