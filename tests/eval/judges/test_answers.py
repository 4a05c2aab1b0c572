"""Protects how a server's answer becomes a judgement: the thought by any of its names, parts, cut and empty answers."""

from typing import Any

import pytest

from cepo.eval.judges.answers import NoAnswerError, read_answer
from cepo.eval.judges.settings import Judgement
from cepo.jacobian.reading.verdict import STRICT

VERDICT = (
    "<specific_criteria>\nright\n</specific_criteria>\n<analysis>\nso\n</analysis>\n<scores>\n\\boxed{8, 6}\n</scores>"
)
DRAFT = "maybe <scores>\\boxed{1, 9}</scores> </think> or so"


def read(message: dict[str, Any], finish_reason: str | None = "stop", **answer: Any) -> Judgement:
    return read_answer({"choices": [{"message": message, "finish_reason": finish_reason}], **answer}, STRICT)


def thinking(*parts: Any) -> dict[str, Any]:
    return {"content": [{"type": "thinking", "thinking": list(parts)}, {"type": "text", "text": VERDICT}]}


@pytest.mark.parametrize(
    "message",
    [
        {"content": VERDICT, "reasoning_content": DRAFT},
        {"content": VERDICT, "reasoning": DRAFT},
        {"content": VERDICT, "reasoning": DRAFT.replace("</think>", "[/THINK]")},
        {"content": VERDICT, "reasoning": DRAFT, "reasoning_content": DRAFT},
        {"content": VERDICT, "reasoning": None, "reasoning_content": "", "reasoning_details": [{"text": DRAFT}]},
        {"content": VERDICT, "reasoning_details": [{"type": "reasoning.summary", "summary": DRAFT}]},
        thinking({"type": "text", "text": DRAFT}),
        {"content": [{"type": "thinking", "thinking": DRAFT}, {"type": "text", "text": VERDICT}]},
        {"content": [{"type": "reasoning", "text": DRAFT}, {"type": "output_text", "text": VERDICT}]},
    ],
)
def test_a_thought_by_any_name_is_kept_apart(message: dict[str, Any]) -> None:
    """Neither its drafts nor a closing tag that it quotes are read as the judgement's."""
    found = read(message)
    assert found.scores == (8.0, 6.0)
    assert found.text.startswith("<think>maybe")
    assert found.text.endswith(VERDICT)


@pytest.mark.parametrize(
    "content",
    [VERDICT, [VERDICT], [{"type": "text", "text": VERDICT}], [{"text": VERDICT[:20]}, {"text": VERDICT[20:]}]],
)
def test_text_in_parts_is_joined(content: Any) -> None:
    assert read({"content": content, "reasoning": None}).text == VERDICT


def test_half_a_character_is_replaced_before_another_model_reads_it() -> None:
    assert read({"content": f"ok \ud83d {VERDICT}"}).text == f"ok ? {VERDICT}"


def test_a_part_that_is_no_text_says_nothing() -> None:
    assert read({"content": [{"type": "reference", "reference_ids": [1]}, {"text": VERDICT}]}).text == VERDICT


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("content", [None, "", []])
def test_a_cut_thought_is_a_judgement_without_a_verdict(field: str, content: Any) -> None:
    """Its draft is none either; it is no failure, which would be asked for again at each run."""
    found = read({"content": content, field: "maybe <scores>\\boxed{1, 9}</scores>"}, "length")
    assert (found.error, found.scores, found.cut) == (None, None, True)
    assert "</think>" not in found.text


@pytest.mark.parametrize(
    ("message", "finish", "text"),
    [
        ({"content": None}, "length", ""),
        ({"content": ""}, "stop", ""),
        ({"content": None}, "content_filter", ""),
        ({"content": None, "refusal": "I cannot judge this."}, "stop", "I cannot judge this."),
    ],
)
def test_what_is_cut_filtered_empty_or_refused_is_judged(message: dict[str, Any], finish: str, text: str) -> None:
    """OpenAI's thoughts are kept back, so that a cut one leaves nothing at all."""
    found = read(message, finish)
    assert (found.text, found.error, found.scores) == (text, None, None)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"error": {"code": 429}}, "no choices"),
        ({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}, "no content"),
        (
            {"choices": [{"message": {"content": None, "tool_calls": [{}]}, "finish_reason": "tool_calls"}]},
            "no content",
        ),
        ({"choices": [{"message": {"content": ""}, "finish_reason": "error", "error": {"code": 502}}]}, "gave up"),
        ({"choices": [{"message": {"content": 3}}]}, "is a int"),
    ],
)
def test_an_answer_without_a_judgement_is_asked_for_again(answer: dict[str, Any], reason: str) -> None:
    with pytest.raises(NoAnswerError, match=reason) as raised:
        read_answer(answer, STRICT)
    assert raised.value.transient
