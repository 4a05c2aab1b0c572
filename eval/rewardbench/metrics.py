"""What judgements of preference items say: accuracy, position bias, ties, failures, RewardBench's section scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cepo.eval.judges.journal import content_key
from cepo.eval.rewardbench.items import PLACES, Item
from cepo.eval.statistics import Estimate, estimate, estimates, widened

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
"""RewardBench's sections: the weight of each subset, which is its number of examples, but for math-prm, whose 447 weigh
as much as the six coding subsets together. Some versions of the reward-bench package have the two xstest counts the
other way round; these are the data's."""
TIES = "Ties"
_ACCURACIES = ("consistent", "average", "single_swap")
METRICS = (
    *_ACCURACIES,
    *("verdicts_only", "soft_average", "soft_summed", "expected_margin"),
    *("position_bias", "follows_position", "ties", "parse_failures", "forced", "not_judged"),
)
"""In the order in which they are shown."""


@dataclass(frozen=True)
class Measure:
    """One line of the summary.

    Attributes:
        metric: see `summarise`.
        scope: "all", a subset, "section Chat" and the like, "mean of sections", or "mean of subsets without Ties".
        estimate: value, interval, and the number of items (of judgements, for rates) that it is taken over.
    """

    metric: str
    scope: str
    estimate: Estimate


@dataclass(frozen=True)
class Outcome:
    """What was found about one item; None where a judgement of it is missing.

    Attributes:
        item: the item.
        right: right in the order that shows the chosen first, and in the other. An item of several pairs is right in an
            order where all of its pairs are.
        single: right where each pair is shown in one order, drawn by seed.
        soft_right: as `right`, by the sign of the expected margin.
        soft_summed: right by the sign of each pair's expected margin, summed over both orders.
        margin: mean expected score of the chosen less that of the rejected, over its pairs and orders.
    """

    item: Item
    right: tuple[bool, bool] | None
    single: bool | None
    soft_right: tuple[bool, bool] | None
    soft_summed: bool | None
    margin: float | None


def summarise(items: Sequence[Item], records: Mapping[str, Mapping[str, Any]], *, seed: int = 0) -> list[Measure]:
    """Return every measure with its 95% bootstrap interval over items.

    Accuracies (1 where right; ties and judgements without a verdict count as wrong; items with a judgement that failed
    are left out): `consistent`, right in both orders; `average`, the mean over the two; `single_swap`, one order a
    pair, drawn by seed, as j1's evaluation does; `verdicts_only`, over single judgements with a verdict. An item of
    several pairs (RewardBench 2) counts as right where the chosen response beats every rejected one.
    Soft (over what has a distribution): `soft_average`, by the sign of the expected margin, mean over the orders;
    `soft_summed`, of the margins summed over the orders; `expected_margin`, chosen less rejected.
    Over judgements: `position_bias`, the share of verdicts for A less the share for B, ties left out;
    `follows_position`, the share of pairs with a verdict in both orders that name the same place twice; `ties`;
    `parse_failures`; `forced`; `not_judged`.
    Each for all, for each subset, and the accuracies also for RewardBench's sections, as far as their subsets are
    there, and their mean where all four are. For all, `single_swap` is the flat mean over pairs that j1 reports.

    RewardBench 2 takes Ties by a formula on scores that a model gives to each response alone. A judge of pairs gives
    none, so Ties is plain accuracy here (every right answer beats every wrong one) and stays out of the mean.

    Args:
        items: what was judged, at least one.
        records: by request key, see `collect_judgements`.
        seed: of the single swap and the resamples.
    """
    outcomes = [outcome(item, records, seed=seed) for item in items]
    tallies = [_tally(found, records) for found in outcomes]
    scopes = {"all": list(range(len(items)))}
    for name in dict.fromkeys(item.subset for item in items):
        scopes.setdefault(name, [place for place, item in enumerate(items) if item.subset == name])
    measures = []
    for scope, places in scopes.items():
        measures += _rates(scope, [tallies[place] for place in places], seed)
    for metric in _ACCURACIES:
        judged = [place for place, tally in enumerate(tallies) if metric in tally]
        values = [float(np.mean(tallies[place][metric])) for place in judged]
        measures += _weighted_measures(metric, values, [items[place].subset for place in judged], seed)
    return measures


