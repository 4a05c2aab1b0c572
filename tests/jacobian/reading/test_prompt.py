"""Prompts by ids alone, padded, doubled or rendered already: the content that the messages give, or a word about it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.spans import SpanReader
from cepo.train.prompts import JUDGE, TIES_JUDGE, judge_prompt

GOOD = (
    "<specific_criteria>\nBe right.\n</specific_criteria>\n<analysis>\nA is right.\n</analysis>\n"
    "<scores>\n\\boxed{8, 6}\n</scores>"
)
_TURN = "{{ '<|h|>' + m['role'] + '<|/h|>\n' + m['content'] + '<|eot|>' }}"
TEMPLATES = {
    "llama": "{{ bos_token }}{% for m in messages %}"
    + _TURN
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n' }}{% endif %}",
    # a system message of its own with the date, and tools
    "dated": "{{ bos_token }}{{ '<|h|>system<|/h|>\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% set messages = messages[1:] %}{% endif %}{{ 'Today: ' + (date or '26 Jul 2024') }}{% for tool in tools or [] %}"
    "{{ tool | tojson }}{% endfor %}<|eot|>{% for m in messages %}"
    + _TURN
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n' }}{% endif %}",
    "chatml": "{% if messages[0].role != 'system' %}{{ '<|h|>system\nYou help.<|eot|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|h|>' + m['role'] + '\n' + m['content'] | trim + '<|eot|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|h|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<|h|>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m['content'] + '<|eot|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|h|>model\n' }}{% endif %}",
    "inst": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|h|> ' + m.content + ' <|/h|>' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
}
TEMPLATES["words"] = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
TEMPLATES["zephyr"] = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
USER = {"role": "user", "content": "Which is better?"}
LONG = [USER, {"role": "assistant", "content": "Better at what?"}, {"role": "user", "content": "At cooking."}]
SYSTEM = {"role": "system", "content": "Be strict."}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def tokenizer_of(family: str | None, **names: str) -> Any:
    """Return a tokenizer of bytes; that of "llama" and "dated" puts its start before a text by itself."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|bos|>", "<|eos|>", "<|pad|>", "<|h|>", "<|/h|>", "<|eot|>"])
    if family in ("llama", "dated"):
        start = [("<|bos|>", core.token_to_id("<|bos|>"))]
        core.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=start)
    names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATES.get(family or ""), **names)


def render(tokenizer: Any, messages: Sequence[Any], **options: Any) -> list[int]:
    """Return the ids of a rendered conversation."""
    return tokenizer.apply_chat_template(
        messages, **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, **options}
    )["input_ids"]


def reader_and_answer(tokenizer: Any) -> tuple[SpanReader, list[int]]:
    """Return a reader of judgements, and the ids of one."""
    return SpanReader(tokenizer, JudgeLayout()), tokenizer(GOOD, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("family", "messages", "options"),
    [
        ("llama", [SYSTEM, *LONG], {}),
        ("dated", [USER], {"date": "1 Jan 2031"}),
        ("dated", [SYSTEM, USER], {"tools": TOOLS, "date": "1 Jan 2031"}),
        ("dated", LONG, {"tools": TOOLS}),
        ("chatml", [USER], {"enable_thinking": False}),
        ("chatml", [SYSTEM, *LONG], {"enable_thinking": False}),
        ("chatml", [USER], {"add_generation_prompt": False}),
        ("gemma", LONG, {}),
        ("inst", LONG, {}),
        ("words", LONG, {}),
        ("zephyr", [SYSTEM, *LONG], {}),
    ],
)
def test_ids_alone_have_the_content_of_the_messages(family: str, messages: Any, options: Any) -> None:
    """A system message, tools, a date, an empty thought and earlier turns are no content, whatever the template."""
    tokenizer = tokenizer_of(family)
    reader, answer = reader_and_answer(tokenizer)
    ids = render(tokenizer, messages, **options)
    by_messages, by_ids = (reader.read(ids, answer, given) for given in (messages, None))
    assert by_ids.spans == by_messages.spans
    wanted = " … ".join(message["content"] for message in messages if message["role"] == "user")
    assert by_ids.spans["prompt"].text == wanted
    assert (by_messages.prompt_found_by, by_ids.prompt_found_by) == ("messages", "template")


