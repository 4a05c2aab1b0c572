"""Protects the choice of columns to score: each form, their order, and what is refused rather than guessed."""

import json
from pathlib import Path
from typing import Any

import pytest

from cepo.eval.judges.encoding import PromptEncoder
from cepo.eval.judges.settings import JudgeSettings
from cepo.eval.score.rows import line_of, read_input, read_lines, read_rollout, read_row
from cepo.jacobian.reading.judge import JudgeLayout, write_judgement
from cepo.jacobian.reading.spans import SpanReader
from cepo.train import testbed
from cepo.train.prompts import JUDGE, TIES_JUDGE, judge_prompt
from tests.byte_tokenizer import byte_tokenizer

ASKED, JUDGED = "Which is better?", "the judgement"
USER, ANSWER = {"role": "user", "content": ASKED}, {"role": "assistant", "content": JUDGED}
TEXT = {"prompt": ASKED, "completion": JUDGED}
MESSAGES = {"prompt": [USER], "completion": JUDGED}


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({**TEXT, "label": True}, TEXT),  # KTO's
        ({**TEXT, "label": "4", "score": "high", "text": 3}, TEXT),
        ({**TEXT, "messages": [{"role": "user", "content": "Something else."}]}, TEXT),  # UltraFeedback's
        ({**TEXT, "messages": "no list", "prompt_ids": None, "completion_ids": "none"}, TEXT),
        ({**TEXT, "prompt_ids": [1, 2]}, TEXT),
        ({**TEXT, "chosen": "x", "rejected": 7, "judge_output": None}, TEXT),
        ({**TEXT, "judge_output": JUDGED}, TEXT),
        ({**TEXT, "judge_output": {"score": 8}}, TEXT),
        ({**TEXT, "prompt_ids": [1], "completion_ids": [2]}, {"prompt_ids": [1], "completion_ids": [2]}),
        ({**TEXT, "prompt": ""}, None),
        ({**TEXT, "completion": ""}, {**TEXT, "completion": ""}),
        ({**TEXT, "completion": [ANSWER, {"role": "tool", "content": "ok"}]}, TEXT),
        ({**TEXT, "completion": [USER, ANSWER]}, TEXT),
        ({**TEXT, "completion": [{"role": "system", "content": "Be strict."}, USER, ANSWER]}, TEXT),
        ({**TEXT, "completion": ANSWER}, TEXT),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": ASKED}]}], "completion": JUDGED}, MESSAGES),
        ({"messages": [USER], "completion": JUDGED}, MESSAGES),
        ({"messages": [USER, ANSWER]}, MESSAGES),
        ({"messages": [USER, ANSWER], "prompt": None, "completion": ""}, MESSAGES),
        (
            {"prompt": ASKED, "completion": [{**ANSWER, "content": "draft"}, {**USER, "content": "Again."}, ANSWER]},
            {"prompt": [USER, {**ANSWER, "content": "draft"}, {**USER, "content": "Again."}], "completion": JUDGED},
        ),
        ({"prompt": [{**USER, "name": None, "tool_calls": None}], "completion": JUDGED}, MESSAGES),
    ],
)
def test_a_column_that_plays_no_part_neither_refuses_a_row_nor_replaces_another(
    row: dict[str, Any], read: dict[str, Any] | None
) -> None:
    if read is None:
        with pytest.raises(ValueError, match="lacks the column"):
            read_row(row)
    else:
        assert read_row(row) == read
        assert read_row(read) == read


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({**TEXT, "judge_output": "another"}, "'completion' and 'judge_output' differ"),
        ({"prompt": [USER, ANSWER], "completion": JUDGED}, "'prompt' ends with a message by the assistant"),
        ({**TEXT, "images": ["a.png"]}, "'images' holds images"),
        ({"messages": [USER, ANSWER], "completion": "another"}, "'messages' ends with a message by the assistant"),
        ({**TEXT, "completion": [{**USER, "content": "Else?"}, ANSWER]}, "hold different questions"),
        ({"messages": [ANSWER]}, "nothing before the answer"),
        ({"messages": [USER, ANSWER, USER]}, "lacks the column completion"),
        ({"messages": []}, "lacks the column completion"),
        ({"prompt": ASKED, "completion": [USER]}, "'completion' holds no message by the assistant"),
        ({"prompt": ASKED, "completion": [{**ANSWER, "reasoning_content": "Hm."}]}, "a thought beside the answer"),
        ({"messages": [USER, {**ANSWER, "reasoning_details": [{"text": "Hm."}]}]}, "a thought beside the answer"),
        ({"prompt": ASKED, "completion_ids": [1]}, "lacks the column prompt_ids"),
        ({"prompt": ASKED, "chosen": "a", "rejected": "b"}, "lacks the column judge_output"),
        ({"chosen": "a", "rejected": "b", "judge_output": "J"}, "'prompt' is missing"),
        ({"prompt": ASKED, "chosen": "a", "rejected": "b", "judge_output": "J", "label": 1}, "'label' holds 1"),
        ({**TEXT, "task_reward": "high"}, "'task_reward' holds 'high'"),
        ({**TEXT, "task_reward": True}, "'task_reward' holds True"),
        ({**TEXT, "task_reward": 10**400}, "'task_reward' holds 1000"),  # larger than any float
    ],
)
def test_what_could_be_two_things_is_refused_with_its_id_and_number(
    tmp_path: Path, row: dict[str, Any], complaint: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in (TEXT, {**row, "id": {"of": "its own"}})))
    (sound, refused), broken = read_input(path)
    assert sound.row == TEXT
    assert refused.broken is not None
    assert complaint in refused.broken
    assert (refused.id, broken) == ("{'of': 'its own'}", [(2, refused.broken)])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"prompt": ASKED, "chosen": "a", "rejected": "b", "judge_output": ""},
            None,
        ),
        (
            {"prompt": ASKED, "chosen": "a", "rejected": "b", "label": "A"},
            "lacks the column judge_output: it holds a preference (prompt, chosen, rejected, label)",
        ),
        ({"prompt": ASKED, "note": None}, "lacks the column chosen: it holds no known form (prompt, note (empty))"),
        (
            {"question": ASKED, "answer": "7"},
            "lacks the column chosen: it holds a question with its answer (question, answer)",
        ),
        ({"prompt_ids": [1]}, "lacks the column completion_ids: it holds no known form (prompt_ids)"),
        ({"completion": JUDGED}, "lacks the column prompt: it holds no known form (completion)"),
        ({"messages": [USER]}, "lacks the column chosen: it holds a conversation (messages)"),
        ({}, "lacks the column chosen: it holds no known form (no columns)"),
    ],
)
def test_a_row_of_another_form_is_told_by_its_own_form_and_that_of_the_rows_beside_it(
    tmp_path: Path, row: dict[str, Any], told: str | None
) -> None:
    """ "Lacks completion" sends someone whose rows are judged pairs after a column that none of them has."""
    pair = {"prompt": ASKED, "chosen": "a", "rejected": "b", "judge_output": JUDGED}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in (row, pair, TEXT, pair)))
    broken = read_input(path)[1]
    beside = "most other rows hold a judged pair (chosen, rejected, judge_output)"
    assert broken == ([] if told is None else [(1, f"line 1: {told}; {beside}")])


