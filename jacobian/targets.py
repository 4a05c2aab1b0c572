"""Target functions: the scalar s_B that a Jacobian differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from cepo.jacobian.links import NUMERIC_FUNCTIONS, TargetFunction
from cepo.jacobian.reading.numbers import expected_number
from cepo.jacobian.records import Rollout
from cepo.kernels.head.definition import selected_log_likelihood, selected_log_odds

# A matrix with one to three rows is multiplied as vectors, summing over the vocabulary term by term, and the gradient
# through the head then has ten times the error. So fewer rows are filled up with copies.
FEWEST_HEAD_ROWS = 4


@dataclass(frozen=True)
class Term:
    """What a target function reads from the logits that predict one token.

    Attributes:
        position: position of the token in prompt + completion; the logits that predict it are at position - 1.
        token: the sampled id.
        kind: "log_likelihood" and "log_odds" are summands by themselves. An expected number is one summand with
            consecutive terms in order: "number" for its first token, "number_goes_on" for the others.
        weight: the summand's coefficient; a number's is that of its first term.
        candidates: pairs (token id, gain) of a number's token, see `cepo.jacobian.records.Digit`.
    """

    position: int
    token: int
    kind: Literal["log_likelihood", "log_odds", "number", "number_goes_on"]
    weight: float = 1.0
    candidates: tuple[tuple[int, float], ...] = ()


class Head(Protocol):
    """Computes log-probabilities and logits of some rows, from stored logits or from hidden states."""

    def log_likelihood(self, rows: Sequence[int], ids_P: Tensor) -> Tensor:
        """Return log p(id) of each row, (P,)."""
        ...

    def log_odds(self, rows: Sequence[int], ids_P: Tensor) -> Tensor:
        """Return log p(id) / (1 - p(id)) of each row, (P,)."""
        ...

    def logits(self, row: int, ids_N: Tensor) -> Tensor:
        """Return a row's logits of these ids, (N,), in float32 or wider."""
        ...


@dataclass(frozen=True)
class LogitsHead:
    """A head over logits that are already computed."""

    logits_PV: Tensor

    def log_likelihood(self, rows: Sequence[int], ids_P: Tensor) -> Tensor:
        return selected_log_likelihood(self._rows(rows), ids_P)

    def log_odds(self, rows: Sequence[int], ids_P: Tensor) -> Tensor:
        return selected_log_odds(self._rows(rows), ids_P)

    def logits(self, row: int, ids_N: Tensor) -> Tensor:
        logits_N = self.logits_PV[row, ids_N]
        return logits_N.to(torch.promote_types(logits_N.dtype, torch.float32))

    def _rows(self, rows: Sequence[int]) -> Tensor:
        return self.logits_PV if len(rows) == len(self.logits_PV) else self.logits_PV[rows]


def target_terms(rollout: Rollout, span_name: str, function: TargetFunction) -> tuple[Term, ...]:
    """Return the terms of s_B, in ascending order of their tokens.

    - log_likelihood: sum over the span of log p(token | before).
    - log_odds: sum over the span of the token's logit minus the logsumexp of all others.
    - expected_score: the sum of the two scores' expectations, see `cepo.jacobian.reading.numbers`.
    - margin: the first score's expectation minus the second's.

    Args:
        rollout: a well-formed rollout.
        span_name: the target span.
        function: the target function.
    """
    token_ids = rollout.token_ids
    if function not in NUMERIC_FUNCTIONS:
        return tuple(Term(at, token_ids[at], function) for at in rollout.spans[span_name].positions)  # type: ignore[arg-type]
    signs = (1.0, -1.0) if function == "margin" else (1.0,) * len(rollout.numbers)
    return tuple(
        Term(
            digit.position,
            token_ids[digit.position],
            "number_goes_on" if index else "number",
            sign,
            digit.candidates,
        )
        for sign, number in zip(signs, rollout.numbers, strict=False)
        for index, digit in enumerate(number)
    )


def target_positions(rollout: Rollout, span_name: str, function: TargetFunction) -> tuple[int, ...]:
    """Return the ascending positions of the tokens that the function reads; the token at t is predicted at t - 1."""
    return tuple(dict.fromkeys(term.position for term in target_terms(rollout, span_name, function)))


def sum_of_terms(logits_PV: Tensor, terms: Sequence[Term]) -> Tensor:
    """Return the target function, a scalar; row i of the logits predicts the token of terms[i]."""
    return values_of_terms(LogitsHead(logits_PV), terms, logits_PV.device).sum()


def values_of_terms(head: Head, terms: Sequence[Term], device: torch.device) -> Tensor:
    """Return each term's contribution to its target function; a number's is at its first term, and 0 at the others.

    Args:
        head: its row i predicts the token of terms[i]; further rows are ignored.
        terms: terms of any rollouts and kinds, with either all terms of a number or none.
        device: device of the head.

    Returns:
        (len(terms),) in float32 or wider.
    """
    places: list[int] = []
    values: list[Tensor] = []
    for kind, selected in (("log_likelihood", head.log_likelihood), ("log_odds", head.log_odds)):
        rows = [row for row, term in enumerate(terms) if term.kind == kind]
        if rows:
            found_P = selected(rows, torch.tensor([terms[row].token for row in rows], device=device))
            places += rows
            values.append(found_P * found_P.new_tensor([terms[row].weight for row in rows]))
    for row, term in enumerate(terms):
        if term.kind == "number":
            places.append(row)
            values.append(term.weight * _expected_number(head, terms, row, device)[None])
    rest = [row for row, term in enumerate(terms) if term.kind == "number_goes_on"]
    values.append(torch.zeros(len(rest), device=device))
    places += rest
    return torch.cat(values)[sorted(range(len(places)), key=places.__getitem__)]


def _expected_number(head: Head, terms: Sequence[Term], first: int, device: torch.device) -> Tensor:
    """Return the expectation of the number whose terms begin at `first`, a scalar."""
    means, written_ps = [], []
    for row in range(first, len(terms)):
        term = terms[row]
        if row > first and term.kind != "number_goes_on":
            break
        ids, gains = zip(*term.candidates, strict=True)
        written = ids.index(term.token)
        logits_N = head.logits(row, torch.tensor(ids, device=device))
        if row == first:
            p_N = logits_N.softmax(-1)
        else:  # over the whole vocabulary, by the written token's probability and the logits relative to its own
            log_p = head.log_likelihood([row], torch.tensor([term.token], device=device))
            p_N = (log_p + logits_N - logits_N[written]).exp()
        means.append(p_N @ p_N.new_tensor(gains))
        written_ps.append(p_N[written])
    return expected_number(means, written_ps)
