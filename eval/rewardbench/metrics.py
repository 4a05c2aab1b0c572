"""Metrics of preference items: by scope and RewardBench's sections for any judge, and those of written judgements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any

import numpy as np

from cepo.eval.judges.settings import PLACES
from cepo.eval.rewardbench.items import PreferenceItem
from cepo.eval.statistics import DIFFERENCE, SHARE, Estimate, estimate, ratio
from cepo.files import content_hash, counted

SECTIONS: Mapping[str, Mapping[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
"""RewardBench's sections, with the weight of each subset: its number of examples, except for math-prm, whose 447
examples weigh as much as the six coding subsets together. Some versions of the reward-bench package swap the two xstest
counts; these are those of the data.

Source:
    Lambert et al., RewardBench: evaluating reward models for language modeling (2024), section 4.
"""
TIES = "Ties"
_MOST_COUNTS_AS = 3.0
_ACCURACIES = ("consistent", "average", "single_swap")
METRICS = (
    *_ACCURACIES,
    *("verdicts_only", "soft_average", "soft_summed", "expected_margin"),
    *("position_bias", "follows_position", "ties", "ties_on_ties", "parse_failures", "forced", "not_judged"),
)
"""All metrics, in the order in which they are shown."""
_ENDS: Mapping[str, tuple[float, float] | None] = {"position_bias": DIFFERENCE, "expected_margin": None}
_MISSING: Mapping[str, Any] = {"error": "missing"}


@dataclass(frozen=True)
class MetricEstimate:
    """One line of the summary.

    Attributes:
        metric: one of METRICS, see `measure_preferences`, or a reward model's, see `measure_rewards`.
        scope: "all", a subset, a section such as "section Chat", "mean of sections", "mean of subsets without Ties", or
            "RewardBench 2".
        estimate: value, interval, and the number of items (for rates, of judgements) in the mean.
    """

    metric: str
    scope: str
    estimate: Estimate


@dataclass(frozen=True)
class Outcome:
    """How one item was judged; None for results that need a missing judgement.

    Attributes:
        records: for each pair, the records with the chosen response first and second.
        right: whether it is right with the chosen response first, and with it second. An item of several pairs is right
            in an order if all of its pairs are. A tie is right if the scores are equal.
        single: whether it is right with each pair in one randomly drawn order.
        soft_right: as `right`, by the sign of the expected margin.
        soft_summed: whether it is right by the sign of each pair's expected margin, summed over both orders.
        margin: expected score of the chosen response minus that of the rejected one, mean over pairs and orders.
    """

    records: Sequence[Sequence[Mapping[str, Any]]]
    right: tuple[bool, bool] | None = None
    single: bool | None = None
    soft_right: tuple[bool, bool] | None = None
    soft_summed: bool | None = None
    margin: float | None = None


def measure_preferences(
    items: Sequence[PreferenceItem], records: Mapping[str, Mapping[str, Any]], *, seed: int = 0
) -> list[MetricEstimate]:
    """Return every measure with its 95% interval; all items of a prompt are one unit.

    Accuracies (ties and judgements without a verdict count as wrong; items with a failed judgement are left out):
    `consistent`, right in both orders; `average`, the mean over the two orders; `single_swap`, one randomly drawn order
    per pair, as in j1's evaluation; `verdicts_only`, over single judgements with a verdict. An item of several pairs
    (RewardBench 2) is right if the chosen response beats every rejected one.
    Soft accuracies (over items with expected scores): `soft_average`, by the sign of the expected margin, mean over the
    orders; `soft_summed`, by the sign of the margins summed over the orders; `expected_margin`, chosen minus rejected.
    Rates of judgements: `position_bias`, the share of verdicts for A minus the share for B, without ties;
    `follows_position`, the share of pairs whose verdicts in the two orders name the same place; `ties`;
    `parse_failures`; `forced`; `not_judged`. Items that are ties count only in these rates, with `ties_on_ties` in
    place of `ties`.
    All measures are given for all items and for each subset, the accuracies also for each of RewardBench's sections
    that has a subset in the data, and for the mean of the sections if there are all four. Over all items, `single_swap`
    is what j1 reports.

    RewardBench 2 defines its measure of Ties for scores of single responses. A judge of pairs has none, so here Ties is
    plain accuracy (every right answer beats every wrong one) and is left out of the mean.

    Args:
        items: the items, at least one.
        records: records by the key of the task, see `collect_judgements`.
        seed: seed of the drawn orders.
    """
    tallies = [_tally(item, outcome(item, records, seed=seed)) for item in items]
    return measure_tallies(items, tallies, METRICS, weighted=_ACCURACIES, ends=_ENDS)


def measure_tallies(
    items: Sequence[PreferenceItem],
    tallies: Sequence[Mapping[str, Sequence[float]]],
    metrics: Sequence[str],
    *,
    weighted: Sequence[str],
    ends: Mapping[str, tuple[float, float] | None],
) -> list[MetricEstimate]:
    """Return each metric over all items and over each subset, and some also for sections and means of subsets.

    Args:
        items: the items, at least one; all items of a prompt are one unit.
        tallies: for each item, the values that it adds to each metric; metrics without values are left out.
        metrics: names of the metrics, in the order in which they are shown.
        weighted: the metrics that are also given for sections and means of subsets.
        ends: bounds of the metrics that are not in [0, 1]; None for an unbounded one.
    """
    scopes = {"all": list(range(len(items)))}
    for name in dict.fromkeys(item.subset for item in items):
        scopes.setdefault(name, [place for place, item in enumerate(items) if item.subset == name])
    measures = []
    for scope, places in scopes.items():
        of_scope, prompts = [tallies[place] for place in places], [items[place].prompt for place in places]
        measures += _rates(scope, of_scope, prompts, metrics, ends)
    for metric in weighted:
        judged = [place for place, tally in enumerate(tallies) if metric in tally]
        values = [float(np.mean(tallies[place][metric])) for place in judged]
        measures += _weighted_measures(metric, values, [items[place] for place in judged])
    return measures


def outcome(item: PreferenceItem, records: Mapping[str, Mapping[str, Any]], *, seed: int = 0) -> Outcome:
    """Return how an item was judged."""
    pairs = [[records.get(item.task_key(*pair, place), _MISSING) for place in PLACES] for pair in item.pairs]
    if any(record["error"] for pair in pairs for record in pair):
        return Outcome(pairs)
    wins = [
        [record["winner"] == ("tie" if item.tie else place) for record, place in zip(pair, PLACES, strict=True)]
        for pair in pairs
    ]
    found = Outcome(
        pairs,
        right=_in_both_orders(wins),
        single=all(won[_drawn_order(item, pair, seed)] for won, pair in zip(wins, item.pairs, strict=True)),
    )
    if not all(record["soft"] for pair in pairs for record in pair):
        return found
    margins = [[chosen_margin(record) for record in pair] for pair in pairs]
    return replace(
        found,
        soft_right=_in_both_orders([[margin > 0 for margin in pair] for pair in margins]),
        soft_summed=all(sum(pair) > 0 for pair in margins),
        margin=float(np.mean(margins)),
    )


def chosen_margin(record: Mapping[str, Any]) -> float:
    """Return the expected score of the chosen response minus that of the rejected one, from one record."""
    first, second = record["soft"]
    return float(first - second if record["chosen_at"] == "A" else second - first)


def _in_both_orders(wins: Sequence[Sequence[bool]]) -> tuple[bool, bool]:
    """Return whether all pairs are won with the chosen response first, and with it second."""
    return all(first for first, _ in wins), all(second for _, second in wins)


def _drawn_order(item: PreferenceItem, pair: tuple[int, int], seed: int) -> int:
    return int(content_hash("order", seed, item.key, *pair), 16) % 2


def _tally(item: PreferenceItem, found: Outcome) -> dict[str, list[float]]:
    """Return the values that an item adds to each metric; metrics without values are left out."""
    rows = [record for pair in found.records for record in pair]
    judged = [record for record in rows if not record["error"]]
    read = [record for record in judged if record["winner"] is not None]
    decided = [
        [one["winner"] for one in pair if not one["error"] and one["winner"] in PLACES] for pair in found.records
    ]
    tally = {
        "verdicts_only": [float(record["winner"] == record["chosen_at"]) for record in read],
        "position_bias": [1.0 if winner == "A" else -1.0 for pair in decided for winner in pair],
        "follows_position": [float(pair[0] == pair[1]) for pair in decided if len(pair) == 2],
        "ties": [float(record["winner"] == "tie") for record in judged],
        "parse_failures": [float(record["winner"] is None) for record in judged],
        "forced": [float(record["forced"]) for record in judged],
        "not_judged": [float(bool(record["error"])) for record in rows],
    }
    if item.tie:
        del tally["verdicts_only"]
        tally["ties_on_ties"] = tally.pop("ties")
        return {metric: values for metric, values in tally.items() if values}
    if found.right is not None:
        tally |= {"consistent": [float(all(found.right))], "average": [sum(found.right) / 2]}
        tally["single_swap"] = [float(bool(found.single))]
    if found.soft_right is not None:
        tally |= {"soft_average": [sum(found.soft_right) / 2], "soft_summed": [float(bool(found.soft_summed))]}
        tally["expected_margin"] = [found.margin or 0.0]
    return {metric: values for metric, values in tally.items() if values}


def _rates(
    scope: str,
    tallies: Sequence[Mapping[str, Sequence[float]]],
    prompts: Sequence[str],
    metrics: Sequence[str],
    ends: Mapping[str, tuple[float, float] | None],
) -> list[MetricEstimate]:
    """Return the mean of each metric over its values; the values of a prompt are one unit."""
    measures = []
    for metric in metrics:
        there = [place for place, tally in enumerate(tallies) if metric in tally]
        if there:
            values = [tallies[place][metric] for place in there]
            sums_N, counts_N = [sum(of_item) for of_item in values], [len(of_item) for of_item in values]
            found = estimate(
                *(ratio, sums_N, counts_N),
                clusters=[prompts[place] for place in there],
                ends=ends.get(metric, SHARE),
                unit="prompt",
            )
            measures.append(MetricEstimate(metric, scope, replace(found, count=sum(counts_N))))
    return measures


def _weighted_measures(metric: str, values: Sequence[float], items: Sequence[PreferenceItem]) -> list[MetricEstimate]:
    """Return the accuracies of the sections, of their mean, and of the mean of RewardBench 2's subsets."""
    if not values:
        return []
    subsets = [item.subset for item in items]
    names = sorted(set(subsets))
    codes = [names.index(subset) for subset in subsets]
    measures = []

    def measure(scope: str, weights: Sequence[Mapping[str, float]]) -> None:
        statistic = mean_of_weighted([[group.get(name, 0.0) for name in names] for group in weights])
        kept = [place for place, name in enumerate(subsets) if any(group.get(name) for group in weights)]
        columns = [values[place] for place in kept], [codes[place] for place in kept]
        prompts = [items[place].prompt for place in kept]
        found = estimate(statistic, *columns, clusters=prompts, ends=SHARE, unit="prompt")
        why = why_uneven(columns[1], weights, names)
        measures.append(MetricEstimate(metric, scope, replace(found, low=nan, high=nan, why=why) if why else found))

    there = {section: weights for section, weights in SECTIONS.items() if set(weights) & set(names)}
    for section, weights in there.items():
        count = len(set(weights) & set(names))
        partly = "" if count == len(weights) else f" ({count} of {len(weights)} subsets)"
        measure(f"section {section}{partly}", [weights])
    if len(there) == len(SECTIONS):
        measure("mean of sections", list(SECTIONS.values()))
    if TIES in names and len(names) > 1:
        measure("mean of subsets without Ties", [{name: 1.0 for name in names if name != TIES}])
    return measures


