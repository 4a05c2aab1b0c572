"""Write what was measured as one self-contained HTML page: summary, curves, tables and token heat maps."""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import DictLoader, Environment
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cepo.eval.figures import picture

_LEVELS = 20  # steps in which a token's colour grows with its norm
_STRONGEST = 5  # source tokens that are named beside a heat map
_UNFOLDED = 4  # rollouts of a section that start open
_DASHES = ("", "7 4", "2 4", "11 4 2 4", "4 2")
_COLOURS = 6
_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 428, 12, 214
_NUMBER = re.compile(r"\s*[-+−±]?\d[\d.,_]*(e[-+]?\d+)?\s*[%×]?(\s*±\s*\d[\d.,]*\s*%?)?\s*", re.IGNORECASE)
# What no UTF-8 file or HTML page may hold: lone surrogates, and the control characters that are no white space.
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class HeatMap:
    """One rollout to be shown, with one heat map for each of its links.

    Attributes:
        title: what the block is called, e.g. "row 12".
        tokens: text of every token of prompt + completion; together they are the text.
        prompt_tokens: how many of them are the prompt's.
        links: for each link, the L2 norm (>= 0) of the Jacobian row at each source position; it
            may be NaN or infinite.
        targets: for each link, the positions of its target.
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
class Curve:
    """One line of a plot.

    Attributes:
        name: what the legend calls it.
        steps: finite and ascending.
        values: one for each step; NaN, infinities and sizes above 1e100 are shown as gaps.
    """

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise ValueError(f"values has {len(self.values)} numbers, steps {len(self.steps)}; expected equally many")
        if not (np.isfinite(self.steps).all() and (np.diff(self.steps) >= 0).all()):
            raise ValueError(f"steps of the curve {self.name!r} are not all finite and ascending")


def write_score_report(
    path: str | os.PathLike[str],
    heat_maps: Sequence[HeatMap],
    *,
    title: str,
    summary: Mapping[str, str],
    notes: Sequence[str] = (),
) -> None:
    """Write the page of `cepo score --html`: the summary, the malformed rollouts, then each rollout's heat maps.

    Args:
        path: where the page goes; a page that is already there is replaced in one step.
        heat_maps: one for each rollout, in order.
        title: heading of the page.
        summary: values by label.
        notes: paragraphs below the summary.
    """
    _write_page(path, title=title, summary=summary, notes=notes, heat_maps={"Rollouts": heat_maps})


def write_demo_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Mapping[str, str],
    curves: Mapping[str, Sequence[Curve]],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
    heat_maps: Mapping[str, Sequence[HeatMap]],
    notes: Sequence[str] = (),
) -> None:
    """Write the page of `cepo demo`: the summary, reward curves, tables, and heat maps by section.

    Args:
        path: where the page goes; a page that is already there is replaced in one step.
        title: heading of the page.
        summary: values by label.
        curves: the curves of each panel, by the panel's title.
        tables: header and rows, by the table's caption; the first cell of a row names it.
        heat_maps: heat maps by the section's title, e.g. "Before training".
        notes: paragraphs below the summary.

    Raises:
        ValueError: for a table with a row that is not as long as its header.
    """
    _check_tables(tables)
    panels = [_panel(name, members) for name, members in curves.items()]
    _write_page(path, title=title, summary=summary, notes=notes, panels=panels, tables=tables, heat_maps=heat_maps)


def write_eval_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Mapping[str, str],
    figures: Mapping[str, Figure],
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
    heat_maps: Mapping[str, Sequence[HeatMap]] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write the page of a `cepo eval` command: the summary, figures, tables, and heat maps where there are some.

    Args:
        path: where the page goes; a page that is already there is replaced in one step.
        title: heading of the page.
        summary: values by label.
        figures: by caption, see `cepo.eval.figures`.
        tables: header and rows, by the table's caption; the first cell of a row names it.
        heat_maps: heat maps by the section's title.
        notes: paragraphs below the summary.

    Raises:
        ValueError: for a table with a row that is not as long as its header.
    """
    _check_tables(tables)
    pictures = {caption: picture(figure) for caption, figure in figures.items()}
    maps = heat_maps or {}
    _write_page(path, title=title, summary=summary, notes=notes, pictures=pictures, tables=tables, heat_maps=maps)


