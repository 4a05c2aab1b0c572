"""Ties in a judge's training: which rows are one, what the prompt says, what scores earn, what is logged."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from cepo.jacobian.reading.judge import write_judgement
from cepo.train import testbed, testbed_model
from cepo.train.config import TrainConfig
from cepo.train.data import load_preferences
from cepo.train.grpo import build_rewards, train
from cepo.train.policy import load_data
from cepo.train.prompts import JUDGE, JUDGE_LITERALS, TIES_JUDGE, TIES_LITERALS, judge_prompt
from cepo.train.rewards.task import argmax_reward
from cepo.train.rows import read_tie

PAIR = {"prompt": "What is the capital of Australia?", "chosen": "Canberra.", "rejected": "It is Canberra."}
TIES: list[dict[str, Any]] = [{"tie": True}, {"tie": "true"}, {"tie": 1}, {"label": "tie"}, {"label": "Tie"}]
PREFERENCES: list[dict[str, Any]] = [{}, {"tie": False}, {"tie": None}, {"tie": "false"}, {"label": "B"}, {"label": 3}]
UNREADABLE = "no verdict"


def write(path: Path, columns: list[dict[str, Any]]) -> Path:
    """Write a pair per set of further columns."""
    rows = [{**PAIR, "prompt": f"{number}. {PAIR['prompt']}", **more} for number, more in enumerate(columns)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored(first: float, second: float) -> str:
    """Write a judgement with these scores."""
    return write_judgement("Right.", "Both are read.", (first, second))  # type: ignore[arg-type]


def test_ties_are_left_out_with_the_way_to_take_them_unless_they_are_asked_for(tmp_path: Path) -> None:
    """A tie that is read as a preference teaches what nobody said; preferences and their prompts stay as they were."""
    path = write(tmp_path / "rows.jsonl", [*PREFERENCES, *TIES])
    loaded = load_preferences(path, test_fraction=0.0)
    assert [row["prompt"] for row in loaded.train] == [
        judge_prompt(row["query"], row["response_a"], row["response_b"]) for row in loaded.train
    ]
    assert set(loaded.train["label"]) == {"A", "B"}
    alone = load_preferences(write(tmp_path / "alone.jsonl", PREFERENCES), test_fraction=0.0)
    assert loaded.fingerprint == alone.fingerprint
    assert [number for number, _ in loaded.skipped] == [*range(len(PREFERENCES) + 1, len(PREFERENCES + TIES) + 1)]
    assert {reason for _, reason in loaded.skipped} == {"is a tie; set data.ties: true to include ties"}


def test_columns_that_disagree_about_a_tie_are_named() -> None:
    with pytest.raises(ValueError, match="'label' says that the row is a tie, and column 'tie' that it is not"):
        read_tie({**PREFERENCES[0], "label": "tie", "tie": False}, ties=True)


def test_ties_that_are_asked_for_are_rows_whose_prompts_do_not_tell_them_apart(tmp_path: Path) -> None:
    """Every prompt allows equal scores, or the prompt alone would say which rows are ties."""
    settings = {"source": write(tmp_path / "rows.jsonl", [*PREFERENCES, *TIES]), "test_fraction": 0.0, "ties": True}
    loaded = load_data("judge", settings, seed=0)
    assert loaded.skipped == ()
    labels = list(loaded.train["label"])
    assert labels[len(PREFERENCES) :] == ["tie"] * len(TIES)
    assert set(labels[: len(PREFERENCES)]) <= {"A", "B"}
    for row in loaded.train:
        assert row["prompt"] == judge_prompt(row["query"], row["response_a"], row["response_b"], ties=True)


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    """A pair that a check refused is not trained on, a column that is neither true nor false says nothing."""
    unusual = [{"kept": False, "reason": "unchanged"}, {"tie": "perhaps"}, {"kept": False}]
    path = write(tmp_path / "rows.jsonl", [{}, *unusual])
    assert load_preferences(path, test_fraction=0.0).skipped == (
        (2, "not kept: unchanged"),
        (3, "column 'tie' holds 'perhaps'; expected true or false"),
        (4, "not kept: no reason given"),
    )
    with pytest.raises(ValueError, match="ties is 'yes'; expected true or false"):
        load_data("judge", {"source": path, "ties": "yes"}, seed=0)
    with pytest.raises(ValueError, match="data holds the unknown key ties"):
        load_data("reasoning", {"source": path, "ties": True}, seed=0)


def test_a_pair_made_of_others_falls_on_the_side_of_its_source(tmp_path: Path) -> None:
    """An unrelated query with a response of the test side would leak it; other words in the column say nothing."""
    columns = [{"split": "test"}, {"split": "train"}, {"split": "validation"}, {}]
    for fraction, on_test in ((0.0, 1), (1.0, 3)):
        loaded = load_preferences(write(tmp_path / "rows.jsonl", columns), test_fraction=fraction)
        assert (len(loaded.train), len(loaded.test)) == (4 - on_test, on_test)
        assert loaded.test[0]["query"].startswith("0.")


def test_the_prompt_says_that_equal_scores_are_allowed_and_its_reader_knows_it() -> None:
    """One sentence differs, in the instructions, which are no content; every reward of such a run reads that prompt."""
    assert TIES_LITERALS[1:] == JUDGE_LITERALS[1:]
    rule = ", let the better response score higher, and give both the same score where neither is better."
    without = TIES_LITERALS[0].replace(rule, "")
    assert without == JUDGE_LITERALS[0].replace(", and let the better response score higher.", "")
    assert without != TIES_LITERALS[0]
    assert TIES_JUDGE.instructions == TIES_LITERALS
    for data, layout in (({"source": "rows.jsonl"}, JUDGE), ({"source": "rows.jsonl", "ties": True}, TIES_JUDGE)):
        (causal, proxy), _ = build_rewards(TrainConfig("smollm2", data, [{"name": "causal"}, {"name": "cir"}], "runs"))
        assert causal.layout == proxy.layout == layout


@pytest.mark.parametrize(
    ("first", "second", "reward"),
    [
        (7, 7, 1.0),
        (1, 1, 1.0),
        (7.0, 7, 1.0),
        (7, 6, 4 / 9),
        (4, 7, 1 / 3),
        (10, 1, 0.0),
        (1, 10, 0.0),
        (95, 10, 0.0),  # beyond the range that is asked for
        (7.000001, 7, 0.5 - 1e-6 / 18),
    ],
)
def test_a_tie_earns_more_the_closer_the_scores_are_and_all_of_it_for_equal_ones(
    first: float, second: float, reward: float
) -> None:
    """By hand: 1, or (1 - |a - b| / 9) / 2, at least 0. A hair's breadth is less than half, so it is no tie."""
    assert argmax_reward([scored(first, second)], label=["tie"]) == [pytest.approx(reward, abs=1e-12)]


