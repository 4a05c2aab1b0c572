"""The results of `cepo eval causal` as estimates with intervals: agreement within prompts, errors, costs, controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np

from cepo.eval.causal.controls import PAIR, certificate
from cepo.eval.causal.measures import CHAIN, LINKS, PLACES
from cepo.eval.causal.within import areas_by_chance, areas_within, correlations_within
from cepo.eval.report.tables import summary_row
from cepo.eval.statistics import AT_LEAST_0, Estimate, areas, estimate, estimates, mean

EXACT = "exact effect"
"""The effect of fresh donors as a definition of its own, an upper reference for its approximations."""
_MODES = {"evidence": 1.0, "length": 0.0, "hollow": 0.0, "query": 0.0, "copied": 0.0}
_DEALS = 200  # shuffles of the modes within prompts


@dataclass(frozen=True)
class JudgeResults:
    """The judgements of one judge, with their measures.

    Attributes:
        name: the judge's name.
        rows: one record per judgement, including malformed ones.
        controls: results of the controls, and costs; empty for the judges of the certified pair.
        certificate: from `testbed_judges.certify`; None for a judge that is not certified.
    """

    name: str
    rows: tuple[dict[str, Any], ...]
    controls: Mapping[str, Any]
    certificate: Mapping[str, float] | None = None

    @property
    def sound(self) -> list[dict[str, Any]]:
        """The records of the judgements that could be measured."""
        return [row for row in self.rows if row["problem"] is None]

    @property
    def is_within(self) -> bool:
        """Whether some prompt has at least two measured judgements, so that they can be compared."""
        return max(Counter(row["prompt"] for row in self.sound).values(), default=0) > 1


@dataclass(frozen=True)
class CausalSummary:
    """All results of a run.

    Attributes:
        records: one per number: what, population (a judge), definition, place or other keys; value, and for an estimate
            low, high and count.
        refused: results that could not be computed, with the reason.
        warnings: paragraphs for the page.
    """

    records: tuple[dict[str, Any], ...]
    refused: Mapping[str, str]
    warnings: tuple[str, ...]

    def found(self, what: str, population: str) -> dict[tuple[str, str], Estimate]:
        """Return the estimates of a kind by definition and place."""
        return {
            (record["definition"], record["place"]): Estimate(
                *(record["value"], record.get("low", nan), record.get("high", nan)),
                *(record.get("count", 0), record.get("why", "")),
            )
            for record in self.records
            if (record["what"], record["population"]) == (what, population)
        }


def summarise_causal(results: Sequence[JudgeResults], *, seed: int) -> CausalSummary:
    """Return all results: agreement with modes and exact effects within prompts, errors, costs, and controls.

    Args:
        results: the results of the judge, then of the certified pair if it was examined.
        seed: seed of the shuffled modes.
    """
    records: list[dict[str, Any]] = []
    refused, warnings = {}, []
    for number, one in enumerate(results):
        records += [{"what": "count", "population": one.name, **count} for count in _counts(one)]
        for figure, value in (one.certificate or {}).items():
            records.append({"what": "certificate", "population": one.name, "figure": figure, "value": value})
        if not one.sound:
            refused[one.name] = "no judgement could be measured"
        elif number == 0:
            records += [{"population": one.name, **record} for record in _agreement(one, seed)]
            records += [{"population": one.name, **record} for record in _controls(one)]
            warnings += _warnings(one)
    pair = {one.name: one for one in results if one.name in PAIR}
    if len(pair) == len(PAIR):
        follows, ignores = (pair[name] for name in PAIR)
        problem = certificate(follows.certificate or {}, ignores.certificate or {})
        if not follows.sound or not ignores.sound:
            problem = "one of the judges has no judgement that could be measured"
        if problem is None:
            records += _separation(follows, ignores)
        else:
            refused["the certified pair"] = problem
    return CausalSummary(tuple(records), refused, tuple(warnings))


def _counts(one: JudgeResults) -> Iterator[dict[str, Any]]:
    modes = Counter(row["mode"] for row in one.sound if row["mode"] is not None)
    counts = {
        "judgements": len(one.rows),
        "prompts": len({row["prompt"] for row in one.sound}),
        "malformed": len(one.rows) - len(one.sound),
        **{f"mode {mode}": count for mode, count in modes.most_common()},
    }
    for figure, count in counts.items():
        yield {"figure": figure, "value": float(count)}


def _agreement(one: JudgeResults, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the agreement of each score with modes and exact effects, and the errors of the approximations."""
    rows = one.sound
    prompts = [row["prompt"] for row in rows]
    modes_N = np.array([_MODES.get(row["mode"], np.nan) for row in rows])
    has_modes = bool({0.0, 1.0} <= set(modes_N[np.isfinite(modes_N)]))
    for place in PLACES:
        truth_N = np.array([row["exact"]["chain" if place == "both->scores" else place] for row in rows], dtype=float)
        names, values_NM = _values(rows, place)
        if not names:
            continue
        known_N = np.isfinite(truth_N)
        kept = [prompt for prompt, known in zip(prompts, known_N, strict=True) if known]
        found = {"rank correlation": correlations_within(values_NM[known_N], truth_N[known_N], kept)}
        if has_modes:
            found["auc"] = areas_within(values_NM, modes_N, prompts)
            if place == "chain":
                chance = areas_by_chance(values_NM, modes_N, prompts, deals=_DEALS, seed=seed)
                found["auc, modes shuffled within prompts"] = chance
        for what, of_place in found.items():
            for name, value in zip(names, of_place, strict=True):
                if name != EXACT or what != "rank correlation":
                    yield summary_row({"what": what, "definition": name, "place": place}, value)
    for name in rows[0]["nats"]:
        errors_NL = np.array(
            [[abs(row["nats"][name][link] - row["nats"]["effect"][link]) for link in LINKS] for row in rows]
        )
        chain_N = errors_NL[:, [LINKS.index(link) for link in CHAIN]].mean(1)
        errors = np.column_stack([errors_NL, chain_N])
        of_places = estimates(mean, errors, clusters=prompts, within=AT_LEAST_0, unit="prompt")
        for place, value in zip((*LINKS, "chain"), of_places, strict=True):
            yield summary_row({"what": "error", "definition": name, "place": place}, value)
    for place in ("chain", *LINKS):
        exact = [row["exact"][place] for row in rows if row["exact"][place] is not None]
        clusters = [row["prompt"] for row in rows if row["exact"][place] is not None]
        if exact:
            value = estimate(mean, exact, clusters=clusters, unit="prompt")
            yield summary_row({"what": "mean", "definition": EXACT, "place": place}, value)


