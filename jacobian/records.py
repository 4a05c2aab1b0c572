"""The records that the stages pass on: spans, rollouts, groups, and a link's Jacobian and path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cepo.jacobian.links import Link
from cepo.jacobian.reading.same_answer import normal_form

if TYPE_CHECKING:  # settings that refer to rollouts are refused before torch is imported
    from torch import Tensor


@dataclass(frozen=True)
class Span:
    """A named set of tokens of a rollout.

    Attributes:
        name: e.g. "criteria".
        positions: ascending positions in prompt + completion of every token that holds a byte of the content.
        movable: the subset that lies wholly inside the content. Only these tokens are moved or replaced in a
            counterfactual; a token that also holds part of a tag stays.
        sentences: the sentence number of each movable token, non-decreasing.
        text: the content as text, for display.
    """

    name: str
    positions: tuple[int, ...]
    movable: tuple[int, ...]
    sentences: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Digit:
    """One token at which a score could have become another number; see `cepo.jacobian.reading.numbers`.

    Attributes:
        position: position in prompt + completion.
        candidates: pairs (token id, gain) of the tokens that could continue the number here, and of the sampled one,
            even if it ends the number. The gain is the amount by which the token increases the number.
    """

    position: int
    candidates: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Rollout:
    """One sampled completion with its spans, in exactly the ids that were sampled.

    Attributes:
        prompt_ids: token ids of the prompt as the policy saw it, chat template included; never empty.
        completion_ids: sampled ids, end-of-sequence kept, no padding.
        spans: spans by name, in the order of the layout; empty if the rollout is malformed.
        numbers: the scores, each as the tokens that determine it (empty for a reasoner).
        malformed: why the spans could not be found, or None.
        found_by: how the spans were found ("tags", "boxed", "hashes", "stated", "after rationale", "last sentence").
        prompt_found_by: how the prompt's content was found ("messages", "template", "plain text", or "whole prompt"
            if no template explains it); see `PromptReader.content`.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    spans: Mapping[str, Span] = field(default_factory=dict)
    numbers: tuple[tuple[Digit, ...], ...] = ()
    malformed: str | None = None
    found_by: str = "tags"
    prompt_found_by: str = field(default="messages", compare=False)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt then completion, as scored."""
        return self.prompt_ids + self.completion_ids

    @property
    def verdict(self) -> str:
        """The conclusion of a well-formed rollout.

        For a judge, which of its two scores is greater, as ">", "<" or "="; otherwise the answer of the last span,
        where "Yes." and "yes" are one.
        """
        token_ids = self.token_ids
        if len(self.numbers) == 2:
            first, second = (
                sum(dict(digit.candidates)[token_ids[digit.position]] for digit in number) for number in self.numbers
            )
            return ">" if first > second else "<" if first < second else "="
        answer = list(self.spans.values())[-1].text
        return normal_form(answer) or answer


@dataclass(frozen=True)
class Group:
    """Rollouts that share one prompt, as GRPO samples them."""

    rollouts: tuple[Rollout, ...]

    def __post_init__(self) -> None:
        if not self.rollouts:
            raise ValueError("rollouts is empty; a group needs at least one rollout")
        if len({rollout.prompt_ids for rollout in self.rollouts}) > 1:
            raise ValueError("rollouts of a group must share their prompt_ids; make one group per prompt")


@dataclass(frozen=True)
class LinkJacobian:
    """The Jacobian of one link of one rollout.

    Attributes:
        link: the link.
        jac_SD: (S, D) gradient rows of the source's tokens; float32, or float64 for a float64 model.
        source_positions: S positions in token_ids.
        target_positions: positions in token_ids of the target tokens; the token at t is predicted at t - 1.
        context_energy: sum of squares of the target's gradient over the rows of all tokens before the target's last
            one, for the same effect; the denominator of `influence`. None unless requested.
    """

    link: Link
    jac_SD: Tensor
    source_positions: tuple[int, ...]
    target_positions: tuple[int, ...]
    context_energy: float | None


@dataclass(frozen=True)
class LinkPath:
    """The target function of a link along the path from each counterfactual to the rollout.

    With E(X) the embeddings of the source and E(X') those of a counterfactual, the path is E(X') + a (E(X) - E(X')) for
    a in [0, 1]. The gradient along it, contracted with E(X) - E(X') and integrated, is s_B(X) - s_B(X') exactly.

    Attributes:
        link: the link.
        own: s_B of the rollout; nats for log_likelihood and log_odds.
        others: s_B with the tokens of each counterfactual, in the order of the counterfactuals.
        sums: the quadrature's estimate of own - other for each counterfactual; empty without nodes.
        attribution_S: (S,) what each token of the source adds to the estimate, mean over the counterfactuals; it sums
            to the mean of `sums`. None without nodes or counterfactuals.
        source_positions: S positions in token_ids.
        target_positions: positions in token_ids of the target tokens.
        nodes: nodes of the quadrature; 0 for values alone.
    """

    link: Link
    own: float
    others: tuple[float, ...]
    sums: tuple[float, ...]
    attribution_S: Tensor | None
    source_positions: tuple[int, ...]
    target_positions: tuple[int, ...]
    nodes: int

    @property
    def delta(self) -> float:
        """The effect: s_B(X) - s_B(X'), mean over the counterfactuals; 0 without any."""
        return self.own - sum(self.others) / len(self.others) if self.others else 0.0

    @property
    def path_sum(self) -> float | None:
        """The path's estimate of delta; None without nodes."""
        return sum(self.sums) / len(self.sums) if self.sums else None

    @property
    def certificate(self) -> float | None:
        """The largest completeness error |sum - (own - other)| over the counterfactuals; None without nodes."""
        errors = [
            abs(found - (self.own - other)) for found, other in zip(self.sums, self.others, strict=bool(self.sums))
        ]
        return max(errors) if errors else None
