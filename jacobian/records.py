"""The records that the stages pass on: spans, rollouts, groups, and the Jacobian of a link."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from cepo.jacobian.links import Link


@dataclass(frozen=True)
class Span:
    """A named set of tokens of a rollout.

    Attributes:
        name: e.g. "criteria".
        positions: ascending positions in prompt + completion of every token that carries a byte of the content.
        movable: the subset that lies wholly inside the content. Only these tokens change place in a counterfactual;
            a token that also carries a piece of a tag stays.
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
    """One token of a score.

    Attributes:
        position: position in prompt + completion.
        place: value of one unit (10 for the tens digit of "10" where it is two tokens, else 1).
        candidates: pairs (token id, number) of the tokens that could stand here, the sampled one included.
    """

    position: int
    place: float
    candidates: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Rollout:
    """One sampled completion with its spans, in exactly the ids that were sampled.

    Attributes:
        prompt_ids: token ids of the prompt as the policy saw it, chat template included; never empty.
        completion_ids: sampled ids, end-of-sequence kept, no padding.
        spans: by name, in the order of the layout. Empty where the rollout is malformed.
        numbers: the scores, each as its digit tokens (empty for a reasoner).
        malformed: why the spans could not be found, or None.
        found_by: how the spans were found ("tags", "boxed", "after rationale", "last sentence").
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    spans: Mapping[str, Span] = field(default_factory=dict)
    numbers: tuple[tuple[Digit, ...], ...] = ()
    malformed: str | None = None
    found_by: str = "tags"

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt then completion, as scored."""
        return self.prompt_ids + self.completion_ids


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
        context_energy: sum of squares of the target's gradient over the rows of all tokens (the union of the target
            tokens' contexts), under the same effect; the denominator of `influence`. None unless requested.
    """

    link: Link
    jac_SD: Tensor
    source_positions: tuple[int, ...]
    target_positions: tuple[int, ...]
    context_energy: float | None
