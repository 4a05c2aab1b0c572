"""The settings and judgements of generative judges, and the protocol of any judge."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, get_args

from cepo.files import Row
from cepo.jacobian.loading import check_device, model_fingerprint, resolve_model
from cepo.jacobian.reading.judge import read_scores
from cepo.jacobian.reading.verdict import STRICT, Verdicts, check_verdicts

Messages: TypeAlias = Sequence[Mapping[str, str]]
Backend = Literal["transformers", "vllm", "server"]
Place = Literal["A", "B"]
PLACES: tuple[Place, ...] = get_args(Place)


@dataclass(frozen=True)
class Judgement:
    r"""A judge's reply to one prompt.

    Attributes:
        text: the whole reply, including its thought and the opening that was appended for a forced verdict.
        token_ids: the ids of `text`, or None if the backend does not return them.
        soft: expected scores of A and B, see `expected_scores`; None without a verdict or probabilities.
        tokens: number of generated tokens, without those that were appended.
        cut: whether it ended because it reached the largest number of tokens; of a forced verdict, whether the text
            before it did.
        forced: whether `\boxed{` was appended, see `JudgeSettings.force_format`.
        seconds: seconds that it took; in a batch, an equal share of the batch's time.
        error: why there is no judgement, or None. A row with an error says nothing about the model.
        verdicts: how its verdict is read, see `JudgeLayout`. Forced verdicts are read leniently: the scores are those
            of the last section, whatever the draft before it holds.
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    soft: tuple[float, float] | None = None
    tokens: int = 0
    cut: bool = False
    forced: bool = False
    seconds: float = 0.0
    error: str | None = None
    verdicts: Verdicts = STRICT

    @property
    def scores(self) -> tuple[float, float] | None:
        """The scores of A and B, or None if there is no judgement or its verdict cannot be read."""
        return None if self.error else read_scores(self.text, verdicts=self.verdicts)

    def record(self) -> Row:
        """Return its fields in judgements.jsonl."""
        scores = self.scores
        return {
            "text": self.text,
            "scores": scores,
            "soft": self.soft,
            "winner": winner(scores),
            "tokens": self.tokens,
            "token_ids": self.token_ids,
            "cut": self.cut,
            "forced": self.forced,
            "seconds": round(self.seconds, 4),
            "error": self.error,
        }


class Answer(Protocol):
    """A judge's answer to a prompt: a judgement or a reward."""

    @property
    def tokens(self) -> int:
        """Number of generated tokens."""

    def record(self) -> Row:
        """Return its fields in judgements.jsonl: at least `error`, None or why there is no answer."""
        ...


Progress: TypeAlias = Callable[[int, int, str], None]
"""Called with (judgements done, judgements in total, speed as text)."""


class Judge(Protocol):
    """Anything that answers judge prompts."""

    def judge(self, prompts: Sequence[Messages]) -> Iterable[tuple[int, Answer]]:
        """Yield the index of each prompt and its answer as they become available, in any order."""
        ...


@dataclass(frozen=True)
class JudgeSettings:
    r"""The judge, and how it generates.

    Attributes:
        model: see `resolve_model`; for a server, the name under which it serves the model.
        backend: "transformers", "vllm" (on this machine, if installed) or "server" (OpenAI's protocol).
        max_new_tokens: largest number of tokens per judgement, at least 1.
        temperature: 0 is greedy. Above 0, each prompt has its own random numbers, a function of the seed and the
            prompt, so that the rest of a batch does not matter.
        seed: seed of the sampling, and of the command's random draws.
        force_format: whether to append `\n<scores>\n\boxed{` to a judgement without a readable verdict and generate two
            integers from 1 to 10. Not for servers, whose protocol cannot continue a message.
        raw: whether to use the prompt as plain text, without the chat template.
        verdicts: "strict" or "lenient": which written forms of a verdict are read, see `JudgeLayout`.
        dtype: dtype of the weights.
        device: device to run on.
        batch_size: prompts generated at once, at least 1. It changes logits by rounding, and so, rarely, a greedy
            choice.
        trust_remote_code: whether code from a hub repository may run.
        base_url: address of the server, such as http://localhost:8000/v1.
        api_key: sent to the server as a bearer token, or in Azure's api-key header.
        concurrency: number of concurrent requests to the server, at least 1.
        timeout_s: seconds that one request may take.
        retries: number of times that a failed request is sent again.
        backoff_s: seconds before the first retry, doubled for each further one, unless the server sends Retry-After.
    """

    model: str
    backend: Backend = "transformers"
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    force_format: bool = False
    raw: bool = False
    verdicts: Verdicts = STRICT
    dtype: str = "float32"
    device: str = "cpu"
    batch_size: int = 16
    trust_remote_code: bool = False
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 8
    timeout_s: float = 300.0
    retries: int = 5
    backoff_s: float = 1.0

    def __str__(self) -> str:
        generation = f"temperature {self.temperature:g}" if self.temperature else "greedy"
        return f"{self.model} ({self.backend}, {generation}, at most {self.max_new_tokens} tokens)"