def test_a_row_without_an_id_is_named_by_where_it_stands_and_scored_alike_elsewhere(tmp_path: Path) -> None:
    """A record is kept where a row moves in its file, and named anew."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(("", json.dumps({**TEXT, "id": ""}), "{broken", json.dumps({**TEXT, "id": 0}))))
    (alone, broken, named), _ = read_input(path)
    assert [alone.name, broken.name, named.name] == ["line 2", "line 3", 0]
    assert alone.content == line_of(TEXT, "row 7").content
    assert line_of(TEXT, "row 7").name == "row 7"


def test_rows_of_other_inputs_that_cannot_be_used_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A torn file of donors, or of judgements to evaluate, would otherwise only make other figures."""
    path = tmp_path / "donors.jsonl"
    path.write_text(json.dumps(TEXT) + '\n{"prompt": "cut\n')
    assert [line.broken is None for line in read_lines(path)] == [True, False]
    assert "1 row cannot be used; the first: line 2 is broken" in caplog.text


def test_a_rendered_prompt_is_taken_raw_and_never_rendered_twice() -> None:
    """As --raw it gives the ids and spans of its messages; without, the row is broken, by a reason with the way out."""
    tokenizer = testbed.build_tokenizer()
    reader = SpanReader(tokenizer, JudgeLayout())
    text = tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    row = {"prompt": text, "completion": JUDGED}
    assert read_rollout(row, reader, raw=True).prompt_ids == read_rollout(MESSAGES, reader).prompt_ids
    with pytest.raises(ValueError, match="already rendered.*--raw"):
        read_rollout(row, reader)
    pair = {"prompt": text, "chosen": "a", "rejected": "b", "judge_output": JUDGED, "label": "A"}
    for other in ({**row, "prompt": [{"role": "user", "content": text}]}, pair):  # the pair's is within the question
        with pytest.raises(ValueError, match="already rendered.*; give its text alone"):
            read_rollout(other, reader)
    for prompt in ([{"role": "user", "content": text}], judge_prompt(text, "a", "b", ties=True)):
        assert "rendered already" in PromptEncoder(tokenizer, JudgeSettings(model="x")).encode(prompt)


