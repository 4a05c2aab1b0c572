"""The prompt's span: its messages' content, without the template's and the judge's own text."""

from __future__ import annotations

from typing import Any

import pytest

from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.jacobian.records import Rollout
from tests.jacobian.reading.tiny_tokenizers import (
    BODY,
    INSTRUCTIONS,
    QUESTION,
    assert_spans_fit,
    build_byte_level,
    chat,
    encode,
)


def prompt_span(
    tokenizer: Any, rendered: str, messages: Any = None, instructions: tuple[str, ...] = ()
) -> tuple[Rollout, list[str]]:
    """Read a good completion after a prompt, and return the rollout and the prompt's tokens as text."""
    reader = SpanReader(tokenizer, JudgeLayout(instructions=instructions))
    rollout = reader.read(encode(tokenizer, rendered), encode(tokenizer, BODY), messages)
    assert rollout.malformed is None
    pieces = TokenBytes(tokenizer).of(rollout.prompt_ids)
    return rollout, [pieces[position].decode() for position in rollout.spans["prompt"].positions]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", ["byte level", "trained", "sentencepiece", "fused"])
def test_prompt_content(tokenizers: dict[str, Any], kind: str, known: bool) -> None:
    """The user's message is the content, told by the messages or, without them, by the chat template.

    A SentencePiece tokenizer writes a space of its own after each special token, which no rendered text shows.
    """
    messages = [{"role": "user", "content": f"  {QUESTION}\n"}]
    tokenizer = tokenizers[kind]
    rendered = chat(tokenizer, messages)
    rollout, _ = prompt_span(tokenizer, rendered, messages if known else None)
    assert_spans_fit(tokenizer, rollout, {"prompt": [QUESTION]})
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    again, _ = prompt_span(tokenizer, rendered, parts)
    assert again.spans["prompt"] == rollout.spans["prompt"]


def test_system_message_is_not_content(tokenizers: dict[str, Any]) -> None:
    """System and assistant messages stay as they are, even where they say what the user says."""
    tokenizer = tokenizers["byte level"]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello there."},
        {"role": "assistant", "content": "Hello there."},
        {"role": "user", "content": QUESTION},
    ]
    rendered = chat(tokenizer, messages)
    rollout, written = prompt_span(tokenizer, rendered, messages)
    assert rollout.spans["prompt"].text == f"Hello there. … {QUESTION}"
    assert "".join(written) == f"Hello there.{QUESTION}"
    text = b"".join(TokenBytes(tokenizer).of(rollout.prompt_ids)).decode()
    first = text[: text.index("Hello there.")]
    assert rollout.spans["prompt"].positions[0] == len(encode(tokenizer, first))
    # By ids alone it is the same: the template's marks stand around each of the user's turns.
    assert prompt_span(tokenizer, rendered)[1] == written


@pytest.mark.parametrize("content", ["user", "s", "assistant"])
def test_short_question_is_found_in_its_message(tokenizers: dict[str, Any], content: str) -> None:
    """A question that also occurs in the template's own words is still found where the message stands."""
    tokenizer = tokenizers["byte level"]
    messages = [{"role": "user", "content": content}]
    rollout, written = prompt_span(tokenizer, chat(tokenizer, messages), messages)
    assert "".join(written) == content
    assert rollout.spans["prompt"].positions[0] == len(encode(tokenizer, "<|im_start|>user\n"))


def test_instructions_are_not_content(tokenizers: dict[str, Any]) -> None:
    """What is fixed in the prompt stays; content is what stands between, gap by gap, line breaks included."""
    tokenizer = tokenizers["byte level"]
    head, to_a, to_b, tail = INSTRUCTIONS
    message = f"{head}Why?{to_a}First one{to_b}Second one{tail}"
    messages = [{"role": "user", "content": message}]
    rendered = chat(tokenizer, messages)
    for known in (messages, None):
        rollout, _ = prompt_span(tokenizer, rendered, known, INSTRUCTIONS)
        assert_spans_fit(tokenizer, rollout, {"prompt": ["Why?", "First one", "Second one"]})
        assert len(set(rollout.spans["prompt"].sentences)) == 3
    # A prompt that does not hold them, or not all, is content as a whole.
    for other in (QUESTION, message.replace("[B]", "[C]"), message.replace("Judge", "Weigh"), message[:-1]):
        rendered = chat(tokenizer, [{"role": "user", "content": other}])
        rollout, _ = prompt_span(tokenizer, rendered, None, INSTRUCTIONS)
        assert rollout.spans["prompt"].text == other
    # Nothing between them: no content at all, which is a reason and no error.
    empty = chat(tokenizer, [{"role": "user", "content": "".join(INSTRUCTIONS)}])
    reader = SpanReader(tokenizer, JudgeLayout(instructions=INSTRUCTIONS))
    rollout = reader.read(encode(tokenizer, empty), encode(tokenizer, BODY))
    assert rollout.malformed == "empty prompt: no token of content"


def test_one_piece_of_instructions(tokenizers: dict[str, Any]) -> None:
    """A lone fixed piece opens the message."""
    tokenizer = tokenizers["byte level"]
    rendered = chat(tokenizer, [{"role": "user", "content": "Answer this: why"}])
    rollout, _ = prompt_span(tokenizer, rendered, None, ("Answer this:",))
    assert_spans_fit(tokenizer, rollout, {"prompt": ["why"]})


def test_prompt_without_template(tokenizers: dict[str, Any]) -> None:
    """A tokenizer without a chat template, or with one that raises: all but the special tokens is content."""
    for template in (None, "{{ raise_exception('no') }}", "{{ messages[1]['content'] }}"):
        tokenizer = build_byte_level()
        tokenizer.chat_template = template
        rollout, written = prompt_span(tokenizer, f"<|im_start|>{QUESTION}<|im_end|>")
        assert "".join(written) == QUESTION
        assert rollout.spans["prompt"].positions == tuple(range(1, len(rollout.prompt_ids) - 1))


def test_empty_prompt_ids(tokenizers: dict[str, Any]) -> None:
    """The first token of a text is predicted by nothing: that is the caller's mistake."""
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        SpanReader(tokenizers["byte level"], JudgeLayout()).read([], [1, 2])
