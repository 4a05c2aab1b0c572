"""The console, the progress bar and the options that commands share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperCommand

from cepo.cli import checks

console = Console()
errors = Console(stderr=True)
_SECONDS_PER_LINE = 30

Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1 ...", callback=checks.device)]
Dtype = Annotated[
    str,
    typer.Option(
        help="Dtype of the weights: float64, float32, bfloat16 or float16.",
        callback=checks.one_of("float64", "float32", "bfloat16", "float16"),
    ),
]
OptionalModel = Annotated[
    str | None,
    typer.Option(help="Model to read: hub id, folder, adapter folder, .gguf file, or smollm2.", callback=checks.model),
]
Layers = Annotated[
    int | None,
    typer.Option(
        help="How many of the pretrained model's first layers a judge in words keeps; SmolLM2 has 30. Default: 8.",
        callback=checks.at_least(1),
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="Take prompts as plain text, without the chat template.")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads. Default: torch's own choice.", callback=checks.at_least(1))
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Allow code from a hub repository to run.")]


class RewardCommand(TyperCommand):
    """A command whose help shows RewardConfig's default for each option named like one of its fields."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help with the defaults; they are read here, so that no other start waits for numpy."""
        from cepo.fusion.config import RewardConfig

        config = RewardConfig()
        filled = [option for option in self.params if option.default is None and hasattr(config, str(option.name))]
        for option in filled:
            value = getattr(config, str(option.name))
            option.default = (
                [f"{link}={weight:g}" for link, weight in value.items()] if option.multiple and value else value
            )
        super().format_help(ctx, formatter)
        for option in filled:
            option.default = None


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given, so that the callee's defaults apply to the others."""
    return {name: value for name, value in options.items() if value is not None}


def progress_bar() -> Progress:
    """Return the progress bar of all commands, on stderr; if that is not a terminal, it is printed periodically."""
    return _Progress(TextColumn("{task.description}"), BarColumn(), _Count(), TimeRemainingColumn(), console=errors)


@contextlib.contextmanager
def showing(what: str = "", total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show the progress bar; yield a function that updates it, of (done, total, text to show after `what`).

    Bars of libraries, such as transformers' of loading weights, are not drawn meanwhile. Ctrl-C says how much is done;
    all commands that show this bar resume.
    """
    from cepo.train.bars import library_bars  # here, since tqdm must not be imported before `main` has set a variable

    with progress_bar() as bar, library_bars(disable=True):
        task = bar.add_task(what, total=total)

        def show(done: int, total: int, words: str = "") -> None:
            bar.update(task, description=f"{what} {words}".strip(), completed=done, total=total)

        try:
            yield show
        except KeyboardInterrupt:
            shown = bar.tasks[0]
            told = "before the first result"
            if shown.total and shown.completed:
                told = f"at {shown.completed:g} of {shown.total:g}: what is done is kept"
            raise KeyboardInterrupt(f"stopped {told}; the same command resumes") from None


class _Progress(Progress):
    """A bar that is also printed during the run outside a terminal, where rich prints it only at the end."""

    _next_line = 0.0

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """Update the bar; outside a terminal, print it at most every half minute."""
        super().update(task_id, **fields)
        if not self.console.is_terminal and self.get_time() >= self._next_line:
            self._next_line = self.get_time() + _SECONDS_PER_LINE
            self.console.print(self.get_renderable())


class _Count(MofNCompleteColumn):
    """The count done/total, once the total is known."""

    def render(self, task: Task) -> Text:
        return Text("starting") if task.total is None else super().render(task)


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads that torch uses; None leaves the choice to torch."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def weighted_links(texts: list[str]) -> dict[str, float]:
    """Return the weight of each link from options such as X->Y (weight 1) or X->Y=0.5."""
    links: dict[str, float] = {}
    for text in texts:
        name, equals, weight = text.partition("=")
        try:
            value = float(weight) if equals else 1.0
        except ValueError:
            raise ValueError(f"--link is {text!r}, whose weight is not a number; expected e.g. 'X->Y=0.5'") from None
        if name.strip() in links:
            raise ValueError(f"--link names {name.strip()!r} twice; expected once, with one weight")
        links[name.strip()] = value
    return links
