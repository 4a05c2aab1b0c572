"""The command line, grouped by the user's jobs: train, score, evaluate; then the research commands."""

from __future__ import annotations

import errno
import os
import sys
from importlib import metadata
from typing import Annotated, NoReturn

import typer

from cepo.cli.augment import augment
from cepo.cli.checks import OptionNames
from cepo.cli.evaluate import best_of_n, rewardbench, robustness
from cepo.cli.experiments import experiment, reward_experiment, words_judge
from cepo.cli.interventions import causal, cue_flips, sensitivity
from cepo.cli.research import ablate, bench
from cepo.cli.score import score
from cepo.cli.shared import RewardCommand, console, errors
from cepo.cli.train import demo, reward_model, train, warm_start

TRAIN, SCORE, EVALUATE, RESEARCH = "Train", "Score", "Evaluate", "Research"
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""Errors of a disk that is full or may not be written to."""
_RESEARCH_COMMANDS = (ablate, bench, experiment, reward_experiment, words_judge)


class _ResearchLast(OptionNames):
    """Lists the research commands after `eval`; typer lists groups of commands last."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        last = [command.__name__.replace("_", "-") for command in _RESEARCH_COMMANDS]
        return sorted(self.commands, key=last.__contains__)


app = typer.Typer(
    cls=_ResearchLast,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command(rich_help_panel=TRAIN)(demo)
app.command(rich_help_panel=TRAIN)(train)
app.command("warm-start", rich_help_panel=TRAIN)(warm_start)
app.command(rich_help_panel=TRAIN)(augment)
app.command("reward-model", rich_help_panel=TRAIN)(reward_model)
app.command(rich_help_panel=SCORE, cls=RewardCommand)(score)
eval_app = typer.Typer(
    cls=OptionNames,
    help="Evaluate a judge: is it right, is it robust, and does S measure what its criteria do?",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
for _command in (rewardbench, robustness, best_of_n, sensitivity, cue_flips, causal):
    eval_app.command()(_command)
app.add_typer(eval_app, name="eval", rich_help_panel=EVALUATE)
app.command(rich_help_panel=RESEARCH, cls=RewardCommand)(ablate)
for _command in (bench, experiment, reward_experiment, words_judge):
    app.command(rich_help_panel=RESEARCH)(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        names = ("cepo", "torch", "transformers", "trl", "peft", "triton")
        console.print(", ".join(f"{name} {_installed(name)}" for name in names), highlight=False, soft_wrap=True)
        raise typer.Exit


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Exact rewards for criteria that cause the scores of language-model judges and reasoners."""


def main() -> None:
    """Run the command line; bad input ends in one paragraph on stderr and exit code 2, a full disk in code 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not errors.is_terminal:  # progress bars of libraries would only fill a log
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it once, when it is imported
    try:
        app()
    except ValueError as error:
        _refuse(str(error), 2)
    except OSError as error:
        if error.errno not in _OF_DISKS:
            raise
        _refuse(f"{error}; results so far are kept: correct this and run the same command again", 1)


def _refuse(reason: str, code: int) -> NoReturn:
    errors.print(f"cepo: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