def _check_tables(tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]]) -> None:
    for caption, (header, rows) in tables.items():
        if ragged := [row for row in rows if len(row) != len(header)]:
            raise ValueError(f"tables[{caption!r}] has the row {list(ragged[0])}; expected {len(header)} cells")


def _write_page(path: str | os.PathLike[str], *, heat_maps: Mapping[str, Sequence[HeatMap]], **content: object) -> None:
    """Fill the page and move it to its place, block by block so that a long report is never held whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{secrets.token_hex(8)}.tmp")
    sections = [
        _Section(name, f"section-{number}", tuple(members)) for number, (name, members) in enumerate(heat_maps.items())
    ]
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=DictLoader({"page": _PAGE, "style": _STYLE})
    )
    environment.tests["numeric"] = lambda cell: _NUMBER.fullmatch(cell) is not None
    page = environment.get_template("page").generate(
        **content,
        sections=sections,
        link_view=_link_view,
        plain_parts=_parts,
        unfolded=_UNFOLDED,
        levels=_LEVELS,
        frame={"left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM, "width": _WIDTH, "height": _HEIGHT},
    )
    try:
        with draft.open("x", encoding="utf-8", newline="") as file:
            file.writelines(_UNWRITABLE.sub("\ufffd", piece) for piece in page)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


# Heat maps


@dataclass(frozen=True)
class _Section:
    """Heat maps under one heading."""

    title: str
    anchor: str
    maps: tuple[HeatMap, ...]

    @property
    def labels(self) -> list[str]:
        """Every label of the maps' facts, in order of first appearance."""
        return list(dict.fromkeys(label for heat_map in self.maps for label in heat_map.facts))

    @property
    def malformed(self) -> dict[str, list[tuple[int, HeatMap]]]:
        """The malformed maps with their numbers, by reason."""
        found: dict[str, list[tuple[int, HeatMap]]] = {}
        for number, heat_map in enumerate(self.maps):
            if heat_map.malformed is not None:
                found.setdefault(heat_map.malformed, []).append((number, heat_map))
        return found


@dataclass(frozen=True)
class _Piece:
    """A stretch of text that looks the same throughout.

    Attributes:
        text: one source token, or all tokens of a run that are none.
        tip: what the tooltip says; empty for plain text.
        kind: CSS classes; empty for plain text.
    """

    text: str
    tip: str = ""
    kind: str = ""


@dataclass(frozen=True)
class _Part:
    """The prompt or the completion."""

    name: str
    tokens: int
    unfolded: bool
    pieces: tuple[_Piece, ...]


@dataclass(frozen=True)
class _LinkView:
    """The heat map of one link."""

    name: str
    count: int
    largest: float
    strongest: tuple[tuple[str, int, float], ...]
    parts: tuple[_Part, ...]


def _link_view(heat_map: HeatMap, name: str) -> _LinkView:
    norms = heat_map.links[name]
    finite = {position: norm for position, norm in norms.items() if math.isfinite(norm)}
    order = sorted(finite, key=lambda position: (-finite[position], position))[:_STRONGEST]
    return _LinkView(
        name=name,
        count=len(norms),
        largest=max(finite.values(), default=0.0),
        strongest=tuple((_visible(heat_map.tokens[position]), position, finite[position]) for position in order),
        parts=_parts(heat_map, name),
    )


def _parts(heat_map: HeatMap, name: str | None = None) -> tuple[_Part, ...]:
    """Return prompt and completion, coloured for a link or plain; the prompt is folded unless it holds a source."""
    norms = heat_map.links[name] if name is not None else {}
    targets = frozenset(heat_map.targets.get(name, ())) if name is not None else frozenset[int]()
    border, end = heat_map.prompt_tokens, len(heat_map.tokens)
    in_prompt = any(position < border for position in norms)
    return (
        _Part("Prompt", border, in_prompt, _pieces(heat_map.tokens, 0, border, norms, targets)),
        _Part("Completion", end - border, True, _pieces(heat_map.tokens, border, end, norms, targets)),
    )


