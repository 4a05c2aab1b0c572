"""Judgements from a server that speaks OpenAI's chat protocol, with concurrent requests and retries."""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from cepo.eval.judges.expected import expected_scores
from cepo.eval.judges.settings import Judgement, JudgeSettings, Messages, OnDone, row_seed
from cepo.jacobian.reading.judge import read_scores
from cepo.jacobian.reading.verdict import Verdicts

_TOP = 20  # alternatives per token, the most that the protocol allows
_LONGEST_WAIT_S = 300.0
_LARGEST_ANSWER = 2**26  # bytes; a longer answer is not a judgement
_FEWEST_FAILURES = 10  # in a row, after which the remaining requests are not tried
_REFUSED = (401, 403, 404)  # a retry or another row would meet the same answer


class ServerJudge:
    """Asks a server for judgements.

    A request that fails (429, 5xx, a dropped connection, an answer that is not JSON or holds no text, more than
    `timeout_s` seconds) is sent again up to `retries` times, after a wait that doubles each time or that the server's
    Retry-After sets. A request that still fails becomes a judgement with an error. After many failures in a row, the
    remaining requests are not tried.

    Args:
        settings: address, key, concurrency, retries, and how to generate.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings = settings
        base = (settings.base_url or "").rstrip("/")
        self._url = f"{base}{'' if urlsplit(base).path else '/v1'}/chat/completions"
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._failures = 0
        self._reason = ""
        self._top_logprobs = True

    def judge(self, prompts: Sequence[Messages], on_done: OnDone | None = None) -> list[Judgement]:
        """Return one judgement per prompt, in order.

        Raises:
            ValueError: if the server refuses the key, the address or the model (401, 403, 404).
        """
        found: dict[int, Judgement] = {}
        pool = ThreadPoolExecutor(self._settings.concurrency)
        try:
            rows = {pool.submit(self._judge_one, messages): row for row, messages in enumerate(prompts)}
            for future in as_completed(rows):
                found[rows[future]] = future.result()
                if on_done is not None:
                    on_done(rows[future], found[rows[future]])
        except BaseException:
            self._stopping.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [found[row] for row in range(len(prompts))]

    def _judge_one(self, messages: Messages) -> Judgement:
        started = time.perf_counter()
        with self._lock:
            hopeless = self._failures >= max(_FEWEST_FAILURES, 2 * self._settings.concurrency)
        if hopeless:
            return Judgement("", error=f"not tried: the {self._failures} requests before it failed ({self._reason})")
        for attempt in range(self._settings.retries + 1):
            try:
                judgement = _read_answer(
                    _post(self._url, self._body(messages), self._settings), self._settings.verdicts
                )
            except _FailureError as failure:
                reason, wait, transient = str(failure), failure.retry_after, failure.transient
                if not transient or attempt == self._settings.retries:
                    break
                if (
                    self._top_logprobs and "logprob" in reason.lower()
                ):  # a server without log-probabilities can still judge
                    self._top_logprobs, wait = False, 0.0
                seconds = self._settings.backoff_s * 2**attempt if wait is None else wait
                if self._stopping.wait(min(_LONGEST_WAIT_S, seconds)):
                    break
            else:
                with self._lock:
                    self._failures = 0
                return replace(judgement, seconds=time.perf_counter() - started)
        if transient:  # a refusal of this prompt alone says nothing about the others
            with self._lock:
                self._failures, self._reason = self._failures + 1, reason
        return Judgement("", error=f"{reason} (tried {attempt + 1}x)", seconds=time.perf_counter() - started)

    def _body(self, messages: Messages) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": self._settings.max_new_tokens,
            "temperature": self._settings.temperature,
            "seed": row_seed(self._settings.seed, messages),
        }
        return body | ({"logprobs": True, "top_logprobs": _TOP} if self._top_logprobs else {})


class _FailureError(Exception):
    """A request without a usable answer.

    Attributes:
        transient: whether another try may succeed.
        retry_after: seconds that the server asks to wait, or None.
    """

    def __init__(self, reason: str, *, transient: bool = True, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.transient, self.retry_after = transient, retry_after


def _post(url: str, body: Mapping[str, Any], settings: JudgeSettings) -> Any:
    """Send one request and return the JSON that came back, or raise _FailureError with the reason."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if settings.api_key:
        headers["Authorization"] = f"Bearer {settings.api_key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    deadline = time.monotonic() + settings.timeout_s
    try:
        with urllib.request.urlopen(request, timeout=settings.timeout_s) as response:
            content = _read_until(response, deadline)
    except urllib.error.HTTPError as error:
        shown = _shown(error)
        if error.code in _REFUSED:
            raise ValueError(f"the server at {url} answers {error.code} for model {body['model']!r}: {shown}") from None
        transient = error.code in (408, 409, 425, 429) or error.code >= 500 or "logprob" in shown.lower()
        wait = _retry_after(error.headers.get("Retry-After"))
        raise _FailureError(
            f"the server answered {error.code}: {shown}", transient=transient, retry_after=wait
        ) from None
    except TimeoutError:
        raise _FailureError(f"no answer within {settings.timeout_s:g} s") from None
    except urllib.error.URLError as error:
        late = isinstance(error.reason, TimeoutError)
        reason = f"no answer within {settings.timeout_s:g} s" if late else f"no connection: {error.reason}"
        raise _FailureError(reason) from None
    except (OSError, http.client.HTTPException) as error:
        raise _FailureError(f"the connection broke: {type(error).__name__}: {error}") from None
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise _FailureError(f"the answer is not JSON: {content[:60]!r}") from None


