"""The causal term of a batch: one differentiable forward pass of the policy over packed readings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cepo.train.causal_loss import CausalLoss, interchange


def causal_values(
    model: Any,
    packed: Mapping[str, Tensor],
    settings: CausalLoss,
    *,
    links: int,
    takes: Collection[str],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, Tensor]:
    """Return the term of each completion (0 without a donor), and whether it has a donor (1.0 or 0.0).

    All readings are run in one forward pass, which keeps logits only from the first target on.

    Args:
        model: the policy; gradients flow into its parameters.
        packed: from `cepo.train.readings.pack_readings`, the readings of each completion, link by link.
        settings: settings of the loss.
        links: number of links.
        takes: from `forward_arguments`, for the model without wrappers.
        autocast: returns a context that is entered for the forward pass.

    Returns:
        Two tensors (B,), in float32 or wider.
    """
    ids_BRT, tokens_BRT, targets_BRT = (packed[f"{name}_BRT"] for name in ("ids", "tokens", "targets"))
    read_BR = targets_BRT.any(-1)
    if not read_BR.any():  # one forward pass all the same: with sharded parameters, other ranks wait for it
        tokens_BRT = tokens_BRT.clone()
        tokens_BRT[0, 0] = True
        read_BR[0, 0] = True
    first = int(tokens_BRT.flatten(0, 1).any(0).to(torch.int8).argmax())  # leave out columns that are all padding
    ids_BRT, tokens_BRT, targets_BRT = ids_BRT[..., first:], tokens_BRT[..., first:], targets_BRT[..., first:]
    columns = targets_BRT.flatten(0, 1).any(0)
    kept = len(columns) - int(columns.to(torch.int8).argmax()) if columns.any() else 1
    with autocast():
        logits_NPV = _last_logits(model, ids_BRT[read_BR], tokens_BRT[read_BR], kept, takes)
    ids_BRP, targets_BRP = ids_BRT[..., -kept:], targets_BRT[..., -kept:]
    logits_BRPV = logits_NPV.new_zeros((*read_BR.shape, *logits_NPV.shape[1:]))
    logits_BRPV = logits_BRPV.index_put(read_BR.nonzero(as_tuple=True), logits_NPV)

    def by_link(tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (links, -1))

    if settings.compares:
        logits, targets = by_link(logits_BRPV), by_link(targets_BRP)[:, :, 1:]
        values = settings.distance(logits[:, :, :1].expand_as(logits[:, :, 1:]), logits[:, :, 1:], targets).flatten(1)
    else:
        targets = targets_BRP
        values = interchange(logits_BRPV, ids_BRP, targets)
    valid = targets.any(-1).flatten(1)
    count_B = valid.sum(-1)
    return (values * valid).sum(-1) / count_B.clamp(min=1), (count_B > 0).to(values.dtype)


def forward_arguments(model: Any) -> frozenset[str]:
    """Return the names of the arguments of a model's forward pass; for an adapter, of its base model's."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(type(bare).forward).parameters)


def _last_logits(model: Any, ids_NT: Tensor, tokens_NT: Tensor, kept: int, takes: Collection[str]) -> Tensor:
    """Return the logits that predict the last `kept` tokens of each text."""
    options: dict[str, Any] = {"use_cache": False}
    if "position_ids" in takes:
        options["position_ids"] = (tokens_NT.long().cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in takes:
        options["logits_to_keep"] = kept + 1
    logits_NTV: Tensor = model(input_ids=ids_NT, attention_mask=tokens_NT.long(), **options).logits
    return logits_NTV[:, -kept - 1 : -1]
