"""The records that the stages hand to each other: spans, rollouts, groups, links, and the Jacobian of a link."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

Effect = Literal["direct", "total", "residual"]
Target = Literal["log_likelihood", "log_odds", "expected_score", "margin"]
NUMERIC_TARGETS: tuple[str, ...] = ("expected_score", "margin")


@dataclass(frozen=True)
class Span:
    """A named set of tokens of a rollout.

    Attributes:
        name: e.g. "criteria".
        positions: ascending positions in prompt + completion of every token that carries a byte of the content.
        movable: the subset that lies wholly inside the content; only these tokens change place in a counterfactual
            (a token that also carries a piece of a tag stays).
        sentences: the sentence number of each movable token, non-decreasing.
        text: the content as text, for people.
    """

    name: str
    positions: tuple[int, ...]
    movable: tuple[int, ...]
    sentences: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Digit:
    """One token of a score: where it stands, what one unit of it is worth, and which tokens could stand there instead.

    Attributes:
        position: position in prompt + completion.
        place: value of one unit (10 for the tens digit of "10" where it is two tokens, else 1).
        candidates: pairs (token id, number it stands for), the sampled one among them.
    """

    position: int
    place: float
    candidates: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Rollout:
    """One sampled completion with its spans, exactly the ids that were sampled.

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
            raise ValueError("rollouts of a group must share their prompt_ids; use group_rollouts to sort them")


@dataclass(frozen=True)
class Link:
    """d(score of the target span) / d(embeddings of the source span).

    Attributes:
        name: as the user wrote it, e.g. "Z->Y" or "criteria->analysis:total@log_odds".
        source: span name.
        target: span name.
        effect: "total" blocks nothing; "direct" lets no cotangent through the mediator; "residual" regresses the
            mediated component out of the total (what the reference implementation of CE-PO does).
        mediator: names of the spans whose positions "direct" blocks.
        score: the target function, see `cepo.jacobian.targets`.
    """

    name: str
    source: str
    target: str
    effect: Effect
    mediator: tuple[str, ...]
    score: Target


@dataclass(frozen=True)
class LinkJacobian:
    """The Jacobian of one link of one rollout.

    Attributes:
        link: what it is the Jacobian of.
        jac_SD: (S, D) gradient rows of the source's tokens; float32, or float64 for a float64 model.
        source_positions: S positions in token_ids.
        target_positions: positions in token_ids of the target tokens; the one at t is predicted at t - 1.
        context_energy: sum of squares of the target's gradient over the rows of all tokens (the union of the target
            tokens' contexts), under the same effect; the denominator of `influence`. None where it was not asked for.
    """

    link: Link
    jac_SD: Tensor
    source_positions: tuple[int, ...]
    target_positions: tuple[int, ...]
    context_energy: float | None


@dataclass(frozen=True)
class Request:
    """What an engine is asked for: some links of rollouts that share a prompt.

    Attributes:
        group: the rollouts; a counterfactual is a rollout like any other.
        links: from `parse_link`.
        context_energy: whether the gradient's energy over the whole context is wanted. It costs one backward pass
            through all of the prompt for every rollout.
        signs: rows of one coefficient a rollout. Empty: one answer a rollout. Else one answer a row, the sum over the
            rollouts of coefficient times Jacobian, which costs the prompt one backward pass a row instead of one a
            rollout. Only for links that start in the prompt, whose rows all rollouts share, and no residual effects.
    """

    group: Group
    links: tuple[Link, ...]
    context_energy: bool = True
    signs: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.links:
            raise ValueError("links is empty; a request needs at least one link")
        if not self.signs:
            return
        first = self.group.rollouts[0]
        if any(len(row) != len(self.group.rollouts) for row in self.signs):
            raise ValueError(
                f"signs has rows that are not one coefficient for each of {len(self.group.rollouts)} rollouts"
            )
        for link in self.links:
            if link.effect == "residual" or first.spans[link.source].positions[-1] >= len(first.prompt_ids):
                raise ValueError(
                    f"signs were given with the link {link.name!r}; expected links that start in the prompt and are "
                    "total or direct"
                )
        if self.context_energy:
            raise ValueError("signs and context_energy exclude each other; set context_energy=False")


def group_rollouts(rollouts: Iterable[Rollout]) -> list[Group]:
    """Sort rollouts into groups of one prompt, in order of first appearance."""
    by_prompt: dict[tuple[int, ...], list[Rollout]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_ids, []).append(rollout)
    return [Group(tuple(members)) for members in by_prompt.values()]


def parse_link(
    text: str, *, names: tuple[str, ...], roles: Mapping[str, str], default_score: str = "log_likelihood"
) -> Link:
    """Read "SOURCE->TARGET[:EFFECT][@SCORE]".

    SOURCE and TARGET are span names or the roles Z, X, Y. EFFECT is direct, total or residual; "Z->Y" without one is
    direct (the paths through X are blocked), every other link is total. The mediator of a direct effect is X where X
    lies strictly between source and target, else all named spans strictly between them. SCORE overrides
    `default_score`; the numeric defaults (expected_score, margin) apply to links that end in the scores, and the others
    keep log_likelihood.

    Args:
        text: the link, e.g. "X->Y", "criteria->analysis", "Z->Y:total", "X->Y@margin".
        names: span names in the order in which they stand in a rollout.
        roles: what Z, X and Y stand for.
        default_score: one of log_likelihood, log_odds, expected_score, margin.

    Raises:
        ValueError: unknown span, effect or score; a source that does not come before its target (by causality its
            Jacobian is zero); a numeric score on a span that is no score.
    """
    scores = get_args(Target)
    if default_score not in scores:
        raise ValueError(f"target is {default_score!r}; expected one of {', '.join(scores)}")
    body, at, score_text = text.partition("@")
    body, colon, effect_text = body.partition(":")
    ends = [part.strip() for part in body.split("->")]
    known = f"the spans are {', '.join(names)} ({', '.join(f'{k} = {v}' for k, v in roles.items())})"
    if len(ends) != 2:
        raise ValueError(f"link {text!r} is not of the form SOURCE->TARGET[:EFFECT][@SCORE], such as 'X->Y'; {known}")
    source, target = (roles.get(end, end) for end in ends)
    for written, name in zip(ends, (source, target), strict=True):
        if name not in names:
            raise ValueError(f"link {text!r} names the unknown span {written!r}; {known}")
    first, last = names.index(source), names.index(target)
    if first >= last:
        raise ValueError(
            f"link {text!r} has its source at or after its target, so its Jacobian is zero by causality; "
            f"the order is {' -> '.join(names)}"
        )
    effect = effect_text.strip() or ("direct" if (source, target) == (roles.get("Z"), roles.get("Y")) else "total")
    if (colon and not effect_text.strip()) or effect not in get_args(Effect):
        raise ValueError(f"link {text!r} asks for the effect {effect_text!r}; expected direct, total or residual")
    between = names[first + 1 : last]
    mediator = (roles["X"],) if roles.get("X") in between else between
    if effect != "total" and not mediator:
        raise ValueError(f"link {text!r} asks for the {effect} effect, but no span lies between source and target")
    score = score_text.strip() or default_score
    if (at and not score_text.strip()) or score not in scores:
        raise ValueError(f"link {text!r} asks for the score {score_text!r}; expected one of {', '.join(scores)}")
    if score in NUMERIC_TARGETS and target != "scores":
        if at:
            raise ValueError(f"link {text!r} asks for {score}, which only a link that ends in 'scores' has; {known}")
        score = "log_likelihood"
    return Link(text, source, target, effect, mediator if effect != "total" else (), score)  # type: ignore[arg-type]
