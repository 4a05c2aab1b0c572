"""How verdicts are generated and read: what a judge is, its settings, the hard scores and the expected ones."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, Protocol, TypeAlias, get_args
from urllib.parse import urlsplit

from cepo.jacobian.loading import check_device, load_model, resolve_model
from cepo.jacobian.reading.judge import find_numbers

Messages: TypeAlias = Sequence[Mapping[str, str]]
Backend = Literal["transformers", "vllm", "server"]
Place = Literal["A", "B"]

FORCED_TOKENS = 12  # "10.25, 10.25}" in single characters
_LARGEST_SCORE = 10


@dataclass(frozen=True)
class Judgement:
    r"""What a judge wrote about one prompt.

    Attributes:
        text: all that it wrote, its thought included. Of a forced one, also what was appended.
        token_ids: the ids of `text`, or None where the backend does not tell them.
        soft: expected scores of A and B, see `expected_scores`; None where there is no verdict or no distribution.
        tokens: how many tokens it generated (what was appended is not counted).
        forced: whether `\boxed{` was put into its mouth, see `JudgeSettings.force_format`.
        seconds: time that it took; the share of its batch where it was generated in one.
        error: why there is no judgement, or None. A row with an error says nothing about the model.
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    soft: tuple[float, float] | None = None
    tokens: int = 0
    forced: bool = False
    seconds: float = 0.0
    error: str | None = None


OnDone: TypeAlias = Callable[[int, Judgement], None]


class Judge(Protocol):
    """Anything that answers judge prompts."""

    def judge(self, prompts: Sequence[Messages], on_done: OnDone | None = None) -> list[Judgement]:
        """Return one judgement a prompt, in their order; `on_done(index, judgement)` hears of each as it comes."""
        ...


@dataclass(frozen=True)
class JudgeSettings:
    r"""Which judge, and how it generates.

    Attributes:
        model: see `resolve_model`; for a server, the name that it knows the model by.
        backend: "transformers", "vllm" (on this machine, where it is installed) or "server" (OpenAI's protocol).
        max_new_tokens: most tokens a judgement may have, at least 1.
        temperature: 0 is greedy. Above it, each prompt draws from its own random numbers, a function of the seed and
            the prompt, so that neighbours in a batch change nothing.
        seed: of the sampling.
        force_format: where no verdict can be read, append `\n<scores>\n\boxed{` and let the scores be generated from
            there, held to two integers from 1 to 10. Not for servers, whose protocol cannot continue a message.
        raw: take the prompt as plain text, without the chat template.
        dtype: dtype of the weights.
        device: where to run.
        batch_size: prompts generated at once. A different batch may change the last bit of a logit, and so, rarely, a
            greedy choice.
        trust_remote_code: whether a hub repository's own code may run.
        base_url: of the server, such as http://localhost:8000/v1.
        api_key: sent to the server as a bearer token.
        concurrency: requests in flight at the server.
        timeout_s: most seconds that one request may take.
        retries: how often a request is sent again after it failed.
        backoff_s: wait before the first retry, doubled with each. A server's Retry-After goes first.
    """

    model: str
    backend: Backend = "transformers"
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    force_format: bool = False
    raw: bool = False
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

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide what is written; the others only decide where and how fast."""
        names = ("model", "backend", "max_new_tokens", "temperature", "seed", "force_format", "raw", "dtype")
        return {name: getattr(self, name) for name in names}


def check_judge(settings: JudgeSettings) -> None:
    """Check everything that can be checked before the weights are loaded or the server is called.

    Raises:
        ValueError: naming the setting, what it is, and what was expected.
    """
    if settings.backend not in get_args(Backend):
        raise ValueError(f"backend is {settings.backend!r}; expected one of {', '.join(get_args(Backend))}")
    for name in ("max_new_tokens", "batch_size", "concurrency"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; expected at least 1")
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
        raise ValueError(f"base_url is {settings.base_url!r} for the backend {settings.backend}, which has no address")
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


def open_judge(settings: JudgeSettings) -> Judge:
    """Load the judge; its weights, or nothing for a server.

    Raises:
        ValueError: for settings or a model that cannot be used.
    """
    check_judge(settings)
    if settings.backend == "server":
        from cepo.eval.judges.server import ServerJudge

        return ServerJudge(settings)
    source = resolve_model(settings.model)
    if settings.backend == "vllm":
        from cepo.eval.judges.vllm import VllmJudge

        return VllmJudge(source, settings)
    from cepo.eval.judges.transformers import TransformersJudge

    model, tokenizer = load_model(
        source, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code
    )
    return TransformersJudge(model, tokenizer, settings)


def winner(scores: Sequence[float] | None) -> Literal["A", "B", "tie"] | None:
    """Return whom the scores of A and B name, "tie" where they are equal, None where there are none."""
    if scores is None:
        return None
    if scores[0] == scores[1]:
        return "tie"
    return "A" if scores[0] > scores[1] else "B"


def row_seed(seed: int, messages: Messages) -> int:
    """Return the seed of one prompt's sampling, in [0, 2^31): a function of the seed and the prompt alone."""
    content = json.dumps([seed, [dict(message) for message in messages]])
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=4).digest()) >> 1