def winner(scores: Sequence[float] | None) -> Literal["A", "B", "tie"] | None:
    """Return which response has the higher score, "tie" for equal scores, None without scores."""
    if scores is None:
        return None
    if scores[0] == scores[1]:
        return "tie"
    return "A" if scores[0] > scores[1] else "B"


def check_judge(settings: JudgeSettings) -> None:
    """Check everything that can be checked before the weights are loaded or the server is called.

    Raises:
        ValueError: naming the setting, its value, and what was expected.
    """
    if settings.backend not in get_args(Backend):
        raise ValueError(f"backend is {settings.backend!r}; expected one of {', '.join(get_args(Backend))}")
    for name in ("max_new_tokens", "batch_size", "concurrency"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; expected at least 1")
    check_verdicts(settings.verdicts)
    if not 0.0 <= settings.temperature < math.inf:
        raise ValueError(f"temperature is {settings.temperature}; expected 0 (greedy) or a positive number")
    if settings.retries < 0 or not settings.timeout_s > 0 or settings.backoff_s < 0:
        raise ValueError(
            f"retries is {settings.retries}, timeout_s {settings.timeout_s}, backoff_s {settings.backoff_s}; "
            "expected at least 0, more than 0, and at least 0"
        )
    if settings.backend == "server":
        _check_server(settings)
        return
    if settings.base_url is not None:
        raise ValueError(
            f"base_url is {settings.base_url!r}, but the backend is {settings.backend}; expected the backend server"
        )
    if settings.dtype not in ("float64", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {settings.dtype!r}; expected float64, float32, bfloat16 or float16")
    source = resolve_model(settings.model)
    if settings.backend == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("backend is vllm, which is not installed here; pip install vllm, or use transformers")
        if source.gguf_file:
            raise ValueError(f"model {settings.model!r} is a .gguf file, which only the backend transformers reads")
    else:
        check_device(settings.device)


def decisive_settings(settings: JudgeSettings) -> dict[str, Any]:
    """Return the settings that determine a judgement, with the weights by their content, not where and how fast."""
    names = ["backend", "max_new_tokens", "temperature", "seed", "verdicts"]
    if settings.backend == "server":
        return {name: getattr(settings, name) for name in [*names, "base_url", "model"]}
    values = {name: getattr(settings, name) for name in [*names, "force_format", "raw", "dtype"]}
    return {**values, "weights": model_fingerprint(resolve_model(settings.model))}


def row_seed(seed: int, messages: Messages) -> int:
    """Return the seed of one prompt's sampling, in [0, 2^31), which depends only on the seed and the prompt."""
    content = json.dumps([seed, [dict(message) for message in messages]])
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=4).digest()) >> 1


def _check_server(settings: JudgeSettings) -> None:
    import httpx2  # here, since only servers need it

    try:
        url = httpx2.URL(settings.base_url or "")
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"base_url is {settings.base_url!r}; expected an address such as http://localhost:8000/v1")
    if settings.force_format:
        raise ValueError("force_format is set for a server, whose protocol cannot continue a message; leave it out")
    if settings.raw:
        raise ValueError("raw is set for a server, which applies its own chat template; leave it out")
