"""What is checked of an argument before torch is imported: callbacks of the options that name models, data and outputs.

What needs more than that is checked by the functions behind the commands. Their errors begin with the parameter's
name, and `OptionNames` puts the option's in its place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from cepo.jacobian.loading import resolve_model
from cepo.train.recipe import load_recipe
from cepo.train.source import check_source

JUDGES = ("able", "lazy", "hollow", "decorative", "copied", "criteria", "query")
"""The testbed's judges, see `cepo.train.testbed_judges.JudgeKind`."""
WORLDS = (*JUDGES, *(f"words-{name}" for name in JUDGES))
"""Those and SmolLM2's."""
SIZES = ("tiny", "small", "a100", "h100", "gpu-135m", "gpu-7b")
"""Of `cepo bench`."""
REASONERS = ("reasoner-able", "reasoner-lazy", "reasoner-hollow")
_OTHER_SETTINGS = "made with other settings: "
_SETTING = re.compile(r"(?:\w+\.)*(\w+)(?= was | has other content)")


class OptionNames(TyperGroup):
    """A group of commands whose errors name options as they are typed: --batch-size, not batch_size.

    So do refusals to resume, which name each setting that differs (`cepo.files.claim`): --seed, not config.seed. A
    dotted name that begins an error is a recipe's entry, such as data.source, and stays.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error that begins with the name of one of its parameters begins with its option."""
        try:
            return super().invoke(ctx)
        except ValueError as error:
            parameters = {str(one.name): one for one in self.commands[ctx.invoked_subcommand].params}
            options = {option_of(one).strip("-").replace("-", "_"): option_of(one) for one in parameters.values()}
            options |= {
                f"{name}s": option_of(one) for name, one in parameters.items() if getattr(one, "multiple", False)
            }
            options |= {name: option_of(one) for name, one in parameters.items()}  # --donors is not the number `donors`
            told, other, settings = str(error).partition(_OTHER_SETTINGS)
            told = re.sub(r"^\w+\b(?!\.)", lambda name: options.get(name[0], name[0]), told)
            settings = _SETTING.sub(lambda name: options.get(name[1], name[0]), settings)
            told += other + settings
            if told == str(error):
                raise
            raise ValueError(told) from error


def option_of(parameter: Any) -> str:
    """Return an option as it is typed, or an argument's name."""
    return max(parameter.opts, key=len)


def refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise ValueError for options that stand on the command line and would do nothing; `why` continues the sentence.

    Args:
        context: the command's.
        names: of its parameters.
        why: such as "needs --base-url".
    """
    parameters = {str(one.name): one for one in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    given = sorted(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")
    if given:
        raise ValueError(f"{', '.join(option_of(parameters[name]) for name in given)} {why}; leave it out")


def model(parameter: typer.CallbackParam, name: str | None) -> str | None:
    """Refuse a model that is not there; what may be on the hub passes."""
    if name is not None:
        check_model(option_of(parameter), name)
    return name


def check_model(option: str, name: str) -> None:
    """Raise ValueError, with the option's name, for a model that is not there."""
    try:
        resolve_model(name)
    except ValueError as error:
        raise ValueError(str(error).replace("model", option, 1)) from error


def data(parameter: typer.CallbackParam, source: str | None) -> str | None:
    """Refuse rows that are not there; what may be on the hub passes."""
    if source is not None:
        try:
            check_source(source)
        except ValueError as error:
            raise ValueError(f"{option_of(parameter)} {error}") from error
    return source


def file(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse a file that is not there."""
    if path is not None and not path.is_file():
        raise ValueError(f"{option_of(parameter)} is {str(path)!r}, which is not a file; expected a file to read")
    return path


def recipe(path: Path) -> Path:
    """Refuse a recipe that is not there, or not YAML."""
    load_recipe(path)
    return path


def folder(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse a folder that cannot be made or written to."""
    place = next((one for one in (path, *path.absolute().parents) if one.exists()), path) if path else None
    if place is not None and not (place.is_dir() and os.access(place, os.W_OK)):
        what = "cannot be written to" if place.is_dir() else "is a file"
        raise ValueError(f"{option_of(parameter)} is {str(path)!r}, but {place} {what}; expected a folder")
    return path


def new_file(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse a file that cannot be written."""
    if path is not None:
        if path.is_dir():
            raise ValueError(f"{option_of(parameter)} is {str(path)!r}, which is a folder; expected a file")
        folder(parameter, path.absolute().parent)
    return path


def testbed_judges(parameter: typer.CallbackParam, names: list[str]) -> list[str]:
    """Refuse what is neither a judge of the testbed nor the folder of a policy."""
    for name in names:
        if name not in JUDGES and not Path(name).is_dir():
            raise ValueError(
                f"{option_of(parameter)} is {name!r}, which is not a folder; expected one, or {', '.join(JUDGES)}"
            )
    return names


def at_least(least: float) -> Callable[..., Any]:
    """Return the callback of an option that takes a number, or several, none below `least`."""

    def check(parameter: typer.CallbackParam, value: Any) -> Any:
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not number >= least:
                raise ValueError(f"{option_of(parameter)} is {number}; expected at least {least:g}")
        return value

    return check


def one_of(*names: str, commas: bool = False) -> Callable[..., Any]:
    """Return the callback of an option that takes one of these names, or several separated by commas."""

    def check(parameter: typer.CallbackParam, value: str | None) -> str | None:
        for name in value.split(",") if commas and value else [value]:
            if name is not None and name.strip() not in names:
                raise ValueError(f"{option_of(parameter)} is {name!r}; expected one of {', '.join(names)}")
        return value

    return check