def test_equal_scores_earn_nothing_on_a_preference_and_no_verdict_earns_nothing_anywhere() -> None:
    """Protects the verdict's reward from the judge that never decides."""
    labels = ["A", "B", "tie"]
    assert argmax_reward([scored(7, 7)] * 3, label=labels) == [0.0, 0.0, 1.0]
    assert argmax_reward([UNREADABLE] * 3, label=labels) == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="label is 'C'; expected 'A', 'B' or 'tie'"):
        argmax_reward([scored(7, 7)], label=["C"])


@pytest.mark.parametrize("preferences", range(1, 13))
def test_always_a_tie_never_pays(preferences: int) -> None:
    """Whatever the mix, a judge that is right earns more; with a third of ties at most, so does one that is right on
    more than half of the preferences and as far as can be from finding a tie."""
    labels = ["A"] * preferences + ["tie"] * (12 - preferences)

    def mean(completions: list[str]) -> float:
        return sum(argmax_reward(completions, label=labels)) / len(labels)

    right = mean([scored(8, 2) if label == "A" else scored(5, 5) for label in labels])
    always = mean([scored(5, 5)] * len(labels))
    assert right == 1.0
    assert always == pytest.approx(1 - preferences / 12)
    hair_breadth = mean([scored(5.000001, 5)] * len(labels))
    assert hair_breadth < right or preferences == 12
    if preferences >= 8:
        better_than_chance = preferences // 2 + 1
        far_apart = [scored(10, 1) if place < better_than_chance else scored(1, 10) for place in range(len(labels))]
        assert always < mean(far_apart)


def test_the_shares_of_ties_are_logged_apart() -> None:
    """Ties on preferences are the hack, ties on ties what is wanted; a batch without rows of a kind says nothing."""
    logged: dict[str, list[float]] = defaultdict(list)

    def log_metric(name: str, value: float) -> None:
        logged[name].append(value)

    completions = [scored(5, 5), scored(8, 2), scored(2, 8), UNREADABLE, scored(6, 6), UNREADABLE]
    argmax_reward(completions, label=["A", "A", "B", "B", "tie", "tie"], log_metric=log_metric)
    argmax_reward([scored(5, 5)], label=["A"], log_metric=log_metric)
    argmax_reward([scored(9, 5)], label=["tie"], log_metric=log_metric)
    assert logged == {"argmax/ties_on_preferences": [0.25, 1.0], "argmax/ties_on_ties": [0.5, 0.0]}


def test_a_run_with_ties_trains_and_logs_both_shares(tmp_path: Path) -> None:
    """The rows, the prompt, the layout and TRL's log, from end to end: one step of a judge without any training."""
    tokenizer, judge = testbed.build_tokenizer(), tmp_path / "judge"
    testbed_model.build_model(tokenizer, seed=0).save_pretrained(judge)
    tokenizer.save_pretrained(judge)
    rows = write(tmp_path / "rows.jsonl", [{"tie": number % 2 == 0} for number in range(4)])
    run = TrainConfig(
        str(judge),
        {"source": str(rows), "ties": True, "test_fraction": 0.0},
        [{"name": "argmax"}, {"name": "causal"}],
        str(tmp_path / "run"),
        threads=1,
        grpo={"max_steps": 1, "per_device_train_batch_size": 8, "num_generations": 2, "max_completion_length": 4},
    )
    train(run)
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert (logged["argmax/ties_on_preferences"], logged["argmax/ties_on_ties"]) == (0.0, 0.0)