def _values(rows: Sequence[Mapping[str, Any]], place: str) -> tuple[list[str], np.ndarray]:
    """Return the definitions that a place has, including the exact effect, and their values (N, M)."""
    names = [name for name, of_places in rows[0]["values"].items() if place in of_places]
    columns = [[row["values"][name][place] for row in rows] for name in names]
    if place in rows[0]["exact"]:
        names = [*names, EXACT]
        columns.append([0.0 if row["exact"][place] is None else row["exact"][place] for row in rows])
    return names, np.array(columns, dtype=float).T


def _controls(one: JudgeResults) -> Iterator[dict[str, Any]]:
    controls = one.controls
    for name, cost in controls.get("costs", {}).items():
        yield {"what": "cost", "definition": name, "place": "chain", "value": cost}
    for figure, value in controls.get("masked", {}).items():
        yield {"what": "masked", "figure": figure, "value": value}
    if controls.get("captum") is not None:
        yield {"what": "captum", "figure": "largest", "value": controls["captum"]}
    for step in controls.get("randomisation", []):
        for score in ("effect", "influence"):
            yield {"what": "randomised", "figure": score, "redrawn": step["redrawn"], "value": step[score]}


def _separation(follows: JudgeResults, ignores: JudgeResults) -> Iterator[dict[str, Any]]:
    """Yield how well each score separates the judge that follows its criteria from the one that ignores them."""
    rows = [*follows.sound, *ignores.sound]
    positive_N = [float(row["judge"] == follows.name) for row in rows]
    prompts = [row["prompt"] for row in rows]
    for place in PLACES:
        names, values_NM = _values(rows, place)
        found = areas(values_NM, positive_N, clusters=prompts, unit="prompt")
        for name, value in zip(names, found, strict=True):
            labels = {"what": "pair", "population": " against ".join(PAIR), "definition": name, "place": place}
            yield summary_row(labels, value)


def _warnings(one: JudgeResults) -> list[str]:
    warnings = []
    modes = Counter(row["mode"] for row in one.sound if row["mode"] is not None)
    if not {0.0, 1.0} <= {_MODES.get(mode) for mode in modes}:
        known = ", ".join(f"{mode} ({count}x)" for mode, count in modes.items())
        warnings.append(
            "There is no AUC. It asks which judgements came to their verdict by evidence, and "
            + (f"here they came to it by {known}." if modes else "that is known of the testbed's judges alone.")
        )
    if not one.is_within:
        warnings.append(
            "Every prompt has one judgement, so rank correlations are over all rows: they mix what differs between "
            "prompts with what a reward inside GRPO could use."
        )
    return warnings
