"""The bytes of single tokens, for every kind of tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cepo.jacobian.reading.reasoner import ReasonerLayout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.reading.token_bytes import TokenBytes
from tests.jacobian.reading.tiny_tokenizers import (
    BUILDERS,
    build_byte_level,
    encode,
    read,
)


def test_words_without_a_decoder() -> None:
    """A word-level tokenizer, whose decoding puts spaces between, goes by prefixes."""
    words = ["<think>", "two", "and", ".", "</think>", "<answer>", "four", "</answer>", "why", "<|im_end|>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="<|im_end|>")
    ids = encode(tokenizer, "<think> two and two . </think> <answer> four </answer> <|im_end|>")
    rollout = SpanReader(tokenizer, ReasonerLayout()).read(encode(tokenizer, "why"), ids)
    assert rollout.malformed is None
    assert rollout.spans["rationale"].positions == (2, 3, 4, 5)
    assert rollout.spans["answer"].positions == (8,)
    assert rollout.spans["prompt"].positions == (0,)


def test_word_pieces() -> None:
    """A WordPiece tokenizer goes by prefixes too: continued pieces lose their marks."""
    pieces = ["[UNK]", "why", "ra", "##tion", "##ale", ".", "the", "an", "##swer", "<|im_end|>"]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="<|im_end|>")
    rollout = SpanReader(tokenizer, ReasonerLayout()).read([1], encode(tokenizer, "rationale. the answer"))
    assert rollout.found_by == "last sentence"
    assert (rollout.spans["rationale"].text, rollout.spans["answer"].text) == ("rationale .", "the answer")
    assert (rollout.spans["rationale"].positions, rollout.spans["answer"].positions) == ((1, 2, 3, 4), (5, 6, 7))


@pytest.mark.parametrize("kind", BUILDERS)
def test_bytes_add_up(tokenizers: dict[str, Any], kind: str) -> None:
    """The bytes of the tokens are the text, characters of several tokens and added tokens included."""
    tokenizer = tokenizers[kind]
    text = "Ça va? 你好 🙂 <|im_end|>\\boxed{10, 9.5}" if kind != "unigram" else "Hi <|im_end|>\\boxed{10, 9.5}"
    found = b"".join(TokenBytes(tokenizer).of(encode(tokenizer, text))).decode()
    assert found.strip() == text


def test_added_ordinary_tokens_are_text() -> None:
    """Tokens that were added without being special, such as <think> in Qwen3, are read and can be content."""
    tokenizer = build_byte_level()
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>"), AddedToken("café")])
    ids = encode(tokenizer, "<think>a café</think><answer>b</answer>")
    rollout = read(tokenizer, ids, ReasonerLayout())
    assert rollout.spans["rationale"].text == "a café"
    assert tokenizer.convert_tokens_to_ids("café") in [rollout.token_ids[p] for p in rollout.spans["rationale"].movable]


def test_a_decoder_that_replaces_by_a_pattern_is_asked_for_its_text() -> None:
    """A pattern is no mark for spaces: such a vocabulary is read by decoding."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "hi": 1, "▁▁you": 2}, unk_token="<unk>"))
    core.decoder = decoders.Sequence([decoders.Replace(Regex("▁+"), " "), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert TokenBytes(tokenizer).of([1, 2]) == [b"hi", b" you"]
