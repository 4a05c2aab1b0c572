"""The task rewards: hand-computed cases, arbitrary text, and real judge outputs."""

import json
import pickle
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given

from cepo.jacobian.reading.judge import read_scores
from cepo.jacobian.reading.reasoner import extract_answer
from cepo.train.rewards import task as rewards
from cepo.train.rewards.completions import completion_text
from cepo.train.rewards.task import (
    argmax_reward,
    bertscore_reward,
    exact_match,
    format_reward,
    math_verify_reward,
    reference_answer,
)
from tests.jacobian.reading.texts import ANY_TEXT, FUZZ, GOOD
from tests.paths import DATA


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (GOOD, 0.2),
        ("", 0.0),
        ("<analysis>", 0.025),
        (GOOD.replace("\\boxed{9, 3}", "9, 3"), 0.15),
        (GOOD.replace("</specific_criteria>", "</specificcriteria>"), 0.125),
        ("<scores>\\boxed{9, 3}</scores>", 0.1),
        (GOOD + "</think>", 0.2),
    ],
)
def test_format_is_an_eighth_a_tag_and_a_quarter_for_the_pair(text: str, reward: float) -> None:
    """Protects j1's format reward, in [0, 0.2]."""
    assert format_reward([text]) == [pytest.approx(reward, abs=1e-15)]


def test_the_winner_must_be_the_label() -> None:
    """Protects the verdict's reward: strict winner only; a tie and what can't be read earn nothing."""
    tie = GOOD.replace("9, 3", "4, 4")
    assert argmax_reward([GOOD, GOOD, tie, tie, "nothing"], label=["A", "B", "A", "B", "A"], id=[0] * 5) == [
        1.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ]
    assert argmax_reward([GOOD.replace("9, 3", "3, 9")], label=["B"]) == [1.0]


@pytest.mark.parametrize("label", [["a"], [None], [0], ["C"], None, ["A", "B"], [], "A"])
def test_a_wrong_label_is_named(label: Any) -> None:
    """Protects against training on labels that mean nothing."""
    with pytest.raises(ValueError, match="label is"):
        argmax_reward([GOOD], label=label)


@pytest.mark.parametrize(("reward", "column"), [(argmax_reward, "label"), (exact_match, "answer")])
def test_a_data_set_without_the_column_is_told_which_it_needs(reward: Any, column: str) -> None:
    """TRL's own preference rows have neither; Python's error for a missing argument would name no data set."""
    with pytest.raises(ValueError, match=f"{column} is None; expected a column '{column}' in the data set"):
        reward(completions=[GOOD], prompts=["x"])


@pytest.mark.parametrize("answer", [[None], [""], [True, "x"], ["  "], [["x"]], [float("nan")], "x", None])
def test_a_missing_reference_is_named(answer: Any) -> None:
    """Protects against training on references that mean nothing."""
    for reward in (exact_match, math_verify_reward, bertscore_reward):
        with pytest.raises(ValueError, match="answer is"):
            reward(["<answer>x</answer>"], answer=answer)


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ([{"role": "assistant", "content": "said"}], "said"),
        ([{"role": "assistant", "content": "call"}, {"role": "tool", "content": "42"}], "call"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "ab"),
        ([{"role": "assistant", "content": None}], ""),
        ([], ""),
        ("lone \ud800 surrogate", "lone ? surrogate"),
    ],
)
def test_completions_come_as_strings_or_messages(completion: Any, text: str) -> None:
    """Protects both forms in which TRL hands completions over, with and without a chat template."""
    assert completion_text(completion) == text
    assert format_reward([completion]) == [0.0]


@pytest.mark.parametrize("completion", [None, 3, {"role": "assistant"}, ["said"], b"said"])
def test_a_completion_of_another_kind_is_named(completion: Any) -> None:
    """Protects the rule that bad input is named: this is the caller's error, not the model's."""
    with pytest.raises(ValueError, match="completions holds"):
        completion_text(completion)


