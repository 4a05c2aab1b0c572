"""Protects what a plan promises: no recorded run took more memory than its plan says, and none far less."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cepo.benchmarks.engine.cases import EXACT, ONLY, jacobian_requests
from cepo.benchmarks.engine.memory import shapes_of
from cepo.benchmarks.engine.sizes import SIZES, Shapes, random_workload
from cepo.fusion.config import PAPER_LINKS
from cepo.jacobian.group import cost as cost_module
from cepo.jacobian.group.cost import CostModel
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.group.schedule import plan_of, schedule
from tests.paths import ROOT

CONFIG = SIZES["small"].models["SmolLM2-135M"]
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
    return replace(
        one,
        **kept,
        layers=CONFIG.num_hidden_layers,
        head=CONFIG.vocab_size * CONFIG.hidden_size,
        logits=one.logits * CONFIG.vocab_size / 64,
        overhead=cost_module._OVERHEAD.get(device, cost_module._OVERHEAD_ELSEWHERE),
        rows_at_once=cost_module._ROWS_AT_ONCE.get(device, cost_module._ROWS_AT_ONCE_ELSEWHERE),
    )


def test_the_plan_is_above_what_was_recorded() -> None:
    """Rows of groups on a CPU. Those of longer prompts, and of a GPU, are older than attention in blocks."""
    cost, compared = costs_of_smollm2(torch.float32, "cpu"), 0
    for row in rows_of("bench-small-cpu"):
        if row["case"] in CASES and row["shapes"]["Lz"] <= 256:
            links, options = CASES[row["case"]]
            workload = random_workload(CONFIG.vocab_size, Shapes(**row["shapes"]), row["seed"])
            plan = plan_of(schedule(jacobian_requests(workload, links, **options), cost, 64 * 2**30), cost)
            assert row["peak_bytes"] <= plan.peak_bytes <= 1.35 * row["peak_bytes"], (row["case"], row["shapes"])
            compared += 1
    assert compared == 4


def test_the_plan_of_one_rollout_is_above_what_was_recorded() -> None:
    """Each length without a budget, and with one that it exceeds, so that MLPs and attention are recomputed."""
    for row in rows_of("memory-cpu"):
        lean = row["memory_gib"] < 64
        cost, budget = costs_of_smollm2(torch.float32, "cpu", lean=lean), row["memory_gib"] * 2**30
        requests = jacobian_requests(random_workload(CONFIG.vocab_size, shapes_of(row["tokens"]), 0), PAPER_LINKS)
        plan = plan_of(schedule(requests, cost, budget), cost)
        assert row["peak_bytes"] <= plan.peak_bytes <= 1.6 * row["peak_bytes"], (row["tokens"], budget)


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return the recorded rows of a benchmark."""
    return [json.loads(line) for line in (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text().splitlines()]