def _pieces(
    tokens: Sequence[str], start: int, end: int, norms: Mapping[int, float], targets: frozenset[int]
) -> tuple[_Piece, ...]:
    """Cut tokens[start:end] into one piece for each source token and one for each run of others."""
    largest = max((norm for norm in norms.values() if math.isfinite(norm)), default=0.0)
    pieces = []
    for (source, target), run in groupby(
        range(start, end), key=lambda position: (position if position in norms else None, position in targets)
    ):
        text = "".join(tokens[position] for position in run)
        outline = "target" if target else ""
        if source is None:
            pieces.append(_Piece(text, "target of the link" if target else "", outline))
            continue
        norm = norms[source]
        share = norm / largest if largest > 0.0 and math.isfinite(norm) else 0.0
        kind = f"h{math.ceil(share * _LEVELS)} {outline} {'line' if chr(10) in text else ''}"
        tip = f"norm {norm:.3g}, {share:.0%} of the largest, token {source}{', target of the link' if target else ''}"
        pieces.append(_Piece(text, tip, " ".join(kind.split())))
    return tuple(pieces)


def _visible(text: str) -> str:
    return text.replace("\n", "↵").replace(" ", "␣") or "(empty)"


# Curves


@dataclass(frozen=True)
class _Line:
    """One curve as drawn: SVG paths, its look, and the numbers that the legend states."""

    name: str
    colour: int
    dash: str
    raw: str
    smooth: str
    numbers: Mapping[str, str]


@dataclass(frozen=True)
class _Panel:
    """One plot: ticks as (place in SVG units, label), and lines."""

    title: str
    alt: str
    steps: tuple[tuple[float, str], ...]
    values: tuple[tuple[float, str], ...]
    lines: tuple[_Line, ...]


def _panel(title: str, curves: Sequence[Curve]) -> _Panel:
    all_steps = np.concatenate([np.zeros(0), *(curve.steps for curve in curves)])
    all_values = np.concatenate([np.zeros(0), *(_drawable(curve.values) for curve in curves)])
    low_step, high_step = _range(all_steps)
    step_ticks = np.asarray(MaxNLocator(6).tick_values(low_step, high_step))
    step_ticks = step_ticks[(step_ticks >= low_step) & (step_ticks <= high_step)]
    value_ticks = np.asarray(MaxNLocator(5).tick_values(*_range(all_values)))

    def across(steps: np.ndarray) -> np.ndarray:
        return np.interp(steps, [low_step, high_step], [_LEFT, _RIGHT])

    def up(values: np.ndarray) -> np.ndarray:
        return _BOTTOM + (values - value_ticks[0]) / (value_ticks[-1] - value_ticks[0]) * (_TOP - _BOTTOM)

    lines = []
    for number, curve in enumerate(curves):
        steps, values = np.asarray(curve.steps, dtype=float), _drawable(curve.values)
        smooth = _smooth(values)
        lines.append(
            _Line(
                name=curve.name,
                colour=number % _COLOURS,
                dash=_DASHES[number % len(_DASHES)],
                raw=_path(across(steps), up(values)),
                smooth=_path(across(steps), up(smooth)),
                numbers=_numbers(values, smooth),
            )
        )
    spoken = "; ".join(f"{line.name}, {', '.join(f'{k} {v}' for k, v in line.numbers.items())}" for line in lines)
    return _Panel(
        title=title,
        alt=f"{title}: {len(lines)} curves over steps {low_step:g} to {high_step:g}. {spoken or 'Nothing to show'}.",
        steps=tuple((place, f"{tick:g}") for place, tick in zip(across(step_ticks), step_ticks, strict=True)),
        values=tuple((place, f"{tick:.6g}") for place, tick in zip(up(value_ticks), value_ticks, strict=True)),
        lines=tuple(lines),
    )


