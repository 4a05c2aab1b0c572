"""Protects what a cell may hold, in every place that reads rows: scoring, training, evaluation and the warm start."""

import json
from pathlib import Path
from typing import Any

import pytest

from cepo.eval.best_of_n.candidates import Question, read_questions
from cepo.eval.rewardbench.items import load_items
from cepo.eval.score.rows import read_input
from cepo.train.data import load_preferences, load_reasoning
from cepo.train.prompts import judge_prompt
from cepo.train.rows import Preference, read_judgement, read_preference
from cepo.train.warm_start import read_examples

ASKED, GOOD, BAD = "How long to boil rice?", "Ten minutes.", "Rice."


def turns(*said: str, **more: Any) -> list[dict[str, Any]]:
    """A conversation that the user opens; what `more` adds stands in its last message."""
    roles = ("user", "assistant")
    spoken = [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]
    return [*spoken[:-1], {**spoken[-1], **more}]


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


PREFERENCES: dict[str, dict[str, Any]] = {
    "text": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "conversations": {"chosen": turns(ASKED, GOOD), "rejected": turns(ASKED, BAD)},
    "a prompt beside conversations": {"prompt": ASKED, "chosen": turns(ASKED, GOOD), "rejected": turns(ASKED, BAD)},
    "a null beside conversations": {"prompt": None, "chosen": turns(ASKED, GOOD), "rejected": turns(ASKED, BAD)},
    "an empty cell": {"prompt": "", "chosen": turns(ASKED, GOOD), "rejected": turns(ASKED, BAD)},
    "messages": {
        "prompt": turns(ASKED),
        "chosen": turns("", GOOD)[1:],
        "rejected": [{"role": "assistant", "content": BAD, "tool_calls": None, "name": None}],
    },
    "one message without a list": {"prompt": turns(ASKED)[0], "chosen": turns("", GOOD)[1], "rejected": BAD},
    "parts": {"prompt": parts("How long ", "to boil rice?"), "chosen": parts(GOOD), "rejected": parts(BAD)},
    "parts in messages": {
        "prompt": [{"role": "user", "content": parts(ASKED)}],
        "chosen": [{"role": "assistant", "content": parts(GOOD)}],
        "rejected": BAD,
    },
    "a turn after the answer": {
        "chosen": [*turns(ASKED, GOOD), *turns("Thanks.")],
        "rejected": [*turns(ASKED, BAD), {"role": "tool", "content": "ok"}],
    },
    "lists of texts": {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]},
    "columns that play no part": {
        "prompt": ASKED,
        "chosen": GOOD,
        "rejected": BAD,
        "label": True,
        "messages": turns("Something else."),
        "completion": 5,
        "text": {"nested": [1]},
        "score": float("nan"),
        "question": None,
        "answer": "no",
        "prompt_ids": "no",
        "images": [],
    },
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", list(PREFERENCES))
def test_every_reader_of_preferences_reads_the_same_pair(tmp_path: Path, name: str) -> None:
    row = {**PREFERENCES[name], "id": 7}
    assert read_preference(row) == Preference(ASKED, (GOOD,), (BAD,))
    path = write(tmp_path / "rows.jsonl", [row])
    (trained,) = load_preferences(path, test_fraction=0.0).train
    assert (trained["query"], {trained["response_a"], trained["response_b"]}) == (ASKED, {GOOD, BAD})
    assert trained["id"] == "7"
    (item,) = load_items(path)[0]
    assert (item.prompt, item.chosen, item.rejected, item.name) == (ASKED, (GOOD,), (BAD,), "7")
    if name != "columns that play no part":
        assert read_questions(path)[0] == [Question(ASKED, (GOOD, BAD), (True, False))]
    judged = {**row, "judge_output": "J", "label": "B", "completion": None}
    assert read_judgement(judged) == (judge_prompt(ASKED, BAD, GOOD), "J")
    path = write(tmp_path / "judged.jsonl", [judged])
    ((example,), _) = read_examples(path)
    (line,) = read_input(path)[0]
    assert line.row == {"prompt": example["prompt"], "completion": example["completion"][0]["content"]}
    assert (line.row["prompt"], line.id) == (judge_prompt(ASKED, BAD, GOOD), 7)


@pytest.mark.parametrize("column", ["images", "image"])
def test_rows_with_images_are_refused(column: str) -> None:
    """Their responses are about what a reader of text would not see."""
    with pytest.raises(ValueError, match=f"column '{column}' holds images"):
        read_preference({**PREFERENCES["columns that play no part"], column: ["a.png"]})