@pytest.mark.parametrize(
    ("written", "reference", "reward"),
    [
        ("Clint  Eastwood.", "clint eastwood", 1.0),
        ('"Paris"', "Paris", 1.0),
        ("**Paris**", "Paris", 1.0),
        ("5!", "5", 0.0),
        ("$1,234,567.50", "1234567.50", 1.0),
        ("\\$18", 18, 1.0),
        ("-3", "3", 0.0),
        (".5", "5", 0.0),
        ("0.5", 0.5, 1.0),
        ("18", 18.0, 1.0),
        ("1,200,35", "120035", 0.0),
        ("1,2", "12", 0.0),
        ("(1, 2]", "[1, 2)", 0.0),
        ("no", "yes", 0.0),
        ("", "$", 0.0),
        ("(B)", "b", 1.0),
        ("B) True", "B", 0.0),
        ("１，２３４", "1234", 1.0),
        ("١٢٣٤", "1234", 1.0),
        ("1{,}234", "1,234", 1.0),
        ("1\u202f234", "1234", 1.0),
        ("−5", "-5", 1.0),
        ("x²", "x2", 0.0),
        ("18 jars", "18", 0.0),
        ("四。", "四", 1.0),
        ("the answer is no", "no", 1.0),
    ],
)
def test_exact_match_forgives_form_only(written: str, reference: str | float, reward: float) -> None:
    """Protects the normalisation: what does not change the answer is forgiven, what changes it is not."""
    assert exact_match([f"<answer>{written}</answer>"], answer=[reference]) == [reward]


@pytest.mark.parametrize(
    ("written", "reference", "reward"),
    [
        ("0.5", "\\frac{1}{2}", 1.0),
        ("$\\frac12$", "so $\\boxed{\\frac{1}{2}}$.", 1.0),
        ("x+1", "1+x", 1.0),
        ("(0,1)", "[0,1]", 0.0),
        ("2", "\\frac \\pi4 + 2 - \\sqrt2", 0.0),
        ("The Pentagon", "the pentagon", 1.0),
        ("\\frac{1}{2}.", "0.5", 1.0),
        ("18 jars", "18", 1.0),
        ("18.0", "18 jars of jam", 1.0),
        ("18 jars", "18 crates", 0.0),
        ("2 million", "2", 0.0),
        ("18%", "0.18", 1.0),
        ("2 pi", "2", 0.0),
        ("2 x", "2", 0.0),
        ("5 apples and 3 pears", "5", 0.0),
        ("\\frac{1", "1", 0.0),
        ("\ud800", "1", 0.0),
        ("9" * 10_000, "9", 0.0),
        ("(" * 10_000, "1", 0.0),
        ("", "1", 0.0),
    ],
)
def test_mathematics_is_compared_by_value(written: str, reference: str, reward: float) -> None:
    """Protects mathematical equality, and that what the library can't read earns 0 instead of raising."""
    assert math_verify_reward([f"<answer>{written}</answer>"], answer=[reference]) == [reward]


def test_mathematics_is_compared_in_a_thread_too() -> None:
    """Protects against the library's SIGALRM, which raises outside the main thread."""
    results: list[list[float]] = []
    thread = threading.Thread(
        target=lambda: results.append(math_verify_reward(["<answer>0.5</answer>"] * 2, answer=["\\frac{1}{2}", "2"]))
    )
    thread.start()
    thread.join()
    assert results == [[1.0, 0.0]]


def test_an_answer_in_a_thought_that_the_prompt_opened_earns_nothing() -> None:
    """Protects training from drafts in a thought that was cut: only the prompt shows that it is one."""
    draft, whole = "Perhaps <answer>5</answer>, but", "Perhaps <answer>4</answer>.</think><answer>5</answer>"
    for reward in (exact_match, math_verify_reward):
        assert reward([draft, whole], ["5", "5"], thought_opened=[True, True]) == [0.0, 1.0]
        assert reward([draft, whole], ["5", "5"], prompts=["2 + 3<think>\n"] * 2) == [0.0, 1.0]
        assert reward([draft], ["5"], prompts=["2 + 3"]) == [1.0]