def _drawable(values: Sequence[float]) -> np.ndarray:
    """Return the values, NaN for those that no axis can hold: beyond 1e100 the arithmetic of ticks overflows."""
    array = np.asarray(values, dtype=float)
    return np.where(np.abs(array) < 1e100, array, np.nan)


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return the least and the greatest finite value, apart from each other."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    margin = 0.0 if high > low else abs(low) / 10 or 0.5
    return low - margin, high + margin


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the centred mean over a tenth of the steps, of finite values only; NaN where the value is none."""
    if not values.size:
        return values
    finite = np.isfinite(values)
    window = np.ones(len(values) // 20 * 2 + 1)
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    count = np.convolve(finite.astype(float), window, mode="same")
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)


def _path(across: np.ndarray, up: np.ndarray) -> str:
    """Return an SVG path through the finite points, with a gap at each of the others."""
    finite = np.isfinite(up)
    runs = [list(run) for is_finite, run in groupby(range(len(up)), key=lambda i: bool(finite[i])) if is_finite]
    # A point between two gaps has no line; "h0" with round caps makes it a dot.
    return " ".join("M" + " L".join(f"{across[i]:.1f},{up[i]:.1f}" for i in run) + "h0" for run in runs)


def _numbers(values: np.ndarray, smooth: np.ndarray) -> dict[str, str]:
    finite = np.isfinite(values)
    if not finite.any():
        return dict.fromkeys(("start", "end", "least", "greatest"), "–")
    values, smooth = values[finite], smooth[finite]
    found = {"start": smooth[0], "end": smooth[-1], "least": values.min(), "greatest": values.max()}
    return {name: f"{number:.3g}" for name, number in found.items()}


# The page

_PAGE = """\
{% macro pairs(values) %}
<dl class="pairs">
{% for label, value in values.items() %}
<div><dt><bdi>{{ label }}</bdi></dt><dd><bdi>{{ value }}</bdi></dd></div>
{% endfor %}
</dl>
{% endmacro %}

{%- macro cell(value) %}
<td{% if value is numeric %} class="number"{% endif %}><bdi>{{ value }}</bdi></td>
{% endmacro %}

{%- macro text(parts, about) %}
{% for part in parts if part.tokens %}
<details class="part"{% if part.unfolded %} open{% endif %}>
<summary>{{ part.name }}{% if part.tokens > 1 %}, {{ part.tokens }} tokens{% endif %}</summary>
{# No line break may stand inside this element: white space in it is the model's. #}
<div class="text" dir="auto" translate="no" role="group" aria-label="{{ part.name }}{{ about }}">
{%- for piece in part.pieces -%}
{% if piece.kind %}<mark class="{{ piece.kind }}" title="{{ piece.tip }}">{{ piece.text }}</mark>
{%- else %}{{ piece.text }}{% endif %}
{%- endfor -%}
</div>
</details>
{% endfor %}
{% endmacro %}

{%- macro plot(panel) %}
<figure class="plot">
<figcaption><bdi>{{ panel.title }}</bdi></figcaption>
<svg viewBox="0 0 {{ frame.width }} {{ frame.height }}" role="img" aria-label="{{ panel.alt }}">
{% for place, label in panel.values %}
<path class="grid" d="M{{ frame.left }},{{ '%.1f' % place }}H{{ frame.right }}"/>
<text x="{{ frame.left - 8 }}" y="{{ '%.1f' % (place + 4) }}" text-anchor="end">{{ label }}</text>
{% endfor %}
{% for place, label in panel.steps %}
<path class="grid" d="M{{ '%.1f' % place }},{{ frame.bottom }}v4"/>
<text x="{{ '%.1f' % place }}" y="{{ frame.bottom + 18 }}" text-anchor="middle">{{ label }}</text>
{% endfor %}
<text x="{{ (frame.left + frame.right) // 2 }}" y="{{ frame.height - 4 }}" text-anchor="middle">step</text>
{% for line in panel.lines %}
<path class="raw c{{ line.colour }}" d="{{ line.raw }}"/>
{% endfor %}
{% for line in panel.lines %}
<path class="c{{ line.colour }}" stroke-dasharray="{{ line.dash }}" d="{{ line.smooth }}"/>
{% endfor %}
</svg>
{% if panel.lines %}
<div class="scroll" tabindex="0" role="region" aria-label="Numbers of {{ panel.title }}">
<table class="legend">
<thead><tr><th scope="col">curve</th>
{%- for name in panel.lines[0].numbers %}<th scope="col" class="number">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for line in panel.lines %}
<tr><th scope="row"><svg class="key" viewBox="0 0 30 8" aria-hidden="true"><path class="c{{ line.colour }}" \
stroke-dasharray="{{ line.dash }}" d="M2,4 L28,4"/></svg> <bdi>{{ line.name }}</bdi></th>
{%- for number in line.numbers.values() %}<td class="number">{{ number }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% else %}
<p class="quiet">Nothing to show.</p>
{% endif %}
</figure>
{% endmacro %}

