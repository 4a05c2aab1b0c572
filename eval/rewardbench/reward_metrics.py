"""Metrics of preference items for a reward model: accuracies, also those of length, and RewardBench 2's Ties."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cepo.eval.judges.reward import Rewards
from cepo.eval.judges.settings import Messages
from cepo.eval.rewardbench.items import PreferenceItem
from cepo.eval.rewardbench.metrics import TIES, MetricEstimate, mean_of_weighted, measure_tallies, why_uneven
from cepo.eval.statistics import Estimate, estimate, undetermined
from cepo.train.pair_encoding import Shown

_WEIGHTED = ("strict", "half_credit", "longest", "shortest")
REWARD_METRICS = (*_WEIGHTED, "longer_right", "shorter_right", "margin", "ties", "not_judged")
TIES_MEASURE = "ties_measure"
ALL_OF_2 = "RewardBench 2"
_ENDS: Mapping[str, tuple[float, float] | None] = {"margin": None}
_TIES_ID = re.compile(r"(ref|tied):(\d+)")
_TIES_WEIGHTS = np.array([0.30, 0.30, 0.20, 0.20, 0.01])
_TIES_ENDS = (-0.01, 1.01)


def shown_texts(items: Sequence[PreferenceItem], shown: Shown) -> list[tuple[dict[str, str], Messages]]:
    """Return facts and texts of all pairs of all items, for `collect_rewards`."""
    return [
        ({"id": item.name, "subset": item.subset}, messages)
        for item in items
        for better, worse in item.pairs
        for messages in shown.pair_messages(item.prompt, item.chosen[better], item.rejected[worse])
    ]


def differences(item: PreferenceItem, rewards: Rewards) -> np.ndarray:
    """Return D of every chosen response with every rejected one, (C, R); NaN if a text has no number."""
    return np.array(
        [[rewards.difference(item.prompt, chosen, rejected) for rejected in item.rejected] for chosen in item.chosen]
    )


def credit(differences_CR: np.ndarray) -> float:
    """Return an item's credit in [0, 1], where ties share it: the smallest over its chosen responses.

    A chosen response that beats every rejected one earns 1, one that ties with k of them at the top 1 / (1 + k), and
    one that loses to any of them 0. RewardBench 2 scores its best-of-four items this way. A tied pair earns 1/2.
    """
    worst_C = differences_CR.min(axis=1)
    return float(np.where(worst_C < 0, 0.0, 1.0 / (1.0 + (differences_CR == 0).sum(axis=1))).min())


def measure_rewards(items: Sequence[PreferenceItem], rewards: Rewards) -> list[MetricEstimate]:
    """Return every measure with its 95% interval; all items of a prompt are one unit.

    Per item: `strict`, every chosen response above every rejected one, with ties as wrong; `half_credit`, see `credit`;
    `longest` and `shortest`, the credit of a rule that prefers the longer or the shorter response, in characters. Per
    pair: `longer_right` and `shorter_right`, strictly right if the better response is the longer, or the shorter, one;
    `margin`, the mean of D; `ties`, D is 0; `not_judged`.
    The first four are also given for RewardBench's sections and means. RewardBench 2's subset Ties has its own measure,
    see `measure_ties`. "RewardBench 2" is the mean of it and of `half_credit` in the other subsets, as published.

    Args:
        items: the items, at least one.
        rewards: the rewards of all their texts.
    """
    of_items = [differences(item, rewards) for item in items]
    measures = measure_tallies(
        items,
        [_tally(item, differences_CR) for item, differences_CR in zip(items, of_items, strict=True)],
        REWARD_METRICS,
        weighted=_WEIGHTED,
        ends=_ENDS,
    )
    if TIES in {item.subset for item in items} and rewards.shown.form == "bradley-terry":
        measures += _ties_measures(items, of_items, rewards)
    return measures


def measure_ties(scores: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Estimate:
    """Return RewardBench 2's measure of its subset Ties, about 0 to 1; prompts are units.

    A prompt has many equally right answers in its item "tied:N" and one in its reference item "ref:N". The gap of an
    item is the smallest reward of a right answer minus the largest of a wrong one. The spread is the largest minus the
    smallest reward of the right answers of "tied:N". The measure is

        0.3 x share of tied items with a gap above 0 + 0.3 x the same of reference items
        + 0.2 x share of prompts whose tied gap is above the spread
        + 0.2 x share of prompts whose smaller gap of the two items is above the spread
        + 0.01 x mean over prompts of tanh(smaller gap / spread - 1), where 0 / 0 counts as 0

    Args:
        scores: by the item's id, the rewards of its right and of its wrong answers, at least one each.

    Source:
        Malik et al., RewardBench 2: Advancing Reward Model Evaluation (2025), arXiv 2506.01937, and
        `process_single_model` in rewardbench/utils.py of <https://github.com/allenai/reward-bench>, which it equals.
    """
    try:
        terms_N5 = _ties_terms(scores)
    except ValueError as reason:
        return undetermined(str(reason))
    return estimate(
        lambda *columns: _ties_score(np.stack(columns[:-1], axis=1), columns[-1]),
        *terms_N5.T,
        ends=_TIES_ENDS,
        unit="prompt",
        lacking="no prompt has both items, tied:N and ref:N",
    )


def _ties_terms(scores: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> np.ndarray:
    """Return each prompt's value of the five terms, (N, 5); NaN if it lacks the items."""
    prompts: dict[str, dict[str, tuple[float, float]]] = {}
    for name, (right, wrong) in scores.items():
        found = _TIES_ID.fullmatch(name)
        if found is None:
            raise ValueError(f"an item of the subset {TIES} has the id {name!r}; expected ref:N or tied:N")
        prompts.setdefault(found[2], {})[found[1]] = min(right) - max(wrong), max(right) - min(right)
    terms_N5 = np.full((len(prompts), len(_TIES_WEIGHTS)), np.nan)
    for term_5, items in zip(terms_N5, prompts.values(), strict=True):
        if "tied" in items:
            term_5[0] = items["tied"][0] > 0
        if "ref" in items:
            term_5[1] = items["ref"][0] > 0
        if len(items) == 2:
            (gap, spread), (reference_gap, _) = items["tied"], items["ref"]
            smaller = np.float64(min(gap, reference_gap))
            with np.errstate(divide="ignore", invalid="ignore"):
                strength = np.nan_to_num(np.tanh(smaller / spread - 1.0), nan=0.0)
            term_5[2:] = gap > spread, smaller > spread, strength
    return terms_N5


