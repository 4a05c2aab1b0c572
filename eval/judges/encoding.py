"""Prompts to token ids, and generated ids to text: what every judge that runs on this machine needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from torch import Tensor

from cepo.eval.judges.settings import JudgeSettings, Messages, expected_scores
from cepo.jacobian.reading.judge import find_verdict_end
from cepo.jacobian.reading.token_bytes import TokenBytes

_LARGEST_SCORE = 10
_TAIL = 16  # tokens in which a closing tag is looked for at each step
_LONGEST_SCORE_TOKEN = 4  # characters of the vocabulary, in which a space may be a mark
_FORCED_PAIRS = [f"{a}, {b}}}".encode() for a in range(1, _LARGEST_SCORE + 1) for b in range(1, _LARGEST_SCORE + 1)]


class PromptEncoder:
    """Turns messages into the ids of a prompt.

    Attributes:
        opened: what the chat template itself opens the answer with, "<think>" or nothing. It belongs to the text of a
            judgement, in which the end of the thought is looked for.
    """

    def __init__(self, tokenizer: Any, settings: JudgeSettings) -> None:
        self._tokenizer, self._raw = tokenizer, settings.raw
        if not settings.raw and not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"model {settings.model!r} has no chat template; judge with --raw, which takes plain text")
        self.opened = ""
        if not settings.raw:
            try:
                probe = tokenizer.apply_chat_template(
                    [{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False
                )
            except (TemplateError, ValueError, TypeError) as error:
                raise ValueError(f"the chat template of model {settings.model!r} refuses a message: {error}") from error
            self.opened = "<think>" if probe.rstrip().endswith("<think>") else ""

    def encode(self, messages: Messages) -> list[int] | str:
        """Return the prompt's ids, or the reason why there are none."""
        if self._raw:
            text = "\n\n".join(message["content"] for message in messages) + "\n\n"
            return list(self._tokenizer(text)["input_ids"]) or "the prompt has no tokens"
        try:
            encoded = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except (TemplateError, ValueError, TypeError) as error:
            return f"the chat template refuses the messages: {error}"
        return list(encoded["input_ids"]) or "the prompt has no tokens"


class TextReader:
    """Reads generated ids: their bytes, their text, where a verdict ends, and which numbers could have stood there.

    Args:
        tokenizer: the judge's.
        opened: what the chat template put before the generated text, see `PromptEncoder`.

    Attributes:
        number_ids: ids of the tokens that are one number from 0 to 10, give or take a mark such as "{".
        score_ids: ids of the tokens that a forced verdict is made of: digits, comma, space, brace.
    """

    def __init__(self, tokenizer: Any, opened: str = "") -> None:
        self._bytes, self._opened = TokenBytes(tokenizer), opened.encode()
        self._numbers = [
            (token, piece)
            for token, piece in self._bytes.short_numbers()
            if int(bytes(byte for byte in piece if 48 <= byte <= 57)) <= _LARGEST_SCORE
        ]
        self.number_ids = [token for token, _ in self._numbers]
        short = sorted(token for text, token in tokenizer.get_vocab().items() if len(text) <= _LONGEST_SCORE_TOKEN)
        self._score_pieces = [
            (token, piece)
            for token, piece in zip(short, (self.pieces([token])[0] for token in short), strict=True)
            if piece and not piece.strip(b"0123456789, }")
        ]
        self.score_ids = [token for token, _ in self._score_pieces]

    def pieces(self, token_ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token; special tokens (end of turn, padding) have none."""
        pieces = self._bytes.of(tuple(token_ids))
        special = self._bytes.special_ids
        return [b"" if token in special else piece for token, piece in zip(token_ids, pieces, strict=True)]

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of the tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.text_of(self.pieces(token_ids))

    def text_of(self, pieces: Sequence[bytes]) -> str:
        """Return the text of the tokens' bytes."""
        return (self._opened + b"".join(pieces)).decode("utf-8", errors="replace")

    def expected(
        self, pieces: Sequence[bytes], likely: Callable[[int], Mapping[bytes, float]]
    ) -> tuple[float, float] | None:
        """Return the expected scores, see `expected_scores`."""
        return expected_scores([self._opened, *pieces], lambda at: likely(at - 1))

    def verdict_length(self, token_ids: Sequence[int]) -> int | None:
        """Return how many tokens reach to the end of the first scores that can be read, or None."""
        text, ends = self._opened, []
        for piece in self.pieces(token_ids):
            text += piece
            ends.append(len(text))
        end = find_verdict_end(text)
        return None if end is None else next(index + 1 for index, reached in enumerate(ends) if reached >= end)

    def is_judged(self, token_ids: Sequence[int]) -> bool:
        """Tell whether scores that can be read have just been closed."""
        tail = b"".join(self.pieces(token_ids[-_TAIL:]))
        return b"</scores>" in tail and self.verdict_length(token_ids) is not None

    def is_boxed(self, token_ids: Sequence[int]) -> bool:
        """Tell whether the brace of a forced verdict is closed."""
        return b"}" in b"".join(self.pieces(token_ids))

    def forced_ids(self, token_ids: Sequence[int]) -> list[int]:
        """Return which tokens may follow in a forced `a, b}` with integers from 1 to 10; none where it is whole."""
        written = b"".join(self.pieces(token_ids))
        return [
            token
            for token, piece in self._score_pieces
            if any(whole.startswith(written + piece) for whole in _FORCED_PAIRS)
        ]

    def likely_numbers(self, probabilities_TN: Tensor) -> Callable[[int], Mapping[bytes, float]]:
        """Return, as a function of a token's place, the probabilities of the numbers there by their bytes."""

        def likely(at: int) -> Mapping[bytes, float]:
            if not 0 <= at < len(probabilities_TN):
                return {}
            pairs = zip(self._numbers, probabilities_TN[at].tolist(), strict=True)
            return {piece: probability for (_, piece), probability in pairs}

        return likely
