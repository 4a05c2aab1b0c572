"""From sampled ids to spans: which tokens are the prompt's content, the criteria or rationale, the scores or answer.

Everything is found on the bytes of the ids themselves. A token belongs to a span when it carries a byte of the content
(surrounding white space is not content); where tags or digits straddle tokens, the straddling token is in, but it never
moves in a counterfactual. Special tokens are never content.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

from jinja2 import TemplateError

from cepo.jacobian.records import Digit, Rollout, Span
from cepo.jacobian.token_bytes import TokenBytes

ByteRange = tuple[int, int]
_WHITE = b" \t\r\n\f\v"
_NUMBER = rb"[0-9]{1,4}(?:\.[0-9]{1,4})?"
_SCORES = re.compile(rb"\\boxed\{\s*(" + _NUMBER + rb")\s*,\s*(" + _NUMBER + rb")\s*\}")
_SENTENCE_END = re.compile(rb"[.!?;:]\s*$|\n")
_SENTENCE_BREAK = re.compile(rb"(?<=[.!?])\s+|\s*\n\s*")
_PROBE = "cepo-content-probe"


@dataclass(frozen=True)
class Found:
    """Where a layout found its spans in a completion: byte ranges by span name, and those of the scores' numbers."""

    ranges: Mapping[str, tuple[ByteRange, ...]]
    numbers: tuple[ByteRange, ...] = ()
    found_by: str = "tags"


class MalformedError(ValueError):
    """A completion in which the layout's spans cannot be found; the message is the reason that users see."""


