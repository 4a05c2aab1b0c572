"""Peak memory of one rollout alone by its length, with a large memory budget and a small one.

`python -m cepo.benchmarks.engine.memory --output runs/memory.jsonl`: SmolLM2's shape in float32 with random weights,
all links of the paper and one counterfactual (more would run one after another). Writes a row per length and budget;
the Jacobians under the small budget are compared with those under the large one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM

from cepo.benchmarks.engine.cases import Jacobians, engine_jacobians, jacobian_requests, worst_error
from cepo.benchmarks.engine.sizes import SIZES, Shapes, random_workload
from cepo.benchmarks.measure import environment, measure
from cepo.eval.report.tables import ConsoleTable
from cepo.files import append_jsonl
from cepo.fusion.config import PAPER_LINKS
from cepo.jacobian.group.engine import GroupEngine

LENGTHS = (501, 1003, 2006)
_ANSWER = 9


def shapes_of(tokens: int) -> Shapes:
    """Return the shapes of one rollout of `tokens` tokens, three tenths of them its rationale."""
    rationale = 3 * tokens // 10
    return Shapes(G=1, Lz=tokens - rationale - _ANSWER, Lx=rationale, Ly=_ANSWER, K=1)


def main(
    output: Annotated[Path, typer.Option(help="JSONL file that the rows are appended to.")],
    memory_gib: Annotated[float, typer.Option(help="Budget of the second run of each length, GiB.")] = 1.0,
    size: Annotated[str, typer.Option(help="Size of cepo bench whose first model is run.")] = "small",
    device: Annotated[str, typer.Option(help="Where to run: cpu or cuda.")] = "cpu",
) -> None:
    """Measure the peak memory of one rollout alone, by its length, without a budget and with one."""
    place, config = torch.device(device), next(iter(SIZES[size].models.values()))
    torch.manual_seed(0)
    with place:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    model.eval().requires_grad_(False)
    engines = {budget: GroupEngine(model, memory_budget=budget * 2**30) for budget in (64.0, memory_gib)}
    table: list[tuple[str, ...]] = []
    for tokens in LENGTHS:
        requests = jacobian_requests(random_workload(config.vocab_size, shapes_of(tokens), 0), PAPER_LINKS)
        wanted: Jacobians = {}
        for budget, engine in engines.items():
            assert engine.unserved is None  # the trial runs before anything is measured
            found, took = measure(lambda engine=engine, requests=requests: engine_jacobians(engine, requests), place)  # type: ignore[misc]
            wanted = wanted or found
            row = {
                **environment(place),
                "tokens": tokens,
                "memory_gib": budget,
                "peak_bytes": took.peak_bytes,
                "planned_peak_bytes": engine.plan(requests).peak_bytes,
                "seconds": took.seconds,
                "error": worst_error(found, wanted, list(wanted)),
            }
            append_jsonl(output, [row])
            peak = "" if took.peak_bytes is None else f"{took.peak_bytes / 2**30:.2f}"
            planned = f"{row['planned_peak_bytes'] / 2**30:.2f}"
            table.append((str(tokens), f"{budget:g}", peak, planned, f"{took.seconds:.1f}", f"{row['error']:.1e}"))
    header = ("tokens", "budget, GiB", "peak, GiB", "planned", "seconds", "largest error")
    Console().print(ConsoleTable(header, table))


if __name__ == "__main__":
    typer.run(main)
