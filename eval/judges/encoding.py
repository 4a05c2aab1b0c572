"""Encode prompts as token ids and read judgements from generated ids, for judges that run on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from jinja2 import TemplateError
from torch import Tensor

from cepo.eval.judges.expected import LARGEST_SCORE, expected_scores
from cepo.eval.judges.settings import Judgement, JudgeSettings, Messages
from cepo.jacobian.reading.judge import SCORES_CLOSING, JudgeLayout, find_verdict_end, forced_opening
from cepo.jacobian.reading.prompt import PromptReader
from cepo.jacobian.reading.thought import THOUGHT, template_opens_thought
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.jacobian.reading.unknown import UnknownTokens
from cepo.jacobian.reading.verdict import STRICT, Verdicts
from cepo.train.prompts import own_words

Likely: TypeAlias = Callable[[int], Mapping[bytes, float]]
"""Maps the index of a generated token to the probabilities of its alternatives, by their bytes."""

FORCED_TOKENS = 12  # "10.25, 10.25}" in single characters
_TAIL = 16  # last tokens that are searched for a closing tag at each step
_LONGEST_SCORE_TOKEN = 4  # characters as written in the vocabulary, where a space may be several
_SCORES = range(1, LARGEST_SCORE + 1)
_FORCED_PAIRS = [f"{first}, {second}}}".encode() for first in _SCORES for second in _SCORES]


class PromptEncoder:
    """Turns messages into the ids of a prompt.

    Attributes:
        opened: what the chat template itself puts at the start of the answer, "<think>" or nothing. It is part of the
            judgement's text, so that the end of the thought is found.
    """

    def __init__(self, tokenizer: Any, settings: JudgeSettings) -> None:
        self._tokenizer, self._raw, self.opened = tokenizer, settings.raw, ""
        self._unknown = UnknownTokens(tokenizer)
        self._prompts = PromptReader(tokenizer, TokenBytes(tokenizer))
        if settings.raw:
            return
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"model {settings.model!r} has no chat template; judge with --raw, which takes plain text")
        try:
            opens = template_opens_thought(tokenizer)
        except (TemplateError, ValueError, TypeError) as error:
            raise ValueError(f"the chat template of model {settings.model!r} refuses a message: {error}") from error
        self.opened = f"<{THOUGHT}>" if opens else ""

    def encode(self, messages: Messages) -> list[int] | str:
        """Return the prompt's ids, or the reason why it cannot be encoded."""
        if self._raw:
            text = "\n\n".join(message["content"] for message in messages) + "\n\n"
            return self._prompts.raw_ids(text) or "the prompt has no tokens"
        if any(self._prompts.is_rendered(own_words(message["content"])) for message in messages):
            return "its text begins as the chat template begins a prompt, as if rendered already; give the text alone"
        try:
            encoded = self._apply_template([dict(message) for message in messages], tokenize=True, return_dict=True)
        except (TemplateError, ValueError, TypeError) as error:
            return f"the chat template refuses the messages: {error}"
        return list(encoded["input_ids"]) or "the prompt has no tokens"

    def encode_all(self, prompts: Sequence[Messages]) -> tuple[dict[int, list[int]], dict[int, Judgement]]:
        """Return the ids of the prompts by row, and judgements with an error for rows that cannot be encoded."""
        encoded = {row: self.encode(messages) for row, messages in enumerate(prompts)}
        failed = {row: Judgement("", error=ids) for row, ids in encoded.items() if isinstance(ids, str)}
        kept = {row: ids for row, ids in encoded.items() if not isinstance(ids, str)}
        for ids in kept.values():
            self._unknown.check(ids)
        return kept, failed

    def _apply_template(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)


