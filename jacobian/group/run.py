"""Run one segment with the model's own modules on the keys and values before it, and run its backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from cepo.jacobian.group.cuts import Segment
from cepo.jacobian.group.swaps import KernelHead, Swaps, swapped
from cepo.jacobian.model import HeldModel
from cepo.jacobian.targets import FEWEST_HEAD_ROWS, Head, LogitsHead, values_of_terms
from cepo.kernels.attention.dispatch import attend

# Key of layer 0, value of layer 0, key of layer 1, ..., each (B, J, L, E).
KeyValues = list[Tensor]

_ATTENTION = "cepo_prefix"


@dataclass(frozen=True)
class Past:
    """Keys and values of one piece of a segment's past.

    Attributes:
        keys_values: right-padded; one row per sequence of the segment, or a single row that all of them share.
        lengths: for each row, how many of its keys are not padding.
    """

    keys_values: KeyValues
    lengths: tuple[int, ...]

    def leaves(self, places: Sequence[int], differentiated: bool) -> Past:
        """Return the rows with these indices (any number of times the single row, if shared), as new leaves."""
        if len(self.lengths) == 1:  # expanded, not copied
            places = [0] * len(places)
            of_places = [tensor.detach().expand(len(places), -1, -1, -1) for tensor in self.keys_values]
        elif list(places) == list(range(len(self.lengths))):
            of_places = [tensor.detach() for tensor in self.keys_values]
        else:
            index_B = torch.tensor(places, device=self.keys_values[0].device)
            of_places = [tensor.detach()[index_B] for tensor in self.keys_values]
        lengths = tuple(self.lengths[place] for place in places)
        return Past([tensor.requires_grad_(differentiated) for tensor in of_places], lengths)


@dataclass
class SegmentRun:
    """One forward pass of a segment: its outputs, its leaf, and the cotangents of the rows that the head read.

    Attributes:
        keys_values: those of the segment's own tokens.
        leaf_BTD: the leaf that replaces the embedding module's output.
        hidden_BTD: the head's input.
        values_P: what each row of the segment's head adds to its target function, in float32 or wider; a number's
            value is at its first row.
        head_PD: d(sum of the target functions) / d(hidden state), one row per row of the segment's head; empty if the
            segment is not differentiated.
    """

    keys_values: KeyValues
    leaf_BTD: Tensor = field(default_factory=lambda: torch.empty(0))
    hidden_BTD: Tensor = field(default_factory=lambda: torch.empty(0))
    values_P: Tensor = field(default_factory=lambda: torch.empty(0))
    head_PD: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class SegmentModel:
    """A model that is run segment by segment, and what the kernels replace in it."""

    held: HeldModel
    swaps: Swaps

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Prepare the model, with prefix attention and the kernels in place; restore everything on exit."""
        with self.held.prepared(), _through_prefix_attention(self.held.causal_lm), swapped(self.swaps):
            yield


