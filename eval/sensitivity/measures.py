"""The measures of one edit from a reward model's gradient and path, with the values per token."""

from __future__ import annotations

import math

import torch

from cepo.eval.sensitivity.edits import Edit
from cepo.files import Row
from cepo.jacobian.edit import differing_blocks, measure_edit
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.jacobian.scalar import reward_jacobian
from cepo.train.reward_scores import RewardModel

METRICS = ("difference", "right", "energy_share", "token_share", "edit_distance", "leak", "error_of_sum", "exact_share")


def measure_sensitivity(edit: Edit, model: RewardModel, token_bytes: TokenBytes) -> Row:
    """Return the row of an edit.

    The attribute's tokens are those that hold its words or, if the row names none, those that the edit changed. The
    row's fields are:

    - difference: reward of the chosen response minus that of the rejected one; right: whether it is above 0.
    - energy_share: the attribute's share of the squared norms of d reward / d E over the chosen response's tokens;
      token_share: its share of the number of tokens. Both are None if the attribute has no tokens, and the first if
      the gradient is 0.
    - edit_distance: number of tokens that were inserted, deleted or replaced.
    - leak: the share of the absolute changes of the reward that falls outside the attribute's tokens, see
      `EditEffect`; None if the row names no words. error_of_sum: error of the attributions' sum, and nodes: number of
      nodes of the path.
    - exact_share: for the testbed's unchecked edits, |o| / (|o| + |c|), where o is the change of the reward when all
      but the attribute is edited, and c its change when the attribute is edited next; None for other edits.
    - tokens: the texts of the chosen response's tokens and those that follow it, with `energy`, `attribution` and
      `of_attribute` of each.

    Args:
        edit: the pair.
        model: a Bradley-Terry model.
        token_bytes: bytes of its tokenizer's tokens.

    Raises:
        ValueError: with the reason why the edit cannot be measured: a text is too long, both have the same tokens,
            neither has the attribute's words, or a reward or its gradient is not finite.
    """
    encoder = model.encoder
    ids, response, own = encoder.encode_response(edit.prompt, edit.chosen, edit.words)
    edit_ids, _, edit_own = encoder.encode_response(edit.prompt, edit.rejected, edit.words)
    blocks = differing_blocks(ids, edit_ids, own, edit_own)
    if not blocks:
        raise ValueError("equal after encoding: both responses have the same tokens")
    if edit.words and not own and not edit_own:  # else the whole edit would count as a leak
        raise ValueError(f"attribute_words: neither response has {' or '.join(map(repr, edit.words))} as a whole word")
    effect = measure_edit(model.model, ids, edit_ids, blocks, batch_size=model.batch_size)
    if not math.isfinite(effect.difference):
        raise ValueError(f"not finite: the rewards differ by {effect.difference}")
    shown = list(range(response[0], len(ids)))
    _, jac_SD = reward_jacobian(model.model, ids, shown)
    energy_S = jac_SD.double().square().sum(-1).cpu()
    if not energy_S.isfinite().all():
        raise ValueError("not finite: the gradient of the reward")
    changed = {place for block in blocks for place in range(block.start, block.end)}
    of_attribute = torch.tensor([place in (own if edit.words else changed) for place in shown])
    in_response = torch.tensor([place in set(response) for place in shown])
    chosen = of_attribute & in_response
    whole = float(energy_S[in_response].sum())
    return {
        "difference": effect.difference,
        "right": float(effect.difference > 0),
        "energy_share": float(energy_S[chosen].sum()) / whole if chosen.any() and whole > 0 else None,
        "token_share": float(chosen.sum() / in_response.sum()) if chosen.any() else None,
        "edit_distance": sum(block.size for block in blocks),
        "leak": effect.leak if edit.words else None,
        "error_of_sum": effect.certificate,
        "exact_share": None if edit.others is None else _exact_share(edit, edit.others, model),
        "nodes": effect.nodes,
        "tokens": [piece.decode("utf-8", "replace") for piece in token_bytes.of(tuple(ids[response[0] :]))],
        "of_attribute": of_attribute.tolist(),
        "energy": energy_S.tolist(),
        "attribution": effect.attribution_T[response[0] :].tolist(),
    }


def _exact_share(edit: Edit, others: str, model: RewardModel) -> float | None:
    """Return the share of everything but the attribute: all else is changed first, then the attribute."""
    before, after = [edit.chosen, others], [others, edit.rejected]
    other_effect, cause_effect = map(abs, model.differences([edit.prompt] * 2, before, after).values_N.tolist())
    whole = other_effect + cause_effect
    return other_effect / whole if whole > 0 else None