def test_words_about_a_template_are_not_a_rendered_prompt() -> None:
    """Questions quote special tokens, and thoughts of earlier turns begin with one, where the model has it as such."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    reader = SpanReader(tokenizer, JudgeLayout())
    thought = [USER, {"role": "assistant", "content": "<think>Hm.</think>Which?"}, USER]
    questions = (
        "<think> tags: what are they?",
        "Why does this appear?\n<|im_start|>user\n",
        "<|im_start|> means what?",
    )
    for prompt in (thought, *questions):
        rollout = read_rollout({"prompt": prompt, "completion": JUDGED}, reader)
        wanted = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        rendered = tokenizer.apply_chat_template(wanted, add_generation_prompt=True, return_dict=True)
        assert list(rollout.prompt_ids) == rendered["input_ids"]


@pytest.mark.parametrize("tie", [{"tie": True}, {"label": "tie"}])
def test_a_judged_tie_is_read_with_the_prompt_that_allowed_it(tie: dict[str, Any]) -> None:
    """Its judge was told of equal scores; where ties are not asked for, the reason names the way to ask, if any."""
    pair = {"prompt": ASKED, "chosen": "a", "rejected": "b", "judge_output": JUDGED}
    for asked, way_out in ((JUDGE, "pass --ties to include ties"), (None, "only preferences are read here")):
        with pytest.raises(ValueError, match=f"^is a tie; {way_out}$"):
            read_row({**pair, **tie}, layout=asked)
    wanted = judge_prompt(ASKED, "a", "b", ties=True)
    assert read_row({**pair, **tie}, layout=TIES_JUDGE) == {"prompt": wanted, "completion": JUDGED}
    assert read_row({**pair, "label": "A"}, layout=TIES_JUDGE)["prompt"] == wanted
    tokenizer = byte_tokenizer()
    rendered = tokenizer.apply_chat_template(wanted, add_generation_prompt=True, return_dict=True)
    read = read_rollout({**pair, **tie}, SpanReader(tokenizer, TIES_JUDGE))
    assert list(read.prompt_ids) == rendered["input_ids"]


@pytest.mark.parametrize("ending", ["<think>", "<think>\n", "<think>\n\n"])
def test_a_thought_that_the_template_opens_is_opened_once(ending: str) -> None:
    """Texts of thinking models are stored with the tag that the template wrote; doubled, it changed every score."""
    tokenizer = byte_tokenizer()
    opener = "{% if add_generation_prompt %}" + ending + "{% endif %}"
    plain, tokenizer.chat_template = tokenizer.chat_template, f"{tokenizer.chat_template}{opener}"
    reader = SpanReader(tokenizer, JUDGE)
    judgement = f"Hm.</think>{write_judgement('Right.', 'A is.', (8, 6))}"
    wanted = read_rollout({"prompt": ASKED, "completion": judgement}, reader)
    assert (wanted.malformed, reader.text_of(wanted.token_ids).count(b"<think>")) == (None, 1)
    for written in (f"<think>{judgement}", f"{ending}{judgement}", f"\n{ending}{judgement}"):
        assert read_rollout({"prompt": ASKED, "completion": written}, reader) == wanted
    # What the model wrote itself stays: another thought, a tag in its text, and all of it where no thought is open.
    for own in (f"So <think> opens one. {judgement}", f"<think>Hm.</think><think>{judgement}"):
        read = read_rollout({"prompt": ASKED, "completion": own}, reader)
        assert reader.text_of(read.completion_ids) == own.removeprefix("<think>").encode()
    tokenizer.chat_template = plain
    read = read_rollout({"prompt": ASKED, "completion": f"<think>{judgement}"}, SpanReader(tokenizer, JUDGE))
    assert reader.text_of(read.completion_ids) == f"<think>{judgement}".encode()