class Layout(Protocol):
    """What a completion looks like: its spans' names in order, the roles Z, X, Y, its tags, and how to find them."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def roles(self) -> Mapping[str, str]: ...

    @property
    def tags(self) -> tuple[str, ...]: ...

    @property
    def instructions(self) -> tuple[str, ...]: ...

    def find(self, completion: bytes) -> Found: ...


@dataclass(frozen=True)
class JudgeLayout:
    """A judge's output: optional thought, then criteria, analysis and scores, each in its tag, exactly once.

    The thought (everything up to the first `</think>`, or the whole text where a `<think>` at its start is never
    closed) is not searched: thinking judges rehearse their tags there.

    Attributes:
        criteria_tag: tag around X.
        analysis_tag: tag around the analysis.
        scores_tag: tag around `\\boxed{a, b}`; the target Y is the tokens of the two numbers, nothing else.
        thought_tag: tag around the thought.
        instructions: the fixed pieces of the prompt, in order, which are not content (first and last are anchored at
            the two ends of the user's message); where a prompt does not have them, all of the message is content.
    """

    criteria_tag: str = "specific_criteria"
    analysis_tag: str = "analysis"
    scores_tag: str = "scores"
    thought_tag: str = "think"
    instructions: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return ("prompt", "criteria", "analysis", "scores")

    @property
    def roles(self) -> Mapping[str, str]:
        return {"Z": "prompt", "X": "criteria", "Y": "scores"}

    @property
    def tags(self) -> tuple[str, ...]:
        return (self.thought_tag, self.criteria_tag, self.analysis_tag, self.scores_tag)

    def find(self, completion: bytes) -> Found:
        """Return the byte ranges of criteria, analysis and scores, or raise MalformedError with the reason."""
        start = _after_thought(completion, self.thought_tag)
        criteria = _tagged(completion, self.criteria_tag, start)
        analysis = _tagged(completion, self.analysis_tag, start)
        scores = _tagged(completion, self.scores_tag, start)
        for (left, left_tag), (right, right_tag) in pairwise(
            [(criteria, self.criteria_tag), (analysis, self.analysis_tag), (scores, self.scores_tag)]
        ):
            if right[0] - len(f"<{right_tag}>") < left[1] + len(f"</{left_tag}>"):
                raise MalformedError(f"out of order: <{right_tag}> opens before </{left_tag}>")
        for content, tag in ((criteria, self.criteria_tag), (analysis, self.analysis_tag), (scores, self.scores_tag)):
            if _trim(completion, content) is None:
                raise MalformedError(f"empty <{tag}>")
        inside = completion[scores[0] : scores[1]]
        if inside.count(rb"\boxed") > 1:
            raise MalformedError(f"doubled \\boxed in <{self.scores_tag}>")
        boxed = _SCORES.search(inside)
        if boxed is None:
            shown = inside.strip()[:40].decode("utf-8", errors="replace")
            raise MalformedError(f"no \\boxed{{a, b}} with two numbers in <{self.scores_tag}>, which holds {shown!r}")
        numbers = tuple((scores[0] + boxed.start(group), scores[0] + boxed.end(group)) for group in (1, 2))
        return Found({"criteria": (criteria,), "analysis": (analysis,), "scores": numbers}, numbers)


@dataclass(frozen=True)
class ReasonerLayout:
    """A reasoner's output: a rationale X, then an answer Y.

    The answer is the content of the answer tag; without one, the inside of the last `\\boxed{}`; without either, and
    only with `fallback`, the last sentence or line. An answer tag that holds a `\\boxed{}` is narrowed to it. The
    rationale is the content of its tag; without one, everything before the answer. `found_by` of the rollout says
    which of these served. A prompt that already opened the rationale's tag leaves only its end in the completion,
    which is understood.

    Attributes:
        rationale_tag: tag around X.
        answer_tag: tag around Y.
        boxed: whether `\\boxed{}` is read.
        fallback: whether text without any marker is split at its last sentence instead of being malformed.
        instructions: as in JudgeLayout.
    """

    rationale_tag: str = "think"
    answer_tag: str = "answer"
    boxed: bool = True
    fallback: bool = True
    instructions: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return ("prompt", "rationale", "answer")

    @property
    def roles(self) -> Mapping[str, str]:
        return {"Z": "prompt", "X": "rationale", "Y": "answer"}

    @property
    def tags(self) -> tuple[str, ...]:
        return (self.rationale_tag, self.answer_tag)

    def find(self, completion: bytes) -> Found:
        """Return the byte ranges of rationale and answer, or raise MalformedError with the reason."""
        opened, closed = f"<{self.rationale_tag}>".encode(), f"</{self.rationale_tag}>".encode()
        has_rationale_tag = opened in completion or closed in completion
        rationale_end = 0
        rationale: ByteRange | None = None
        if has_rationale_tag:
            if opened not in completion:  # the prompt opened it
                completion_with_opening = completion.count(closed)
                if completion_with_opening > 1:
                    raise MalformedError(f"doubled </{self.rationale_tag}>")
                rationale = (0, completion.index(closed))
            else:
                rationale = _tagged(completion, self.rationale_tag, 0)
            rationale_end = rationale[1] + len(closed)
        answer, answer_start, found_by = self._answer(completion, rationale_end)
        if rationale is None:
            rationale = (0, answer_start)
        if _trim(completion, answer) is None:
            raise MalformedError("empty answer")
        if _trim(completion, rationale) is None:
            raise MalformedError("empty rationale")
        return Found({"rationale": (rationale,), "answer": (answer,)}, (), found_by)

    def _answer(self, completion: bytes, start: int) -> tuple[ByteRange, int, str]:
        """Return the answer's range, where the answer's marker starts, and what marked it."""
        opened, closed = f"<{self.answer_tag}>".encode(), f"</{self.answer_tag}>".encode()
        if opened in completion or closed in completion:
            answer = _tagged(completion, self.answer_tag, 0)
            if answer[0] - len(opened) < start:
                raise MalformedError(f"out of order: <{self.answer_tag}> opens before </{self.rationale_tag}>")
            inner = _last_boxed(completion, answer) if self.boxed else None
            return inner or answer, answer[0] - len(opened), "tags"
        boxed = _last_boxed(completion, (start, len(completion))) if self.boxed else None
        if boxed is not None:
            return boxed, boxed[0] - len(rb"\boxed{"), "boxed"
        rest = _trim(completion, (start, len(completion)))
        if not self.fallback or rest is None:
            raise MalformedError(f"missing <{self.answer_tag}>")
        if start:  # the rationale was tagged, so what follows it is the answer
            return rest, rest[0], "after rationale"
        breaks = list(_SENTENCE_BREAK.finditer(completion, rest[0], rest[1]))
        if not breaks:
            raise MalformedError("no tags and only one sentence: nothing tells the rationale from the answer")
        return (breaks[-1].end(), rest[1]), breaks[-1].start(), "last sentence"


class SpanReader:
    """Reads rollouts out of token ids for one tokenizer and one layout.

    Args:
        tokenizer: the policy's Hugging Face tokenizer.
        layout: JudgeLayout, ReasonerLayout, or anything with their face.
    """

    def __init__(self, tokenizer: Any, layout: Layout) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self._bytes = TokenBytes(tokenizer)
        self._short_numbers: list[tuple[int, bytes]] | None = None

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
                the template does not explain is content but for its special tokens.

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
            if not completion_text.strip(_WHITE):
                raise MalformedError("empty completion")
            found = self.layout.find(completion_text)
            ranges = {
                "prompt": self._prompt_ranges(prompt_text, messages),
                **{name: tuple((a + shift, b + shift) for a, b in spans) for name, spans in found.ranges.items()},
            }
            text = prompt_text + completion_text
            spans = {name: self._span(name, ranges[name], text, ids, ends) for name in self.layout.names}
        except MalformedError as reason:
            return Rollout(**{**blank.__dict__, "malformed": str(reason)})
        numbers = tuple(self._number((a + shift, b + shift), text, ids, ends) for a, b in found.numbers)
        return Rollout(prompt_ids, completion_ids, spans, numbers, None, found.found_by)

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token, for people: together they are the text, and a character that spans tokens
        stands with the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = self._bytes.of(tuple(token_ids))
        return [decoder.decode(piece, final=index + 1 == len(pieces)) for index, piece in enumerate(pieces)]

    def _without_specials(self, token_ids: Sequence[int], pieces: Sequence[bytes]) -> list[bytes]:
        """Blank the special tokens (end of turn, padding) but for those that are the layout's own tags."""
        tags = {mark for tag in self.layout.tags for mark in (f"<{tag}>".encode(), f"</{tag}>".encode())}
        special = self._bytes.special_ids
        return [
            b" " * len(piece) if token in special and piece.strip() not in tags else piece
            for token, piece in zip(token_ids, pieces, strict=True)
        ]

    def _span(
        self, name: str, ranges: Sequence[ByteRange], text: bytes, ids: Sequence[int], ends: Sequence[int]
    ) -> Span:
        positions, movable, sentences, sentence = [], [], [], 0
        trimmed = [(whole, core) for whole in ranges if (core := _trim(text, whole)) is not None]
        for whole, core in trimmed:
            for position, (start, end) in _overlapping(ends, core):
                if ids[position] in self._bytes.special_ids:
                    continue
                positions.append(position)
                if whole[0] <= start and end <= whole[1]:
                    movable.append(position)
                    sentences.append(sentence)
                    sentence += bool(_SENTENCE_END.search(text[start:end]))
            sentence += 1
        if not positions:
            raise MalformedError(f"empty {name}: no token of content")
        shown = " … ".join(text[core[0] : core[1]].decode("utf-8", errors="replace") for _, core in trimmed)
        unique = dict.fromkeys(positions)  # one token can carry the ends of two ranges
        kept = dict(zip(movable, sentences, strict=True))
        return Span(name, tuple(unique), tuple(kept), tuple(kept.values()), shown)

    def _number(self, number: ByteRange, text: bytes, ids: Sequence[int], ends: Sequence[int]) -> tuple[Digit, ...]:
        """Return the digit tokens of a score. A token that mixes digits with the decimal point counts as a constant."""
        if self._short_numbers is None:
            self._short_numbers = self._bytes.short_numbers()
        whole = text[number[0] : number[1]]
        point = number[0] + (whole.index(b".") if b"." in whole else len(whole))
        digits = []
        for position, (start, end) in _overlapping(ends, number):
            run = (max(start, number[0]), min(end, number[1]))
            written = text[run[0] : run[1]]
            if written == b".":
                continue
            if not written.isdigit():
                digits.append(Digit(position, 1.0, ((ids[position], _lenient_float(written)),)))
                continue
            place = 10.0 ** (point - run[1] if run[1] <= point else point + 1 - run[1])
            before, after = text[start : run[0]], text[run[1] : end]
            ceiling = max(10, int(written))
            candidates = {ids[position]: float(int(written))}
            for token_id, piece in self._short_numbers:
                middle = piece[len(before) : len(piece) - len(after)]
                if piece == before + middle + after and middle.isdigit() and int(middle) <= ceiling:
                    candidates.setdefault(token_id, float(int(middle)))
            digits.append(Digit(position, place, tuple(sorted(candidates.items()))))
        return tuple(digits)

    def _prompt_ranges(self, prompt: bytes, messages: Sequence[Mapping[str, Any]] | None) -> tuple[ByteRange, ...]:
        contents = self._message_ranges(prompt, messages) if messages else self._lone_message_range(prompt)
        pieces = [piece.encode("utf-8", errors="surrogatepass") for piece in self.layout.instructions]
        return tuple(gap for content in contents for gap in _without_instructions(prompt, content, pieces))

    def _message_ranges(self, prompt: bytes, messages: Sequence[Mapping[str, Any]]) -> tuple[ByteRange, ...]:
        """Return where the text of each user message stands in the rendered prompt.

        The template is rendered with a probe for every text, so that a short text is never found in the template's own
        words. A prompt that starts otherwise (tools, a template of the trainer's own) is searched for the texts.
        """
        texts = [(message.get("role"), text) for message in messages for text in _texts(message)]
        frame = self._frame([{**message, "content": _PROBE} for message in messages for _ in _texts(message)])
        cursor = len(frame[0]) if len(frame) == len(texts) + 1 and prompt.startswith(frame[0]) else None
        ranges, searched = [], 0
        for index, (role, text) in enumerate(texts):
            encoded = text.encode("utf-8", errors="surrogatepass")
            start = None
            for wanted in (encoded, encoded.strip(_WHITE)):  # templates strip
                if start is None and wanted:
                    at = prompt.find(wanted, searched) if cursor is None else cursor
                    if at >= 0 and prompt.startswith(wanted, at):
                        start, end = at, at + len(wanted)
            if start is None:
                if cursor is not None:  # the template changed the text: it reaches to the template's next words
                    end = prompt.find(frame[index + 1], cursor) if frame[index + 1] else len(prompt)
                    start, end = cursor, end if end >= 0 else len(prompt)
                else:
                    continue
            if role == "user":
                ranges.append((start, end))
            searched = end
            cursor = end + len(frame[index + 1]) if cursor is not None else None
        return tuple(ranges)

    def _lone_message_range(self, prompt: bytes) -> tuple[ByteRange, ...]:
        """Return where the chat template puts a lone user message, or the whole prompt if it does not explain it."""
        frame = self._frame([{"role": "user", "content": _PROBE}])
        if len(frame) == 2:
            before, after = frame
            if len(prompt) > len(before) + len(after) and prompt.startswith(before) and prompt.endswith(after):
                return ((len(before), len(prompt) - len(after)),)
        return ((0, len(prompt)),)

    def _frame(self, probes: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Return what the chat template puts around the probes, in the bytes of its tokens; [] without a template."""
        tokenizer = self.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            return []
        try:
            rendered = tokenizer.apply_chat_template(
                list(probes), tokenize=True, add_generation_prompt=True, return_dict=True
            )
        except (TemplateError, ValueError, TypeError):  # a template that refuses such a conversation
            return []
        return b"".join(self._bytes.of(rendered["input_ids"])).split(_PROBE.encode())


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


def _after_thought(completion: bytes, tag: str) -> int:
    opened, closed = f"<{tag}>".encode(), f"</{tag}>".encode()
    end = completion.find(closed)
    if end >= 0:
        return end + len(closed)
    if completion.lstrip(_WHITE).startswith(opened):
        raise MalformedError(f"unclosed <{tag}>: the output ends inside its thought")
    return 0


def _tagged(text: bytes, tag: str, start: int) -> ByteRange:
    """Return the content range of a tag that must stand exactly once after `start`."""
    opened, closed = f"<{tag}>".encode(), f"</{tag}>".encode()
    opens, closes = text.count(opened, start), text.count(closed, start)
    if opens == 0 and closes == 0:
        raise MalformedError(f"missing <{tag}>")
    if opens > 1 or closes > 1:
        raise MalformedError(f"doubled <{tag}>")
    if closes == 0:
        raise MalformedError(f"unclosed <{tag}>")
    if opens == 0:
        raise MalformedError(f"</{tag}> without <{tag}>")
    begin, end = text.index(opened, start) + len(opened), text.index(closed, start)
    if end < begin:
        raise MalformedError(f"out of order: </{tag}> comes before <{tag}>")
    return begin, end


def _trim(text: bytes, wanted: ByteRange) -> ByteRange | None:
    start, end = wanted
    core = text[start:end]
    left = len(core) - len(core.lstrip(_WHITE))
    core = core.strip(_WHITE)
    return (start + left, start + left + len(core)) if core else None


def _last_boxed(text: bytes, within: ByteRange) -> ByteRange | None:
    """Return the inside of the last `\\boxed{...}` with balanced braces."""
    marker = rb"\boxed{"
    at = text.rfind(marker, *within)
    while at >= 0:
        depth, begin = 1, at + len(marker)
        for index in range(begin, within[1]):
            depth += (text[index] == ord("{")) - (text[index] == ord("}"))
            if depth == 0:
                return begin, index
        at = text.rfind(marker, within[0], at)
    return None


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    return [content] if isinstance(content, str) else [part.get("text", "") for part in content or []]


def _without_instructions(prompt: bytes, content: ByteRange, pieces: Sequence[bytes]) -> tuple[ByteRange, ...]:
    """Return the gaps between the fixed pieces: first and last at the ends, the others where they first come."""
    if not pieces:
        return (content,)
    first, *middle = [pieces[0].lstrip(_WHITE), *pieces[1:]]
    last = middle.pop().rstrip(_WHITE) if middle else b""
    start, end = content
    core = _trim(prompt, content) or content
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


def _lenient_float(written: bytes) -> float:
    try:
        return float(written)
    except ValueError:
        return 0.0