{%- macro heat(view) %}
<figure class="heat" aria-label="Heat map of {{ view.name }}">
<figcaption>
<strong><bdi>{{ view.name }}</bdi></strong>
{% if view.largest > 0 %}
<span class="scale"><span>0</span>
<span class="ramp" role="img" aria-label="colour grows in proportion to the norm"></span>
<span>{{ '%.3g' % view.largest }}</span></span>
{% endif %}
<span class="quiet">{{ view.count }} source tokens{% if view.largest == 0 %}, no norm above 0{% endif %}</span>
</figcaption>
{% if view.strongest and view.largest > 0 %}
<p class="strongest"><span class="quiet">Largest norms:</span>
{% for token, position, norm in view.strongest %}
<span><bdi class="token" translate="no">{{ token }}</bdi> <span class="quiet">at {{ position }}</span> \
{{ '%.3g' % norm }}</span>
{% endfor %}
</p>
{% endif %}
{{ text(view.parts, ", heat map of " ~ view.name) }}
</figure>
{% endmacro -%}

<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
{% include "style" %}
</style>
</head>
<body>
<main>
<h1><bdi>{{ title }}</bdi></h1>
{% if summary %}
<section aria-label="Summary">
{{ pairs(summary) }}
</section>
{% endif %}
{% for note in notes %}
<p class="note" dir="auto">{{ note }}</p>
{% endfor %}

{% if panels %}
<section>
<h2>Curves</h2>
<p class="quiet">Faint: every step. Strong: centred mean over a tenth of the steps. A gap is a value that is no finite \
number. Start and end are read from the mean, least and greatest from the steps.</p>
<div class="plots">
{% for panel in panels %}
{{ plot(panel) }}
{% endfor %}
</div>
</section>
{% endif %}

{% if pictures %}
<section>
<h2>Figures</h2>
{% for caption, address in pictures.items() %}
<figure class="picture">
<figcaption><bdi>{{ caption }}</bdi></figcaption>
<img src="{{ address }}" alt="{{ caption }}">
</figure>
{% endfor %}
</section>
{% endif %}

{% if tables %}
<section>
<h2>Tables</h2>
{% for caption, (header, rows) in tables.items() %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ caption }}">
<table>
<caption><bdi>{{ caption }}</bdi></caption>
<thead><tr>
{% for name in header %}
<th scope="col"{% if not loop.first and rows and rows[0][loop.index0] is numeric %} class="number"{% endif %}>\
<bdi>{{ name }}</bdi></th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in rows %}
<tr>
{% for value in row %}
{% if loop.first %}
<th scope="row"><bdi>{{ value }}</bdi></th>
{% else %}
{{ cell(value) }}
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endfor %}
</section>
{% endif %}

{% if sections | map(attribute="maps") | sum(start=()) | selectattr("links") | list %}
<aside class="key-box" aria-label="How to read the heat maps">
<p>A heat map shows one link, source → target. A source token is <mark class="h12">coloured</mark> by the L2 norm of \
its row of the Jacobian, the gradient of the target's score at that token's embedding. The colour is linear in the \
norm, from 0 to the link's largest norm (the number beside the ramp), in {{ levels }} steps; it compares \
tokens, not links. Point at a token for its number. An <mark class="target">outline</mark> marks the target.</p>
</aside>
{% endif %}