def test_bertscore_is_f1_and_an_empty_answer_never_reaches_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the call into the optional library: F1 is the third value, rows keep their places, 1 is the most."""

    class Scorer:
        def __init__(self, lang: str) -> None:
            assert lang == "en"

        def score(self, candidates: list[str], references: list[str]) -> tuple[torch.Tensor, ...]:
            assert (candidates, references) == (["cat", "dog"], ["a cat", "a dog"])
            return torch.zeros(2), torch.zeros(2), torch.tensor([0.25, 1.0000001])

    rewards._load_bert_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(BERTScorer=Scorer))
    texts = ["<answer>cat</answer>", "<answer> </answer>", "<answer>dog</answer>"]
    assert bertscore_reward(texts, answer=["a cat", "a bird", "a dog"]) == [0.25, 0.0, 1.0]
    rewards._load_bert_scorer.cache_clear()


def test_a_missing_bertscore_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the message of the optional extra."""
    rewards._load_bert_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(ImportError, match=r"pip install 'cepo\[bertscore\]'"):
        bertscore_reward(["<answer>cat</answer>"], answer=["cat"])


@FUZZ
@given(text=ANY_TEXT)
def test_no_text_breaks_the_judges_rewards(text: str) -> None:
    """Protects training from whatever a model may write."""
    scores = read_scores(text)
    assert scores is None or all(0.0 <= score < float("inf") for score in scores)
    assert 0.0 <= format_reward([text])[0] <= 0.2
    assert argmax_reward([text], label=["A"])[0] + argmax_reward([text], label=["B"])[0] in (0.0, 1.0)


@FUZZ
@given(text=ANY_TEXT, reference=ANY_TEXT)
def test_no_text_breaks_the_reasoners_rewards(text: str, reference: str) -> None:
    """Protects training from whatever a model may write; a reference with content is always matched by itself."""
    assert exact_match([text], answer=["7" + reference])[0] in (0.0, 1.0)
    assert extract_answer(text) == extract_answer(text).strip()
    assert exact_match([f"</think><answer>{reference_answer(reference)}</answer>"], answer=["7"])[0] in (0.0, 1.0)


def test_the_rewards_can_be_pickled() -> None:
    """Protects their use in worker processes."""
    for reward in (format_reward, argmax_reward, exact_match, math_verify_reward, bertscore_reward):
        assert pickle.loads(pickle.dumps(reward)) is reward


def test_real_judge_outputs_are_read_as_their_authors_read_them() -> None:
    """Protects agreement with the published scores of a real judge, thoughts and drafts included."""
    path = DATA / "judge" / "j1_micro_trajectories.jsonl"
    if not path.is_file():
        pytest.skip(f"the judge outputs are not here: {path.name}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert list(read_scores(row["judge_output"]) or ()) == json.loads(row["pairwise_score"])
    outputs = [row["judge_output"] for row in rows]
    assert format_reward(outputs) == [0.2] * len(rows)
    assert argmax_reward(outputs, label=["A"] * len(rows)) == [float(row["correct"] == "True") for row in rows]


@pytest.mark.parametrize("name", ["gsm8k_test", "ifqa", "cladder_2000", "casehold", "bbeh_causal", "math_hard"])
def test_every_real_reference_is_matched_by_itself(name: str) -> None:
    """Protects the references of real data sets from being lost in extraction or normalisation."""
    path = DATA / "reason" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"the data set is not here: {path.name}")
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    completions = [f"<think>so</think>\n<answer>{reference_answer(answer)}</answer>" for answer in answers]
    assert exact_match(completions, answer=answers) == [1.0] * len(answers)
