"""From sampled ids to spans: which tokens are the prompt's content, the criteria or rationale, the scores or answer.

Everything is found on the bytes of the ids themselves. A token belongs to a span when it carries a byte of the content
(surrounding white space is not content); a token that a tag or a digit shares with the content belongs to the span, but
never moves in a counterfactual. Special tokens are never content.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from jinja2 import TemplateError

from cepo.jacobian.reading.layout import WHITE_SPACE, ByteRange, Layout, MalformedError, as_bytes, trim_range
from cepo.jacobian.reading.numbers import NumberToken, number_tokens, scale_of
from cepo.jacobian.reading.sentences import sentence_ends
from cepo.jacobian.reading.thought import thought_opened
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.jacobian.records import Digit, Rollout, Span

_PROBE = "cepo-content-probe"


class SpanReader:
    """Reads rollouts out of token ids for one tokenizer and one layout.

    Args:
        tokenizer: the policy's Hugging Face tokenizer.
        layout: JudgeLayout, ReasonerLayout, or any other `Layout`.
    """

    def __init__(self, tokenizer: Any, layout: Layout) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self._bytes = TokenBytes(tokenizer)
        self._unread = self._bytes.unread_ids(layout.tags)
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
            prompt_ids: ids of the prompt as the policy saw it.
            completion_ids: sampled ids without padding.
            messages: the conversation that the prompt was rendered from, where known: the text of its user messages is
                the content. Without it, the tokenizer's chat template is asked where content stands, and a prompt that
                the template does not explain is all content, except for its special tokens.

        Raises:
            ValueError: if prompt_ids is empty (the first token of a text is predicted by nothing).
        """
        prompt_ids, completion_ids = tuple(map(int, prompt_ids)), tuple(map(int, completion_ids))
        if not prompt_ids:
            raise ValueError("prompt_ids is empty; a rollout needs at least one prompt token to be predicted from")
        blank = Rollout(prompt_ids, completion_ids)
        prompt = self._bytes.of(prompt_ids)
        completion = self._without_specials(completion_ids, self._bytes.of(completion_ids))
        prompt_text, completion_text = b"".join(prompt), b"".join(completion)
        ids = prompt_ids + completion_ids
        ends = list(accumulate(len(piece) for piece in prompt + completion))
        shift = len(prompt_text)
        try:
            if not completion_text.strip(WHITE_SPACE):
                raise MalformedError("empty completion")
            opened = thought_opened(prompt_text, self.layout.thought_tag)
            found = self.layout.find(completion_text, thought_opened=opened)
            ranges = {
                "prompt": self._prompt_ranges(prompt_text, messages),
                **{name: tuple((a + shift, b + shift) for a, b in spans) for name, spans in found.ranges.items()},
            }
            text = prompt_text + completion_text
            spans = {name: self._span(name, ranges[name], text, ids, ends) for name in self.layout.names}
        except MalformedError as reason:
            return Rollout(**{**blank.__dict__, "malformed": str(reason)})
        scale = scale_of([completion_text[a:b] for a, b in found.numbers])
        numbers = tuple(self._number((a + shift, b + shift), scale, text, ids, ends) for a, b in found.numbers)
        return Rollout(prompt_ids, completion_ids, spans, numbers, None, found.found_by)

    def responses(self, rollout: Rollout) -> tuple[ByteRange, ByteRange] | None:
        """Return where the two responses stand in the bytes of the prompt, or None where nothing marks them clearly.

        The first of the layout's forms fits whose marks all stand exactly once, in order, around text without special
        tokens.

        Args:
            rollout: well-formed, of this reader.
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
        """Return the bytes of the ids, those of special tokens included."""
        return b"".join(self._bytes.of(tuple(token_ids)))

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token for display: joined, they are the text; a character that spans several tokens
        is given to the last of them."""
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
        unique = dict.fromkeys(positions)  # one token can carry the ends of two ranges
        kept = dict(zip(movable, sentences, strict=True))
        return Span(name, tuple(unique), tuple(kept), tuple(kept.values()), shown)

    def _number(
        self, number: ByteRange, scale: int, text: bytes, ids: Sequence[int], ends: Sequence[int]
    ) -> tuple[Digit, ...]:
        digits = []
        for position, token in number_tokens(text, ends, number, scale):
            if token not in self._gains:
                self._gains[token] = self._gains_of(token)
            written = token.reached - token.ended
            digits.append(Digit(position, tuple(sorted({**self._gains[token], ids[position]: written}.items()))))
        return tuple(digits)

    def _gains_of(self, token: NumberToken) -> dict[int, float]:
        """Return the gain of every token of the vocabulary that could go on with the number here."""
        if self._short_numbers is None:
            self._short_numbers = self._bytes.short_numbers()
        gains = ((token_id, token.gain(piece)) for token_id, piece in self._short_numbers)
        return {token_id: gain for token_id, gain in gains if gain is not None}

    def _prompt_ranges(self, prompt: bytes, messages: Sequence[Mapping[str, Any]] | None) -> tuple[ByteRange, ...]:
        contents = self._message_ranges(prompt, messages) if messages else self._lone_message_range(prompt)
        pieces = [as_bytes(piece) for piece in self.layout.instructions]
        return tuple(gap for content in contents for gap in _without_instructions(prompt, content, pieces))

    def _message_ranges(self, prompt: bytes, messages: Sequence[Mapping[str, Any]]) -> tuple[ByteRange, ...]:
        """Return where the text of each user message stands in the rendered prompt.

        The template is rendered with a probe for every text, so that a short text is never found in the template's own
        words. A prompt that starts otherwise (tools, a template of the trainer's own) is searched for the texts.
        """
        texts = [(message.get("role"), text) for message in messages for text in _texts(message)]
        if all(isinstance(message.get("content"), str) for message in messages):
            frame = self._frame([{**message, "content": _PROBE} for message in messages])
            if frame and prompt.startswith(frame[0]):
                return _framed_ranges(prompt, texts, frame)
        return _searched_ranges(prompt, texts)

    def _lone_message_range(self, prompt: bytes) -> tuple[ByteRange, ...]:
        """Return where the chat template puts a lone user message, or the whole prompt if it does not explain it."""
        frame = self._frame([{"role": "user", "content": _PROBE}])
        if frame:
            before, after = frame
            if len(prompt) > len(before) + len(after) and prompt.startswith(before) and prompt.endswith(after):
                return ((len(before), len(prompt) - len(after)),)
        return ((0, len(prompt)),)

    def _frame(self, probes: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Return what the chat template puts around the probes, as bytes; [] without a template that explains them.

        The bytes of the template's tokens are tried first (some tokenizers put a space after a special token), then
        its text (some vocabularies cannot write the probe).
        """
        if not getattr(self.tokenizer, "chat_template", None):
            return []
        try:
            text = self.tokenizer.apply_chat_template(list(probes), tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError):  # a template that refuses such a conversation
            return []
        tokens = b"".join(self._bytes.of(self.tokenizer(text, add_special_tokens=False)["input_ids"]))
        for rendered in (tokens, text.encode()):
            frame = rendered.split(_PROBE.encode())
            if len(frame) == len(probes) + 1:
                return frame
        return []


def _overlapping(ends: Sequence[int], wanted: ByteRange) -> list[tuple[int, ByteRange]]:
    """Return (position, byte range) of each token that carries a byte of the wanted range, given all tokens' ends."""
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
    """Return where sentences, clauses and lines end in the wanted range, ascending."""
    written = text[slice(*wanted)].decode("utf-8", "surrogateescape")
    ends = sorted({*sentence_ends(written, clauses=True), *(line.end() for line in re.finditer(r"\n", written))})
    pieces = (written[start:end] for start, end in pairwise([0, *ends]))
    return list(accumulate((len(piece.encode("utf-8", "surrogateescape")) for piece in pieces), initial=wanted[0]))[1:]


def _framed_ranges(prompt: bytes, texts: Sequence[tuple[Any, str]], frame: Sequence[bytes]) -> tuple[ByteRange, ...]:
    """Return the user's ranges by walking the template's own words, which stand before, between and after the texts."""
    ranges, cursor = [], len(frame[0])
    for (role, text), after in zip(texts, frame[1:], strict=True):
        encoded = as_bytes(text)
        written = next((w for w in (encoded, encoded.strip(WHITE_SPACE)) if prompt.startswith(w, cursor)), None)
        if written is not None:
            end = cursor + len(written)
        else:  # the template changed the text: it reaches to the template's next words
            found = prompt.find(after, cursor)
            end = found if after and found >= 0 else len(prompt)
        if role == "user":
            ranges.append((cursor, end))
        cursor = end + len(after)
    return tuple(ranges)


def _searched_ranges(prompt: bytes, texts: Sequence[tuple[Any, str]]) -> tuple[ByteRange, ...]:
    """Return the user's ranges by searching for each text after the one before."""
    ranges, cursor = [], 0
    for role, text in texts:
        wanted = as_bytes(text).strip(WHITE_SPACE)  # templates strip
        start = prompt.find(wanted, cursor) if wanted else -1
        if start >= 0:
            cursor = start + len(wanted)
            if role == "user":
                ranges.append((start, cursor))
    return tuple(ranges)


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    return [content] if isinstance(content, str) else [part.get("text", "") for part in content or []]


def _without_instructions(prompt: bytes, content: ByteRange, pieces: Sequence[bytes]) -> tuple[ByteRange, ...]:
    """Return the gaps between the fixed pieces: first and last at the ends, the others where they first occur."""
    if not pieces:
        return (content,)
    first, *middle = [pieces[0].lstrip(WHITE_SPACE), *pieces[1:]]
    last = middle.pop().rstrip(WHITE_SPACE) if middle else b""
    start, end = content
    core = trim_range(prompt, content) or content
    if not prompt.startswith(first, core[0]) or not prompt.endswith(last, 0, core[1]):
        return (content,)
    start, end = core[0] + len(first), core[1] - len(last)
    gaps, cursor = [], start
    for piece in middle:
        at = prompt.find(piece, cursor, end)
        if at < 0:
            return (content,)
        gaps.append((cursor, at))
        cursor = at + len(piece)
    return (*gaps, (cursor, end)) if cursor <= end else (content,)


def _between(prompt: bytes, marks: Sequence[bytes], end: int) -> tuple[ByteRange, ByteRange] | None:
    """Return the two gaps between three marks that stand exactly once and in order; an empty last mark is the end."""
    if any(mark and prompt.count(mark) != 1 for mark in marks):
        return None
    before, middle = prompt.index(marks[0]) + len(marks[0]), prompt.index(marks[1])
    after = prompt.index(marks[2]) if marks[2] else end
    second = middle + len(marks[1])
    return ((before, middle), (second, after)) if before <= middle and second <= after else None
