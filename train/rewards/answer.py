"""The likelihood of a completion's own answer when the text before it is shortened, edited or hidden."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cepo.jacobian.model import HeldModel

_MOST_LOGIT_ROWS = 256  # rows of logits per forward pass, unless one sequence has more


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
def answer_log_probabilities(model: HeldModel, variants: Sequence[Variant]) -> Iterator[Tensor]:
    """Yield, for each variant, the log-probabilities that predict the answer's tokens, teacher-forced.

    Args:
        model: already prepared.
        variants: sequences with P targets each. They share forward passes while the logits stay few, padded on the
            right, which a causal model does not see.

    Yields:
        (P, V) in nats, float32 or wider, on the model's device.
    """
    for batch in _batches(variants):
        device = model.embedding.weight.device
        ids_BT = pad_sequence([torch.tensor(variant.token_ids) for variant in batch], batch_first=True)
        seen_BT = pad_sequence([torch.ones(len(variant.token_ids), dtype=torch.long) for variant in batch], True)
        for row, variant in enumerate(batch):
            seen_BT[row, list(variant.hidden)] = 0
        read_BP = torch.tensor([variant.targets for variant in batch]) - 1
        kept_N = torch.unique(read_BP)
        options: dict[str, Any] = {}
        if "position_ids" in model.forward_takes:  # some models would derive positions from the mask
            options["position_ids"] = torch.arange(ids_BT.shape[1], device=device).expand_as(ids_BT)
        if "logits_to_keep" in model.forward_takes:
            options["logits_to_keep"] = kept_N.to(device)
            read_BP = torch.searchsorted(kept_N, read_BP)
        output = model.forward(
            model.causal_lm,
            input_ids=ids_BT.to(device),
            attention_mask=seen_BT.to(device),
            use_cache=False,
            return_dict=True,
            **options,
        )
        for logits_NV, read_P in zip(output.logits, read_BP.to(device), strict=True):
            logits_PV = logits_NV[read_P]
            yield logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32)).log_softmax(-1)


def joint_log_probabilities(log_p: Iterable[Tensor], answer_P: Tensor) -> list[float]:
    """Return log p of the whole answer under each variant, in nats, from its tokens' (P, V) log-probabilities."""
    return [float(one_PV.gather(-1, answer_P.to(one_PV.device)[:, None]).double().sum()) for one_PV in log_p]


def _batches(variants: Sequence[Variant]) -> Iterator[list[Variant]]:
    """Yield batches of variants with few rows of logits: each position that any variant reads is computed for all."""
    batch: list[Variant] = []
    for variant in variants:
        positions = {target for one in [*batch, variant] for target in one.targets}
        if batch and len(positions) * (len(batch) + 1) > _MOST_LOGIT_ROWS:
            yield batch
            batch = []
        batch.append(variant)
    if batch:
        yield batch


def without(variant: Variant, dropped: Sequence[int]) -> Variant:
    """Return the variant without the tokens at some positions, none of them a target."""
    gone = set(dropped)
    kept = [position for position in range(len(variant.token_ids)) if position not in gone]
    place = {position: index for index, position in enumerate(kept)}
    return Variant(
        tuple(variant.token_ids[position] for position in kept), tuple(place[target] for target in variant.targets)
    )
