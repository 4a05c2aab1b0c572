"""`cepo bench`: throughput and memory of the VJP engine, timed once its values agree with a dense Jacobian."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cepo.fusion.engine import PAPER_LINKS, RewardConfig, score_rollouts
from cepo.jacobian.layouts import JudgeLayout
from cepo.jacobian.records import Group, Rollout, Span, parse_link
from cepo.jacobian.vjp import JacobianEngine

# name -> (shape of the model, rollouts G, prompt Lz, criteria Lx, scores Ly, counterfactuals K)
SIZES: dict[str, tuple[dict[str, int], tuple[int, int, int, int, int]]] = {
    "tiny": (
        {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        (2, 24, 8, 2, 2),
    ),
    "small": (  # SmolLM2-135M
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
        (4, 256, 64, 9, 4),
    ),
}
_TOLERANCE = 1e-5


def run_benchmark(size: str, output: Path, *, seed: int = 0) -> Table:
    """Compare values, then time the engine link by link, and append a row to `output/results.jsonl`.

    A token row is one token through one forward or one backward pass. Values are compared first, on a shortened copy of
    the model in float64 against a dense Jacobian that shares none of the engine's code: if they differ by more than
    1e-5 relative, nothing is timed.

    Args:
        size: "tiny" or "small".
        output: folder of the results.
        seed: of weights and ids.

    Raises:
        ValueError: for an unknown size, or values that do not agree.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    shape, (rollouts, prompt, criteria, scores, counterfactuals) = SIZES[size]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=4096)).eval()
    group = _rollouts(shape["vocab_size"], rollouts, prompt, criteria, scores, seed)
    difference = _difference_to_dense(shape, seed)
    if not difference <= _TOLERANCE:
        raise ValueError(f"the engine differs from the dense Jacobian by {difference:.1e}; nothing was timed")
    layout = JudgeLayout()
    tokens = len(group.rollouts[0].token_ids)
    table = Table(
        "what", "seconds", "rollouts/s", "token rows/s", title=f"{size}: G {rollouts}, Lz {prompt}, Lx {criteria}"
    )
    timings: dict[str, Any] = {}
    cases = {
        "X->Y, K = 0": RewardConfig(links={"X->Y": 1.0}, counterfactuals=0),
        f"X->Y, K = {counterfactuals}": RewardConfig(links={"X->Y": 1.0}, counterfactuals=counterfactuals),
        f"all links, K = {counterfactuals}": RewardConfig(links=dict(PAPER_LINKS), counterfactuals=counterfactuals),
    }
    engine = JacobianEngine(model)
    for name, config in cases.items():
        started = time.perf_counter()
        score_rollouts(group.rollouts, engine, config, layout)
        seconds = time.perf_counter() - started
        rows = _token_rows(config) * tokens * rollouts
        timings[name] = {"seconds": seconds, "rollouts_per_s": rollouts / seconds, "rows_per_s": rows / seconds}
        table.add_row(name, f"{seconds:.2f}", f"{rollouts / seconds:.2f}", f"{rows / seconds:,.0f}")
    row = {
        "size": size,
        "engine": "autograd",
        "device": platform.processor() or platform.machine(),
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "shape": shape,
        "rollouts": rollouts,
        "tokens": tokens,
        "difference_to_dense": difference,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "timings": timings,
    }
    output.mkdir(parents=True, exist_ok=True)
    with (output / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return table


def _token_rows(config: RewardConfig) -> int:
    """Return forward plus backward passes over all tokens that the oracle makes for one rollout."""
    if list(config.links) == ["X->Y"]:
        return 2 * (1 + config.counterfactuals)
    # s_X, s_Y with nothing blocked and s_Y with X blocked; a permuted prompt asks for s_X and the blocked s_Y.
    return (1 + 3) + config.counterfactuals * ((1 + 2) + (1 + 1))


def _rollouts(vocabulary: int, count: int, prompt: int, criteria: int, scores: int, seed: int) -> Group:
    """Return rollouts of random ids: prompt, a tag, criteria, a tag, analysis, the score tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist())

    def span(name: str, start: int, length: int) -> Span:
        positions = tuple(range(start, start + length))
        return Span(name, positions, positions, (0,) * length, "")

    prompt_ids, starts = draw(prompt), (prompt + 1, prompt + criteria + 2, prompt + 2 * criteria + 3)
    spans = {
        "prompt": span("prompt", 1, prompt - 1),
        "criteria": span("criteria", starts[0], criteria),
        "analysis": span("analysis", starts[1], criteria),
        "scores": span("scores", starts[2], scores),
    }
    length = starts[2] + scores - prompt
    return Group(tuple(Rollout(prompt_ids, draw(length), spans) for _ in range(count)))


def _difference_to_dense(shape: dict[str, int], seed: int) -> float:
    """Return the largest relative difference of X->Y and Z->X to jacrev in float64, at two layers of the shape."""
    torch.manual_seed(seed)
    short = {**shape, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**short, attn_implementation="eager")).double().eval()
    rollout = _rollouts(shape["vocab_size"], 1, 12, 6, 2, seed).rollouts[0]
    layout = JudgeLayout()
    links = [parse_link(text, names=layout.names, roles=layout.roles) for text in ("X->Y", "Z->X")]
    ours = JacobianEngine(model).jacobians(Group((rollout,)), links)[0]
    ids_T = torch.tensor(rollout.token_ids)
    embeddings_TD = model.get_input_embeddings()(ids_T).detach()

    def score(embeddings: torch.Tensor, name: str) -> torch.Tensor:
        log_p_TV = nn.functional.log_softmax(model(inputs_embeds=embeddings[None]).logits[0], -1)
        return torch.stack([log_p_TV[at - 1, ids_T[at]] for at in rollout.spans[name].positions]).sum()

    worst = 0.0
    for link in links:
        dense_TD = torch.func.jacrev(score)(embeddings_TD, link.target)
        wanted_SD = dense_TD.detach()[list(rollout.spans[link.source].positions)]
        worst = max(worst, float((ours[link.name].jac_SD - wanted_SD).norm() / wanted_SD.norm()))
    return worst


def _commit() -> str:
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
