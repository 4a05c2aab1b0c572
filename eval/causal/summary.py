"""What `cepo eval causal` found, as estimates with intervals: rank correlations, AUCs, effects and controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from cepo.eval.causal.controls import SHARES, Pair, certificate
from cepo.eval.causal.evidence import BASELINES, DEFAULT, DEFAULT_LINK, HARDENED, PAPER, REWARD, SWEPT, definition
from cepo.eval.causal.interventions import INTERVENTIONS
from cepo.eval.statistics import Estimate, aucs, estimate, estimates, mean, rank_correlations, warning_of_few

PRIMARY = "resample total tv"
"""The effect that definitions are chosen by: criteria resampled from the judge, everything after them written anew."""
SWEPT_ALONE: frozenset[str] = frozenset(
    definition(score, DEFAULT_LINK, count, rank)
    for score in ("phi", "phi_retained", "phi_influence", "influence_retained", "norm")
    for count, rank in product(SWEPT, SWEPT)
    if (count, rank) != HARDENED
)
"""Definitions that only the sweep over K and r has; they are compared with the primary effect and in the AUC alone."""
_MODES, _MEASURES = ("direct", "total"), ("tv", "margin", "flip")


@dataclass(frozen=True)
class Population:
    """The judgements of one judge, with what was measured on them.

    Attributes:
        name: of the judge.
        rows: one record a rollout, malformed ones among them.
        certificate: what `testbed_judges.certify` says of the judge; None for one that has no known workings.
        controls: what the controls show.
    """

    name: str
    rows: tuple[dict[str, Any], ...]
    certificate: Mapping[str, float] | None
    controls: Mapping[str, Any]

    @property
    def sound(self) -> list[dict[str, Any]]:
        """The records of rollouts that could be measured."""
        return [row for row in self.rows if row["malformed"] is None]


@dataclass(frozen=True)
class CausalSummary:
    """Every figure of a run.

    Attributes:
        records: what, population, definition or other keys, value, low, high, count; one a figure.
        correlations: (population or group, definition, effect) -> estimate.
        aucs: (pair, definition) -> estimate, for certified pairs alone.
        refused: groups without an AUC or without figures, with the reason.
        best: the definition that agrees best with the primary effect, by group; none where the effect never varies.
        groups: names of the populations that were pooled, by group.
        warnings: paragraphs for readers, where there is too little to go by.
    """

    records: tuple[dict[str, Any], ...]
    correlations: Mapping[tuple[str, str, str], Estimate]
    aucs: Mapping[tuple[str, str], Estimate]
    refused: Mapping[str, str]
    best: Mapping[str, str]
    groups: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...]


def summarise(populations: Sequence[Population], *, pairs: Sequence[Pair], draws: int, seed: int) -> CausalSummary:
    """Return every figure: rank correlations within each judge and pooled over a pair, AUCs, and the controls.

    Args:
        populations: the judges; those of a pair judged the same items.
        pairs: which judges belong together; empty for a judge of unknown workings.
        draws: bootstrap resamples, at least 1.
        seed: of the bootstrap and of permuted labels.
    """
    by_name = {population.name: population for population in populations}
    known = [pair for pair in pairs if pair.follows in by_name and pair.ignores in by_name]
    groups: dict[str, tuple[str, ...]] = {pair.name: (pair.follows, pair.ignores) for pair in known}
    groups = groups or {population.name: (population.name,) for population in populations}
    correlations: dict[tuple[str, str, str], Estimate] = {}
    areas: dict[tuple[str, str], Estimate] = {}
    refused: dict[str, str] = {}
    best: dict[str, str] = {}
    records: list[dict[str, Any]] = []
    for group, members in groups.items():
        pooled = [row for name in members for row in by_name[name].sound]
        if not pooled:
            refused[group] = "no rollout could be measured"
            continue
        wanted = {group: pooled, **{name: by_name[name].sound for name in members}}
        for place, rows in wanted.items():
            if rows:
                correlations |= {(place, *key): one for key, one in _correlate(rows, draws, seed).items()}
        scored = {
            name: one.value
            for (at, name, effect), one in correlations.items()
            if (at, effect) == (group, PRIMARY) and math.isfinite(one.value) and name not in BASELINES
        }
        if scored:
            best[group] = max(scored, key=lambda name: scored[name])
        for name in dict.fromkeys((PAPER, DEFAULT, REWARD, best.get(group, PAPER))):
            records.append(
                {
                    "what": "permuted",
                    "population": group,
                    "definition": name,
                    **_numbers(_permuted(pooled, name, draws, seed)),
                }
            )
    for pair in known:
        first, second = by_name[pair.follows], by_name[pair.ignores]
        assert first.certificate is not None
        assert second.certificate is not None
        problem = certificate(first.certificate, second.certificate)
        if not first.sound or not second.sound:
            problem = "one of the judges has no rollout that could be measured"
        if problem is not None:
            refused[pair.name] = problem
            continue
        rows = [*first.sound, *second.sound]
        names, values_NM = _definitions(rows)
        positive_N = [float(row["judge"] == pair.follows) for row in rows]
        found = estimates(aucs, values_NM, positive_N, clusters=_prompts(rows), draws=draws, seed=seed)
        areas |= {(pair.name, name): one for name, one in zip(names, found, strict=True)}
    records += [
        {"what": "spearman", "population": place, "definition": name, "effect": effect, **_numbers(one)}
        for (place, name, effect), one in correlations.items()
    ]
    records += [
        {"what": "auc", "population": pair, "definition": name, **_numbers(one)} for (pair, name), one in areas.items()
    ]
    records += [{"what": "refused", "population": name, "reason": reason} for name, reason in refused.items()]
    for population in populations:
        records += _population_records(population, draws, seed)
    prompts = min((len(set(_prompts(population.sound))) for population in populations), default=0)
    warnings = tuple(warning_of_few(prompts, "prompts"))
    return CausalSummary(tuple(records), correlations, areas, refused, best, groups, warnings)


def effect_of(row: Mapping[str, Any], effect: str) -> float | None:
    """Return a measure of an intervention's effect on a rollout, or None where it is not known.

    Args:
        row: record of a sound rollout.
        effect: intervention, mode and measure, such as "resample total tv".
    """
    name, mode, measure = effect.rsplit(" ", 2)
    found = row["effects"][name][mode]
    return None if found is None else float(found[measure])


def _correlate(rows: Sequence[dict[str, Any]], draws: int, seed: int) -> dict[tuple[str, str], Estimate]:
    """Return the rank correlation of each definition with each effect; swept ones with the primary effect alone."""
    effects = [" ".join(parts) for parts in product(INTERVENTIONS, _MODES, _MEASURES)]
    effects_NE = np.array([[_number(effect_of(row, effect)) for effect in effects] for row in rows])
    there_NE = np.isfinite(effects_NE)
    found: dict[tuple[str, str], Estimate] = {}
    # Effects that are known for the same rows share their resamples' ranks.
    for pattern in dict.fromkeys(map(tuple, there_NE.T.tolist())):
        kept = np.array(pattern)
        chosen = [place for place in range(len(effects)) if tuple(there_NE[:, place].tolist()) == pattern]
        if kept.sum() < 3:
            continue
        members = [row for row, there in zip(rows, kept, strict=True) if there]
        names, values_NM = _definitions(members)
        of_chosen = estimates(
            rank_correlations,
            values_NM,
            effects_NE[kept][:, chosen],
            clusters=_prompts(members),
            draws=draws,
            seed=seed,
        )
        for (name, place), one in zip(product(names, chosen), of_chosen, strict=True):
            if name not in SWEPT_ALONE or effects[place] == PRIMARY:
                found[name, effects[place]] = one
    return found


def _permuted(rows: Sequence[dict[str, Any]], name: str, draws: int, seed: int) -> Estimate:
    """Return a definition's rank correlation with the effects of other items: nothing may be left of it."""
    kept = [(row, effect) for row in rows if (effect := effect_of(row, PRIMARY)) is not None]
    if not kept:
        return Estimate(math.nan, math.nan, math.nan, 0)
    effects_N = np.random.default_rng(seed).permutation([effect for _, effect in kept])
    values = [row["evidence"][name] for row, _ in kept]
    clusters = _prompts([row for row, _ in kept])
    return estimate(rank_correlations, values, effects_N, clusters=clusters, draws=draws, seed=seed)


