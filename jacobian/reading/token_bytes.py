"""The bytes of each token id, so that spans are found in what was sampled and never in re-encoded text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from cepo.jacobian.reading.layout import as_bytes
from cepo.jacobian.reading.thought import spellings

_LARGEST_ID = 2**31 - 1  # the largest id that tokenizers can look up; negative ids such as -100 mark padding
_SHORT_NUMBER = re.compile(rb"[^0-9]{0,4}[0-9]{1,3}[^0-9]{0,4}")


class TokenBytes:
    """Owns one tokenizer's table from token ids to bytes.

    Byte-level vocabularies (GPT-2, Llama 3, Qwen, SmolLM2) and SentencePiece ones (Llama 2, Mistral, Gemma) are read
    token by token. Any other kind is read by decoding ever longer prefixes, which is slower and only as exact as its
    decoder. Added tokens stand for their own text.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special_ids = frozenset(tokenizer.all_special_ids)
        added = tokenizer.added_tokens_decoder
        self.special_ids |= {token_id for token_id, token in added.items() if token.special}
        self._cache: dict[int, bytes] = {token_id: as_bytes(token.content) for token_id, token in added.items()}
        self._kind, self._space = _decoder_kind(tokenizer)
        self._byte_of = _byte_level_alphabet() if self._kind == "byte_level" else {}

    def of(self, token_ids: tuple[int, ...] | list[int]) -> list[bytes]:
        """Return the bytes of each id, in order; ids that the tokenizer does not know give no bytes."""
        if self._kind == "prefix":
            return self._by_prefix(token_ids)
        return [self._read(token_id) for token_id in token_ids]

    def unread_ids(self, tags: Sequence[str]) -> frozenset[int]:
        """Return the special tokens that are not part of an output's text: all except the given tags.

        Args:
            tags: names of the tags; some tokenizers have `<think>` and `</think>`, or others, as special tokens.
        """
        marks = {mark for tag in tags for pair in spellings(tag).items() for mark in pair}
        return frozenset(token for token in self.special_ids if self.of([token])[0].strip() not in marks)

    def short_numbers(self) -> list[tuple[int, bytes]]:
        """Return (id, bytes) of every ordinary token with one run of up to three digits and few other bytes."""
        found = []
        for token, token_id in self.tokenizer.get_vocab().items():
            if token_id not in self.special_ids and any("0" <= character <= "9" for character in token):
                piece = self.of([token_id])[0]
                if _SHORT_NUMBER.fullmatch(piece):
                    found.append((token_id, piece))
        return sorted(found)

    def _read(self, token_id: int) -> bytes:
        if not 0 <= token_id <= _LARGEST_ID:
            return b""
        if token_id not in self._cache:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            self._cache[token_id] = b"" if token is None else self._piece(token)
        return self._cache[token_id]

    def _piece(self, token: str) -> bytes:
        if self._kind == "byte_level":
            return b"".join(
                bytes([self._byte_of[character]]) if character in self._byte_of else as_bytes(character)
                for character in token
            )
        if len(token) == 6 and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return as_bytes(token.replace(self._space, " "))

    def _by_prefix(self, token_ids: tuple[int, ...] | list[int]) -> list[bytes]:
        pieces, before = [], b""
        known = [token_id if 0 <= token_id <= _LARGEST_ID else None for token_id in token_ids]
        for count in range(1, len(token_ids) + 1):
            text = self.tokenizer.decode(
                [token_id for token_id in known[:count] if token_id is not None],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
            # A character whose bytes are still incomplete decodes to U+FFFD; it belongs to the token that completes it.
            now = as_bytes(text.rstrip("�")) if count < len(token_ids) else as_bytes(text)
            pieces.append(now[len(before) :])
            before = now if len(now) > len(before) else before
        return pieces


def _decoder_kind(tokenizer: Any) -> tuple[str, str]:
    """Return how tokens become bytes ("byte_level", "sentencepiece" or "prefix"), and SentencePiece's space mark."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return "prefix", ""
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return "byte_level", ""
    for step in steps:
        if step["type"] == "Metaspace":
            return "sentencepiece", step["replacement"]
        if step["type"] == "Replace" and step.get("content") == " " and "String" in step["pattern"]:
            return "sentencepiece", step["pattern"]["String"]
    return "prefix", ""


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each printable character that byte-level vocabularies use for it (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(hidden)}
