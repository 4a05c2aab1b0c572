"""Target functions: the scalar s_B that a Jacobian differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cepo.jacobian.links import NUMERIC_FUNCTIONS, TargetFunction
from cepo.jacobian.records import Rollout
from cepo.kernels.head.definition import expected_value, selected_log_likelihood, selected_log_odds

# A matrix product of one to three rows runs as vector products that sum over the vocabulary term by term, and the
# gradient through the head comes out with a tenth of the accuracy. Fewer rows are filled up with copies.
FEWEST_HEAD_ROWS = 4


@dataclass(frozen=True)
class Term:
    """One summand of a target function, read off the logits that predict one token.

    Attributes:
        position: position of the token in prompt + completion; the logits that predict it are at position - 1.
        token: the sampled id.
        kind: which function of the logits.
        weight: its coefficient in the sum.
        candidates: pairs (token id, number) of an expected value.
    """

    position: int
    token: int
    kind: Literal["log_likelihood", "log_odds", "expected_value"]
    weight: float = 1.0
    candidates: tuple[tuple[int, float], ...] = ()


def target_terms(rollout: Rollout, span_name: str, function: TargetFunction) -> tuple[Term, ...]:
    """Return s_B as a sum of terms, one per target token, in ascending order.

    - log_likelihood: sum over the span of log p(token | before).
    - log_odds: sum over the span of the token's logit against the logsumexp of all others.
    - expected_score: sum over the scores of their expectation. A score's expectation is the sum over its digit tokens
      of place value times the mean digit, under the softmax restricted to the tokens that could stand there.
    - margin: the first score's expectation less the second's.

    Args:
        rollout: a well-formed rollout.
        span_name: the target span.
        function: the target function.
    """
    token_ids = rollout.token_ids
    if function not in NUMERIC_FUNCTIONS:
        return tuple(Term(at, token_ids[at], function) for at in rollout.spans[span_name].positions)  # type: ignore[arg-type]
    signs = (1.0, -1.0) if function == "margin" else (1.0,) * len(rollout.numbers)
    terms = [
        Term(digit.position, token_ids[digit.position], "expected_value", sign * digit.place, digit.candidates)
        for sign, number in zip(signs, rollout.numbers, strict=False)
        for digit in number
    ]
    return tuple(sorted(terms, key=lambda term: term.position))


def target_positions(rollout: Rollout, span_name: str, function: TargetFunction) -> tuple[int, ...]:
    """Return the ascending positions of the tokens that the function reads; the token at t is predicted at t - 1."""
    return tuple(dict.fromkeys(term.position for term in target_terms(rollout, span_name, function)))


def sum_of_terms(logits_PV: Tensor, terms: Sequence[Term]) -> Tensor:
    """Return the weighted sum of the terms, a scalar; see `values_of_terms`."""
    return values_of_terms(logits_PV, terms).sum()


def values_of_terms(logits_PV: Tensor, terms: Sequence[Term]) -> Tensor:
    """Return each term's weighted value.

    Args:
        logits_PV: row i predicts the token of terms[i], so it stands one position earlier; further rows are ignored.
        terms: at most P of them, of any rollouts and kinds.

    Returns:
        (len(terms),) in float32 or wider.
    """
    device = logits_PV.device
    weights_P = torch.tensor(
        [term.weight for term in terms],
        dtype=torch.promote_types(logits_PV.dtype, torch.float32),
        device=device,
    )
    places, values = [], []
    for kind, selected in (("log_likelihood", selected_log_likelihood), ("log_odds", selected_log_odds)):
        rows = [row for row, term in enumerate(terms) if term.kind == kind]
        if rows:
            ids_P = torch.tensor([terms[row].token for row in rows], device=device)
            places += rows
            values.append(selected(logits_PV if len(rows) == len(logits_PV) else logits_PV[rows], ids_P))
    for row, term in enumerate(terms):
        if term.kind == "expected_value":
            ids_N = torch.tensor([token for token, _ in term.candidates], device=device)
            values_N = torch.tensor([value for _, value in term.candidates], device=device)
            places.append(row)
            values.append(expected_value(logits_PV[row], ids_N, values_N)[None])
    return weights_P * torch.cat(values)[sorted(range(len(places)), key=places.__getitem__)] if values else weights_P