def _population_records(population: Population, draws: int, seed: int) -> list[dict[str, Any]]:
    """Return the figures of one judge: counts, certificate, mean effects and controls."""
    name, rows, controls = population.name, population.sound, population.controls
    records: list[dict[str, Any]] = []

    def add(what: str, one: Estimate | float, **keys: Any) -> None:
        numbers = _numbers(one) if isinstance(one, Estimate) else {"value": one}
        records.append({"what": what, "population": name, **keys, **numbers})

    def averaged(values: Sequence[float], clusters: Sequence[int] | None = None) -> Estimate:
        kept = [place for place, value in enumerate(values) if math.isfinite(value)]
        if not kept:
            return Estimate(math.nan, math.nan, math.nan, 0)
        labels = None if clusters is None else [clusters[place] for place in kept]
        return estimate(mean, [values[place] for place in kept], clusters=labels, draws=draws, seed=seed)

    add("count", float(len(population.rows)), figure="rollouts")
    add("count", float(len(population.rows) - len(rows)), figure="malformed")
    for figure, value in (population.certificate or {}).items():
        add("certificate", value, figure=figure)
    for parts in product(INTERVENTIONS, _MODES, _MEASURES):
        known = [row for row in rows if effect_of(row, " ".join(parts)) is not None]
        if known:
            add(
                "effect",
                averaged([_number(effect_of(row, " ".join(parts))) for row in known], _prompts(known)),
                intervention=parts[0],
                measure=" ".join(parts[1:]),
            )
    for mode in _MODES:
        found = [row["effects"]["resample"][mode] for row in rows]
        add("count", float(found.count(None)), figure=f"without a {mode} effect of resampling")
        lost = sum(one["malformed"] for one in found if one is not None)
        add("count", float(lost), figure=f"other resampled criteria without a {mode} effect")
    if not controls:
        return records
    for figure, value in controls["masked"].items():
        add("masked", value, figure=figure)
    if controls["captum"] is not None:
        add("captum", controls["captum"], figure="largest")
    records += _randomised(population, draws, seed)
    for figure, ranking, share in product(("comprehensiveness", "sufficiency"), ("gradient", "random"), SHARES):
        values = [one[figure] for one in controls["faithfulness"] if (one["ranking"], one["share"]) == (ranking, share)]
        add("removal", averaged(values), figure=figure, ranking=ranking, share=share)
    cells = dict.fromkeys((one["link"], one["permutation"], one["rank"]) for one in controls["angles"])
    for link, permutation, rank in cells:
        values = [
            one["angle"]
            for one in controls["angles"]
            if (one["link"], one["permutation"], one["rank"]) == (link, permutation, rank)
        ]
        add("angle", averaged(values), link=link, permutation=permutation, rank=rank)
    for rank, angle in controls["random_angles"].items():
        add("random angle", angle, rank=int(rank))
    return records


