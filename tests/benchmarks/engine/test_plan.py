"""Protects what a plan promises: no recorded run took more memory than its plan says, and none far less."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cepo.benchmarks.engine.cases import EXACT, ONLY, _requests
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


def costs_of_smollm2(dtype: torch.dtype, device: str) -> CostModel:
    """Return the cost model of SmolLM2-135M's shape on a device: what one layer of its width keeps, thirty times."""
    found = []
    for layers in (1, 2):
        small = LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": layers, "vocab_size": 64})
        served = GroupEngine(AutoModelForCausalLM.from_config(small, dtype=dtype).eval())._tried()
        assert not isinstance(served, str), served
        found.append(served.cost)
    one, two = found
    kept = {
        name: getattr(one, name) + (CONFIG.num_hidden_layers - 1) * (getattr(two, name) - getattr(one, name))
        for name in ("body", "saved_row", "saved_pair", "saved_past")
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


@pytest.mark.parametrize(
    ("name", "dtype", "device", "most"),
    [("bench-small-cpu", torch.float32, "cpu", 1.35), ("bench-gpu-135m-h200", torch.bfloat16, "cuda", 1.25)],
)
def test_the_plan_is_above_what_was_recorded(name: str, dtype: torch.dtype, device: str, most: float) -> None:
    """Every recorded row of the group engine, of a process on a CPU and of a GPU: the plan is no less, nor far more.

    Rows of the kernels are left out: what their graph keeps can be measured on a GPU alone.
    """
    cost, compared = costs_of_smollm2(dtype, device), 0
    for row in map(json.loads, (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text().splitlines()):
        if row["case"] in CASES:
            links, options = CASES[row["case"]]
            workload = random_workload(CONFIG.vocab_size, Shapes(**row["shapes"]), row["seed"])
            plan = plan_of(schedule(_requests(workload, links, **options), cost, 64 * 2**30), cost)
            assert row["peak_bytes"] <= plan.peak_bytes <= most * row["peak_bytes"], (row["case"], row["shapes"])
            compared += 1
    assert compared >= 4