@pytest.mark.parametrize(("layout", "ties"), [(JUDGE, False), (TIES_JUDGE, True)])
def test_a_judges_instructions_are_found_by_ids_alone(layout: JudgeLayout, ties: bool) -> None:
    """Under a system message the content is still the query and the responses, whether or not ties are allowed."""
    tokenizer = tokenizer_of("chatml")
    messages = [SYSTEM, *judge_prompt("How long?", "Ten minutes.", "Rice.", ties=ties)]
    rollout = SpanReader(tokenizer, layout).read(render(tokenizer, messages), reader_and_answer(tokenizer)[1])
    assert rollout.spans["prompt"].text == "How long? … Ten minutes. … Rice."


def test_what_no_template_explains_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Ids of another template: all is content, which the record and one warning say. Plain text is no such case."""
    foreign = render(tokenizer_of("inst"), [USER])
    tokenizer = tokenizer_of("llama")
    reader, answer = reader_and_answer(tokenizer)
    plain = tokenizer("Which is better?")["input_ids"]
    with caplog.at_level(logging.WARNING, logger="cepo"):
        assert reader.read(plain, answer).prompt_found_by == "plain text"
        assert not caplog.records
        for _ in range(2):
            assert reader.read(foreign, answer).prompt_found_by == "whole prompt"
    assert len(caplog.records) == 1
    assert "chat template does not explain" in caplog.text


@pytest.mark.parametrize("family", ["llama", "chatml", None])
@pytest.mark.parametrize("pad", ["<|pad|>", "<|eos|>", "<|eot|>", "<|bos|>", None])
@pytest.mark.parametrize("count", [1, 3])
def test_padding_is_taken_off(family: str | None, pad: str | None, count: int) -> None:
    """Left of the prompt, between and right, also where it is the end or the start of text; a real start stays."""
    tokenizer = tokenizer_of(family, **({} if pad is None else {"pad_token": pad}))
    reader, answer = reader_and_answer(tokenizer)
    plain = tokenizer("Which is better?")["input_ids"]
    prompt = render(tokenizer, [USER]) if family else plain
    clean = reader.read(prompt, answer)
    pads = [-100 if pad is None else tokenizer.pad_token_id] * count
    if pads == [tokenizer.bos_token_id] and family is None:
        return  # one start of text before plain text may be meant
    for padded in ((pads + prompt, answer), (prompt, pads + answer), (pads + prompt, pads + answer)):
        assert reader.read(*padded) == clean
    if not (family is None and pads == [tokenizer.eos_token_id]):  # one end before the answer may be meant
        assert reader.read(prompt + pads, answer) == clean


def test_padding_by_any_id() -> None:
    """Before the token that opens every prompt, a run of any id is padding; before other text it is text."""
    tokenizer = tokenizer_of("llama")
    reader, answer = reader_and_answer(tokenizer)
    prompt = render(tokenizer, [USER])
    assert reader.read([0] * 5 + prompt, answer) == reader.read(prompt, answer)
    assert reader.read([0] * 5 + prompt[4:], answer).prompt_ids == tuple([0] * 5 + prompt[4:])


def test_a_start_stays() -> None:
    """One start of text is no padding, even where the padding is the same token; nor is the end of the last turn."""
    tokenizer = tokenizer_of("llama", pad_token="<|bos|>")
    reader, answer = reader_and_answer(tokenizer)
    for prompt in (render(tokenizer, [USER]), tokenizer("Which?")["input_ids"], [tokenizer.bos_token_id]):
        assert reader.read(prompt, answer).prompt_ids == tuple(prompt)
    tokenizer = tokenizer_of("llama", pad_token="<|eot|>")
    unanswered = render(tokenizer, [USER], add_generation_prompt=False)
    assert SpanReader(tokenizer, JudgeLayout()).read(unanswered, answer).prompt_ids == tuple(unanswered)


def test_a_doubled_start_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Ids are taken as the policy saw them; that they begin twice is said once."""
    tokenizer = tokenizer_of("llama")
    reader, answer = reader_and_answer(tokenizer)
    doubled = [tokenizer.bos_token_id, *render(tokenizer, [USER])]
    with caplog.at_level(logging.WARNING, logger="cepo"):
        for _ in range(2):
            rollout = reader.read(doubled, answer)
    assert rollout.prompt_ids == tuple(doubled)
    assert rollout.spans["prompt"].text == "Which is better?"
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert "<|bos|> twice" in caplog.text