def _randomised(population: Population, draws: int, seed: int) -> list[dict[str, Any]]:
    """Return what is left of the order of row norms and scores, the mean over redrawn models, at each step."""

    def kept_order(first_N: np.ndarray, redrawn_NM: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
        return np.asarray(rank_correlations(first_N, redrawn_NM, weights_BN).mean(axis=-1))

    steps = population.controls["randomisation"]
    records = []
    for step in steps:
        found = {}
        for link, by_draw in step["saliency"].items():
            of_rollouts = [float(np.mean(values)) for values in zip(*by_draw, strict=True)]
            sound = [value for value in of_rollouts if math.isfinite(value)]
            if sound:
                found[f"row norms of {link}, within a rollout"] = estimate(mean, sound, draws=draws, seed=seed)
        for score in ("influence", "phi"):
            columns = [steps[0][score][0], *step[score]]
            found[f"{score} X->Y, over rollouts"] = estimates(
                kept_order, columns[0], np.transpose(columns[1:]), draws=draws, seed=seed
            )[0]
        records += [
            {
                "what": "randomised",
                "population": population.name,
                "figure": figure,
                "redrawn": step["redrawn"],
                "depth": step["depth"],
                **_numbers(one),
            }
            for figure, one in found.items()
        ]
    return records


def _definitions(rows: Sequence[dict[str, Any]]) -> tuple[list[str], np.ndarray]:
    names = list(rows[0]["evidence"])
    return names, np.array([[row["evidence"][name] for name in names] for row in rows])


def _prompts(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return [row["prompt"] for row in rows]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _numbers(one: Estimate) -> dict[str, Any]:
    """Return an estimate for JSON, which has no NaN."""
    values = {"value": one.value, "low": one.low, "high": one.high}
    return {**{name: value if math.isfinite(value) else None for name, value in values.items()}, "count": one.count}
