"""From sampled ids to spans: which tokens are the prompt's content, the criteria or rationale, the scores or answer.

Everything is found in the bytes of the ids themselves. A token belongs to a span if it holds a byte of the content,
which does not include surrounding white space. A token that also holds part of a tag belongs to the span, but never
moves in a counterfactual. Special tokens are never content.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from cepo.jacobian.reading.layout import WHITE_SPACE, ByteRange, Layout, MalformedError, as_bytes, trim_range
from cepo.jacobian.reading.numbers import NumberToken, number_tokens, scale_of
from cepo.jacobian.reading.prompt import PromptReader
from cepo.jacobian.reading.sentences import sentence_ends
from cepo.jacobian.reading.thought import thought_opened
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.jacobian.reading.unknown import UnknownTokens
from cepo.jacobian.records import Digit, Rollout, Span

_REMEMBERED = 128  # most number tokens whose alternatives are cached; the same few recur


class SpanReader:
    """Reads rollouts from token ids, for one tokenizer and one layout.

    Args:
        tokenizer: the policy's Hugging Face tokenizer.
        layout: JudgeLayout, ReasonerLayout, or any other `Layout`.
    """

    def __init__(self, tokenizer: Any, layout: Layout) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self._bytes = TokenBytes(tokenizer)
        self._unread = self._bytes.unread_ids(layout.tags)
        self.prompts = PromptReader(tokenizer, self._bytes, layout.instructions)
        self._unknown = UnknownTokens(tokenizer)
        self._short_numbers: list[tuple[int, bytes]] | None = None
        self._gains: dict[NumberToken, dict[int, float]] = {}

    def read(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        messages: Sequence[Mapping[str, Any]] | None = None,
    ) -> Rollout:
        """Return the rollout with its spans, or marked malformed with the reason; never raises on model output.

        Args:
            prompt_ids: ids of the prompt as the policy saw it. Padding around it is removed, see
                `PromptReader.without_padding`.
            completion_ids: sampled ids.
            messages: the conversation that the prompt was rendered from, if known: the text of its user messages is the
                content. Without it, the content is found by the tokenizer's chat template, see `PromptReader.content`.

        Raises:
            ValueError: if prompt_ids is empty (the completion's first token would be predicted from nothing).
        """
        if not len(prompt_ids):
            raise ValueError("prompt_ids is empty; a rollout needs at least one prompt token to be predicted from")
        prompt_ids, completion_ids = self.prompts.without_padding([*map(int, prompt_ids)], [*map(int, completion_ids)])
        self._unknown.check(prompt_ids + completion_ids)
        blank = Rollout(prompt_ids, completion_ids)
        prompt = self._bytes.of(prompt_ids)
        completion = self._without_specials(completion_ids, self._bytes.of(completion_ids))
        prompt_text, completion_text = b"".join(prompt), b"".join(completion)
        ids = prompt_ids + completion_ids
        ends = list(accumulate(len(piece) for piece in prompt + completion))
        shift = len(prompt_text)
        try:
            if turn := self.prompts.later_turn(completion_ids):
                raise MalformedError(f"the completion continues into another turn ({turn}), such as a tool's result")
            if not completion_text.strip(WHITE_SPACE):
                raise MalformedError("empty completion")
            opened = thought_opened(prompt_text, self.layout.thought_tag)
            found = self.layout.find(completion_text, thought_opened=opened)
            content, prompt_found_by = self.prompts.content(prompt_ids, messages)
            ranges = {
                "prompt": content,
                **{name: tuple((a + shift, b + shift) for a, b in spans) for name, spans in found.ranges.items()},
            }
            text = prompt_text + completion_text
            spans = {name: self._span(name, ranges[name], text, ids, ends) for name in self.layout.names}
        except MalformedError as reason:
            return Rollout(**{**blank.__dict__, "malformed": str(reason)})
        scale = scale_of([completion_text[a:b] for a, b in found.numbers])
        numbers = tuple(self._number((a + shift, b + shift), scale, text, ids, ends) for a, b in found.numbers)
        return Rollout(
            prompt_ids, completion_ids, spans, numbers, None, found.found_by, prompt_found_by=prompt_found_by
        )

    def responses(self, rollout: Rollout) -> tuple[ByteRange, ByteRange] | None:
        """Return the byte ranges of the two responses in the prompt, or None if they are not clearly marked.

        The first of the layout's forms is used whose marks all occur exactly once, in order, around text without
        special tokens.

        Args:
            rollout: a well-formed rollout from this reader.
        """
        pieces = self._bytes.of(rollout.prompt_ids)
        ends = list(accumulate(len(piece) for piece in pieces))
        last = max(at for at in rollout.spans[self.layout.roles["Z"]].positions if at < len(pieces))
        special = [
            (end - len(piece), end)
            for token, piece, end in zip(rollout.prompt_ids, pieces, ends, strict=True)
            if token in self._bytes.special_ids
        ]
        for marks in self.layout.responses:
            found = _between(b"".join(pieces), [as_bytes(mark) for mark in marks], ends[last])
            if found and not any(start < found[1][1] and found[0][0] < end for start, end in special):
                return found
        return None

    def text_of(self, token_ids: Sequence[int]) -> bytes:
        """Return the bytes of the ids, including those of special tokens."""
        return b"".join(self._bytes.of(tuple(token_ids)))

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token for display. A character that spans several tokens belongs to the last."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = self._bytes.of(tuple(token_ids))
        return [decoder.decode(piece, final=index + 1 == len(pieces)) for index, piece in enumerate(pieces)]

    def _without_specials(self, token_ids: Sequence[int], pieces: Sequence[bytes]) -> list[bytes]:
        """Blank the special tokens (end of turn, padding), except those that are the layout's own tags."""
        return [
            b" " * len(piece) if token in self._unread else piece
            for token, piece in zip(token_ids, pieces, strict=True)
        ]

    def _span(
        self, name: str, ranges: Sequence[ByteRange], text: bytes, ids: Sequence[int], ends: Sequence[int]
    ) -> Span:
        positions, movable, sentences, sentence = [], [], [], 0
        trimmed = [(whole, core) for whole in ranges if (core := trim_range(text, whole)) is not None]
        for whole, core in trimmed:
            breaks = _sentence_breaks(text, core)
            for position, (start, end) in _overlapping(ends, core):
                if ids[position] in self._bytes.special_ids:
                    continue
                positions.append(position)
                if whole[0] <= start and end <= whole[1]:
                    movable.append(position)
                    sentences.append(sentence + bisect_right(breaks, start))
            sentence += len(breaks) + 1
        if not positions:
            raise MalformedError(f"empty {name}: no token of content")
        shown = " … ".join(text[core[0] : core[1]].decode("utf-8", errors="replace") for _, core in trimmed)
        unique = dict.fromkeys(positions)  # one token can hold the end of one range and the start of the next
        kept = dict(zip(movable, sentences, strict=True))
        return Span(name, tuple(unique), tuple(kept), tuple(kept.values()), shown)

    def _number(
        self, number: ByteRange, scale: int, text: bytes, ids: Sequence[int], ends: Sequence[int]
    ) -> tuple[Digit, ...]:
        digits = []
        for position, token in number_tokens(text, ends, number, scale):
            if token not in self._gains:
                if len(self._gains) == _REMEMBERED:
                    self._gains.clear()
                self._gains[token] = self._gains_of(token)
            written = token.reached - token.ended
            digits.append(Digit(position, tuple(sorted({**self._gains[token], ids[position]: written}.items()))))
        return tuple(digits)

    def _gains_of(self, token: NumberToken) -> dict[int, float]:
        """Return the gain of every token of the vocabulary that could continue the number here."""
        if self._short_numbers is None:
            self._short_numbers = self._bytes.short_numbers()
        gains = ((token_id, token.gain(piece)) for token_id, piece in self._short_numbers)
        return {token_id: gain for token_id, gain in gains if gain is not None}


def _overlapping(ends: Sequence[int], wanted: ByteRange) -> list[tuple[int, ByteRange]]:
    """Return (position, byte range) of each token that holds a byte of the wanted range, given all tokens' ends."""
    found = []
    start = 0
    for position, end in enumerate(ends):
        if start >= wanted[1]:
            break
        if end > wanted[0] and end > start:
            found.append((position, (start, end)))
        start = end
    return found


def _sentence_breaks(text: bytes, wanted: ByteRange) -> list[int]:
    """Return the byte positions at which sentences, clauses and lines end in the wanted range, ascending."""
    written = text[slice(*wanted)].decode("utf-8", "surrogateescape")
    ends = sorted({*sentence_ends(written, clauses=True), *(line.end() for line in re.finditer(r"\n", written))})
    pieces = (written[start:end] for start, end in pairwise([0, *ends]))
    return list(accumulate((len(piece.encode("utf-8", "surrogateescape")) for piece in pieces), initial=wanted[0]))[1:]


def _between(prompt: bytes, marks: Sequence[bytes], end: int) -> tuple[ByteRange, ByteRange] | None:
    """Return the two gaps between three marks that occur exactly once and in order; an empty last mark means `end`."""
    if any(mark and prompt.count(mark) != 1 for mark in marks):
        return None
    before, middle = prompt.index(marks[0]) + len(marks[0]), prompt.index(marks[1])
    after = prompt.index(marks[2]) if marks[2] else end
    second = middle + len(marks[1])
    return ((before, middle), (second, after)) if before <= middle and second <= after else None
