"""Protects what a reward model is shown: one beginning of text, both orders, and where the response stands."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cepo.train.pair_encoding import PairEncoder, Shown, read_shown

WORDS = ["<s>", "</s>", "[UNK]", "one", "two", "three", "four", "A", "B", "ask", "(", ")", ":"]
TEMPLATE = "{prompt} A {first} B {second} :"
CHAT = (
    "<s> {% for message in messages %}( {{ message['content'] }} ) {% endfor %}"
    "{% if add_generation_prompt %}: {% else %}</s>{% endif %}"
)


def build(template: str | None, *, adds_beginning: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that pads with its end of text, and adds a beginning unless told not to."""
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_beginning:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("adds", [True, False])
def test_every_text_has_one_beginning(template: str | None, adds: bool) -> None:
    """The template writes one and the tokenizer adds one; a prompt that brings its own does not double it either."""
    tokenizer = build(template, adds_beginning=adds)
    encoder = PairEncoder(tokenizer, Shown())
    for prompt in ("ask", "<s> ask"):
        for ids in encoder.encode(prompt, "one two", "three"):
            expected = 0 if template is None and not adds and prompt == "ask" else 1
            assert ids[:2].count(0) == expected
            assert ids[-1] == 1, "the end of the text is a part of it, padding id or not"


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
def test_a_pairwise_text_holds_both_responses_in_both_orders(template: str | None) -> None:
    tokenizer = build(template)
    encoder = PairEncoder(tokenizer, Shown("pairwise", TEMPLATE))
    first, second = (tokenizer.decode(ids) for ids in encoder.encode("ask", "one {second}", "three"))
    assert "A one [UNK] B three :" in first, "a response that looks like the template's field is text"
    assert "A three B one [UNK] :" in second
    assert encoder.verdict_ids == (WORDS.index("A"), WORDS.index("B"))
    assert encoder.shown.differences([3.0, 1.0, 2.0, 8.0]) == [1.0, -3.0]
    assert Shown().differences([3.0, 1.0]) == [2.0]


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
def test_the_response_is_found_in_its_text(template: str | None) -> None:
    encoder = PairEncoder(build(template), Shown())
    ids, positions, found = encoder.encode_response("one two", " two three two ", ["two", "thre", "one"])
    assert [WORDS[ids[place]] for place in positions] == ["two", "three", "two"]
    assert positions[0] > 2, "the same word in the prompt is not the response"
    assert found == [positions[0], positions[2]], "whole words of the response alone"
    assert ids == encoder.ids(encoder.shown.messages("one two", " two three two "))


@pytest.mark.parametrize(
    ("response", "word", "found"),
    [
        ("15*10=150kg, 1500 or 3.150", "150", ["150", "150"]),
        ("it is correct, incorrect or correct_ed", "correct", ["correct"]),
        ("costs US$5 or $50", "$5", ["$5"]),
        ("日本語は正しい。", "正しい", ["正しい"]),
        ("(这很好。)", "这很好。", ["这很好。"]),
        ("B2B for 2", "B", []),
    ],
)
def test_a_word_may_stand_next_to_a_unit_and_in_a_script_without_spaces(
    response: str, word: str, found: list[str]
) -> None:
    """What augment and users name as an attribute's words: a word that is missed would make the whole edit a leak."""
    characters = [*sorted({*response, "\n"}), "[UNK]"]
    backend = Tokenizer(models.WordLevel({one: place for place, one in enumerate(characters)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    encoder = PairEncoder(PreTrainedTokenizerFast(tokenizer_object=backend), Shown())
    ids, _, positions = encoder.encode_response(response, response, [word])
    assert "".join(characters[ids[place]] for place in positions) == "".join(found)


@pytest.mark.parametrize(("split", "found"), [(r"\.|\n|\w", ["\n", "b", "."]), (r"\.\n|\.|\w", ["b", ".\n"])])
def test_a_dropped_sentence_takes_along_the_line_break_that_is_its_own(split: str, found: list[str]) -> None:
    """With either tokenizer the other tokens are those of the text without it: what else changed would be a leak."""
    vocabulary = ["a", "b", "c", ".", "\n", ".\n", "\n\n", "[UNK]"]
    backend = Tokenizer(models.WordLevel({one: place for place, one in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(split), "isolated")
    encoder = PairEncoder(PreTrainedTokenizerFast(tokenizer_object=backend), Shown())
    ids, response, positions = encoder.encode_response("a", "a.\nb.\nc", ["\nb."])
    assert [vocabulary[ids[place]] for place in positions] == found
    shorter, of_shorter, _ = encoder.encode_response("a", "a.\nc")
    assert [ids[place] for place in response if place not in positions] == [shorter[place] for place in of_shorter]


def test_a_response_that_the_template_writes_too_is_not_found_behind_itself() -> None:
    ids, positions, _ = PairEncoder(build(CHAT), Shown()).encode_response("one", ")")
    assert [WORDS[place] for place in ids] == ["<s>", "(", "one", ")", "(", ")", ")", "</s>"]
    assert positions == [5]


def test_what_cannot_be_told_apart_is_said(tmp_path: Path) -> None:
    encoder = PairEncoder(build(CHAT), Shown(), max_length=8)
    for chosen, rejected, complaint in (
        ("one two three", "one", "too long: 10 tokens, over max_length 8"),
        ("unheard", "unseen", "equal after encoding"),
    ):
        with pytest.raises(ValueError, match=complaint):
            encoder.encode("ask", chosen, rejected)
    refusing: Any = build("{{ raise_exception('no assistant') }}")
    with pytest.raises(ValueError, match="the chat template refuses the messages: no assistant"):
        PairEncoder(refusing, Shown()).encode("ask", "one", "two")
    unsplit = build(CHAT.replace("{% if add_generation_prompt %}: ", "{% if add_generation_prompt %}:"))
    with pytest.raises(ValueError, match="the verdict 'A' is not one token"):
        PairEncoder(unsplit, Shown("pairwise", TEMPLATE))
    shown = Shown("pairwise", TEMPLATE, {"enable_thinking": False})
    shown.write(tmp_path)
    assert read_shown(tmp_path) == shown
    assert read_shown(tmp_path / "other") == Shown()
