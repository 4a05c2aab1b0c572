"""How likely a completion's own answer is where the text before it is shortened, edited or hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cepo.jacobian.model import HeldModel

_ROWS = 16  # sequences per forward pass


@dataclass(frozen=True)
class Variant:
    """A sequence that ends in the completion's own answer.

    Attributes:
        token_ids: the ids up to the answer's last token.
        targets: ascending positions of the answer's tokens.
        hidden: positions that no token attends to.
    """

    token_ids: tuple[int, ...]
    targets: tuple[int, ...]
    hidden: tuple[int, ...] = ()


@torch.no_grad()
def answer_log_probabilities(model: HeldModel, variants: Sequence[Variant]) -> Tensor:
    """Return the log-probabilities that predict the answer's tokens, teacher-forced.

    Args:
        model: already prepared.
        variants: N sequences with P targets each; padded at the right, where a causal model never looks.

    Returns:
        (N, P, V) in nats, float32 or wider.
    """
    device = model.embedding.weight.device
    found = []
    for start in range(0, len(variants), _ROWS):
        batch = variants[start : start + _ROWS]
        ids_BT = pad_sequence([torch.tensor(variant.token_ids) for variant in batch], batch_first=True)
        seen_BT = pad_sequence([torch.ones(len(variant.token_ids), dtype=torch.long) for variant in batch], True)
        for row, variant in enumerate(batch):
            seen_BT[row, list(variant.hidden)] = 0
        read_BP = torch.tensor([variant.targets for variant in batch]) - 1
        kept_N = torch.unique(read_BP)
        options: dict[str, Any] = {}
        if "position_ids" in model.forward_takes:  # some models would count positions by the mask
            options["position_ids"] = torch.arange(ids_BT.shape[1], device=device).expand_as(ids_BT)
        if "logits_to_keep" in model.forward_takes:
            options["logits_to_keep"] = kept_N.to(device)
        output = model.forward(
            model.causal_lm,
            input_ids=ids_BT.to(device),
            attention_mask=seen_BT.to(device),
            use_cache=False,
            return_dict=True,
            **options,
        )
        rows_BP = torch.searchsorted(kept_N, read_BP) if "logits_to_keep" in options else read_BP
        logits_BPV = output.logits[torch.arange(len(batch))[:, None], rows_BP]
        found.append(logits_BPV.to(torch.promote_types(logits_BPV.dtype, torch.float32)).log_softmax(-1))
    return torch.cat(found)


def joint_log_probabilities(log_p_NPV: Tensor, answer_P: Tensor) -> Tensor:
    """Return log p of the whole answer under each variant: (N,), float64, in nats."""
    return log_p_NPV[:, torch.arange(len(answer_P)), answer_P].double().sum(-1)


def without(variant: Variant, dropped: Sequence[int]) -> Variant:
    """Return the variant with the tokens at some positions, none a target, taken out."""
    gone = set(dropped)
    kept = [position for position in range(len(variant.token_ids)) if position not in gone]
    place = {position: index for index, position in enumerate(kept)}
    return Variant(
        tuple(variant.token_ids[position] for position in kept), tuple(place[target] for target in variant.targets)
    )