{% for section in sections %}
<section>
<h2><bdi>{{ section.title }}</bdi></h2>
{% if not section.maps %}
<p class="quiet">There is none.</p>
{% endif %}
{% if section.malformed %}
<div class="warning">
<p><strong>Malformed: {{ section.malformed.values() | map("length") | sum }} of {{ section.maps | length }}.</strong> \
Nothing could be computed for these.</p>
<ul>
{% for reason, members in section.malformed.items() %}
<li><bdi>{{ reason }}</bdi> <span class="quiet">({{ members | length }}):</span>
{% for number, map in members %}
<a href="#{{ section.anchor }}-{{ number }}"><bdi>{{ map.title }}</bdi></a>{{ "," if not loop.last }}
{% endfor %}
</li>
{% endfor %}
</ul>
</div>
{% endif %}
{% if section.maps | length > unfolded %}
<details class="index">
<summary>All {{ section.maps | length }} at a glance</summary>
<div class="scroll" tabindex="0" role="region" aria-label="All of {{ section.title }}">
<table>
<thead><tr><th scope="col">title</th>
{% for label in section.labels %}
<th scope="col"><bdi>{{ label }}</bdi></th>
{% endfor %}
</tr></thead>
<tbody>
{% for map in section.maps %}
<tr><th scope="row"><a href="#{{ section.anchor }}-{{ loop.index0 }}"><bdi>{{ map.title }}</bdi></a></th>
{% for label in section.labels %}
{{ cell(map.facts.get(label, "")) }}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
</details>
{% endif %}
{% for map in section.maps %}
<details class="map" id="{{ section.anchor }}-{{ loop.index0 }}"{% if loop.index <= unfolded %} open{% endif %}>
<summary><bdi>{{ map.title }}</bdi>
{% if map.malformed is not none %}
<span class="badge">malformed</span>
{% endif %}
</summary>
{% if map.malformed is not none %}
<p class="warning">Malformed: <bdi>{{ map.malformed }}</bdi></p>
{% endif %}
{% if map.facts %}
{{ pairs(map.facts) }}
{% endif %}
{% for name in map.links %}
{{ heat(link_view(map, name)) }}
{% else %}
{{ text(plain_parts(map), "") }}
{% endfor %}
</details>
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""

