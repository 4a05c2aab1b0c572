"""Token heat maps: how strongly a link's target depends on each token of a rollout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

LEVELS = 20
"""Number of steps in which a token's colour grows with its norm."""

_STRONGEST = 5  # source tokens that are listed above a heat map


@dataclass(frozen=True)
class HeatMap:
    """One rollout to show, with one heat map per link.

    Attributes:
        title: heading, e.g. "row 12".
        tokens: text of every token of prompt + completion, in order.
        prompt_tokens: how many of them are the prompt's.
        links: by link, the L2 norm (>= 0, NaN or infinite) of the Jacobian row at each source position.
        targets: by link, the positions of its target.
        facts: short values by label, shown above the text, e.g. {"reward": "0.71"}.
        malformed: why nothing could be computed, or None.
    """

    title: str
    tokens: tuple[str, ...]
    prompt_tokens: int
    links: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    targets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    malformed: str | None = None

    def __post_init__(self) -> None:
        count = len(self.tokens)
        if not 0 <= self.prompt_tokens <= count:
            raise ValueError(f"prompt_tokens is {self.prompt_tokens}; expected 0 to {count}, the number of tokens")
        if unknown := set(self.targets) - set(self.links):
            raise ValueError(f"targets names {sorted(unknown)}, which links does not have; it has {sorted(self.links)}")
        for name, positions in (*self.links.items(), *self.targets.items()):
            if outside := [position for position in positions if not 0 <= position < count]:
                raise ValueError(f"{name} has the position {outside[0]}; expected 0 to {count - 1}")
        for name, norms in self.links.items():
            if negative := [norm for norm in norms.values() if norm < 0.0]:
                raise ValueError(f"links[{name!r}] holds the norm {negative[0]}; expected norms >= 0")


@dataclass(frozen=True)
class Piece:
    """A stretch of text that looks the same throughout.

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
    """The heat map of one link."""

    name: str
    count: int
    largest: float
    strongest: tuple[tuple[str, int, float], ...]
    parts: tuple[Part, ...]


def link_view(heat_map: HeatMap, name: str) -> LinkView:
    norms = heat_map.links[name]
    finite = {position: norm for position, norm in norms.items() if math.isfinite(norm)}
    order = sorted(finite, key=lambda position: (-finite[position], position))[:_STRONGEST]
    return LinkView(
        name=name,
        count=len(norms),
        largest=max(finite.values(), default=0.0),
        strongest=tuple((_visible(heat_map.tokens[position]), position, finite[position]) for position in order),
        parts=text_parts(heat_map, name),
    )


def text_parts(heat_map: HeatMap, name: str | None = None) -> tuple[Part, ...]:
    """Return prompt and completion, coloured for a link or plain; a prompt without source tokens is folded."""
    norms = heat_map.links[name] if name is not None else {}
    targets = frozenset(heat_map.targets.get(name, ())) if name is not None else frozenset[int]()
    border, end = heat_map.prompt_tokens, len(heat_map.tokens)
    in_prompt = any(position < border for position in norms)
    return (
        Part("Prompt", border, in_prompt, _pieces(heat_map.tokens, 0, border, norms, targets)),
        Part("Completion", end - border, True, _pieces(heat_map.tokens, border, end, norms, targets)),
    )


def _pieces(
    tokens: Sequence[str], start: int, end: int, norms: Mapping[int, float], targets: frozenset[int]
) -> tuple[Piece, ...]:
    """Cut tokens[start:end] into one piece for each source token and one for each run of others."""
    largest = max((norm for norm in norms.values() if math.isfinite(norm)), default=0.0)
    pieces = []
    for (source, target), run in groupby(
        range(start, end), key=lambda position: (position if position in norms else None, position in targets)
    ):
        text = "".join(tokens[position] for position in run)
        outline = "target" if target else ""
        if source is None:
            pieces.append(Piece(text, "target of the link" if target else "", outline))
            continue
        norm = norms[source]
        share = norm / largest if largest > 0.0 and math.isfinite(norm) else 0.0
        kind = f"h{math.ceil(share * LEVELS)} {outline} {'line' if chr(10) in text else ''}"
        tip = f"norm {norm:.3g}, {share:.0%} of the largest, token {source}{', target of the link' if target else ''}"
        pieces.append(Piece(text, tip, " ".join(kind.split())))
    return tuple(pieces)


def _visible(text: str) -> str:
    return text.replace("\n", "↵").replace(" ", "␣") or "(empty)"
