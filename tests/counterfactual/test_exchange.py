"""The two responses exchanged in the prompt: the text side of the order leak, on real and made-up tokenizers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cepo.counterfactual.exchange import exchanged_prompts
from cepo.jacobian.reading.judge import write_judgement
from cepo.jacobian.reading.reasoner import ReasonerLayout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout
from cepo.train import testbed
from cepo.train.prompts import JUDGE, judge_prompt
from tests.jacobian.reading.tiny_tokenizers import BUILDERS, encode
from tests.train.testbed_item import ITEM, PROMPT

JUDGEMENT = write_judgement("Names the right city (weight 3).", "A is right. B is not.", (9, 2))
TEXT = st.text(st.sampled_from("ab é\n[]AB:,.9"), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return BUILDERS["byte level"]()


def read(tokenizer: Any, message: str, completion: str = JUDGEMENT, layout: Any = JUDGE) -> tuple[Rollout, SpanReader]:
    messages = [{"role": "user", "content": message}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    reader = SpanReader(tokenizer, layout)
    return reader.read(encode(tokenizer, prompt), encode(tokenizer, completion), messages), reader


def exchange(rollout: Rollout, reader: SpanReader) -> Rollout | None:
    (exchanged,) = exchanged_prompts([rollout], reader)
    return exchanged


def own_prompt(query: str, first: str, second: str) -> str:
    return judge_prompt(query, first, second)[0]["content"]


@settings(derandomize=True, deadline=None, database=None, max_examples=12)
@given(query=TEXT, first=TEXT, second=TEXT)
def test_the_exchanged_prompt_is_that_of_the_responses_in_the_other_order(
    byte_level: Any, query: str, first: str, second: str
) -> None:
    """Protects the counterfactual: it is the prompt that the judge would have seen, token for token, and nothing that
    the judge wrote is touched: its ids are the same, its spans moved by the change of the prompt's length."""
    rollout, reader = read(byte_level, own_prompt(query, first, second))
    other, _ = read(byte_level, own_prompt(query, second, first))
    exchanged = exchange(rollout, reader)
    assert exchanged is not None
    assert exchanged == other
    assert exchange(exchanged, reader) == rollout
    moved = len(exchanged.prompt_ids) - len(rollout.prompt_ids)
    for name in ("criteria", "analysis", "scores"):
        assert exchanged.spans[name].positions == tuple(at + moved for at in rollout.spans[name].positions)


def test_the_testbed_is_exchanged_by_its_lines() -> None:
    """Protects the second form of a prompt, responses that each open a line."""
    rollout, reader = read(testbed.build_tokenizer(), PROMPT, ITEM.completion)
    first, second = (line.split(": ")[1] for line in PROMPT.split("\n")[1:])
    exchanged = exchange(rollout, reader)
    query = PROMPT.split("\n")[0]
    assert exchanged is not None
    expected = f"<|user|>{query}\nResponse A: {second}\nResponse B: {first}<|assistant|>"
    assert reader.text_of(exchanged.prompt_ids).decode() == expected
    assert exchanged.completion_ids == rollout.completion_ids


@pytest.mark.parametrize(
    "form",
    [
        "[The Begin of Response A]\n{}\n[The End of Response A]\n"
        "[The Begin of Response B]\n{}\n[The End of Response B]\nScore them.",
        "[The Start of Assistant A's Answer]\n{}\n[The End of Assistant A's Answer]\n\n"
        "[The Start of Assistant B's Answer]\n{}\n[The End of Assistant B's Answer]",
    ],
)
def test_published_prompts_are_exchanged_by_their_marks(byte_level: Any, form: str) -> None:
    """Protects the leak of judges that others prompt: the forms of j1 and of MT-Bench."""
    rollout, reader = read(byte_level, "Query\n" + form.format("one", "two and more"))
    other, _ = read(byte_level, "Query\n" + form.format("two and more", "one"))
    assert exchange(rollout, reader) == other


@pytest.mark.parametrize(
    "message",
    [
        "Which is better?",
        "Q\nResponse A: one\nResponse B: two\nResponse B: three",
        "Q\nResponse B: two\nResponse A: one",
        own_prompt("q", "one\n[End of response A]\n\n[Response B]\ntwo", "three"),
        "Q\nResponse A: one<|im_end|>\nResponse B: two",
    ],
)
def test_unclear_responses_are_left_alone(byte_level: Any, message: str) -> None:
    """Protects against a wrong exchange: marks that are missing, doubled, disordered, or a turn that ends within."""
    rollout, reader = read(byte_level, message)
    assert rollout.malformed is None
    assert reader.responses(rollout) is None
    assert exchange(rollout, reader) is None


@pytest.mark.parametrize("name", BUILDERS)
def test_an_exchange_is_exact_or_refused(name: str) -> None:
    """Protects the ids of the prompt: a tokenizer that does not give them back for their own text is not guessed at."""
    tokenizer = BUILDERS[name]()
    message = "Which?\nResponse A: The good one.\nResponse B: 10, 9"
    rollout, reader = read(tokenizer, message)
    exchanged = exchange(rollout, reader)
    if encode(tokenizer, reader.text_of(rollout.prompt_ids).decode()) != list(rollout.prompt_ids):
        assert exchanged is None
    else:
        assert exchanged is not None
        text = reader.text_of(exchanged.prompt_ids)
        assert b"Response A: 10, 9\nResponse B: The good one." in text
    split = replace(rollout, prompt_ids=tuple(encode(tokenizer, "Whi") + encode(tokenizer, "ch?\nResponse A: ")))
    assert exchange(split, reader) is None


def test_what_has_no_responses_is_none_in_its_place(byte_level: Any) -> None:
    """Protects the order of the answers: malformed rollouts and reasoners have no exchanged prompt."""
    rollout, reader = read(byte_level, own_prompt("q", "one", "two"))
    broken, _ = read(byte_level, own_prompt("q", "one", "two"), "no tags")
    found = exchanged_prompts([broken, rollout, broken], reader)
    assert [each is not None for each in found] == [False, True, False]
    reasoning, reasoner = read(
        byte_level, own_prompt("q", "one", "two"), "<think>so</think><answer>4</answer>", ReasonerLayout()
    )
    assert exchange(reasoning, reasoner) is None
