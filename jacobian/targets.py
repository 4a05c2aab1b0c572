"""Target functions: the scalar s_B whose gradient a Jacobian is."""

from __future__ import annotations

import torch
from torch import Tensor

from cepo.jacobian.records import NUMERIC_TARGETS, Rollout, Target
from cepo.kernels.selected import expected_value, selected_log_likelihood, selected_log_odds


def target_score(logits_PV: Tensor, rollout: Rollout, span_name: str, score: Target) -> Tensor:
    """Return s_B for the span, teacher-forced on the sampled ids.

    - log_likelihood: sum over the span of log p(token | before).
    - log_odds: sum over the span of the token's logit against the logsumexp of all others.
    - expected_score: sum over the scores of their expectation. A score's expectation is the sum over its digit tokens
      of place value times the mean digit, under the softmax restricted to the tokens that could stand there.
    - margin: the first score's expectation less the second's.

    Args:
        logits_PV: row i predicts the token at `target_positions(...)[i]`, that is, it was read one position before.
        rollout: a well-formed rollout.
        span_name: the target span.
        score: which function.

    Returns:
        Scalar tensor, in float32 or wider.
    """
    positions = target_positions(rollout, span_name, score)
    if score in NUMERIC_TARGETS:
        row_of = {position: row for row, position in enumerate(positions)}
        expectations = [
            torch.stack(
                [
                    digit.place
                    * expected_value(
                        logits_PV[row_of[digit.position]],
                        torch.tensor([token for token, _ in digit.candidates], device=logits_PV.device),
                        torch.tensor([value for _, value in digit.candidates], device=logits_PV.device),
                    )
                    for digit in number
                ]
            ).sum()
            for number in rollout.numbers
        ]
        return expectations[0] - expectations[1] if score == "margin" else torch.stack(expectations).sum()
    token_ids = rollout.token_ids
    ids_P = torch.tensor([token_ids[position] for position in positions], device=logits_PV.device)
    selected = selected_log_odds if score == "log_odds" else selected_log_likelihood
    return selected(logits_PV, ids_P).sum()


def target_positions(rollout: Rollout, span_name: str, score: Target) -> tuple[int, ...]:
    """Return the ascending positions of the tokens that the score reads; the token at t is predicted at t - 1."""
    if score in NUMERIC_TARGETS:
        return tuple(sorted({digit.position for number in rollout.numbers for digit in number}))
    return rollout.spans[span_name].positions
