"""The costs of one model: FLOPs and bytes of segments, by the shapes of its weights and three tiny runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cepo.jacobian.group.cuts import Segment, Stem

# More rows in one matrix product save no time and take more memory: for SmolLM2, 512 and 2048 were equally fast on a
# CPU. A tiny model's products are over before the next is called: it takes more rows at once.
_ROWS_AT_ONCE = {"cpu": 256}
_MOST_ROWS_OF_TINY, _TINY = 2048, 1_000_000  # weights of the body
_ROWS_AT_ONCE_ELSEWHERE = 8192
# The most that a process was seen to hold over the sum of its tensors: allocators keep blocks that were freed.
ALLOCATOR = 1.5


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
        saved_row: bytes that the graph keeps for one row of all layers.
        saved_pair: bytes that it keeps for one row and one position that the row attends to.
        saved_past: bytes that it keeps for one position of the past of one rollout.
        rows_at_once: rows of one matrix product beyond which larger products are no faster.
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
        """Return the bytes that a batched backward pass holds at once, about two layers of gradients."""
        return 2.0 * cotangents * self.graph(rollouts, tokens, past) / self.layers

    def stem_bytes(self, stem: Stem) -> float:
        """Return the bytes that a prompt holds while its stages run."""
        kept = self.graph(1, stem.segment.length, stem.start) if stem.segment.differentiated else 0.0
        return kept + self.cache(1, stem.end)

    def stages_bytes(self, stages: Sequence[Segment], passes: int, entering: int, stem: Stem) -> float:
        """Return the peak bytes of the stages of jobs that run at once, without the stem.

        Args:
            stages: of these jobs.
            passes: how many passes a job has.
            entering: how many of them send cotangents to the stem.
            stem: of their prompt.
        """
        jobs, past = len(stages[0].ids) if stages else 0, stem.end
        kept, transient = 0.0, 0.0
        for stage in stages:
            if stage.active:
                kept += self.graph(jobs, stage.length, past)
                transient = max(
                    transient,
                    self.backward(len(stage.active), jobs, stage.length, past),
                    4.0 * 2 * len(stage.head) * self.head / self.width,
                )
            kept += (1 + len(stage.active)) * self.cache(jobs, stage.length)
            past += stage.length
        asked = 2 * entering * self.cache(jobs, stem.segment.length)
        gradients = 4.0 * jobs * passes * past * self.width
        return kept + transient + asked + gradients

    def stem_backward_bytes(self, cotangents: int, at_once: int, stem: Stem) -> float:
        """Return the bytes of cotangents that go back through the stem, some of them at once."""
        return 2 * cotangents * self.cache(1, stem.segment.length) + at_once * self._stem_cotangent(stem)

    def stem_cotangents_at_once(self, stem: Stem, budget: float) -> int:
        """Return how many cotangents go back through the stem at once within the budget, at least one."""
        room = (budget / ALLOCATOR - self.stem_bytes(stem)) / self._stem_cotangent(stem)
        return max(1, int(min(room, -(-self.rows_at_once // stem.segment.length))))

    def _stem_cotangent(self, stem: Stem) -> float:
        return self.backward(1, 1, stem.segment.length, stem.start) + self.cache(1, stem.segment.length)


def measured_cost(model: Any, four: int, eight: int, four_on_eight: int) -> CostModel:
    """Return the cost model, from the shapes of the weights and the bytes that the graphs of three tiny runs keep.

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
        rows_at_once=_MOST_ROWS_OF_TINY
        if body < _TINY
        else _ROWS_AT_ONCE.get(head.weight.device.type, _ROWS_AT_ONCE_ELSEWHERE),
    )


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return float(psutil.virtual_memory().available)