def _read_until(response: Any, deadline: float) -> bytes:
    """Read a body until the deadline; the socket's own time-out only limits each piece of it."""
    content = b""
    while piece := response.read1(2**16):
        content += piece
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(content) > _LARGEST_ANSWER:
            raise _FailureError(f"the answer is longer than {_LARGEST_ANSWER} bytes")
    promised = response.length  # bytes that Content-Length announced and that did not come
    if promised:
        raise _FailureError(f"the connection broke: {promised} bytes of the answer are missing")
    return content


def _read_answer(answer: Any, verdicts: Verdicts) -> Judgement:
    """Return the judgement in an answer, or raise _FailureError if it holds no text."""
    try:
        choice = answer["choices"][0]
        text, thought = choice["message"].get("content"), choice["message"].get("reasoning_content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _FailureError(f"the answer holds no choices: {str(answer)[:60]!r}") from None
    if text is not None and not isinstance(text, str):
        raise _FailureError(f"the answer's content is a {type(text).__name__}")
    if text is None and not isinstance(thought, str):
        raise _FailureError("the answer holds no content")
    # Some servers return the thought in a field of its own.
    whole = f"<think>{thought}</think>{text or ''}" if isinstance(thought, str) and thought else (text or "")
    usage = answer.get("usage")
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    tokens, soft = _read_logprobs(choice.get("logprobs"), whole, verdicts)
    return Judgement(whole, soft=soft, tokens=counted if isinstance(counted, int) else tokens, verdicts=verdicts)


def _read_logprobs(logprobs: Any, text: str, verdicts: Verdicts) -> tuple[int, tuple[float, float] | None]:
    """Return how many tokens the server lists, and the expected scores where it lists enough."""
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
    """Return the bytes of a token as the server lists them: its text may be half a character."""
    listed = token.get("bytes")
    return bytes(listed) if listed is not None else str(token["token"]).encode()


def _retry_after(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, as seconds or as a date; None if it is neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _shown(error: urllib.error.HTTPError) -> str:
    """Return the start of an error's body, which says what is wrong, or its reason where there is no body."""
    try:
        body = error.read(2000).decode("utf-8", errors="replace").strip()
    except (OSError, http.client.HTTPException):
        body = ""
    return " ".join((body or str(error.reason)).split())[:200]
