"""Find the content of a prompt in its ids: what the user wrote, without padding, template and fixed instructions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

from jinja2 import TemplateError

from cepo.jacobian.reading.layout import WHITE_SPACE, ByteRange, as_bytes, trim_range
from cepo.jacobian.reading.token_bytes import TokenBytes

logger = logging.getLogger("cepo")

_PROBE = "cepo-content-probe"
_USER, _SYSTEM, _ASSISTANT = ({"role": role, "content": _PROBE} for role in ("user", "system", "assistant"))


class PromptReader:
    """Reads prompts of one tokenizer.

    Args:
        tokenizer: the policy's Hugging Face tokenizer.
        token_bytes: the tokenizer's table of bytes.
        instructions: the fixed pieces of the user's message, see `JudgeLayout.instructions`.
    """

    def __init__(self, tokenizer: Any, token_bytes: TokenBytes, instructions: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self._bytes = token_bytes
        self._instructions = [as_bytes(piece) for piece in instructions]
        self._warned: set[str] = set()

    def without_padding(
        self, prompt_ids: Sequence[int], completion_ids: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return both without the padding that batching adds before, between and after them.

        Before the prompt, padding is a run of one id: a negative id, the tokenizer's padding, a special token that
        occurs more than once, or any id that occurs more than once before the token that begins every prompt. That
        token itself is kept once, even if it is also the padding. A doubled start token that is not padding is kept,
        with a warning.
        """
        prompt, completion = tuple(prompt_ids), tuple(completion_ids)
        start, end = self._leading(prompt), len(prompt) - self._trailing(prompt)
        if start < end:
            prompt = prompt[start:end]
        first, count = _run(completion)
        if count < len(completion) and self._is_padding(first):
            completion = completion[count:]
        while completion and completion[-1] < 0:  # other padding does no harm after the last target
            completion = completion[:-1]
        return prompt, completion

    def content(
        self, prompt_ids: Sequence[int], messages: Sequence[Mapping[str, Any]] | None
    ) -> tuple[tuple[ByteRange, ...], str]:
        """Return the byte ranges of the prompt's content, and how they were found.

        - "messages": the text of the user's messages, where they are given.
        - "template": what is between the template's marks of the user's turns, whatever else the prompt holds (a system
          message, tools, a date, an empty thought).
        - "plain text": all of a prompt without special tokens.
        - "whole prompt": all of a prompt that the template does not explain. Then the template's own words count as
          content, and a warning says so once.
        """
        prompt = b"".join(self._bytes.of(tuple(prompt_ids)))
        if messages:
            contents, found_by = self._message_ranges(prompt, messages), "messages"
        else:
            contents, found_by = self._turn_ranges(prompt), "template"
        if not messages and not contents:
            contents, found_by = ((0, len(prompt)),), "plain text"
            if any(token in self._bytes.special_ids for token in prompt_ids if token != prompt_ids[0]):
                found_by = "whole prompt"
                self._warn(
                    "prompt_ids hold special tokens that the tokenizer's chat template does not explain, so all of the "
                    "prompt counts as content (Z), the template's own words too: give the messages, or set "
                    "tokenizer.chat_template to the template that rendered them"
                )
        return tuple(
            gap for one in contents for gap in _without_instructions(prompt, one, self._instructions)
        ), found_by

    def later_turn(self, completion_ids: Sequence[int]) -> str | None:
        """Return the token that begins another turn after the end of the completion's own, or None."""
        opened, closed = (set(self._ids(mark)) & self._bytes.special_ids for mark in self._marks)
        ends = closed | {self.tokenizer.eos_token_id}
        first = next((at for at, token in enumerate(completion_ids) if token in ends), len(completion_ids))
        later = (token for token in completion_ids[first:] if token in opened - ends)
        return next((str(self.tokenizer.convert_ids_to_tokens(token)) for token in later), None)

    def raw_ids(self, text: str) -> list[int]:
        """Return the ids of a prompt that is given as text, with one start-of-text token.

        The tokenizer's start token is added to a text that lacks it, but not to a rendered prompt whose template writes
        none. A token that the tokenizer appends (end of sequence) is never part of a prompt.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        start = self._start_of_text
        template_writes_it = self._opening[: len(start)] == start
        if ids[: len(start)] == start or (self.is_rendered(text) and not template_writes_it):
            return ids
        return start + ids

    def is_rendered(self, text: str) -> bool:
        """Return whether a text is an already rendered prompt: it begins as the chat template's prompts do.

        Words that could be ordinary text, such as `USER: `, must also be at its end: those that open the answer.
        """
        written = as_bytes(text).strip(WHITE_SPACE)
        return any(
            written.startswith(opening) and (_holds_any(opening, self._special_texts) or written.endswith(self._ending))
            for opening in self._openings
        )

    @cached_property
    def _openings(self) -> tuple[bytes, ...]:
        """How rendered prompts begin: with a system message or a user's, with or without the start of text.

        Beginnings without a special token, which could be ordinary text, are kept only if prompts end in words too.
        """
        mark = self._marks[0]  # it may begin with the end-of-sequence token
        first = min((at for token in self._special_texts if (at := mark.find(token)) >= 0), default=len(mark))
        start = as_bytes(self.tokenizer.bos_token or "")
        whole = [frame[0] for probes in ([_USER], [_SYSTEM, _USER]) for frame in self._frames(probes)] + [mark[first:]]
        bare = [opening.lstrip(WHITE_SPACE).removeprefix(start) for opening in whole]
        openings = {opening.lstrip(WHITE_SPACE) for opening in (*whole, *bare)}
        return tuple(
            opening for opening in openings if opening and (self._ending or _holds_any(opening, self._special_texts))
        )

    @cached_property
    def _ending(self) -> bytes:
        """How rendered prompts end, after the user's words: b"" if nothing follows them."""
        return self._lone[1].strip(WHITE_SPACE) if self._lone else b""

    @cached_property
    def _special_texts(self) -> list[bytes]:
        pieces = (b"".join(self._bytes.of([token])).strip(WHITE_SPACE) for token in self._bytes.special_ids)
        return [piece for piece in pieces if piece]

    @cached_property
    def _start_of_text(self) -> list[int]:
        """The ids that the tokenizer prepends to a text."""
        bare, whole = (self.tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
        places = range(len(whole) - len(bare) + 1)
        return list(whole[: next((at for at in places if whole[at : at + len(bare)] == bare), 0)])

    @cached_property
    def _opening(self) -> list[int]:
        """The ids that the chat template puts before the user's first words, or the tokenizer before a text."""
        return self._ids(self._lone[0]) if self._lone else self._start_of_text

    @cached_property
    def _lone(self) -> list[bytes]:
        """What the template puts before and after a single user message; [] if there is no template that shows it."""
        return self._frame([_USER])

    @cached_property
    def _marks(self) -> tuple[bytes, bytes]:
        """What the template puts before and after each of the user's turns; empty if no template shows it."""
        if not self._lone:
            return b"", b""
        turns = self._frame([_USER, _ASSISTANT, _USER])
        befores, afters = [self._lone[0]], [self._lone[1]]
        if turns:
            befores, afters = [*befores, turns[2]], [*afters, turns[1]]
        for more, side in ((self._frame([_SYSTEM, _USER]), befores), (self._frame([_USER], answered=True), afters)):
            # Ignored if the template writes the system message into the user's turn, or nothing after the turn.
            piece = more[1] if more else b""
            if any(token in piece for token in self._special_texts):
                side.append(piece)
        opened, closed = _common(befores, last=True), _common(afters, last=False)
        # The end of the preceding turn is not part of the mark, since a prompt may begin with the user's turn.
        ends = next((token for token in self._special_texts if closed.startswith(token)), None)
        if ends and opened.startswith(ends):
            opened = opened[len(ends) :].lstrip(WHITE_SPACE)
        return opened, closed

    def _ids(self, mark: bytes) -> list[int]:
        return list(self.tokenizer(mark.decode("utf-8", "replace"), add_special_tokens=False)["input_ids"])

    def _is_padding(self, token: int) -> bool:
        return token < 0 or token == self.tokenizer.pad_token_id

    def _leading(self, ids: Sequence[int]) -> int:
        """Return how many tokens at the start are padding."""
        token, count = _run(ids)
        if count == len(ids):
            return 0
        opening = self._opening[:1]
        before_opening = [ids[count]] == opening
        lone_start = token == self.tokenizer.bos_token_id and count == 1 and not before_opening
        if [token] == opening or lone_start:
            if not (self._is_padding(token) or token in self._bytes.special_ids):
                return 0  # the template's own words, such as the marks of a heading
            if count == 2 and not self._is_padding(token):
                self._warn(
                    f"prompt_ids start with {self.tokenizer.convert_ids_to_tokens(token)} twice, as a rendered prompt "
                    "does that is encoded with special tokens; they are taken as they are"
                )
                return 0
            return count - 1
        repeated = count > 1 and (token in self._bytes.special_ids or before_opening)
        return count if repeated or self._is_padding(token) else 0

    def _trailing(self, ids: Sequence[int]) -> int:
        """Return how many tokens at the end are padding, without an end of turn that precedes them."""
        token, count = _run(ids[::-1])
        if not (self._is_padding(token) or (count > 1 and token in self._bytes.special_ids)):
            return 0
        ending = self._ids(self._lone[1]) if self._lone else []
        if ending and list(ids[: len(ids) - count])[-len(ending) :] == ending:
            return count
        ends_a_turn = token in self._ids(self._marks[1]) or (count == 1 and token == self.tokenizer.eos_token_id)
        return count - 1 if ends_a_turn else count

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)

    def _turn_ranges(self, prompt: bytes) -> tuple[ByteRange, ...]:
        """Return the ranges between the template's marks of the user's turns; () if the prompt does not fit them."""
        opened, closed = self._marks
        if self._lone and prompt.startswith(self._lone[0]) and prompt.endswith(self._lone[1]):
            start, end = len(self._lone[0]), len(prompt) - len(self._lone[1])
            if start < end and not (opened and opened in prompt[start:end]):
                return ((start, end),)
        ranges, cursor = [], 0
        while opened and closed and (at := prompt.find(opened, cursor)) >= 0:
            start = at + len(opened)
            end = prompt.find(closed, start)
            if end < 0:
                return ()
            ranges.append((start, end))
            cursor = end
        return tuple(ranges)

    def _message_ranges(self, prompt: bytes, messages: Sequence[Mapping[str, Any]]) -> tuple[ByteRange, ...]:
        """Return the range of each user message's text in the rendered prompt.

        The template is rendered with a probe in place of each text, so that a short text is never found in the
        template's own words. A prompt that was rendered differently (tools, a date) is searched for each text between
        the marks of the user's turns, or anywhere if the number of turns differs.
        """
        texts = [(message.get("role"), text) for message in messages for text in _texts(message)]
        if all(isinstance(message.get("content"), str) for message in messages):
            frame = self._frame([{**message, "content": _PROBE} for message in messages])
            framed = _framed_ranges(prompt, texts, frame) if frame and prompt.startswith(frame[0]) else None
            if framed is not None:
                return framed
        turns, own = self._turn_ranges(prompt), [text for role, text in texts if role == "user"]
        if len(turns) != len(own):
            return _searched_ranges(prompt, texts)
        ranges: list[ByteRange] = []
        for (start, end), text in zip(turns, own, strict=True):
            ranges += _searched_ranges(prompt[:end], [("user", text)], start) or ((start, end),)
        return tuple(ranges)

    def _frame(self, probes: Sequence[Mapping[str, Any]], *, answered: bool = False) -> list[bytes]:
        """Return what the chat template puts before, between and after the probes; [] if no template shows it."""
        return next(self._frames(probes, answered=answered), [])

    def _frames(self, probes: Sequence[Mapping[str, Any]], *, answered: bool = False) -> Iterator[list[bytes]]:
        """Yield the frame as the bytes of the template's tokens, then as its text, each if it holds all probes.

        Some tokenizers put a space after a special token, and some vocabularies cannot write the probe.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            return
        try:
            text = self.tokenizer.apply_chat_template(list(probes), tokenize=False, add_generation_prompt=not answered)
        except (TemplateError, ValueError, TypeError):  # a template that refuses such a conversation
            return
        tokens = b"".join(self._bytes.of(self.tokenizer(text, add_special_tokens=False)["input_ids"]))
        for rendered in (tokens, text.encode()):
            frame = rendered.split(_PROBE.encode())
            if len(frame) == len(probes) + 1:
                yield frame


def _holds_any(text: bytes, pieces: Sequence[bytes]) -> bool:
    return any(piece in text for piece in pieces)


def _run(ids: Sequence[int]) -> tuple[int, int]:
    """Return the first id and the length of its run; (0, 0) if there are no ids."""
    return next(((token, len(list(same))) for token, same in groupby(ids)), (0, 0))


def _common(pieces: Sequence[bytes], *, last: bool) -> bytes:
    """Return the longest common prefix of all pieces, or with `last` the longest common suffix."""
    turned = [piece[::-1] if last else piece for piece in pieces]
    together = zip(*turned, strict=False)
    length = next((at for at, of_each in enumerate(together) if len(set(of_each)) > 1), min(map(len, turned)))
    return turned[0][:length][::-1] if last else turned[0][:length]


def _framed_ranges(
    prompt: bytes, texts: Sequence[tuple[Any, str]], frame: Sequence[bytes]
) -> tuple[ByteRange, ...] | None:
    """Return the user's ranges by matching the template's own words before, between and after the texts.

    None if the words between the texts differ; those after the last text may differ.
    """
    ranges, cursor = [], len(frame[0])
    for place, ((role, text), after) in enumerate(zip(texts, frame[1:], strict=True), 1):
        encoded = as_bytes(text)
        written = next((w for w in (encoded, encoded.strip(WHITE_SPACE)) if prompt.startswith(w, cursor)), None)
        if written is not None:
            end = cursor + len(written)
            if place < len(texts) and not prompt.startswith(after, end):
                return None
        else:  # the template changed the text, so it extends to the template's next words
            found = prompt.find(after, cursor)
            if place < len(texts) and found < 0:
                return None
            end = found if after and found >= 0 else len(prompt)
        if role == "user":
            ranges.append((cursor, end))
        cursor = end + len(after)
    return tuple(ranges)


def _searched_ranges(prompt: bytes, texts: Sequence[tuple[Any, str]], cursor: int = 0) -> tuple[ByteRange, ...]:
    """Return the user's ranges by searching for each text after the preceding one, from `cursor` on."""
    ranges = []
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
    """Return the gaps between the fixed pieces: the first and last at the ends, the others where they first occur."""
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