def test_a_role_that_nobody_has_is_named() -> None:
    """Templates leave such a message out, or write a turn that the model never saw."""
    with pytest.raises(ValueError, match="role 'human'; expected system, developer, user, assistant"):
        read_preference({"prompt": [{"role": "human", "content": ASKED}], "chosen": GOOD, "rejected": BAD})


def test_a_prompt_that_is_not_what_the_responses_answer_is_refused() -> None:
    """The first turn of a conversation, kept as its prompt, would lose what the responses answer, without a word."""
    longer = {"chosen": turns("Hi.", "Hello.", ASKED, GOOD), "rejected": turns("Hi.", "Hello.", ASKED, BAD)}
    with pytest.raises(ValueError, match="columns 'prompt' and 'chosen' hold different questions"):
        read_preference({"prompt": "Hi.", **longer})
    assert read_preference({"prompt": f" {ASKED}\n", **longer}).prompt == f" {ASKED}\n"
    assert read_preference({"prompt": turns("Hi.", "Hello.", ASKED), **longer}) == read_preference(longer)
    assert read_preference(longer).prompt == f"User: Hi.\n\nAssistant: Hello.\n\nUser: {ASKED}"


@pytest.mark.parametrize("empty", [None, float("nan")])
def test_a_cell_without_a_value_counts_as_a_missing_column(empty: Any) -> None:
    """What a table writes for an empty cell is no number, nor text of a wrong kind."""
    with pytest.raises(ValueError, match="column 'prompt' is missing; the row holds a preference .*prompt \\(empty\\)"):
        read_preference({"prompt": empty, "chosen": GOOD, "rejected": BAD})


def test_questions_and_answers_are_read_from_the_same_cells(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": ASKED, "answer": "10", "prompt": turns("else"), "label": 1},
        {"question": turns(ASKED), "answer": parts("1", "0")},
        {"question": [{"role": "user", "content": parts(ASKED)}], "answer": 10.0},
    ]
    trained = load_reasoning(write(tmp_path / "rows.jsonl", rows), test_fraction=0.0).train
    assert [(row["question"], row["answer"]) for row in trained] == [(ASKED, "10")] * 3
    completions = ["\\boxed{10}", turns(ASKED, "\\boxed{9}"), {"role": "assistant", "content": parts("\\boxed{8}")}]
    graded = {"question": None, "prompt": turns(ASKED), "completions": completions, "answer": "10", "correct": None}
    (question,) = read_questions(write(tmp_path / "graded.jsonl", [graded]))[0]
    assert question == Question(ASKED, ("\\boxed{10}", "\\boxed{9}", "\\boxed{8}"), (True, False, False))


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "a part of type 'image_url'; only"),
        ([{"type": "image"}, *parts("x")], "a part of type 'image'"),
        ([*turns("x", "y", tool_calls=[{"id": 1}]), *turns("z")], "a message that calls tools"),
        ([{"role": "assistant", "content": None, "function_call": {"name": "f"}}], "a message that calls tools"),
        ([*turns("x"), {"role": "tool", "content": "4"}], "a tool's result \\(role 'tool'\\)"),
        (str(turns("x")), "messages that are written out as text"),
        (json.dumps(turns("x", "y")), "messages that are written out as text"),
        ([{"role": "user"}], "nothing, not text"),
        ([*turns("x"), "y"], "a list, but not one of messages"),
        ([], "a list, but not one of messages"),
        ({"text": "x"}, "an object, not text"),
        (3, "a number, not text"),
    ],
)
def test_what_is_not_read_is_named_and_never_guessed(tmp_path: Path, value: Any, complaint: str) -> None:
    """The same reason for scoring and for training."""
    row = {"id": 1, "prompt": value, "chosen": GOOD, "rejected": BAD, "judge_output": "J", "completion": None}
    with pytest.raises(ValueError, match=f"column 'prompt' holds {complaint}|column 'prompt' is {complaint}"):
        load_preferences(write(tmp_path / "rows.jsonl", [row]))
    for one in (row, {"id": 1, "prompt": value, "completion": "x"}):
        ((line,), broken) = read_input(write(tmp_path / "rows.jsonl", [one]))
        assert line.broken is not None
        assert (line.id, line.row, broken) == (1, None, [(1, line.broken)])
        assert line.broken.startswith("line 1: column 'prompt'")
