"""What `cepo eval causal` found, as estimates with intervals: rank correlations, AUCs, effects and controls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from cepo.eval.causal.controls import SHARES, ControlPair, certificate
from cepo.eval.causal.evidence import BASELINES, COMPARED, DEFAULT_LINK, HARDENED, HARDENED_SCORES, SWEPT, definition
from cepo.eval.causal.interventions import INTERVENTIONS
from cepo.eval.report.tables import summary_row
from cepo.eval.statistics import (
    UNDETERMINED,
    Estimate,
    aucs,
    estimate,
    estimates,
    mean,
    rank_correlations,
    warning_of_few,
)

PRIMARY = "resample total tv"
"""The effect that definitions are chosen by: criteria resampled from the judge, everything after them written anew."""
SWEPT_ALONE: frozenset[str] = frozenset(
    definition(score, DEFAULT_LINK, count, rank)
    for score, count, rank in product(HARDENED_SCORES, SWEPT, SWEPT)
    if (count, rank) != HARDENED
)
"""Definitions that only the sweep over K and r has; only the primary effect and the AUC are compared with them."""
_MODES, _MEASURES = ("direct", "total"), ("tv", "margin", "flip")
_EFFECTS = [" ".join(parts) for parts in product(INTERVENTIONS, _MODES, _MEASURES)]


@dataclass(frozen=True)
class JudgeResults:
    """The judgements of one judge, with what was measured on them.

    Attributes:
        name: of the judge.
        rows: one record per rollout, malformed ones included.
        certificate: from `testbed_judges.certify`; None for a judge whose workings are not known.
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
        records: one per figure: what, population (a judge or a group), definition or other keys; value, and for an
            estimate low, high and count.
        correlations: (judge or group, definition, effect) -> estimate.
        aucs: (pair, definition) -> estimate, for certified pairs alone.
        refused: groups without an AUC or without figures, with the reason.
        best: the definition that agrees best with the primary effect, by group; none where the effect never varies.
        groups: names of the judges that were pooled, by group.
        warnings: paragraphs for readers, where there is too little data.
    """

    records: tuple[dict[str, Any], ...]
    correlations: Mapping[tuple[str, str, str], Estimate]
    aucs: Mapping[tuple[str, str], Estimate]
    refused: Mapping[str, str]
    best: Mapping[str, str]
    groups: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...]

    def shown(self, group: str) -> list[str]:
        """Return the definitions that every table and figure of a group shows."""
        return list(dict.fromkeys((*COMPARED, self.best.get(group, COMPARED[0]))))


def summarise_causal(
    results: Sequence[JudgeResults], *, pairs: Sequence[ControlPair], draws: int, seed: int
) -> CausalSummary:
    """Return every figure: rank correlations within each judge and pooled over a pair, AUCs, and the controls.

    Args:
        results: of each judge; those of a pair judged the same items.
        pairs: which judges belong together; empty for a judge whose workings are not known.
        draws: number of bootstrap resamples, at least 1.
        seed: of the bootstrap and of permuted labels.
    """
    bootstrap = {"draws": draws, "seed": seed}
    by_name = {one.name: one for one in results}
    known = [pair for pair in pairs if pair.follows in by_name and pair.ignores in by_name]
    groups: dict[str, tuple[str, ...]] = {pair.name: (pair.follows, pair.ignores) for pair in known}
    groups = groups or {name: (name,) for name in by_name}
    pooled = {group: [row for name in members for row in by_name[name].sound] for group, members in groups.items()}
    refused = {group: "no rollout could be measured" for group, rows in pooled.items() if not rows}
    correlations: dict[tuple[str, str, str], Estimate] = {}
    best: dict[str, str] = {}
    for group, members in groups.items():
        for place, rows in {group: pooled[group], **{name: by_name[name].sound for name in members}}.items():
            if pooled[group]:
                correlations |= {(place, *key): one for key, one in _correlate(rows, bootstrap).items()}
        scored = {
            name: one.value
            for (place, name, effect), one in correlations.items()
            if (place, effect) == (group, PRIMARY) and math.isfinite(one.value) and name not in BASELINES
        }
        if scored:
            best[group] = max(scored, key=lambda name: scored[name])
    areas: dict[tuple[str, str], Estimate] = {}
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
        names, values_NM = _definitions(pooled[pair.name])
        positive_N = [float(row["judge"] == pair.follows) for row in pooled[pair.name]]
        found = estimates(aucs, values_NM, positive_N, clusters=_prompts(pooled[pair.name]), **bootstrap)
        areas |= {(pair.name, name): one for name, one in zip(names, found, strict=True)}
    prompts = min((len(set(_prompts(one.sound))) for one in results), default=0)
    summary = CausalSummary((), correlations, areas, refused, best, groups, tuple(warning_of_few(prompts, "prompts")))
    records = [
        summary_row(
            {"what": "permuted", "population": group, "definition": name}, _permuted(pooled[group], name, bootstrap)
        )
        for group in groups
        if pooled[group]
        for name in summary.shown(group)
    ]
    records += [
        summary_row({"what": "spearman", "population": place, "definition": name, "effect": effect}, one)
        for (place, name, effect), one in correlations.items()
    ]
    records += [
        summary_row({"what": "auc", "population": pair, "definition": name}, one) for (pair, name), one in areas.items()
    ]
    records += [{"what": "refused", "population": name, "reason": reason} for name, reason in refused.items()]
    for one in results:
        records += [{"what": what, "population": one.name, **rest} for what, rest in _figures(one, bootstrap)]
    return replace(summary, records=tuple(records))


def effect_of(row: Mapping[str, Any], effect: str) -> float | None:
    """Return a measure of an intervention's effect on a rollout, or None where it is not known.

    Args:
        row: record of a sound rollout.
        effect: intervention, mode and measure, such as "resample total tv".
    """
    name, mode, measure = effect.rsplit(" ", 2)
    found = row["effects"][name][mode]
    return None if found is None else float(found[measure])


def _correlate(rows: Sequence[dict[str, Any]], bootstrap: Mapping[str, int]) -> dict[tuple[str, str], Estimate]:
    """Return the rank correlation of each definition with each effect; swept ones with the primary effect alone."""
    effects_NE = np.array([[effect_of(row, effect) for effect in _EFFECTS] for row in rows], dtype=float)
    found: dict[tuple[str, str], Estimate] = {}
    # Effects that are known for the same rows share their resamples' ranks.
    patterns: dict[tuple[bool, ...], list[int]] = {}
    for place, there_N in enumerate(np.isfinite(effects_NE).T):
        patterns.setdefault(tuple(there_N.tolist()), []).append(place)
    for pattern, chosen in patterns.items():
        members = [row for row, there in zip(rows, pattern, strict=True) if there]
        if len(members) < 3:
            continue
        names, values_NM = _definitions(members)
        of_chosen = estimates(
            rank_correlations,
            values_NM,
            effects_NE[list(pattern)][:, chosen],
            clusters=_prompts(members),
            **bootstrap,
        )
        for (name, place), one in zip(product(names, chosen), of_chosen, strict=True):
            if name not in SWEPT_ALONE or _EFFECTS[place] == PRIMARY:
                found[name, _EFFECTS[place]] = one
    return found


def _permuted(rows: Sequence[dict[str, Any]], name: str, bootstrap: Mapping[str, int]) -> Estimate:
    """Return a definition's rank correlation with the effects of other items, which must be about 0."""
    kept = [(row, effect) for row in rows if (effect := effect_of(row, PRIMARY)) is not None]
    if not kept:
        return UNDETERMINED
    effects_N = np.random.default_rng(bootstrap["seed"]).permutation([effect for _, effect in kept])
    return estimate(
        rank_correlations,
        [row["evidence"][name] for row, _ in kept],
        effects_N,
        clusters=_prompts([row for row, _ in kept]),
        **bootstrap,
    )


