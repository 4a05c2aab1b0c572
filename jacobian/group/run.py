"""One segment of a batch: the model's own modules on the keys and values of what came before, and its backward pass."""

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

from cepo.jacobian.group.swaps import Swaps, sum_of_terms_through_head
from cepo.jacobian.targets import FEWEST_HEAD_ROWS, Term, sum_of_terms
from cepo.kernels.attention.door import attend
from cepo.kernels.launch import Implementation

# Keys and values, layer by layer: key of layer 0, value of layer 0, key of layer 1 ... each (B, J, L, E).
KeyValues = list[Tensor]
Cotangents = list[Tensor | None]  # of a segment's outputs: its hidden states, then its keys and values

_ATTENTION = "cepo_prefix"


@dataclass
class Segment:
    """One forward of a batch: its outputs, its leaves, and the cotangents of the rows that the head read."""

    keys_values: KeyValues
    past: list[KeyValues]
    leaf_BTD: Tensor = field(default_factory=lambda: torch.empty(0))
    hidden_BTD: Tensor = field(default_factory=lambda: torch.empty(0))
    head_PD: Tensor = field(default_factory=lambda: torch.empty(0))


def run_segment(
    model: Any,
    forward: Callable[..., Any],
    ids: Sequence[Sequence[int]],
    starts: Sequence[int],
    past: list[KeyValues],
    past_lengths: Sequence[int],
    head: Sequence[tuple[int, int, Term]],
    *,
    differentiated: bool,
    swaps: Swaps,
) -> Segment:
    """Run one segment of a batch.

    Args:
        model: the causal LM.
        forward: its class's forward, called with the model.
        ids: the tokens of each rollout, ragged.
        starts: position of the first of each.
        past: keys and values before the segment, in pieces along their length; the last may be ragged.
        past_lengths: real length of each rollout's past.
        head: (rollout, row, term) of each row that the head is wanted for.
        differentiated: whether to keep a graph from a leaf in the embeddings' place.
        swaps: what the kernels take over; its forwards are in place already.
    """
    device = model.get_input_embeddings().weight.device
    tokens = max(map(len, ids))
    ids_BT = torch.tensor([[*row, *[0] * (tokens - len(row))] for row in ids], device=device)
    positions_BT = torch.tensor(
        [
            [start + min(at, max(len(row) - 1, 0)) for at in range(tokens)]
            for row, start in zip(ids, starts, strict=True)
        ],
        device=device,
    )
    cache = _SegmentCache(
        [piece for piece in past if piece],
        torch.tensor(past_lengths, device=device),
        max(past_lengths),
        swaps.attention,
    )
    segment = Segment(cache.keys_values, past)
    read = [(rollout, row) for rollout, row, _ in head]
    rows = torch.tensor(read + read[-1:] * (FEWEST_HEAD_ROWS - len(read)), dtype=torch.long, device=device)

    def embed(module: Any, inputs: Any, output_BTD: Tensor) -> Tensor:
        segment.leaf_BTD = output_BTD.detach().clone().requires_grad_(differentiated)
        return segment.leaf_BTD

    def enter_head(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        segment.hidden_BTD = inputs[0]
        rows_PD = inputs[0][rows[:, 0], rows[:, 1]] if head else inputs[0][0, :0]
        captured.append(rows_PD)
        # Where the kernels form the targets, the model's own logits are of no rows.
        put_in_PD = rows_PD if swaps.head == "torch" else rows_PD[:0]
        return (put_in_PD[None], *inputs[1:])

    captured: list[Tensor] = []
    handles = [
        model.get_input_embeddings().register_forward_hook(embed),
        model.get_output_embeddings().register_forward_pre_hook(enter_head),
    ]
    token = _CACHE.set(cache)
    try:
        with torch.set_grad_enabled(differentiated):
            output = forward(
                model,
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
    if head:
        terms = [term for _, _, term in head]
        if swaps.head == "torch":
            score = sum_of_terms(output.logits[0], terms)
        else:
            weight_VD = model.get_output_embeddings().weight
            score = sum_of_terms_through_head(captured[0], weight_VD, terms, implementation=swaps.head)
        (segment.head_PD,) = torch.autograd.grad(score, captured)
    return segment


def backward(segment: Segment, cotangents: Cotangents, inputs: Sequence[Tensor], *, keep: bool = False) -> list[Tensor]:
    """Return what C cotangents of a segment's outputs become at the inputs, each (C, *shape), in one batched pass."""
    outputs = [segment.hidden_BTD, *segment.keys_values]
    given = [
        (output, cotangent) for output, cotangent in zip(outputs, cotangents, strict=True) if cotangent is not None
    ]

    def pull(*cotangent: Tensor) -> tuple[Tensor, ...]:
        # An input that nothing reaches has a gradient of zeros.
        return torch.autograd.grad(
            [output for output, _ in given],
            list(inputs),
            cotangent,
            retain_graph=keep,
            allow_unused=True,
            materialize_grads=True,
        )

    of_each = [cotangent_C for _, cotangent_C in given]
    if len(of_each[0]) == 1:  # a batch of one would only cost the batching
        return [gradient[None] for gradient in pull(*(cotangent_C[0] for cotangent_C in of_each))]
    # Not is_grads_batched: that is PyTorch's older vmap, which knows no rule of a custom function, ours included.
    return list(torch.func.vmap(pull)(*of_each))


def leaves_of(keys_values: KeyValues, rollouts: int, differentiated: bool) -> KeyValues:
    """Return the keys and values as leaves of their own for each rollout; expanded, not copied."""
    return [tensor.detach().expand(rollouts, -1, -1, -1).requires_grad_(differentiated) for tensor in keys_values]


@contextlib.contextmanager
def through_prefix_attention(model: Any) -> Iterator[None]:
    """Have the model's layers call our attention, by the name under which transformers knows it."""
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
    """Takes the keys and values of a segment as its layers make them, and gives our attention what came before."""

    def __init__(self, past: list[KeyValues], past_lengths_B: Tensor, length: int, kernels: Implementation) -> None:
        super().__init__(layers=[])
        self.past, self.past_lengths_B, self.length, self.kernels = past, past_lengths_B, length, kernels
        self.keys_values: KeyValues = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if 2 * layer_idx != len(self.keys_values):
            raise ValueError(f"layer {layer_idx} came out of turn; expected each layer once, in order")
        self.keys_values += [key_states, value_states]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def past_of_layer(self, like_BJTE: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values before the segment, of the layer that was updated last."""
        layer = len(self.keys_values) - 2
        both = []
        for which in (layer, layer + 1):
            pieces = [piece[which].expand(like_BJTE.shape[0], -1, -1, -1) for piece in self.past]
            both.append(torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0] if pieces else like_BJTE[:, :, :0])
        return both[0], both[1]


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
    """Our attention behind transformers' interface."""
    for name in ("s_aux", "position_bias", "head_mask"):
        if options.get(name) is not None:
            raise ValueError(f"its attention asks for {name}")
    cache = _CACHE.get()
    output_BHTE = attend(
        query_BHTE,
        *cache.past_of_layer(key_BJTE),
        key_BJTE,
        value_BJTE,
        cache.past_lengths_B,
        scale=query_BHTE.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        implementation=cache.kernels,
    )
    return output_BHTE.transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attend)
