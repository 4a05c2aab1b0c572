"""Read the answers of servers with OpenAI's chat protocol, in the forms that different servers use.

| where | thought | text |
| --- | --- | --- |
| OpenAI, Azure, TGI, Together | not sent, or in the text | `content` |
| DeepSeek, SGLang, llama.cpp, xAI, vLLM before 0.16 | `reasoning_content` | `content` |
| vLLM, OpenRouter, Ollama, Groq | `reasoning` | `content` |
| OpenRouter, for some models | `reasoning_details`, a list with `text` or `summary` | `content` |
| Mistral | parts of `content` of the type thinking | parts of the type text |
| OpenAI, refusing | | `refusal` |

An answer that was cut off (`finish_reason` length) or filtered is a judgement without a verdict. An answer with neither
text nor thought is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cepo.eval.judges.expected import expected_scores
from cepo.eval.judges.settings import Judgement
from cepo.jacobian.reading.judge import read_scores
from cepo.jacobian.reading.thought import THOUGHT, open_thought
from cepo.jacobian.reading.verdict import Verdicts
from cepo.train.rows import encodable

_CUT = ("length", "max_tokens")
_THOUGHT_FIELDS = ("reasoning_content", "reasoning", "reasoning_details")
_THOUGHT_PARTS = ("thinking", "reasoning")


class NoAnswerError(Exception):
    """A request without a usable answer.

    Attributes:
        transient: whether another try may succeed.
        wait: seconds that the server asks to wait, or None.
    """

    def __init__(self, reason: str, *, transient: bool = True, wait: float | None = None) -> None:
        super().__init__(reason)
        self.transient, self.wait = transient, wait


def read_answer(answer: Any, verdicts: Verdicts) -> Judgement:
    """Return the judgement in an answer, its thought in tags before the text.

    Args:
        answer: the JSON of the answer.
        verdicts: see `JudgeLayout`.

    Raises:
        NoAnswerError: if it holds no judgement.
    """
    try:
        choice = answer["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content = message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise NoAnswerError(f"the answer holds no choices: {str(answer)[:60]!r}") from None
    if choice.get("error") or finish == "error":
        raise NoAnswerError(f"the server gave up: {str(choice.get('error'))[:60]!r}")
    if not isinstance(content, str | list | None):
        raise NoAnswerError(f"the answer's content is a {type(content).__name__}")
    parts = content if isinstance(content, list) else [content]
    text = "".join(_text(part) for part in parts if not _is_thought(part)) or _text(message.get("refusal"))
    thought = next((found for name in _THOUGHT_FIELDS if (found := _text(message.get(name)))), "")
    thought = thought or "".join(_text(part) for part in parts if _is_thought(part))
    was_cut = finish in _CUT
    if not text and not thought and not isinstance(content, str) and not was_cut and finish != "content_filter":
        raise NoAnswerError("the answer holds no content")
    whole = text
    if thought:
        opened = open_thought(thought)
        whole = opened if was_cut and not text else f"{opened}</{THOUGHT}>{text}"
    whole = encodable(whole)  # another model may read it
    usage = answer.get("usage")
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    tokens, soft = _read_logprobs(choice.get("logprobs"), whole, verdicts)
    tokens = counted if isinstance(counted, int) else tokens
    return Judgement(whole, soft=soft, tokens=tokens, cut=was_cut, verdicts=verdicts)


def _is_thought(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _THOUGHT_PARTS


def _text(part: Any) -> str:
    """Return the text of a part, of a list of parts, or of a field; "" if there is none."""
    if isinstance(part, str):
        return part
    if isinstance(part, list):
        return "".join(map(_text, part))
    if isinstance(part, dict):
        return next((_text(part[name]) for name in ("text", "thinking", "summary", "reasoning") if part.get(name)), "")
    return ""


def _read_logprobs(logprobs: Any, text: str, verdicts: Verdicts) -> tuple[int, tuple[float, float] | None]:
    """Return the number of tokens that the server lists, and the expected scores if it lists enough of them."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content:
        return 0, None
    try:
        pieces = [_piece(token) for token in content]
        listed = b"".join(pieces).decode("utf-8", errors="replace")
        same = read_scores(listed, verdicts=verdicts) == read_scores(text, verdicts=verdicts)
        return len(content), expected_scores(pieces, _likely(content), verdicts) if same else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return len(content), None


def _likely(content: Sequence[Mapping[str, Any]]) -> Callable[[int], Mapping[bytes, float]]:
    def likely(at: int) -> Mapping[bytes, float]:
        listed = [content[at], *(content[at].get("top_logprobs") or [])]
        return {_piece(token): math.exp(float(token["logprob"])) for token in listed}

    return likely


def _piece(token: Mapping[str, Any]) -> bytes:
    """Return the bytes of a token; preferably those that the server lists, since its text may be half a character."""
    listed = token.get("bytes")
    return bytes(listed) if listed is not None else str(token["token"]).encode()