def _figures(one: JudgeResults, bootstrap: Mapping[str, int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield kind and content of each figure of one judge: counts, certificate, mean effects and controls."""
    rows, controls = one.sound, one.controls
    counts = {"rollouts": len(one.rows), "malformed": len(one.rows) - len(rows)}
    for mode in _MODES:
        found = [row["effects"]["resample"][mode] for row in rows]
        counts[f"without a {mode} effect of resampling"] = found.count(None)
        lost = sum(change["malformed"] for change in found if change is not None)
        counts[f"other resampled criteria without a {mode} effect"] = lost
    for figure, count in counts.items():
        yield "count", {"figure": figure, "value": float(count)}
    for figure, value in (one.certificate or {}).items():
        yield "certificate", {"figure": figure, "value": value}
    for intervention, mode, measure in product(INTERVENTIONS, _MODES, _MEASURES):
        effects = [effect_of(row, f"{intervention} {mode} {measure}") for row in rows]
        known = [(row, effect) for row, effect in zip(rows, effects, strict=True) if effect is not None]
        if known:
            found_mean = _mean(bootstrap, [effect for _, effect in known], _prompts([row for row, _ in known]))
            yield "effect", summary_row({"intervention": intervention, "measure": f"{mode} {measure}"}, found_mean)
    if not controls:
        return
    for figure, value in controls["masked"].items():
        yield "masked", {"figure": figure, "value": value}
    if controls["captum"] is not None:
        yield "captum", {"figure": "largest", "value": controls["captum"]}
    for step in controls["randomisation"]:
        labels = {"redrawn": step["redrawn"], "depth": step["depth"]}
        for figure, kept in _kept_order(controls["randomisation"][0], step, bootstrap).items():
            yield "randomised", summary_row({"figure": figure, **labels}, kept)
    for figure, ranking, share in product(("comprehensiveness", "sufficiency"), ("gradient", "random"), SHARES):
        of_cell = [
            found for found in controls["faithfulness"] if (found["ranking"], found["share"]) == (ranking, share)
        ]
        labels = {"figure": figure, "ranking": ranking, "share": share}
        yield "removal", summary_row(labels, _mean(bootstrap, [found[figure] for found in of_cell]))
    angles: dict[tuple[Any, ...], list[float]] = {}
    for found in controls["angles"]:
        angles.setdefault((found["link"], found["permutation"], found["rank"]), []).append(found["angle"])
    for (link, permutation, rank), values in angles.items():
        yield "angle", summary_row({"link": link, "permutation": permutation, "rank": rank}, _mean(bootstrap, values))
    for rank, angle in controls["random_angles"].items():
        yield "random angle", {"rank": int(rank), "value": angle}


def _kept_order(
    original: Mapping[str, Any], step: Mapping[str, Any], bootstrap: Mapping[str, int]
) -> dict[str, Estimate]:
    """Return how much of the order of row norms and of scores a step of redrawing keeps, the mean over its models."""

    def kept(first_N: np.ndarray, redrawn_NM: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
        return np.asarray(rank_correlations(first_N, redrawn_NM, weights_BN).mean(axis=-1))

    found = {}
    for link, by_draw in step["saliency"].items():
        of_rollouts = np.mean(by_draw, axis=0)
        if np.isfinite(of_rollouts).any():
            found[f"row norms of {link}, within a rollout"] = _mean(bootstrap, of_rollouts)
    for score in ("influence", "phi"):
        redrawn_NM = np.transpose(step[score])
        (found[f"{score} X->Y, over rollouts"],) = estimates(
            kept,
            original[score][0],
            redrawn_NM,
            **bootstrap,
        )
    return found


def _mean(bootstrap: Mapping[str, int], values: Sequence[float], clusters: Sequence[int] | None = None) -> Estimate:
    """Return the mean of the finite values."""
    finite = np.isfinite(values)
    if not finite.any():
        return UNDETERMINED
    labels = None if clusters is None else np.asarray(clusters)[finite]
    return estimate(mean, np.asarray(values)[finite], clusters=labels, **bootstrap)


def _definitions(rows: Sequence[dict[str, Any]]) -> tuple[list[str], np.ndarray]:
    names = list(rows[0]["evidence"])
    return names, np.array([[row["evidence"][name] for name in names] for row in rows])


def _prompts(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return [row["prompt"] for row in rows]
