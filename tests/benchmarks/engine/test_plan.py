"""Protects what a plan promises: no recorded run took more memory than its plan says, and none far less; and FLOPs tell
the time. Rows that are recorded later are compared without a change here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cepo.benchmarks.engine.cases import EXACT, ONLY, jacobian_requests
from cepo.benchmarks.engine.effects import CHAIN, EFFECT, PATH, _requests
from cepo.benchmarks.engine.memory import shapes_of
from cepo.benchmarks.engine.sizes import SIZES, Shapes, random_workload
from cepo.fusion.config import PAPER_LINKS
from cepo.jacobian.group import cost as cost_module
from cepo.jacobian.group.cost import CostModel
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.group.paths import plan_paths
from cepo.jacobian.group.schedule import plan_of, schedule
from tests.paths import ROOT

_BEFORE_BLOCKS = {"89548b4"}  # commit of rows on a GPU that are older than attention in blocks
RESULTS = ROOT / "benchmarks" / "results"
CONFIG = SIZES["small"].models["SmolLM2-135M"]
MOST = 1.45  # planned bytes over measured ones
XY = {"X->Y": 1.0}
CASES: dict[str, tuple[Mapping[str, float], dict[str, Any]]] = {
    EXACT: (PAPER_LINKS, {}),
    "group: all links, base only": (PAPER_LINKS, {"counterfactuals": 0}),
    ONLY: (XY, {}),
    "group: X->Y, with influence": (XY, {"also": ("influence",)}),
}


def costs_of_smollm2(dtype: torch.dtype, device: str, *, lean: bool = False) -> CostModel:
    """Return the cost model of SmolLM2-135M's shape on a device: what one layer of its width keeps, thirty times.

    With `lean`, as it runs where memory is short.
    """
    found = []
    for layers in (1, 2):
        small = LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": layers, "vocab_size": 64})
        served = GroupEngine(AutoModelForCausalLM.from_config(small, dtype=dtype).eval())._tried()
        assert not isinstance(served, str), served
        assert served.lean is not None
        found.append(served.lean.cost if lean else served.cost)
    one, two = found
    kept = {
        name: getattr(one, name) + (CONFIG.num_hidden_layers - 1) * (getattr(two, name) - getattr(one, name))
        for name in ("body", "saved_row", "working_row", "saved_pair", "saved_past")
    }
    allocator = cost_module.ALLOCATORS.get(device, cost_module.ALLOCATOR_ELSEWHERE)
    return replace(
        one,
        **kept,
        layers=CONFIG.num_hidden_layers,
        head=CONFIG.vocab_size * CONFIG.hidden_size,
        logits=one.logits * CONFIG.vocab_size / 64,
        allocator=replace(allocator, small=allocator.recomputing) if lean else allocator,
        rows_at_once=cost_module._ROWS_AT_ONCE.get(device, cost_module._ROWS_AT_ONCE_ELSEWHERE),
    )


def test_the_plan_is_above_what_was_recorded() -> None:
    """The plan of today, for Jacobians of groups on a CPU."""
    cost, compared = costs_of_smollm2(torch.float32, "cpu"), set()
    for row in rows_of("bench-small-cpu"):
        if row["case"] in CASES:
            links, options = CASES[row["case"]]
            workload = random_workload(CONFIG.vocab_size, Shapes(**row["shapes"]), row["seed"])
            plan = plan_of(schedule(jacobian_requests(workload, links, **options), cost, 64 * 2**30), cost)
            assert row["peak_bytes"] <= plan.peak_bytes <= MOST * row["peak_bytes"], (row["case"], row["shapes"])
            compared.add(row["case"])
    assert compared == {*CASES}


def test_the_plan_of_effects_and_paths_is_above_what_was_recorded() -> None:
    """The plan of today, for path requests of groups on a CPU."""
    cost, compared = costs_of_smollm2(torch.float32, "cpu"), set()
    for row in rows_of("bench-small-cpu"):
        question = row.get("case", "").removeprefix("group: ")
        if row["section"] == "effects" and row["case"] != question:
            workload = random_workload(CONFIG.vocab_size, Shapes(**row["shapes"]), row["seed"])
            plan = plan_paths(_requests(workload, CONFIG.vocab_size, question), cost, 64 * 2**30)
            assert row["peak_bytes"] <= plan.peak_bytes <= MOST * row["peak_bytes"], row["case"]
            compared.add(question)
    assert compared == {EFFECT, CHAIN, PATH}


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("bench-*.jsonl")))
def test_the_plan_of_its_day_was_above_what_was_recorded(name: str) -> None:
    """For effects and paths as well, on any device."""
    for row in rows_of(name):
        if row.get("planned_peak_bytes") and row["commit"] not in _BEFORE_BLOCKS:
            assert row["peak_bytes"] <= row["planned_peak_bytes"], (row["section"], row["case"], row["shapes"])


def test_operations_predict_how_much_faster_a_schedule_is() -> None:
    """Within a quarter, on a CPU: a GPU waits for launches."""
    rows = [row for row in rows_of("bench-small-cpu") if row.get("speedup") is not None]
    assert len(rows) >= 9
    for row in rows:
        assert 0.75 <= row["speedup"] / row["speedup_by_flops"] <= 1.25, (row["section"], row["case"], row["shapes"])


def test_the_plan_of_one_rollout_is_above_what_was_recorded() -> None:
    """Each length without a budget, and with one that it exceeds, so that MLPs and attention are recomputed."""
    for row in rows_of("memory-cpu"):
        lean = row["memory_gib"] < 64
        cost, budget = costs_of_smollm2(torch.float32, "cpu", lean=lean), row["memory_gib"] * 2**30
        requests = jacobian_requests(random_workload(CONFIG.vocab_size, shapes_of(row["tokens"]), 0), PAPER_LINKS)
        plan = plan_of(schedule(requests, cost, budget), cost)
        assert row["peak_bytes"] <= plan.peak_bytes <= MOST * row["peak_bytes"], (row["tokens"], budget)


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return the recorded rows of a benchmark."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