def _ties_score(terms_N5: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return the measure (B,) of each sample of prompts."""
    counts_B5 = weights_BN @ ~np.isnan(terms_N5)
    means_B5 = weights_BN @ np.nan_to_num(terms_N5) / np.where(counts_B5 > 0, counts_B5, np.nan)
    found: np.ndarray = means_B5 @ _TIES_WEIGHTS
    return found


def _tally(item: PreferenceItem, differences_CR: np.ndarray) -> dict[str, list[float]]:
    """Return the values that an item adds to each metric."""
    missing = np.isnan(differences_CR)
    tally = {"not_judged": missing.ravel().astype(float).tolist()}
    if missing.any():
        return tally
    longer_CR = np.array([[len(chosen) - len(rejected) for rejected in item.rejected] for chosen in item.chosen])
    right_CR = (differences_CR > 0).astype(float)
    tally |= {
        "strict": [float(right_CR.all())],
        "half_credit": [credit(differences_CR)],
        "longest": [credit(longer_CR)],
        "shortest": [credit(-longer_CR)],
        "longer_right": right_CR[longer_CR > 0].tolist(),
        "shorter_right": right_CR[longer_CR < 0].tolist(),
        "margin": differences_CR.ravel().tolist(),
        "ties": (differences_CR == 0).ravel().astype(float).tolist(),
    }
    return {metric: values for metric, values in tally.items() if values}


def _ties_measures(
    items: Sequence[PreferenceItem], of_items: Sequence[np.ndarray], rewards: Rewards
) -> list[MetricEstimate]:
    """Return the measure of Ties, and the benchmark's score if there are other subsets too."""
    judged = [(item, found) for item, found in zip(items, of_items, strict=True) if not np.isnan(found).any()]

    def numbers(item: PreferenceItem, responses: Sequence[str]) -> list[float]:
        return [rewards.number(rewards.shown.messages(item.prompt, response)) for response in responses]

    of_ties = [item for item, _ in judged if item.subset == TIES]
    scores = {item.name: (numbers(item, item.chosen), numbers(item, item.rejected)) for item in of_ties}
    ties = measure_ties(scores) if scores else undetermined("no item of Ties was judged")
    measures = [MetricEstimate(TIES_MEASURE, TIES, ties)]
    others = [(item, credit(found)) for item, found in judged if item.subset != TIES]
    if not others or np.isnan(ties.value):
        return measures
    names = sorted({item.subset for item, _ in others})
    terms_N5 = _ties_terms(scores)
    # One row per item of the other subsets and per prompt of Ties; the code of a subset is its index in `names`.
    values_N = np.array([earned for _, earned in others] + [0.0] * len(terms_N5))
    codes_N = np.array([names.index(item.subset) for item, _ in others] + [len(names)] * len(terms_N5))
    terms_N5 = np.concatenate([np.full((len(others), terms_N5.shape[1]), np.nan), terms_N5])
    units = [item.prompt for item, _ in others] + [f"{TIES} {number}" for number in range(len(terms_N5) - len(others))]
    mean_of_subsets = mean_of_weighted(np.eye(len(names)).tolist())

    def statistic(*columns: np.ndarray) -> np.ndarray:
        values_N, codes_N, *terms, weights_BN = columns
        ties_B = _ties_score(np.stack(terms, axis=1), weights_BN)
        return (len(names) * mean_of_subsets(values_N, codes_N, weights_BN) + ties_B) / (len(names) + 1)

    overall = estimate(statistic, values_N, codes_N, *terms_N5.T, clusters=units, ends=_TIES_ENDS, unit="prompt")
    subsets = [*names, TIES]
    if why := why_uneven(codes_N.tolist(), [dict.fromkeys(subsets, 1.0)], subsets):
        overall = replace(overall, low=math.nan, high=math.nan, why=why)
    return [*measures, MetricEstimate("half_credit", ALL_OF_2, overall)]