class TextReader:
    """Reads generated ids: their bytes and text, the end of the verdict, and the numbers that were possible in it.

    Args:
        tokenizer: the judge's tokenizer.
        opened: what the chat template put before the generated text, see `PromptEncoder`.
        verdicts: how verdicts are read, see `JudgeLayout`.

    Attributes:
        number_ids: ids of the tokens that hold one number of up to three digits, with or without a mark such as "{".
        score_ids: ids of the tokens of which a forced verdict may consist: digits, comma, space, brace.
    """

    def __init__(self, tokenizer: Any, opened: str = "", verdicts: Verdicts = STRICT) -> None:
        self._tokenizer, self._bytes, self._opened = tokenizer, TokenBytes(tokenizer), opened.encode()
        self._verdicts, self._unread = verdicts, self._bytes.unread_ids(JudgeLayout().tags)
        self._numbers = self._bytes.short_numbers()
        self.number_ids = [token for token, _ in self._numbers]
        short = sorted(token for text, token in tokenizer.get_vocab().items() if len(text) <= _LONGEST_SCORE_TOKEN)
        self._score_pieces = [
            (token, piece)
            for token, piece in zip(short, (self.pieces([token])[0] for token in short), strict=True)
            if piece and not piece.strip(b"0123456789, }")
        ]
        self.score_ids = [token for token, _ in self._score_pieces]

    def pieces(self, token_ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token; special tokens that are not tags (end of turn, padding) have none."""
        pieces = self._bytes.of(tuple(token_ids))
        return [b"" if token in self._unread else piece for token, piece in zip(token_ids, pieces, strict=True)]

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of the tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._text(self.pieces(token_ids))

    def judgement(self, token_ids: Sequence[int], likely: Likely, most: int) -> Judgement:
        """Return generated ids as a judgement.

        Text after the verdict is not part of the judgement, whether or not generation stopped there.

        Args:
            token_ids: the generated ids.
            likely: returns the probabilities at the index of a token.
            most: the largest number of tokens that may be generated.
        """
        written = tuple(token_ids[: self.verdict_length(token_ids) or len(token_ids)])
        pieces, count = self.pieces(written), len(token_ids)
        soft = self._expected(pieces, likely, self._verdicts)
        return Judgement(self._text(pieces), written, soft, count, cut=count >= most, verdicts=self._verdicts)

    def opening_ids(self, text: str) -> list[int]:
        """Return the ids to append to a judgement without a verdict."""
        return list(self._tokenizer(forced_opening(text), add_special_tokens=False)["input_ids"])

    def forced_judgement(
        self, draft: Judgement, before: Sequence[int], rest: Sequence[int], likely: Likely
    ) -> Judgement:
        """Return a judgement whose scores were forced, with the scores closed.

        Args:
            draft: the judgement without a verdict.
            before: ids of the draft without its end of turn, and of the opening of the scores.
            rest: the ids generated after them; those after the closing brace are ignored.
            likely: returns the probabilities at the index of a token in `rest`.
        """
        pieces = self.pieces(rest)
        count = next((at + 1 for at, piece in enumerate(pieces) if b"}" in piece), len(pieces))
        token_ids = (*before, *rest[:count])
        closed = [*self.pieces(token_ids), SCORES_CLOSING.encode()]
        soft = self._expected(closed, lambda at: likely(at - len(before)), "lenient")
        return Judgement(self._text(closed), token_ids, soft, draft.tokens + count, draft.cut, True, verdicts="lenient")

    def verdict_length(self, token_ids: Sequence[int]) -> int | None:
        """Return the number of tokens up to the end of the first readable scores, or None without any."""
        text, ends = self._opened, []
        for piece in self.pieces(token_ids):
            text += piece
            ends.append(len(text))
        end = find_verdict_end(text, verdicts=self._verdicts)
        return None if end is None else next(index + 1 for index, reached in enumerate(ends) if reached >= end)

    def is_judged(self, token_ids: Sequence[int]) -> bool:
        """Tell whether readable scores have just been closed."""
        tail = b"".join(self.pieces(token_ids[-_TAIL:]))
        return b"</scores>" in tail and self.verdict_length(token_ids) is not None

    def is_boxed(self, token_ids: Sequence[int]) -> bool:
        """Tell whether the brace of a forced verdict is closed."""
        return b"}" in b"".join(self.pieces(token_ids))

    def forced_ids(self, token_ids: Sequence[int]) -> list[int]:
        """Return the tokens that may follow in a forced `a, b}` with integers from 1 to 10; none if it is complete."""
        written = b"".join(self.pieces(token_ids))
        return [
            token
            for token, piece in self._score_pieces
            if any(whole.startswith(written + piece) for whole in _FORCED_PAIRS)
        ]

    def likely_numbers(self, probabilities_TN: Tensor) -> Likely:
        """Return probabilities (T, N), in the order of `number_ids`, as a function of the token's index."""

        def likely(at: int) -> Mapping[bytes, float]:
            if not 0 <= at < len(probabilities_TN):
                return {}
            found: dict[bytes, float] = {}  # a vocabulary may hold the same bytes twice
            for (_, piece), probability in zip(self._numbers, probabilities_TN[at].tolist(), strict=True):
                found[piece] = found.get(piece, 0.0) + probability
            return found

        return likely

    def _text(self, pieces: Sequence[bytes]) -> str:
        return (self._opened + b"".join(pieces)).decode("utf-8", errors="replace")

    def _expected(self, pieces: Sequence[bytes], likely: Likely, verdicts: Verdicts) -> tuple[float, float] | None:
        return expected_scores([self._opened, *pieces], lambda at: likely(at - 1), verdicts)