def why_uneven(codes: Sequence[int], weights: Sequence[Mapping[str, float]], names: Sequence[str]) -> str:
    """Return why a weighted mean of subsets has no interval: one of its items counts as several do; "" if none does.

    A few heavy items do not show how much they vary, and intervals are then too short (`tests/eval/test_coverage.py`).

    Args:
        codes: for each item, the index of its subset in `names`.
        weights: weight of each subset in each group of subsets.
        names: the subsets.
    """
    counts, shares = Counter(codes), dict.fromkeys(range(len(names)), 0.0)
    for group in weights:
        there = {code: group.get(names[code], 0.0) for code in counts}
        for code, weight in there.items():
            shares[code] += weight / (sum(there.values()) or 1.0) / len(weights)
    code = max(counts, key=lambda code: shares[code] / counts[code])
    counts_as = shares[code] / counts[code] * len(codes)
    return (
        f"each of {counted(counts[code], 'item')} of {names[code]} counts as {counts_as:.1f}" if counts_as > 3 else ""
    )


def mean_of_weighted(weights: Sequence[Sequence[float]]) -> Callable[..., np.ndarray]:
    """Return a statistic of values and subset codes: the mean over groups of the weighted mean of their subsets.

    Args:
        weights: weight of each of S subsets in each of G groups, (G, S).
    """
    weights_GS = np.asarray(weights)

    def statistic(values_N: np.ndarray, codes_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
        member_NS = codes_N[:, None] == np.arange(weights_GS.shape[1])
        counts_BS = weights_BN @ member_NS
        means_BS = (weights_BN * values_N) @ member_NS / np.maximum(counts_BS, 1.0)
        there_BS = counts_BS > 0.0  # a subset of one item is empty in the sample that leaves it out
        totals_BG = there_BS @ weights_GS.T
        scores_BG = (there_BS * means_BS) @ weights_GS.T / np.where(totals_BG > 0.0, totals_BG, np.nan)
        return np.asarray(scores_BG.mean(axis=1))

    return statistic