def run_segment(
    model: SegmentModel,
    segment: Segment,
    past: Sequence[Past] = (),
    moved: Callable[[Tensor], Tensor] | None = None,
) -> SegmentRun:
    """Run one segment forward; inside `model.prepared()`.

    Args:
        model: the model.
        segment: its tokens and the rows of its head.
        past: the pieces of its past, in order.
        moved: maps the embeddings (B, T, D) to what enters the first layer in their place.
    """
    causal_lm, device, length = model.held.causal_lm, model.held.embedding.weight.device, segment.length
    ids_BT = torch.tensor([[*row, *[0] * (length - len(row))] for row in segment.ids], device=device)
    positions_BT = torch.tensor(
        [
            [start + min(at, max(len(row) - 1, 0)) for at in range(length)]
            for row, start in zip(segment.ids, segment.starts, strict=True)
        ],
        device=device,
    )
    cache = _SegmentCache([piece for piece in past if piece.keys_values], len(segment.ids), device, model.swaps)
    run = SegmentRun(cache.keys_values)
    read = [(row.sequence, row.row) for row in segment.head]
    rows = torch.tensor(read + read[-1:] * (FEWEST_HEAD_ROWS - len(read)), dtype=torch.long, device=device)
    rows_PD = torch.empty(0)

    def embed(module: Any, inputs: Any, output_BTD: Tensor) -> Tensor:
        entered_BTD = output_BTD.detach().clone() if moved is None else moved(output_BTD.detach())
        run.leaf_BTD = entered_BTD.requires_grad_(segment.differentiated)
        return run.leaf_BTD

    def enter_head(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal rows_PD
        run.hidden_BTD = inputs[0]
        rows_PD = inputs[0][rows[:, 0], rows[:, 1]] if read else inputs[0][0, :0]
        # If the kernels compute the target functions, the model's own head gets no rows.
        put_in_PD = rows_PD if model.swaps.head == "torch" else rows_PD[:0]
        return (put_in_PD[None], *inputs[1:])

    handles = [
        model.held.embedding.register_forward_hook(embed),
        causal_lm.get_output_embeddings().register_forward_pre_hook(enter_head),
    ]
    token = _CACHE.set(cache)
    try:
        with torch.set_grad_enabled(segment.differentiated):
            output = model.held.forward(
                causal_lm,
                input_ids=ids_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            )
    finally:
        _CACHE.reset(token)
        for handle in handles:
            handle.remove()
    if read:
        terms = [row.term for row in segment.head]
        with torch.set_grad_enabled(segment.differentiated):
            head: Head = LogitsHead(output.logits[0])
            if model.swaps.head != "torch":
                head = KernelHead(rows_PD, causal_lm.get_output_embeddings().weight, model.swaps.head)
            values_P = values_of_terms(head, terms, rows_PD.device)
        run.values_P = values_P.detach()
        if segment.differentiated:
            (gradient_PD,) = torch.autograd.grad(values_P.sum(), [rows_PD])
            run.head_PD = gradient_PD[: len(read)]
    return run


def backward(
    run: SegmentRun, cotangents: Sequence[Tensor | None], inputs: Sequence[Tensor], *, keep: bool = False
) -> list[Tensor]:
    """Return the gradients of the inputs under C cotangents of a segment's outputs, in one batched pass.

    Args:
        run: the segment.
        cotangents: cotangents of its hidden states, then of its keys and values, (C, *shape) each; None for zero.
        inputs: tensors of its graph.
        keep: whether the graph is needed again.

    Returns:
        One tensor (C, *shape) per input.
    """
    outputs = [run.hidden_BTD, *run.keys_values]
    given = [(output, sent) for output, sent in zip(outputs, cotangents, strict=True) if sent is not None]

    def pull_back(*cotangent: Tensor) -> tuple[Tensor, ...]:
        # Unused inputs get zeros.
        return torch.autograd.grad(
            [output for output, _ in given],
            list(inputs),
            cotangent,
            retain_graph=keep,
            allow_unused=True,
            materialize_grads=True,
        )

    of_each = [sent_C for _, sent_C in given]
    if len(of_each[0]) == 1:  # batching a single cotangent only costs time
        return [gradient[None] for gradient in pull_back(*(sent_C[0] for sent_C in of_each))]
    # Not is_grads_batched: it is PyTorch's older vmap, which ignores the vmap rules of custom functions.
    return list(torch.func.vmap(pull_back)(*of_each))


def backward_in_parts(
    run: SegmentRun, cotangents: Sequence[Tensor | None], inputs: Sequence[Tensor], at_once: int, *, keep: bool = False
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield (slice, gradients): what `backward` returns for at most `at_once` cotangents at a time."""
    count = next(len(sent_C) for sent_C in cotangents if sent_C is not None)
    for start in range(0, count, at_once):
        part = slice(start, min(start + at_once, count))
        of_part = [None if sent_C is None else sent_C[part] for sent_C in cotangents]
        yield part, backward(run, of_part, inputs, keep=keep or part.stop < count)


@contextlib.contextmanager
def _through_prefix_attention(model: Any) -> Iterator[None]:
    """Let the model's layers call prefix attention, which is registered with transformers by name."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    names = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in names:
            config._attn_implementation = _ATTENTION
        yield
    finally:
        for config, name in names:
            config._attn_implementation = name


class _SegmentCache(Cache):
    """Collects the keys and values of a segment layer by layer, and gives prefix attention those before it."""

    def __init__(self, past: list[Past], sequences: int, device: torch.device, swaps: Swaps) -> None:
        super().__init__(layers=[])
        self.past, self.swaps = past, swaps
        self.keys_values: KeyValues = []
        lengths = [piece.lengths if len(piece.lengths) == sequences else piece.lengths * sequences for piece in past]
        totals = [sum(of_one) for of_one in zip(*lengths, strict=True)] or [0] * sequences
        self.past_lengths_B, self.length = torch.tensor(totals, device=device), max(totals)
        self._order_BL = _without_gaps(lengths, [piece.keys_values[0].shape[2] for piece in past], device)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if 2 * layer_idx != len(self.keys_values):
            raise ValueError(f"layer {layer_idx} updated its cache out of order; expected each layer once")
        self.keys_values += [key_states, value_states]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def past_of_layer(self, like_BJTE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the past's keys and values of the layer that was updated last, right-padded."""
        layer = len(self.keys_values) - 2
        both = []
        for which in (layer, layer + 1):
            pieces = [piece.keys_values[which].expand(like_BJTE.shape[0], -1, -1, -1) for piece in self.past]
            whole = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0] if pieces else like_BJTE[:, :, :0]
            if self._order_BL is not None:
                _, heads, _, size = whole.shape
                whole = whole.gather(2, self._order_BL[:, None, :, None].expand(-1, heads, -1, size))
            both.append(whole)
        return both[0], both[1]


def _without_gaps(lengths: Sequence[Sequence[int]], widths: Sequence[int], device: torch.device) -> Tensor | None:
    """Return the order of the concatenated pieces' keys that moves all padding to the end; None if it is there.

    Args:
        lengths: for each piece, how many keys of each sequence are not padding.
        widths: for each piece, its number of keys with padding.
        device: the device of the result.

    Returns:
        Indices (B, L), int64, L the most keys of a sequence that are not padding.
    """
    if all(length == width for of_piece, width in list(zip(lengths, widths, strict=True))[:-1] for length in of_piece):
        return None
    pieces = [
        torch.arange(width)[None] >= torch.tensor(of_piece)[:, None]
        for of_piece, width in zip(lengths, widths, strict=True)
    ]
    longest = max(sum(of_one) for of_one in zip(*lengths, strict=True))
    return torch.cat(pieces, dim=1).int().argsort(dim=1, stable=True)[:, :longest].to(device)


_CACHE: ContextVar[_SegmentCache] = ContextVar("cepo_segment_cache")


def _attend(
    module: Any,
    query_BHTE: Tensor,
    key_BJTE: Tensor,
    value_BJTE: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Prefix attention behind transformers' attention interface."""
    for name in ("s_aux", "position_bias", "head_mask", "sliding_window"):
        if options.get(name) is not None:
            raise ValueError(f"its attention uses {name}")
    if attention_mask is not None:  # transformers makes none for ours: what it hides may begin beyond the trial
        raise ValueError("its attention uses a mask of its own")
    cache = _CACHE.get()
    output_BHTE = attend(
        query_BHTE,
        *cache.past_of_layer(key_BJTE),
        key_BJTE,
        value_BJTE,
        cache.past_lengths_B,
        scale=query_BHTE.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        implementation=cache.swaps.attention,
        kept_bytes=cache.swaps.kept_bytes,
    )
    return output_BHTE.transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attend)
