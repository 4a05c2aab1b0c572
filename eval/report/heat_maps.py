"""Token heat maps: the norm of a link's Jacobian at each token of a rollout, or each token's attribution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from cepo.eval.report.numbers import digits
from cepo.eval.report.tables import PageTable

LEVELS = 20
"""Number of colour levels for a token's norm or attribution."""

_STRONGEST = 5  # number of source tokens that are listed above a heat map
_NO_EFFECT = 1e-3  # nats; a smaller effect changes the target's probability by less than 0.1%


@dataclass(frozen=True)
class Attribution:
    """What the tokens of a link's source contributed to its target, from the path Jacobian.

    Attributes:
        nats: what the token at each source position adds to the path's estimate of the effect; negative if it made the
            target less likely, NaN or infinite if there is no number.
        delta: the exact effect, in nats.
        path_sum: the sum of the tokens' nats.
        parts: text, nats and share of the effect (None if the effect is 0) of each sentence or list item.
        unit: unit of these numbers: "nats", or "reward" if the target is the reward of a response.
    """

    nats: Mapping[int, float]
    delta: float
    path_sum: float
    parts: tuple[tuple[str, float, float | None], ...] = ()
    unit: str = "nats"

    @property
    def doubt(self) -> str:
        """Why the parts have no meaningful shares of the effect; empty if they have.

        Shares add up to path_sum / delta. Where the path's error is above half of the effect, that is below 50% or
        above 150%: the error may be larger than what any part did.
        """
        if self.unit == "nats" and abs(self.delta) < _NO_EFFECT:
            return f"The effect is below {_NO_EFFECT:g} nats, which counts as none, so it has no shares."
        if not abs(self.path_sum - self.delta) <= abs(self.delta) / 2:  # NaN too
            return (
                "They differ by more than half of the effect: this attribution is not reliable, and needs more nodes "
                "along the path (--nodes)."
            )
        return ""


@dataclass(frozen=True)
class HeatMap:
    """One rollout to show, with one heat map per link for its Jacobian, and one for its attributions.

    Attributes:
        title: heading, e.g. "row 12".
        tokens: text of every token of prompt + completion, in order.
        prompt_tokens: number of tokens of the prompt.
        links: by link, the L2 norm (>= 0, NaN or infinite) of the Jacobian row at each source position.
        attributions: by link, what each token of the source contributed to the target.
        targets: by link, the positions of its target.
        facts: short values by label, shown above the text, e.g. {"reward": "0.71"}.
        measures: a table of the links, shown below the facts, or None.
        malformed: why nothing could be computed, or None.

    Raises:
        ValueError: for positions out of range, targets of an unknown link, or negative norms.
    """

    title: str
    tokens: tuple[str, ...]
    prompt_tokens: int
    links: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    attributions: Mapping[str, Attribution] = field(default_factory=dict)
    targets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    measures: PageTable | None = None
    malformed: str | None = None

    @property
    def units(self) -> tuple[str, ...]:
        """The units of the attributions."""
        return tuple(one.unit for one in self.attributions.values())

    def __post_init__(self) -> None:
        count = len(self.tokens)
        if not 0 <= self.prompt_tokens <= count:
            raise ValueError(f"prompt_tokens is {self.prompt_tokens}; expected 0 to {count}, the number of tokens")
        known = {*self.links, *self.attributions}
        if unknown := set(self.targets) - known:
            raise ValueError(f"targets names {sorted(unknown)}, which links does not have; it has {sorted(known)}")
        attributed = {name: one.nats for name, one in self.attributions.items()}
        for name, positions in (*self.links.items(), *attributed.items(), *self.targets.items()):
            if outside := [position for position in positions if not 0 <= position < count]:
                raise ValueError(f"{name} has the position {outside[0]}; expected 0 to {count - 1}")
        for name, norms in self.links.items():
            if negative := [norm for norm in norms.values() if norm < 0.0]:
                raise ValueError(f"links[{name!r}] holds the norm {negative[0]}; expected norms >= 0")