@pytest.mark.parametrize("family", list(TEMPLATES))
def test_a_rendered_prompt_as_raw_text(family: str) -> None:
    """Its ids are those of the messages, with or without the start of text that logs may lack; plain text begins as
    the tokenizer begins it."""
    tokenizer = tokenizer_of(family)
    prompts = SpanReader(tokenizer, JudgeLayout()).prompts
    text = tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    wanted = render(tokenizer, [USER])
    assert prompts.raw_ids(text) == wanted
    if family in ("llama", "dated"):
        assert prompts.raw_ids(text.removeprefix("<|bos|>")) == wanted
    assert prompts.raw_ids("Which?") == tokenizer("Which?")["input_ids"]


@pytest.mark.parametrize("family", list(TEMPLATES))
def test_a_rendered_prompt_is_known(family: str) -> None:
    """By its beginning, with a system message or the start of text, or without; quotations of one are not rendered."""
    tokenizer = tokenizer_of(family)
    prompts = SpanReader(tokenizer, JudgeLayout()).prompts
    text = tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)
    assert prompts.is_rendered(text)
    assert prompts.is_rendered("\n" + text.removeprefix("<|bos|>"))
    if family not in ("gemma", "inst"):  # which have no system message
        system = tokenizer.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, tokenize=False)
        assert prompts.is_rendered(system)
    assert not prompts.is_rendered("Log of today:\n" + text)
    assert not prompts.is_rendered("Which is better?")
    assert not prompts.is_rendered("### user:\nis how its prompts begin. Why?")
    assert not prompts.is_rendered("What does the token <|eot|> mean?")
    assert not SpanReader(tokenizer_of(None), JudgeLayout()).prompts.is_rendered("user: Which?")


def test_a_template_with_a_system_message_of_its_own_explains_a_prompt_without() -> None:
    """The end of the turn before is no part of the mark of a user's turn."""
    tokenizer = tokenizer_of("chatml")
    prompts = SpanReader(tokenizer, JudgeLayout()).prompts
    bare = "<|h|>user\nWhich is better?<|eot|>\n<|h|>assistant\n"
    assert prompts.is_rendered(bare)
    ids = tokenizer(bare, add_special_tokens=False)["input_ids"]
    ((start, end),), found_by = prompts.content(ids, None)
    assert (bare.encode()[start:end], found_by) == (b"Which is better?", "template")


@pytest.mark.parametrize("family", ["llama", "chatml"])
def test_a_tools_result_in_a_completion_is_malformed(family: str) -> None:
    """Rewards get no mask of what the policy did not write, so a completion with a later turn is refused by name."""
    tokenizer = tokenizer_of(family)
    reader, answer = reader_and_answer(tokenizer)
    end, turn = (tokenizer.convert_tokens_to_ids(token) for token in ("<|eot|>", "<|h|>"))
    result = tokenizer("tool\n42", add_special_tokens=False)["input_ids"]
    assert reader.read(render(tokenizer, [USER]), [*answer, end]).malformed is None
    rollout = reader.read(render(tokenizer, [USER]), [*result, end, turn, *result, end, turn, *answer, end])
    assert rollout.malformed == "the completion continues into another turn (<|h|>), such as a tool's result"
