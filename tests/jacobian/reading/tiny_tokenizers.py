"""Tokenizers of every kind, made on the spot, and completions read with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.jacobian.records import Rollout

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


QUESTION = "Which is good, A or B?"


BODY = "<specific_criteria>a</specific_criteria><analysis>b</analysis><scores>\\boxed{9, 6}</scores>"


INSTRUCTIONS = ("Judge these.\n\n[Query]\n", "\n[A]\n", "\n[B]\n", "\nScore them.")


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


def chat(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """Render messages with the generation prompt."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