_STYLE = """\
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --card: #ffffff; --ink: #22252b; --quiet: #5d6470; --rule: #e3e0da;
  --accent: #1f5f8b; --heat: 235 104 20; --deep: 0.72; --target: #0b7285; --warn: #9a3412; --warn-card: #fff4ec;
  --c0: #1f6fb2; --c1: #c2540a; --c2: #2b8a3e; --c3: #9c36b5; --c4: #a07400; --c5: #c2255c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1b1e24; --ink: #e4e6ea; --quiet: #9aa3b0; --rule: #2e333c;
    --accent: #7cc0f0; --heat: 255 132 48; --deep: 0.52; --target: #66d9e8; --warn: #ffb48a; --warn-card: #2b211b;
    --c0: #6cb6f5; --c1: #ff9a52; --c2: #69db7c; --c3: #da8cf0; --c4: #ffd43b; --c5: #ff85ab;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 66rem; margin: 0 auto; padding: clamp(1rem, 4vw, 3rem) clamp(0.8rem, 4vw, 2rem); }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 1.4rem; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 0.8rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--rule); }
a { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.quiet { color: var(--quiet); font-size: 0.9rem; }
.note { max-width: 46rem; margin: 0.7rem 0; }
.number, .pairs dd, .scale, .strongest { font-variant-numeric: tabular-nums; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: 0.6rem; margin: 0.9rem 0; }
.pairs div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 0.5rem 0.75rem; }
.pairs dt { color: var(--quiet); font-size: 0.82rem; }
.pairs dd { margin: 0; font-weight: 600; }
.key-box, .warning { border-inline-start: 4px solid var(--rule); border-radius: 4px; padding: 0.1rem 1rem; }
.warning { margin: 1.4rem 0; }
.key-box { margin-top: 2.8rem; background: var(--card); font-size: 0.93rem; }
.warning { border-color: var(--warn); background: var(--warn-card); }
p.warning { padding: 0.5rem 1rem; }
.badge { color: var(--warn); border: 1px solid; border-radius: 99px; font-size: 0.75rem; padding: 0.05rem 0.5rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.93rem; overflow-wrap: normal; }
caption { text-align: start; font-weight: 600; padding-bottom: 0.4rem; }
th, td { text-align: start; padding: 0.35rem 1.1rem 0.35rem 0; border-bottom: 1px solid var(--rule); }
thead th { color: var(--quiet); font-weight: 500; font-size: 0.85rem; vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 6.5rem; }
th.number, td.number { text-align: end; }
td.number { white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1.1rem; }
figure { margin: 0; min-width: 0; }
.plot { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 0.9rem 1rem 0.3rem; }
.picture { background: #ffffff; color: #22252b; border: 1px solid var(--rule); border-radius: 10px; }
.picture { margin: 1rem 0; padding: 0.9rem 1rem; max-width: 50rem; }
.picture figcaption { font-weight: 600; margin-bottom: 0.5rem; }
.picture img { display: block; width: 100%; height: auto; }
.plot figcaption { font-weight: 600; margin-bottom: 0.5rem; }
.plot > svg { display: block; width: 100%; max-width: 40rem; height: auto; }
.plot .scroll { margin: 0.4rem 0; }
.legend { width: 100%; font-size: 0.86rem; }
.legend tr:last-child > * { border-bottom: 0; }
.legend .number { padding-right: 0; padding-left: 0.9rem; }
.key { width: 30px; height: 8px; vertical-align: middle; }
svg text { fill: var(--quiet); font-size: 12px; font-variant-numeric: tabular-nums; }
svg path { fill: none; stroke-width: 2.2; stroke-linecap: round; stroke-linejoin: round; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .raw { stroke-width: 1.2; opacity: 0.32; }
{% for number in range(6) %}
.c{{ number }} { stroke: var(--c{{ number }}); }
{% endfor %}
summary { cursor: pointer; }
.index, .map { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.index, .map { margin: 0.8rem 0; padding: 0.7rem 1rem; }
.map { content-visibility: auto; contain-intrinsic-size: auto 3rem; }
.map[open] { contain-intrinsic-size: auto 40rem; }
.map > summary { font-weight: 600; }
.map:target { border-color: var(--accent); }
.heat { margin: 1.3rem 0; }
.heat figcaption { display: flex; flex-wrap: wrap; align-items: center; gap: 0.2rem 1rem; }
.scale { display: inline-flex; align-items: center; gap: 0.4rem; font-size: 0.85rem; }
.ramp {
  width: 7rem; height: 0.7rem; border-radius: 3px; border: 1px solid var(--rule);
  background: linear-gradient(to right, rgb(var(--heat) / 0), rgb(var(--heat) / var(--deep)));
}
.strongest { display: flex; flex-wrap: wrap; gap: 0.1rem 1.1rem; margin: 0.3rem 0; font-size: 0.88rem; }
.token { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap; }
.part { margin: 0.4rem 0; }
.part > summary { color: var(--quiet); font-size: 0.85rem; }
.text {
  white-space: pre-wrap; unicode-bidi: plaintext; line-height: 1.8; padding: 0.6rem 0.8rem; margin-top: 0.3rem;
  background: var(--page); border: 1px solid var(--rule); border-radius: 8px;
}
mark { background: none; color: inherit; border-radius: 3px; }
mark { -webkit-box-decoration-break: clone; box-decoration-break: clone; }
mark[class^="h"] { border-bottom: 1px dotted rgb(var(--heat)); }
mark.target { outline: 1.5px solid var(--target); outline-offset: 1px; }
mark.line::before { content: "↵"; content: "↵" / ""; opacity: 0.6; }
mark:empty::before { content: "◌"; content: "◌" / ""; opacity: 0.6; }
{% for level in range(1, levels + 1) %}
.h{{ level }} { background: rgb(var(--heat) / calc(var(--deep) * {{ level / levels }})); }
{% endfor %}
"""