@dataclass(frozen=True)
class Piece:
    """A stretch of text with uniform formatting.

    Attributes:
        text: one source token, or a run of other tokens.
        tip: text of the tooltip; empty for plain text.
        kind: CSS classes; empty for plain text.
    """

    text: str
    tip: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Part:
    """The prompt or the completion."""

    name: str
    tokens: int
    unfolded: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class LinkView:
    """The heat map of one link: of norms, or of a signed attribution."""

    name: str
    count: int
    largest: float
    strongest: tuple[tuple[str, int, float], ...]
    parts: tuple[Part, ...]
    attribution: Attribution | None = None


def link_view(heat_map: HeatMap, name: str) -> LinkView:
    """Return the view of a link's gradient norms."""
    return _view(heat_map, name, heat_map.links[name], None)


def attribution_view(heat_map: HeatMap, name: str) -> LinkView:
    """Return the view of a link's signed attributions."""
    attribution = heat_map.attributions[name]
    return _view(heat_map, name, attribution.nats, attribution)


def criteria_table(attribution: Attribution) -> PageTable:
    """Return a table of text, nats and share of each part of the source; without shares where they are in doubt."""
    header = ["sentence or list item", "nats", "share of the effect"]
    rows = [
        [text, digits(nats, sign="+"), "" if share is None else f"{100 * share:+z.0f}%"]
        for text, nats, share in attribution.parts
    ]
    columns = slice(2 if attribution.doubt else None)
    return header[columns], [row[columns] for row in rows]


def text_parts(heat_map: HeatMap) -> tuple[Part, ...]:
    """Return prompt and completion without colours."""
    return _parts(heat_map, {}, frozenset(), unit=None)


def _view(heat_map: HeatMap, name: str, values: Mapping[int, float], attribution: Attribution | None) -> LinkView:
    finite = {position: value for position, value in values.items() if math.isfinite(value)}
    order = sorted(finite, key=lambda position: (-abs(finite[position]), position))[:_STRONGEST]
    targets = frozenset(heat_map.targets.get(name, ()))
    return LinkView(
        name=name,
        count=len(values),
        largest=_largest(values),
        strongest=tuple((_visible(heat_map.tokens[position]), position, finite[position]) for position in order),
        parts=_parts(heat_map, values, targets, unit=None if attribution is None else attribution.unit),
        attribution=attribution,
    )


def _parts(
    heat_map: HeatMap, values: Mapping[int, float], targets: frozenset[int], *, unit: str | None
) -> tuple[Part, ...]:
    """Return prompt and completion, coloured by the values; a prompt without source tokens is folded."""
    border, end = heat_map.prompt_tokens, len(heat_map.tokens)
    in_prompt = any(position < border for position in values)
    return tuple(
        Part(name, stop - start, unfolded, _pieces(heat_map.tokens, start, stop, values, targets, unit=unit))
        for name, start, stop, unfolded in (("Prompt", 0, border, in_prompt), ("Completion", border, end, True))
    )


def _pieces(
    tokens: Sequence[str],
    start: int,
    end: int,
    values: Mapping[int, float],
    targets: frozenset[int],
    *,
    unit: str | None,
) -> tuple[Piece, ...]:
    """Cut tokens[start:end] into one piece per source token and one per run of other tokens."""
    largest = _largest(values)
    pieces = []
    for (source, target), run in groupby(
        range(start, end), key=lambda position: (position if position in values else None, position in targets)
    ):
        text = "".join(tokens[position] for position in run)
        outline = "target" if target else ""
        if source is None:
            pieces.append(Piece(text, "target of the link" if target else "", outline))
            continue
        value = values[source]
        share = abs(value) / largest if largest > 0.0 and math.isfinite(value) else 0.0
        colour = "c" if value < 0.0 else "h"  # cold, hot
        kind = f"{colour}{math.ceil(share * LEVELS)} {outline} {'line' if chr(10) in text else ''}"
        shown = f"{digits(value, sign='+')} {unit}" if unit else f"norm {digits(value)}"
        tip = f"{shown}, {share:.0%} of the largest, token {source}{', target of the link' if target else ''}"
        pieces.append(Piece(text, tip, " ".join(kind.split())))
    return tuple(pieces)


def _largest(values: Mapping[int, float]) -> float:
    return max((abs(value) for value in values.values() if math.isfinite(value)), default=0.0)


def _visible(text: str) -> str:
    return text.replace("\n", "↵").replace(" ", "␣") or "(empty)"