def section_scores(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Return the score of each section of which a subset is there: the weighted mean of its subsets' accuracies.

    Source:
        Lambert et al., RewardBench: evaluating reward models for language modeling (2024), section 4.
    """
    scores = {}
    for section, weights in SECTIONS.items():
        there = {name: weight for name, weight in weights.items() if name in accuracies}
        if there:
            scores[section] = sum(accuracies[name] * weight for name, weight in there.items()) / sum(there.values())
    return scores


def outcome(item: Item, records: Mapping[str, Mapping[str, Any]], *, seed: int = 0) -> Outcome:
    """Return what was found about an item."""
    pairs = [[records.get(item.request_key(*pair, place), {}) for place in PLACES] for pair in item.pairs]
    judged = all(record and not record["error"] for pair in pairs for record in pair)
    right = single = soft_right = soft_summed = margin = None
    if judged:
        wins = [[record["winner"] == place for record, place in zip(pair, PLACES, strict=True)] for pair in pairs]
        right = (all(first for first, _ in wins), all(second for _, second in wins))
        single = all(won[_drawn_order(item, pair, seed)] for won, pair in zip(wins, item.pairs, strict=True))
        if all(record["soft"] for pair in pairs for record in pair):
            margins = [[chosen_margin(record) for record in pair] for pair in pairs]
            soft_right = (all(first > 0 for first, _ in margins), all(second > 0 for _, second in margins))
            soft_summed = all(first + second > 0 for first, second in margins)
            margin = float(np.mean(margins))
    return Outcome(item, right, single, soft_right, soft_summed, margin)


def chosen_margin(record: Mapping[str, Any]) -> float:
    """Return the expected score of the chosen response less that of the rejected one."""
    first, second = record["soft"]
    return float(first - second if record["chosen_at"] == "A" else second - first)


def _drawn_order(item: Item, pair: tuple[int, int], seed: int) -> int:
    return int(content_key("order", seed, item.key, *pair), 16) % 2


def _tally(found: Outcome, records: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return what an item adds to each metric: the values that its mean is taken over; nothing where there are none."""
    item = found.item
    rows: list[Mapping[str, Any]] = []
    stays: list[float] = []
    for pair in item.pairs:
        shown = [records.get(item.request_key(*pair, place), {"error": "not there"}) for place in PLACES]
        rows += shown
        verdicts = [None if record["error"] else record["winner"] for record in shown]
        if all(verdict in PLACES for verdict in verdicts):
            stays.append(float(verdicts[0] == verdicts[1]))
    judged = [record for record in rows if not record["error"]]
    read = [record for record in judged if record["winner"] is not None]
    tally = {
        "verdicts_only": [float(record["winner"] == record["chosen_at"]) for record in read],
        "position_bias": [1.0 if record["winner"] == "A" else -1.0 for record in read if record["winner"] in PLACES],
        "follows_position": stays,
        "ties": [float(record["winner"] == "tie") for record in judged],
        "parse_failures": [float(record["winner"] is None) for record in judged],
        "forced": [float(record["forced"]) for record in judged],
        "not_judged": [float(bool(record["error"])) for record in rows],
    }
    if found.right is not None:
        tally |= {"consistent": [float(all(found.right))], "average": [sum(found.right) / 2]}
        tally["single_swap"] = [float(bool(found.single))]
    if found.soft_right is not None:
        tally |= {"soft_average": [sum(found.soft_right) / 2], "soft_summed": [float(bool(found.soft_summed))]}
        tally["expected_margin"] = [found.margin or 0.0]
    return {metric: values for metric, values in tally.items() if values}


def _rates(scope: str, tallies: Sequence[Mapping[str, Sequence[float]]], seed: int) -> list[Measure]:
    """Return the mean of each metric over its values, resampled by item, all metrics from the same resamples."""
    there = [metric for metric in METRICS if any(metric in tally for tally in tallies)]
    sums_NM = np.array([[sum(tally.get(metric, ())) for metric in there] for tally in tallies])
    counts_NM = np.array([[len(tally.get(metric, ())) for metric in there] for tally in tallies])
    found = estimates(_ratios, sums_NM, counts_NM, seed=seed)
    measures = []
    for metric, one, counts_N in zip(there, found, counts_NM.T, strict=True):
        if metric != "expected_margin":
            items = int((counts_N > 0).sum())
            one = widened(one, items, ends=(-1.0, 1.0) if metric == "position_bias" else (0.0, 1.0))
        measures.append(Measure(metric, scope, replace(one, count=int(counts_N.sum()))))
    return measures


def _ratios(sums_NM: np.ndarray, counts_NM: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    counts_BM = weights_BN @ counts_NM
    means: np.ndarray = weights_BN @ sums_NM / np.where(counts_BM > 0.0, counts_BM, np.nan)
    return means


def _weighted_measures(metric: str, values: Sequence[float], subsets: Sequence[str], seed: int) -> list[Measure]:
    """Return the means over sections, over their mean, and over RewardBench 2's subsets, where the data has them."""
    if not values:
        return []
    names = sorted(set(subsets))
    codes = [names.index(subset) for subset in subsets]
    measures = []

    def measure(scope: str, weights: Sequence[Mapping[str, float]]) -> None:
        statistic = _mean_of_weighted([[group.get(name, 0.0) for name in names] for group in weights])
        kept = [place for place, name in enumerate(subsets) if any(group.get(name) for group in weights)]
        columns = [values[place] for place in kept], [codes[place] for place in kept]
        measures.append(Measure(metric, scope, estimate(statistic, *columns, seed=seed)))

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


def _mean_of_weighted(weights: Sequence[Sequence[float]]) -> Callable[..., np.ndarray]:
    """Return the statistic of (value, subset's code): the mean over groups of their subsets' weighted mean."""
    weights_GS = np.asarray(weights)

    def statistic(values_N: np.ndarray, codes_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
        member_NS = codes_N[:, None] == np.arange(weights_GS.shape[1])
        counts_BS = weights_BN @ member_NS
        means_BS = (weights_BN * values_N) @ member_NS / np.maximum(counts_BS, 1.0)
        there_BS = counts_BS > 0.0  # a resample may miss a small subset
        totals_BG = there_BS @ weights_GS.T
        scores_BG = (there_BS * means_BS) @ weights_GS.T / np.where(totals_BG > 0.0, totals_BG, np.nan)
        return np.asarray(scores_BG.mean(axis=1))

    return statistic
