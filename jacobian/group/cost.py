"""The cost model: FLOPs and bytes of a model's segments, from the shapes of its weights and a few tiny runs.

docs/engine.md, "Memory", says where the constants come from and which commands check them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cepo.jacobian.group.cuts import Segment, Stem
from cepo.jacobian.targets import FEWEST_HEAD_ROWS
from cepo.kernels.attention.blocks import BLOCK_BYTES, KEPT_BYTES

# More rows in one matrix product save no time and take more memory: for SmolLM2 on a CPU, 512 and 1024 were equally
# fast, and 256 a tenth slower. In a tiny model the overhead of calls dominates, so it takes more rows.
_ROWS_AT_ONCE = {"cpu": 512}
_MOST_ROWS_OF_TINY, _TINY = 2048, 1_000_000  # `_TINY` in weights of the body
_ROWS_AT_ONCE_ELSEWHERE = 8192
# Where attention runs in blocks, several cotangents go back at once, since they share the recomputed weights.
_COTANGENTS_OF_BLOCKS = 4
_COPIES, _MASKS = 3.5, 0.25  # in units of attention's scores: tensors of the definition with its mask; a block's masks
_COPIES_OF_LOGITS = 4  # the logits in float32 or wider, their logarithms, and the gradients of both


@dataclass(frozen=True)
class Allocator:
    """How much memory a process holds for live tensors, at most, by kind of tensor.

    The C library's allocator fragments: small tensors take more than their bytes, and medium-sized tensors fit into no
    gap. Blocks of at least `mapped` bytes are mapped from the system and returned to it. CUDA's allocator reuses freed
    blocks.

    Attributes:
        small: bytes held per byte of tensors other than logits, at least 1.
        recomputing: likewise where layers are computed again in the backward pass: their tensors come and go between
            those that stay.
        logits: bytes held per byte of logits and of tensors computed from them, in blocks smaller than `mapped`; larger
            blocks have no overhead.
        mapped: bytes of a block, see above.
        constant: bytes held in any case.
    """

    small: float
    recomputing: float
    logits: float
    mapped: float
    constant: float


ALLOCATORS = {"cpu": Allocator(small=1.45, recomputing=1.6, logits=2.0, mapped=2.0**25, constant=24.0 * 2**20)}
ALLOCATOR_ELSEWHERE = Allocator(small=1.1, recomputing=1.1, logits=1.1, mapped=math.inf, constant=0.0)


@dataclass(frozen=True)
class CostModel:
    """The costs of one model.

    Attributes:
        body: number of weights that a row is multiplied by, without the head's.
        head: number of weights of the head.
        width: D.
        layers: number of layers.
        attention: query heads times head size.
        key_values: key heads times head size.
        itemsize: bytes of one activation.
        heads: number of query heads.
        saved_row: bytes that the graph keeps for one row, in all layers.
        working_row: bytes that one row takes while it is run, in all layers; equals `saved_row` if nothing is
            recomputed.
        saved_pair: bytes that the graph keeps per row and position that it attends to, where scores are kept.
        saved_past: bytes that the graph keeps per position of one rollout's past.
        logits: bytes of one row of logits and of the tensors computed from it.
        allocator: how much memory a process holds for tensors.
        rows_at_once: rows of a matrix product beyond which larger products are no faster.
    """

    body: int
    head: int
    width: int
    layers: int
    attention: int
    key_values: int
    itemsize: int
    heads: int
    saved_row: float
    working_row: float
    saved_pair: float
    saved_past: float
    logits: float
    allocator: Allocator
    rows_at_once: int

    def flops(self, rows: int, context: float, *, backward: bool) -> float:
        """Return the FLOPs of rows that attend to `context` positions each."""
        return rows * (2.0 * self.body + (8 if backward else 4) * self.layers * self.attention * context)

    def graph(self, rollouts: int, tokens: int, past: int) -> float:
        """Return the bytes that the graph of a segment keeps."""
        kept = self.saved_pair if self._keeps_scores(rollouts, tokens, past) else 0.0
        return rollouts * (tokens * (self.saved_row + (past + tokens) * kept) + past * self.saved_past)

    def forward(self, rollouts: int, tokens: int, past: int, *, differentiated: bool = False) -> float:
        """Return the working memory of one layer of a forward pass, in bytes, without what the graph keeps.

        It is the larger of the MLP's and attention's. The fractions of a layer's rows and past that are alive at the
        same time as attention's scores, here and in `backward`, were counted in the code.
        """
        layer, of_past = self._layer(rollouts, tokens, past)
        scores = self._scores(0, rollouts, tokens, past)
        if not differentiated:
            return max(layer, scores + 2.0 * of_past + 0.5 * layer)
        if self._keeps_scores(rollouts, tokens, past):  # the rest is in the graph
            return scores - self._score_bytes(rollouts, tokens, past)
        return max(layer, scores + of_past + 0.25 * layer)

    def head_bytes(self, segment: Segment) -> float:
        """Return the bytes of a segment's logits and of the tensors computed from them, in the units of `held_bytes`.

        That is, scaled by the allocator's overhead for logits relative to that for other tensors.
        """
        if not segment.head:
            return 0.0
        logits = max(FEWEST_HEAD_ROWS, len(segment.head)) * self.logits
        if not segment.differentiated:  # no gradients, and nothing kept for them
            return logits * (0.5 if self.itemsize >= 4 else 0.75) / self.allocator.small
        is_mapped = logits / _COPIES_OF_LOGITS >= self.allocator.mapped
        return logits * (1.0 if is_mapped else self.allocator.logits) / self.allocator.small

    def cache(self, rollouts: int, tokens: int) -> float:
        """Return the bytes of keys and values, or of one cotangent of them."""
        return 2.0 * rollouts * tokens * self.layers * self.key_values * self.itemsize

    def backward(self, cotangents: int, rollouts: int, tokens: int, past: int, *, past_asked: bool = False) -> float:
        """Return the working memory of one layer of a batched backward pass, in bytes: its MLP's or attention's."""
        layer, of_past = self._layer(rollouts, tokens, past)
        recomputed = rollouts * tokens * (self.working_row - self.saved_row) / self.layers
        attention = self._scores(cotangents, rollouts, tokens, past) + 0.25 * cotangents * layer
        if not self._keeps_scores(rollouts, tokens, past):
            attention += (cotangents + 1 if past_asked else 1) * of_past + 0.75 * cotangents * layer
        return max(recomputed + cotangents * layer, attention)

    def held_bytes(self, tensors: float) -> float:
        """Return the most bytes that a process holds while this many bytes of tensors are alive."""
        return self.allocator.small * tensors + self.allocator.constant

    def tensors_within(self, budget: float) -> float:
        """Return the bytes of live tensors for which a process holds at most `budget` bytes."""
        return (budget - self.allocator.constant) / self.allocator.small

    def stem_bytes(self, stem: Stem) -> float:
        """Return the bytes that the stem keeps while stages run."""
        prompts = len(stem.prompts)
        kept = self.graph(prompts, stem.segment.length, stem.start) if stem.segment.differentiated else 0.0
        return kept + self.cache(prompts, stem.end)

    def stem_forward_bytes(self, stem: Stem) -> float:
        """Return the peak bytes of the stem's forward pass."""
        prompts, start = len(stem.prompts), stem.start
        before = self.forward(prompts, start, 0) + 2.0 * self.cache(prompts, start)
        own = self.forward(prompts, stem.segment.length, start, differentiated=stem.segment.differentiated)
        return max(before, self.stem_bytes(stem) + own + self.head_bytes(stem.segment))

    def stages_bytes(self, stages: Sequence[Segment], passes: int, entering: Sequence[int], stem: Stem) -> float:
        """Return the peak bytes of the stages of jobs that run at once, without the stem.

        Args:
            stages: the stages of these jobs.
            passes: number of passes per job.
            entering: the passes that send cotangents to the stem.
            stem: the stem of their prompts.
        """
        jobs, past, kept, peak = len(stages[0].ids) if stages else 0, stem.end, 0.0, 0.0
        if len(stem.prompts) > 1:  # each job has a copy of its prompt's keys and values
            kept = self.cache(jobs, stem.end - stem.opening)
        graphs: list[float] = []
        for stage in stages:
            graphs.append(self.graph(jobs, stage.length, past) if stage.active else 0.0)
            kept += graphs[-1] + 2.0 * self.cache(jobs, stage.length)
            work = self.forward(jobs, stage.length, past, differentiated=bool(stage.active)) + self.head_bytes(stage)
            peak = max(peak, kept + work)
            past += stage.length
        kept += 4.0 * jobs * passes * past * self.width  # the gradients that are returned
        asked = 0.0  # cotangents that later stages sent to the stem and to earlier ones
        of_stem = self.cache(jobs, stem.segment.length)
        for stage, graph in zip(reversed(stages), reversed(graphs), strict=True):
            past -= stage.length
            if stage.active:
                sent = len(stage.active) * self.cache(jobs, past - stem.end)
                sent += len(stage.active) * of_stem if set(stage.active) & set(entering) else 0.0
                work = self.backward(len(stage.active), jobs, stage.length, past, past_asked=sent > 0)
                peak = max(peak, kept + asked + sent + work)
                asked = min(asked + sent, len(entering) * of_stem + passes * self.cache(jobs, past - stem.end))
                peak = max(peak, kept + asked + sent)  # cotangents are added up before they and the graph are freed
            kept -= graph + 2.0 * self.cache(jobs, stage.length)
        return peak

    def stem_backward_bytes(self, jobs: int, passes: int, cotangents: int, at_once: int, stem: Stem) -> float:
        """Return the peak bytes of the jobs' cotangents on their way through the stem, and of all gradients."""
        gradients = 4.0 * jobs * passes * stem.end * self.width
        prompts, length = len(stem.prompts), stem.segment.length
        sent = cotangents * self.cache(prompts, length)  # twice with several prompts: they are copied into slots
        return gradients + (2.0 if prompts > 1 else 1.0) * sent + self._stem_cotangents(at_once, stem)

    def stem_cotangents_at_once(self, stem: Stem, budget: float) -> int:
        """Return how many cotangents go back through the stem at once within the budget, at least one."""
        at_once = -(-self.rows_at_once // stem.segment.rows)
        if not self._keeps_scores(len(stem.prompts), stem.segment.length, stem.start):
            at_once = max(at_once, _COTANGENTS_OF_BLOCKS)
        while at_once > 1 and self.held_bytes(self.stem_bytes(stem) + self._stem_cotangents(at_once, stem)) > budget:
            at_once -= 1
        return at_once

    def _layer(self, rollouts: int, tokens: int, past: int) -> tuple[float, float]:
        """Return the working memory of one layer without attention's scores, in bytes: of the rows, and of the past."""
        return rollouts * tokens * self.working_row / self.layers, rollouts * past * self.saved_past / self.layers

    def _scores(self, cotangents: int, rollouts: int, tokens: int, past: int) -> float:
        """Return the bytes of attention's scores and copies of them: a whole layer's, or a block's where large.

        Args:
            cotangents: cotangents that go back at once; 0 for a forward pass.
            rollouts: rollouts that run at once.
            tokens: tokens of each.
            past: positions before them.
        """
        scores = self._score_bytes(rollouts, tokens, past)
        if self._keeps_scores(rollouts, tokens, past):
            return (3.0 * cotangents if cotangents > 1 else 2.0 if cotangents else _COPIES) * scores
        return (max(2, 2 * cotangents + 1) + _MASKS) * min(scores, BLOCK_BYTES / (max(1, cotangents) + 1))

    def _keeps_scores(self, rollouts: int, tokens: int, past: int) -> bool:
        return self.saved_pair > 0 and self._score_bytes(rollouts, tokens, past) <= KEPT_BYTES

    def _score_bytes(self, rollouts: int, tokens: int, past: int) -> float:
        """Return the bytes of attention's scores of one layer, in float32 or wider."""
        return max(4.0, self.itemsize) * self.heads * rollouts * tokens * (past + tokens)

    def _stem_cotangents(self, count: int, stem: Stem) -> float:
        """Return the peak bytes of this many cotangents that go back through the stem at once."""
        prompts, length = len(stem.prompts), stem.segment.length
        return self.backward(count, prompts, length, stem.start) + count * self.cache(prompts, length)


def measured_cost(model: Any, four: int, eight: int, four_on_eight: int, *, has_logits: bool = True) -> CostModel:
    """Return the cost model, from the shapes of the weights and the bytes that the graphs of tiny runs keep.

    Args:
        model: a causal LM.
        four: bytes kept for four tokens without a past.
        eight: bytes kept for eight tokens without a past.
        four_on_eight: bytes kept for four tokens after a past of eight.
        has_logits: whether logits are stored; the kernels store none.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    kept_out = {id(head), id(model.get_input_embeddings())}
    body = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in kept_out
    )
    heads, device = config.num_attention_heads, head.weight.device.type
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
        heads=heads,
        saved_row=row,
        working_row=row,
        saved_pair=pair,
        saved_past=max(0.0, (four_on_eight - 4 * row - 48 * pair) / 8),
        logits=_COPIES_OF_LOGITS * head.weight.shape[0] * max(4.0, head.weight.element_size()) if has_logits else 0.0,
        allocator=ALLOCATORS.get(device, ALLOCATOR_ELSEWHERE),
        rows_at_once=_MOST_ROWS_OF_TINY if body < _TINY else _ROWS_AT_ONCE.get(device, _ROWS_AT_ONCE_ELSEWHERE),
    )


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return float(psutil.virtual_memory().available)
