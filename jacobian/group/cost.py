"""What a computation will cost before it is run: rows, FLOPs and memory, and the chunks that fit a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cepo.jacobian.group.cuts import HeadRow, Job, Stage, Stem, cut_all, enters_stem, stages
from cepo.jacobian.protocol import Request
from cepo.jacobian.targets import FEWEST_HEAD_ROWS

# Beyond this many rows a matrix product gains nothing, and memory grows: 512 and 2048 took the same time on a CPU.
_ROWS_AT_ONCE = {"cpu": 256}
_ROWS_AT_ONCE_ELSEWHERE = 8192
# What a process was seen to hold over the sum of its tensors, at most: allocators keep blocks that were freed.
_ALLOCATOR = 1.5


@dataclass(frozen=True)
class Rows:
    """Token rows of one segment: one row is one token through one forward or one backward pass, padding included."""

    segment: str
    forward: int = 0
    backward: int = 0
    head: int = 0


@dataclass(frozen=True)
class Plan:
    """What a computation would run.

    Attributes:
        rows: by segment: "opening" (shared by all prompts), "stem" (shared by a prompt's rollouts), "stages".
        flops: floating-point operations of the matrix products; a mixture of experts is counted whole.
        peak_bytes: estimated peak of what the computation adds to the model, what the allocator holds back included.
        chunks: rollouts in each chunk of the stages.
    """

    rows: tuple[Rows, ...]
    flops: float
    peak_bytes: float
    chunks: tuple[int, ...]

    @property
    def forward_rows(self) -> int:
        """Forward rows of all segments."""
        return sum(row.forward for row in self.rows)

    @property
    def backward_rows(self) -> int:
        """Backward rows of all segments."""
        return sum(row.backward for row in self.rows)

    @property
    def head_rows(self) -> int:
        """Rows through the head, each once forward and once back."""
        return sum(row.head for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'segment':<10}{'forward':>10}{'backward':>10}{'head':>8}"]
        lines += [f"{row.segment:<10}{row.forward:>10,}{row.backward:>10,}{row.head:>8,}" for row in self.rows]
        lines.append(f"{'all':<10}{self.forward_rows:>10,}{self.backward_rows:>10,}{self.head_rows:>8,}")
        lines.append(
            f"{self.flops / 1e12:.3f} TFLOP, about {self.peak_bytes / 2**30:.2f} GiB beside the model, "
            f"chunks of {', '.join(map(str, sorted(set(self.chunks), reverse=True))) or 'none'} rollouts"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class CostModel:
    """The costs of one model.

    Attributes:
        body: weights that a row is multiplied with, the head's left out.
        head: weights of the head.
        width: D.
        layers: number of layers.
        attention: query heads times head size.
        key_values: key heads times head size.
        itemsize: bytes of one activation.
        saved_row: bytes that the graph keeps for one row of all layers.
        saved_pair: bytes that it keeps for one row and one position that the row attends to.
        saved_past: bytes that it keeps for one position of the past of one rollout.
        rows_at_once: rows of one matrix product beyond which nothing is gained.
    """

    body: int
    head: int
    width: int
    layers: int
    attention: int
    key_values: int
    itemsize: int
    saved_row: float
    saved_pair: float
    saved_past: float
    rows_at_once: int

    def flops(self, rows: int, context: float, *, backward: bool) -> float:
        """Return the operations of rows that attend to `context` positions each."""
        return rows * (2.0 * self.body + (8 if backward else 4) * self.layers * self.attention * context)

    def graph(self, rollouts: int, tokens: int, past: int) -> float:
        """Return the bytes that the graph of a segment keeps."""
        rows = rollouts * tokens
        return rows * self.saved_row + rows * (past + tokens) * self.saved_pair + rollouts * past * self.saved_past

    def cache(self, rollouts: int, tokens: int) -> float:
        """Return the bytes of keys and values, or of one cotangent of them."""
        return 2.0 * rollouts * tokens * self.layers * self.key_values * self.itemsize

    def backward(self, cotangents: int, rollouts: int, tokens: int, past: int) -> float:
        """Return the bytes that a batched backward pass holds at once: about two layers of gradients."""
        return 2.0 * cotangents * self.graph(rollouts, tokens, past) / self.layers

    def cotangents(self, stem: Stem, budget: float) -> int:
        """Return how many cotangents go back through the stem at once, at least one."""
        tokens = stem.end - stem.start
        each = self.backward(1, 1, tokens, stem.start) + self.cache(1, tokens)
        return max(1, min(int((budget / _ALLOCATOR - self.trunk(stem)) / each), -(-self.rows_at_once // tokens)))

    def trunk(self, stem: Stem) -> float:
        """Return the bytes that a prompt holds while its stages run."""
        kept = self.graph(1, stem.end - stem.start, stem.start) if stem.differentiated else 0.0
        return kept + self.cache(1, stem.end)

    def stages(self, jobs: Sequence[Job], stem: Stem) -> float:
        """Return the peak bytes of the stages of some jobs that run at once, the trunk's left out."""
        count, to_stem = len(jobs), len(enters_stem(jobs, stem))
        kept, transient = 0.0, 0.0
        past = stem.end
        for stage in stages(jobs, stem.end):
            rows, cotangents = len(stage.head), len(stage.active)
            if cotangents:
                kept += self.graph(count, stage.length, past)
                transient = max(transient, self.backward(cotangents, count, stage.length, past))
                transient = max(transient, 4.0 * 2 * rows * self.head / self.width)
            kept += (1 + cotangents) * self.cache(count, stage.length)
            past += stage.length
        asked = 2 * to_stem * self.cache(count, stem.end - stem.start)
        gradients = 4.0 * count * len(jobs[0].passes) * past * self.width
        return kept + transient + asked + gradients

    def chunk(self, jobs: Sequence[Job], stem: Stem, budget: float) -> int:
        """Return how many of the jobs, longest first, run at once within the budget; at least one."""
        rows = max((stage.length for stage in stages(jobs[:1], stem.end)), default=1)
        size = min(len(jobs), max(1, self.rows_at_once // rows))
        while size > 1 and self.needed(jobs[:size], stem) > budget:
            size = (size + 1) // 2
        return size

    def needed(self, jobs: Sequence[Job], stem: Stem) -> float:
        """Return the bytes that jobs take which run at once, the stem's and what the allocator holds back included."""
        return _ALLOCATOR * (self.trunk(stem) + self.stages(jobs, stem))


def measured_cost(model: Any, four: int, eight: int, four_on_eight: int) -> CostModel:
    """Return the cost model, from the weights' shapes and the bytes that the graphs of three tiny runs keep.

    Args:
        model: a causal LM.
        four: bytes kept for four tokens without a past.
        eight: for eight tokens without a past.
        four_on_eight: for four tokens on a past of eight.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    kept_out = {id(head), id(model.get_input_embeddings())}
    body = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in kept_out
    )
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    pair = max(0.0, (eight - 2 * four) / 32)
    row = (four - 16 * pair) / 4
    return CostModel(
        body=body,
        head=head.weight.numel(),
        width=model.get_input_embeddings().weight.shape[-1],
        layers=config.num_hidden_layers,
        attention=heads * size,
        key_values=(getattr(config, "num_key_value_heads", None) or heads) * size,
        itemsize=model.get_input_embeddings().weight.element_size(),
        saved_row=row,
        saved_pair=pair,
        saved_past=max(0.0, (four_on_eight - 4 * row - 48 * pair) / 8),
        rows_at_once=_ROWS_AT_ONCE.get(head.weight.device.type, _ROWS_AT_ONCE_ELSEWHERE),
    )


def plan_requests(requests: Sequence[Request], cost: CostModel, budget: float) -> Plan:
    """Return what the group engine would run for the requests, in chunks that fit the budget in bytes."""
    opening, stem_rows, stage_rows = Rows("opening"), Rows("stem"), Rows("stages")
    flops, peak = 0.0, 0.0
    chunks: list[int] = []
    for prompt in cut_all(requests):
        stem, jobs = prompt.stem, prompt.jobs
        if stem is None:
            continue
        if stem.opening and not opening.forward:
            opening = Rows("opening", stem.opening)
            flops += cost.flops(stem.opening, stem.opening / 2, backward=False)
        own = stem.end - stem.opening
        flops += cost.flops(own, (stem.opening + stem.end) / 2, backward=False)
        tokens, context = stem.end - stem.start, (stem.start + stem.end) / 2
        backward = 0
        peak_here = 0.0
        for number in prompt.requests:
            of_request = [jobs[index] for index in prompt.members(number)]
            if not of_request:
                continue
            request = requests[number]
            entering = len(enters_stem(of_request, stem))
            backward += entering * (len(request.signs) or len(of_request)) * tokens
            size = cost.chunk(of_request, stem, budget)
            for start in range(0, len(of_request), size):
                batch = of_request[start : start + size]
                chunks.append(len(batch))
                for stage in stages(batch, stem.end):
                    stage_rows, more = _with_stage(stage_rows, stage, len(batch), cost)
                    flops += more
            peak_here = max(peak_here, cost.stages(of_request[:size], stem))
            if entering:
                held = min(cost.cotangents(stem, budget), entering * size)
                asked = 2 * entering * cost.cache(size, tokens)
                peak_here = max(
                    peak_here, asked + held * (cost.backward(1, 1, tokens, stem.start) + cost.cache(1, tokens))
                )
        peak = max(peak, cost.trunk(stem) + peak_here)
        flops += cost.flops(backward, context, backward=True) + 4.0 * cost.head * _head_rows(stem.head)
        stem_rows = Rows(
            "stem", stem_rows.forward + own, stem_rows.backward + backward, stem_rows.head + _head_rows(stem.head)
        )
    return Plan((opening, stem_rows, stage_rows), flops, _ALLOCATOR * peak, tuple(chunks))


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return float(psutil.virtual_memory().available)


def _head_rows(rows: Sequence[HeadRow]) -> int:
    return max(FEWEST_HEAD_ROWS, len(rows)) if rows else 0


def _with_stage(total: Rows, stage: Stage, rollouts: int, cost: CostModel) -> tuple[Rows, float]:
    rows = rollouts * stage.length
    context = sum(stage.starts) / rollouts + stage.length / 2
    backward = rows * len(stage.active)
    flops = cost.flops(rows, context, backward=False) + cost.flops(backward, context, backward=True)
    flops += 4.0 * cost.head * _head_rows(stage.head)
    return Rows("stages", total.forward + rows, total.backward + backward, total.head + _head_rows(stage.head)), flops
