"""Judgements from a server with OpenAI's chat protocol, with concurrent requests and retries."""

from __future__ import annotations

import email.utils
import json
import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import httpx2

from cepo.eval.judges.answers import NoAnswerError, read_answer
from cepo.eval.judges.settings import Judgement, JudgeSettings, Messages, row_seed

logger = logging.getLogger("cepo")

_TOP = 20  # alternatives per token, the most that the protocol allows
_LONGEST_WAIT_S = 300.0
_LARGEST_ANSWER = 2**26  # most bytes of an answer
_FEWEST_FAILURES = 10  # least consecutive failures after which the remaining requests are not tried
_REFUSED = (401, 402, 403, 404)  # retries and other rows would get the same answer
_TRANSIENT = (408, 409, 425, 429)
# Optional parameters of a request, and the warning's text if a server refuses one.
_YIELDS = {
    "max_tokens": "it gets max_completion_tokens instead",
    "temperature": "judgements are sampled at its own temperature",
    "seed": "sampling cannot be repeated",
    "logprobs": "there are no expected scores",
}
_REFUSES = "unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed|forbidden|only|instead"


class ServerJudge:
    """Asks a server for judgements.

    A request that fails (429, 5xx, a dropped connection, an answer that is not JSON or holds no text, more than
    `timeout_s` seconds) is sent again up to `retries` times, after a wait that doubles each time or that the server's
    Retry-After sets. A request that still fails becomes a judgement with an error. After many failures in a row, the
    remaining requests are not tried.

    A parameter that the server refuses by name (max_tokens, temperature, seed, logprobs) is left out from then on, and
    a warning says so once. Redirects are not followed, so that the key is never sent to another address.

    Args:
        settings: address, key, concurrency, retries, and how to generate.

    Raises:
        ValueError: if the environment names a proxy that cannot be used.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings = settings
        self._url, headers = _address(settings)
        limits = httpx2.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        try:
            self._client = httpx2.Client(headers=headers, timeout=settings.timeout_s, limits=limits)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"a proxy that the environment names, such as ALL_PROXY, cannot be used: {error}"
            ) from None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._failures = 0
        self._reason = ""
        self._asked = frozenset(_YIELDS)

    def judge(self, prompts: Sequence[Messages]) -> Iterator[tuple[int, Judgement]]:
        """Yield the index of each prompt and its judgement as they arrive.

        Raises:
            ValueError: if the server refuses the key, the address or the model (401 to 404), or redirects.
        """
        pool = ThreadPoolExecutor(self._settings.concurrency)
        try:
            rows = {pool.submit(self._judge_one, messages): row for row, messages in enumerate(prompts)}
            for future in as_completed(rows):
                yield rows[future], future.result()
        except BaseException:
            self._stopping.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _judge_one(self, messages: Messages) -> Judgement:
        started = time.perf_counter()
        with self._lock:
            hopeless = self._failures >= max(_FEWEST_FAILURES, 2 * self._settings.concurrency)
        if hopeless:
            return Judgement("", error=f"not tried: the {self._failures} requests before it failed ({self._reason})")
        attempt = 0
        while True:
            asked = self._asked
            try:
                judgement = read_answer(self._post(self._body(messages, asked)), self._settings.verdicts)
            except _RefusedError as refusal:
                if self._without_refused(asked, refusal):
                    continue
                failure: NoAnswerError = refusal
            except NoAnswerError as error:
                failure = error
            else:
                with self._lock:
                    self._failures = 0
                return replace(judgement, seconds=time.perf_counter() - started)
            attempt += 1
            if not failure.transient or attempt > self._settings.retries:
                break
            seconds = self._settings.backoff_s * 2 ** (attempt - 1) if failure.wait is None else failure.wait
            if self._stopping.wait(min(_LONGEST_WAIT_S, seconds)):
                break
        if failure.transient:  # a prompt that is refused says nothing about the others
            with self._lock:
                self._failures, self._reason = self._failures + 1, str(failure)
        return Judgement("", error=f"{failure} (tried {attempt}x)", seconds=time.perf_counter() - started)

    def _body(self, messages: Messages, asked: frozenset[str]) -> dict[str, Any]:
        settings = self._settings
        optional: dict[str, dict[str, Any]] = {
            "max_tokens": {"max_tokens": settings.max_new_tokens},
            "temperature": {"temperature": settings.temperature},
            "seed": {"seed": row_seed(settings.seed, messages)},
            "logprobs": {"logprobs": True, "top_logprobs": _TOP},
        }
        body: dict[str, Any] = {"model": settings.model, "messages": [dict(one) for one in messages], "stream": False}
        if "max_tokens" not in asked:
            body["max_completion_tokens"] = settings.max_new_tokens
        return body | {name: value for key in asked for name, value in optional[key].items()}

    def _without_refused(self, asked: frozenset[str], refusal: _RefusedError) -> bool:
        """Leave out the parameters that a refusal names from now on; return whether that changes the request."""
        refused = {name for name in asked if refusal.names(name)}
        with self._lock:
            for name in sorted(refused & self._asked):
                logger.warning("the server refuses %s: %s (%s)", name, _YIELDS[name], refusal)
            self._asked -= refused
        return bool(refused)

    def _post(self, body: Mapping[str, Any]) -> Any:
        """Send one request and return the JSON of the answer.

        Raises:
            NoAnswerError: with the reason why there is no answer.
            ValueError: if no request can succeed: for a redirect, or if the key, the address or the model is refused.
        """
        deadline = time.monotonic() + self._settings.timeout_s
        try:
            with self._client.stream("POST", self._url, content=json.dumps(body)) as response:
                content = _read_until(response, deadline)
        except httpx2.TimeoutException:
            raise NoAnswerError(f"no answer within {self._settings.timeout_s:g} s") from None
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            raise NoAnswerError(f"no connection: {error}") from None
        except httpx2.HTTPError as error:
            raise NoAnswerError(f"the connection broke: {type(error).__name__}: {error}") from None
        if response.is_success:
            try:
                return json.loads(content)
            except (ValueError, RecursionError):
                raise NoAnswerError(f"the answer is not JSON: {content[:60]!r}") from None
        if response.has_redirect_location:
            raise ValueError(
                f"the server at {self._url} redirects to {response.headers['Location']!r}; redirects are not followed, "
                "so that the key is never sent to another address: give the right one with --base-url"
            )
        code, shown = response.status_code, _shown(content) or response.reason_phrase
        if code in _REFUSED:
            raise ValueError(f"the server at {self._url} answers {code} for model {body['model']!r}: {shown}")
        reason = f"the server answered {code}: {shown}"
        if code in _TRANSIENT or (code >= 500 and "logprob" not in shown.lower()):
            raise NoAnswerError(reason, wait=_retry_after(response.headers.get("Retry-After")))
        raise _RefusedError(reason, content.decode("utf-8", errors="replace"))


class _RefusedError(NoAnswerError):
    """A request that the server refuses for its content."""

    def __init__(self, reason: str, body: str) -> None:
        super().__init__(reason, transient=False)
        self._body = body

    def names(self, parameter: str) -> bool:
        """Return whether the parameter itself is refused, and not its value."""
        if parameter == "logprobs":  # no other refusal mentions them
            return "logprob" in self._body.lower()
        if parameter == "max_tokens" and "max_completion_tokens" not in self._body:
            return False
        near = rf"\b{parameter}\b.{{0,80}}({_REFUSES})|({_REFUSES}).{{0,80}}\b{parameter}\b"
        return re.search(near, self._body, re.IGNORECASE | re.DOTALL) is not None


def _address(settings: JudgeSettings) -> tuple[httpx2.URL, dict[str, str]]:
    """Return the address of requests, and their headers.

    An address without a path gets /v1, a query stays (Azure's api-version), and an address that already ends in
    /chat/completions is used as it is.
    """
    base = httpx2.URL(settings.base_url or "")
    path = base.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if settings.api_key:
        # Azure, whose address names an api-version, takes the key in a header of its own.
        is_azure = "api-version" in base.params
        headers |= {"api-key": settings.api_key} if is_azure else {"Authorization": f"Bearer {settings.api_key}"}
    return base.copy_with(path=f"{path}/chat/completions"), headers


def _read_until(response: httpx2.Response, deadline: float) -> bytes:
    """Read a body until the deadline; the client's own time-out limits only the time between pieces."""
    content = b""
    for piece in response.iter_bytes():
        content += piece
        if time.monotonic() > deadline:
            raise httpx2.ReadTimeout("the answer comes too slowly")
        if len(content) > _LARGEST_ANSWER:
            raise NoAnswerError(f"the answer is longer than {_LARGEST_ANSWER} bytes")
    return content


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


def _shown(content: bytes) -> str:
    """Return the start of an error's body, for a message."""
    return " ".join(content[:2000].decode("utf-8", errors="replace").split())[:200]