def expected_scores(
    pieces: Sequence[bytes], likely: Callable[[int], Mapping[bytes, float]]
) -> tuple[float, float] | None:
    r"""Return the expected scores of A and B over the digits that could have stood in the last `\boxed{a, b}`.

    At the token that opens a number, the expectation is over the numbers from 0 to 10 under their probabilities,
    normalised to one. Where 10 is two tokens, "1" stands for both 1 and 10: where 1 or 10 was written, its probability
    is split by that of a "0" behind it, which is known there; where another number was written, it counts as 1. A
    decimal part counts as it was written.

    Args:
        pieces: bytes of each token of the judgement, in order.
        likely: of the index of a token, the probabilities of what could have stood there, by their bytes. What is
            missing is taken to be impossible.

    Returns:
        None where `read_scores` reads no verdict, a number is greater than 10, or nothing likely is a number.
    """
    text = b"".join(pieces)
    numbers = find_numbers(text)
    if numbers is None or max(float(text[slice(*number)]) for number in numbers) > _LARGEST_SCORE:
        return None
    ends = list(accumulate(len(piece) for piece in pieces))
    expected = [_expected_number(number, pieces, ends, likely) for number in numbers]
    return None if expected[0] is None or expected[1] is None else (expected[0], expected[1])


def _expected_number(
    number: tuple[int, int],
    pieces: Sequence[bytes],
    ends: Sequence[int],
    likely: Callable[[int], Mapping[bytes, float]],
) -> float | None:
    text = b"".join(pieces)[number[0] : number[1]]
    first = next(index for index, end in enumerate(ends) if end > number[0])
    start = ends[first] - len(pieces[first])
    written = text[: ends[first] - number[0]]
    if not written.isdigit():  # a token that holds the decimal point too
        return None
    before, after = pieces[first][: number[0] - start], pieces[first][number[0] + len(written) - start :]
    weights: dict[int, float] = {}
    for piece, probability in likely(first).items():
        middle = piece[len(before) : len(piece) - len(after)]
        if middle.isdigit() and piece == before + middle + after and int(middle) <= _LARGEST_SCORE:
            weights[int(middle)] = weights.get(int(middle), 0.0) + probability
    total = sum(weights.values())
    if not total > 0.0:
        return None
    values = {value: float(value) for value in weights}
    if written == b"1" and not after and first + 1 < len(pieces):
        values[1] = 1.0 + 9.0 * min(1.0, likely(first + 1).get(b"0", 0.0))
    fraction = float(text) - int(float(text))
    return sum(weight * values[value] for value, weight in weights.items()) / total + fraction


def _check_server(settings: JudgeSettings) -> None:
    parts = urlsplit(settings.base_url or "")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"base_url is {settings.base_url!r}; expected an address such as http://localhost:8000/v1")
    if settings.force_format:
        raise ValueError("force_format is set for a server, whose protocol cannot continue a message; leave it out")
    if settings.raw:
        raise ValueError("raw is set for a server, which puts messages through its own chat template; leave it out")
