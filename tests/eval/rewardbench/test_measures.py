"""Protects accuracies against numbers worked out by hand, and the sections of RewardBench."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from cepo.eval.judges.journal import JudgeTask, judgement_record
from cepo.eval.judges.settings import Judgement
from cepo.eval.rewardbench.items import judge_tasks, read_item
from cepo.eval.rewardbench.metrics import SECTIONS, MetricEstimate, measure_preferences, outcome
from tests.eval.rewardbench.rule import SCORES, items_of, prefer, records_of, value


def test_a_judge_that_always_names_a_is_right_half_the_time_and_fully_biased() -> None:
    items = items_of(["x"] * 6)
    measures = measure_preferences(items, records_of(items, lambda item, place: SCORES.format(9, 1)))
    assert value(measures, "consistent") == 0.0
    assert value(measures, "average") == 0.5
    assert value(measures, "verdicts_only") == 0.5
    assert value(measures, "position_bias") == 1.0
    assert value(measures, "follows_position") == 1.0
    intervals = {one.metric: (one.estimate.low, one.estimate.high) for one in measures if one.scope == "all"}
    exact = 0.025 ** (1 / 6)  # of six items, not of their twelve judgements
    assert intervals["follows_position"] == (pytest.approx(exact), 1.0)
    assert intervals["position_bias"] == (pytest.approx(2.0 * exact - 1.0), 1.0)
    assert 0.0 <= value(measures, "single_swap") <= 1.0


def test_items_of_one_prompt_are_one_unit() -> None:
    """Ten pairs of one prompt say little about other prompts: the interval is that of the prompts."""
    items = items_of(["x"] * 20)
    of_two = [replace(item, prompt=f"prompt {place // 10}") for place, item in enumerate(items)]
    widths = []
    for asked in (items, of_two):
        records = records_of(asked, lambda item, place: prefer(place, chosen=int(item.name) < 10))
        (found,) = [
            one for one in measure_preferences(asked, records) if (one.metric, one.scope) == ("consistent", "all")
        ]
        assert (found.estimate.value, found.estimate.count) == (0.5, 20)
        widths.append(found.estimate.high - found.estimate.low)
    assert widths[0] < 0.5 < widths[1]


def test_measures_equal_numbers_worked_out_by_hand() -> None:
    """Four items: right twice; right once, then a tie; wrong twice; right once, then no verdict."""
    items = items_of(["x", "x", "y", "y"])
    answers = {
        ("0", "A"): prefer("A"),
        ("0", "B"): prefer("B"),
        ("1", "A"): prefer("A"),
        ("1", "B"): SCORES.format(5, 5),
        ("2", "A"): prefer("A", chosen=False),
        ("2", "B"): prefer("B", chosen=False),
        ("3", "A"): prefer("A"),
        ("3", "B"): "I like both",
    }
    measures = measure_preferences(items, records_of(items, lambda item, place: answers[item.name, place]))
    assert value(measures, "consistent") == 1 / 4
    assert value(measures, "average") == (2 + 1 + 0 + 1) / 8
    assert value(measures, "consistent", "x") == 1 / 2
    assert value(measures, "average", "y") == 1 / 4
    assert value(measures, "ties") == 1 / 8
    assert value(measures, "parse_failures") == 1 / 8
    assert value(measures, "verdicts_only") == 4 / 7
    # Decided verdicts: A, B, A, B, A, A.
    assert value(measures, "position_bias") == pytest.approx((4 - 2) / 6)
    assert value(measures, "follows_position") == 0.0
    assert value(measures, "not_judged") == 0.0
    singles = [outcome(item, records_of(items, lambda item, place: answers[item.name, place])).single for item in items]
    assert singles[0] is True
    assert singles[2] is False
    assert value(measures, "single_swap") == sum(map(bool, singles)) / 4


def test_the_single_swap_is_half_of_each_order_and_its_own_for_each_seed() -> None:
    items = items_of(["x"] * 400)
    records = records_of(items, lambda item, place: SCORES.format(9, 1))
    drawn = [[outcome(item, records, seed=seed).single for item in items] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert np.mean([bool(right) for right in drawn[0]]) == pytest.approx(0.5, abs=0.08)


def test_an_item_whose_judgement_failed_is_left_out_and_counted() -> None:
    items = items_of(["x", "x"])
    broken = Judgement("", error="the server hung")
    records = records_of(items, lambda item, place: broken if (item.name, place) == ("1", "B") else prefer(place))
    measures = measure_preferences(items, records)
    assert value(measures, "consistent") == 1.0
    assert value(measures, "not_judged") == 1 / 4
    (found,) = [measure for measure in measures if (measure.metric, measure.scope) == ("consistent", "all")]
    assert found.estimate.count == 1


def test_soft_measures_take_the_sign_of_the_expected_margin() -> None:
    """Item 0 is clear; item 1 follows the position, but less where that is wrong, so the sum over orders is right."""
    items = items_of(["x", "x"])
    soft = {("0", "A"): (7, 3), ("0", "B"): (4, 6), ("1", "A"): (8.0, 5.0), ("1", "B"): (7.0, 6.0)}
    records = records_of(items, lambda item, place: Judgement(SCORES.format(5, 5), soft=soft[item.name, place]))
    measures = measure_preferences(items, records)
    assert value(measures, "soft_average") == (2 + 1) / 4
    assert value(measures, "soft_summed") == 1.0
    assert value(measures, "expected_margin") == pytest.approx(((4 + 2) / 2 + (3 - 1) / 2) / 2)
    hard = records_of(items, lambda item, place: prefer(place))
    assert not [measure for measure in measure_preferences(items, hard) if measure.metric.startswith("soft")]


def test_best_of_four_is_right_where_the_chosen_beats_all_in_an_order() -> None:
    four = read_item(
        {"id": "0", "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math"}, "line 1"
    )
    asked = judge_tasks([four])
    lost = {("A", 2)}  # shown first, the chosen loses to the third

    def answer(task: JudgeTask) -> str:
        place, worse = str(task.facts["chosen_at"]), task.facts["pair"][1]
        return prefer(place, chosen=(place, worse) not in lost)

    records = {task.key: judgement_record(task, Judgement(answer(task))) for task in asked}
    assert outcome(four, records).right == (False, True)
    measures = measure_preferences([four], records)
    assert (value(measures, "consistent"), value(measures, "average")) == (0.0, 0.5)
    assert value(measures, "verdicts_only") == 5 / 6


def test_ties_stay_out_of_the_mean_of_rewardbench_2() -> None:
    items = items_of(["Math", "Math", "Safety", "Ties", "Ties", "Ties"])
    wrong = {"1", "3", "4", "5"}
    records = records_of(items, lambda item, place: prefer(place, chosen=item.name not in wrong))
    measures = measure_preferences(items, records)
    assert value(measures, "consistent", "mean of subsets without Ties") == (0.5 + 1.0) / 2
    assert value(measures, "consistent", "Ties") == 0.0
    assert value(measures, "consistent") == 2 / 6


def judged_items(right: Mapping[str, int], of: int) -> list[MetricEstimate]:
    """Metrics of `of` items per subset, of which so many are right in both orders."""
    items = items_of([name for name in right for _ in range(of)])
    wins = {item.name for place, item in enumerate(items) if place % of < right[item.subset]}
    return measure_preferences(items, records_of(items, lambda item, place: prefer(place, chosen=item.name in wins)))


def test_section_scores_equal_numbers_worked_out_by_hand() -> None:
    right = {"math-prm": 1, "hep-go": 3, "hep-rust": 4, "mt-bench-easy": 2, "other": 0}
    measures = judged_items(right, of=4)
    sections = {one.scope: one.estimate.value for one in measures if one.scope.startswith("section")}
    assert sections == {
        "section Chat (1 of 5 subsets)": 0.5,
        "section Reasoning (3 of 7 subsets)": pytest.approx((0.25 * 984 + 0.75 * 164 + 1.0 * 164) / (984 + 164 + 164)),
    }


def test_math_weighs_as_much_as_all_code() -> None:
    weights = dict(SECTIONS["Reasoning"])
    assert weights.pop("math-prm") == sum(weights.values()) == 984


def test_section_scores_are_those_of_the_reward_bench_package() -> None:
    pytest.importorskip("rewardbench.constants", reason="needs the package rewardbench")
    from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
    from rewardbench.utils import calculate_scores_per_section

    rng = np.random.default_rng(0)
    right = {name: int(rng.integers(6)) for name in EXAMPLE_COUNTS}
    measures = judged_items(right, of=5)
    accuracies = {name: count / 5 for name, count in right.items()}
    theirs = calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, accuracies)
    assert {name: value(measures, "consistent", f"section {name}") for name in theirs} == pytest.approx(theirs)


def test_the_summarys_sections_are_the_section_scores() -> None:
    """Of subsets of unlike size, so that a mean over items would be another number."""
    names = [name for weights in SECTIONS.values() for name in weights]
    items = items_of([name for place, name in enumerate(names) for _ in range(1 + place % 3)])
    records = records_of(items, lambda item, place: prefer(place, chosen=int(item.name) % 3 != 1))
    measures = measure_preferences(items, records)
    expected = [
        sum(value(measures, "consistent", name) * weight for name, weight in weights.items()) / sum(weights.values())
        for weights in SECTIONS.values()
    ]
    for section, score in zip(SECTIONS, expected, strict=True):
        assert value(measures, "consistent", f"section {section}") == pytest.approx(score)
    assert value(measures, "consistent", "mean of sections") == pytest.approx(np.mean(expected))


def test_a_section_of_which_subsets_are_missing_says_so() -> None:
    items = items_of(["llmbar-natural", "llmbar-adver-GPTOut"])
    measures = measure_preferences(items, records_of(items, lambda item, place: prefer(place, chosen=item.name == "0")))
    assert value(measures, "average", "section Chat Hard (2 of 6 subsets)") == pytest.approx(100 / 147)
    assert not [measure for measure in measures if measure.scope == "mean of sections"]
