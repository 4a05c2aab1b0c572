"""The costs of one model: FLOPs and bytes of segments, by the shapes of its weights and a few tiny runs."""

from __future__ import annotations

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

# More rows in one matrix product save no time and take more memory: for SmolLM2, 512 and 1024 were equally fast on a
# CPU, and 256 were a tenth slower. A tiny model's products are over before the next is called: it takes more rows.
_ROWS_AT_ONCE = {"cpu": 512}
_MOST_ROWS_OF_TINY, _TINY = 2048, 1_000_000  # weights of the body
_ROWS_AT_ONCE_ELSEWHERE = 8192
# The most that a process was seen to hold over the sum of its tensors (45 runs on a CPU: 1.05 to 1.86, the most where
# all is small). The C library's allocator keeps blocks that were freed; CUDA's gives them to the next tensor.
_OVERHEAD, _OVERHEAD_ELSEWHERE = {"cpu": 1.9}, 1.1
# Of a long stem more go back at once: a block's shares are formed again once for all of them.
_COTANGENTS_OF_BLOCKS = 4
_COPIES = 3.0  # of attention's scores in its definition: before the mask, after it, and as shares
_OF_LOGITS = 8.0  # bytes of a logit's float32 copies beside the logit and its gradient


@dataclass(frozen=True)
class CostModel:
    """The costs of one model.

    Attributes:
        body: number of weights that a row is multiplied with, without the head's.
        head: number of weights of the head.
        width: D.
        layers: number of layers.
        attention: query heads times head size.
        key_values: key heads times head size.
        itemsize: bytes of one activation.
        heads: number of query heads.
        saved_row: bytes that the graph keeps for one row of all layers.
        working_row: bytes that one row of all layers takes while it is run: `saved_row` where nothing is recomputed.
        saved_pair: bytes that it keeps for one row and one position that the row attends to, where scores are kept.
        saved_past: bytes that it keeps for one position of the past of one rollout.
        logits: bytes of one row of logits and of what is computed from it.
        overhead: the most that a process was seen to hold, over the sum of its tensors.
        rows_at_once: rows of one matrix product beyond which larger products are no faster.
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
    overhead: float
    rows_at_once: int

    def flops(self, rows: int, context: float, *, backward: bool) -> float:
        """Return the operations of rows that attend to `context` positions each."""
        return rows * (2.0 * self.body + (8 if backward else 4) * self.layers * self.attention * context)

    def graph(self, rollouts: int, tokens: int, past: int) -> float:
        """Return the bytes that the graph of a segment keeps."""
        kept = self.saved_pair if self._keeps_scores(rollouts, tokens, past) else 0.0
        return rollouts * (tokens * (self.saved_row + (past + tokens) * kept) + past * self.saved_past)

    def forward(self, rollouts: int, tokens: int, past: int) -> float:
        """Return the bytes that a forward pass works with beside what it keeps: about two layers, and scores."""
        return self._layers(rollouts, tokens, past) + self._scores(0, rollouts, tokens, past)

    def head_bytes(self, segment: Segment) -> float:
        """Return the bytes of the logits of a segment, and of what is computed from them."""
        return max(FEWEST_HEAD_ROWS, len(segment.head)) * self.logits if segment.head else 0.0

    def cache(self, rollouts: int, tokens: int) -> float:
        """Return the bytes of keys and values, or of one cotangent of them."""
        return 2.0 * rollouts * tokens * self.layers * self.key_values * self.itemsize

    def backward(self, cotangents: int, rollouts: int, tokens: int, past: int) -> float:
        """Return the bytes that a batched backward pass works with at once."""
        recomputed = rollouts * tokens * (self.working_row - self.saved_row) / self.layers
        scores = self._scores(cotangents, rollouts, tokens, past)
        return cotangents * self._layers(rollouts, tokens, past) + recomputed + scores

    def held_bytes(self, tensors: float) -> float:
        """Return the most that a process holds for so many bytes of tensors at once."""
        return self.overhead * tensors

    def stem_bytes(self, stem: Stem) -> float:
        """Return the bytes that prompts hold while their stages run."""
        prompts = len(stem.prompts)
        kept = self.graph(prompts, stem.segment.length, stem.start) if stem.segment.differentiated else 0.0
        return kept + self.cache(prompts, stem.end)

    def stem_forward_bytes(self, stem: Stem) -> float:
        """Return the peak bytes of the forward pass of prompts."""
        prompts, start = len(stem.prompts), stem.start
        before = self.forward(prompts, start, 0) + self._layers(prompts, start, 0) + 2.0 * self.cache(prompts, start)
        own = self.forward(prompts, stem.segment.length, start) + self.head_bytes(stem.segment)
        return max(before, self.stem_bytes(stem) + own)

    def stages_bytes(self, stages: Sequence[Segment], passes: int, entering: Sequence[int], stem: Stem) -> float:
        """Return the peak bytes of the stages of jobs that run at once, without the stem.

        Args:
            stages: of these jobs.
            passes: how many passes a job has.
            entering: those of them that send cotangents to the stem.
            stem: of their prompts.
        """
        jobs, past, kept, peak = len(stages[0].ids) if stages else 0, stem.end, 0.0, 0.0
        if len(stem.prompts) > 1:  # each job has a copy of its prompt's
            kept = self.cache(jobs, stem.end)
        own: list[float] = []
        for stage in stages:
            graph = self.graph(jobs, stage.length, past) if stage.active else 0.0
            own.append(graph + 2.0 * self.cache(jobs, stage.length))
            kept += own[-1]
            peak = max(peak, kept + self.forward(jobs, stage.length, past) + self.head_bytes(stage))
            past += stage.length
        kept += 4.0 * jobs * passes * past * self.width  # the gradients that are returned
        asked = 0.0  # cotangents that later stages sent to the stem and to earlier ones
        of_stem = self.cache(jobs, stem.segment.length)
        for stage, of_stage in zip(reversed(stages), reversed(own), strict=True):
            past -= stage.length
            if stage.active:
                sent = len(stage.active) * self.cache(jobs, past - stem.end)
                sent += len(stage.active) * of_stem if set(stage.active) & set(entering) else 0.0
                peak = max(peak, kept + asked + sent + self.backward(len(stage.active), jobs, stage.length, past))
                asked = min(asked + sent, len(entering) * of_stem + passes * self.cache(jobs, past - stem.end))
            kept -= of_stage
        return peak

    def stem_backward_bytes(self, jobs: int, passes: int, cotangents: int, at_once: int, stem: Stem) -> float:
        """Return the bytes of cotangents of jobs that go back through the stem, some at once, and of all gradients."""
        gradients = 4.0 * jobs * passes * stem.end * self.width
        prompts, length = len(stem.prompts), stem.segment.length
        sent = cotangents * self.cache(prompts, length)  # twice where they are put in slots
        return gradients + (2.0 if prompts > 1 else 1.0) * sent + at_once * self._stem_cotangent(stem)

    def stem_cotangents_at_once(self, stem: Stem, budget: float) -> int:
        """Return how many cotangents go back through the stem at once within the budget, at least one."""
        room = (budget / self.overhead - self.stem_bytes(stem)) / self._stem_cotangent(stem)
        most = -(-self.rows_at_once // stem.segment.rows)
        if not self._keeps_scores(len(stem.prompts), stem.segment.length, stem.start):
            most = max(most, _COTANGENTS_OF_BLOCKS)
        return max(1, int(min(room, most)))

    def _layers(self, rollouts: int, tokens: int, past: int) -> float:
        """Return the bytes of what two layers work with, without attention's scores."""
        return 2.0 * rollouts * (tokens * self.working_row + past * self.saved_past) / self.layers

    def _scores(self, cotangents: int, rollouts: int, tokens: int, past: int) -> float:
        """Return the bytes that attention works with on its scores: all of one layer where few, else a block's.

        Args:
            cotangents: that go back at once; 0 for a forward pass.
            rollouts: that run at once.
            tokens: of each.
            past: before them.
        """
        scores = self._score_bytes(rollouts, tokens, past)
        if self._keeps_scores(rollouts, tokens, past):
            return _COPIES * max(1, cotangents) * scores
        return min((2 * cotangents + 1 if cotangents else 2) * scores, 2.0 * BLOCK_BYTES)

    def _keeps_scores(self, rollouts: int, tokens: int, past: int) -> bool:
        return self.saved_pair > 0 and self._score_bytes(rollouts, tokens, past) <= KEPT_BYTES

    def _score_bytes(self, rollouts: int, tokens: int, past: int) -> float:
        """Return the bytes of attention's scores of one layer, in float32 or wider."""
        return max(4.0, self.itemsize) * self.heads * rollouts * tokens * (past + tokens)

    def _stem_cotangent(self, stem: Stem) -> float:
        prompts, length = len(stem.prompts), stem.segment.length
        return self.backward(1, prompts, length, stem.start) + self.cache(prompts, length)


def measured_cost(model: Any, four: int, eight: int, four_on_eight: int, *, has_logits: bool = True) -> CostModel:
    """Return the cost model, from the shapes of the weights and the bytes that the graphs of tiny runs keep.

    Args:
        model: a causal LM.
        four: bytes kept for four tokens without a past.
        eight: for eight tokens without a past.
        four_on_eight: for four tokens on a past of eight.
        has_logits: whether the head's logits are formed; the kernels form none.
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
        logits=head.weight.shape[0] * (2.0 * head.weight.element_size() + _OF_LOGITS) if has_logits else 0.0,
        overhead=_OVERHEAD.get(device, _OVERHEAD_ELSEWHERE),
        rows_at_once=_MOST_ROWS_OF_TINY if body < _TINY else _ROWS_AT_ONCE.get(device, _ROWS_AT_ONCE_ELSEWHERE),
    )


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return float(psutil.virtual_memory().available)
