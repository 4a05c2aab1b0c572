"""What the commands share: the console, the progress bar, and options that mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console()
errors = Console(stderr=True)

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")]
Raw = Annotated[bool, typer.Option("--raw", help="Take prompt text as it is, without the chat template.")]
Threads = Annotated[int | None, typer.Option(help="Threads of a CPU; default: torch's own choice.", min=1)]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let a hub repository's own code run.")]

# Of commands that let a judge write.
Backend = Annotated[
    str | None, typer.Option(help="transformers, vllm (where installed), or server. Default: by --base-url.")
]
BaseUrl = Annotated[
    str | None, typer.Option(help="Address of a server of OpenAI's protocol, e.g. http://localhost:8000/v1.")
]
ApiKeyFile = Annotated[
    Path | None, typer.Option(help="File with the server's key. Default: the variable OPENAI_API_KEY, or none.")
]
Concurrency = Annotated[int, typer.Option(help="Requests in flight at the server.")]
Timeout = Annotated[float, typer.Option(help="Seconds that one request may take.")]
Retries = Annotated[int, typer.Option(help="How often a failed request is sent again.")]
MaxNewTokens = Annotated[
    int, typer.Option(help="Most tokens a judgement may have; on a CPU, 32 to 128 keep 100 pairs within minutes.")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy; above it, sampled by the seed.")]
ForceFormat = Annotated[
    bool, typer.Option("--force-format", help="Open the scores for a judge that has given none, and count how often.")
]
BatchSize = Annotated[int, typer.Option(help="Prompts generated at once.")]


def progress_bar() -> Progress:
    """Return the progress bar of all commands, on stderr."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=errors
    )


def use_threads(threads: int | None) -> None:
    """Let torch use so many threads; None leaves it its own choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def weighted_links(texts: list[str]) -> dict[str, float]:
    """Return the weights by link of options such as X->Y or X->Y=0.5."""
    links: dict[str, float] = {}
    for text in texts:
        name, equals, weight = text.partition("=")
        try:
            value = float(weight) if equals else 1.0
        except ValueError:
            raise ValueError(f"--link is {text!r}, whose weight is no number; expected e.g. 'X->Y=0.5'") from None
        if name.strip() in links:
            raise ValueError(f"--link names {name.strip()!r} twice; expected once, with one weight")
        links[name.strip()] = value
    return links
