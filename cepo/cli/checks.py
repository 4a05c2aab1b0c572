"""Checks of arguments that need no torch: the callbacks of options, and the error for missing options.

Everything else is checked by the functions behind the commands. Their errors begin with the name of a parameter, which
`OptionNames` replaces by the option.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from cepo.files import means_path
from cepo.fusion.settings import check_names
from cepo.jacobian.loading import check_device_name, resolve_model
from cepo.train.recipe import load_recipe
from cepo.train.source import check_file, check_source

JUDGES = ("able", "lazy", "hollow", "decorative", "copied", "criteria", "query")
"""The testbed's judges, see `cepo.train.testbed_judges.JudgeKind`."""
WORLDS = (*JUDGES, *(f"words-{name}" for name in JUDGES))
"""The testbed's judges and SmolLM2's."""
SIZES = ("tiny", "small", "a100", "h100", "gpu-135m", "gpu-7b")
"""Sizes of `cepo bench`."""
PEERS = ("reference", "padded", "functional", "captum", "inseq")
"""Peers that `cepo bench` times."""
REASONERS = ("reasoner-able", "reasoner-lazy", "reasoner-hollow")
_OTHER_SETTINGS = "made with other settings: "
_SETTING = re.compile(r"(?:\w+\.)*(\w+)(?= was | has other content)")
_EXAMPLE = re.compile(r"^An example(?:.*\n)+?\n(?:(?: {4}.*)?\n)*", re.MULTILINE)
_PATHS = "cepo.paths"  # key in typer's context of the files and folders named so far on the command line


class OptionNames(TyperGroup):
    """A group of commands whose errors name options as they are typed: --batch-size, not batch_size.

    So do refusals to resume, which name each setting that differs (`cepo.files.claim`): --seed, not config.seed. A
    dotted name at the beginning of an error is an entry of a recipe, such as data.source, and is kept, and so is a name
    that holds an unknown key. The error for a missing required option has the option's help and an example. Ctrl-C is
    reported too.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse empty values, such as of a shell's variable that is not set; as a path, "" is the current folder."""
        for before, value in zip(["cepo", *args], args, strict=False):
            option, equals, given = value.partition("=")
            if not value or (option.startswith("--") and equals and not given):
                raise ValueError(
                    f"{option or before} is followed by an empty value; expected text (is a shell variable unset?)"
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; replace a parameter's name at the beginning of an error by its option."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            typer.echo(f"cepo: {str(stopped) or 'stopped'}", err=True)
            raise typer.Exit(130) from None
        except typer.BadParameter as error:
            if error.message or error.param is None or error.ctx is None:  # only a missing parameter has no message
                raise
            told = f"{option_of(error.param)} is missing. {getattr(error.param, 'help', '')}"
            raise missing(error.ctx, told) from None
        except ValueError as error:
            parameters = {str(one.name): one for one in self.commands[ctx.invoked_subcommand].params}
            options = {option_of(one).strip("-").replace("-", "_"): option_of(one) for one in parameters.values()}
            options |= {
                f"{name}s": option_of(one) for name, one in parameters.items() if getattr(one, "multiple", False)
            }
            options |= {name: option_of(one) for name, one in parameters.items()}  # --donors is not the number `donors`
            told, other, settings = str(error).partition(_OTHER_SETTINGS)
            told = re.sub(r"^\w+\b(?!\.| holds the unknown key)", lambda name: options.get(name[0], name[0]), told)
            settings = _SETTING.sub(lambda name: options.get(name[1], name[0]), settings)
            told += other + settings
            if told == str(error):
                raise
            raise ValueError(told) from error


def option_of(parameter: Any) -> str:
    """Return an option as it is typed, or an argument's name."""
    return max(parameter.opts, key=len)


def refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise ValueError for options on the command line that would have no effect.

    Args:
        context: the command's context.
        names: names of its parameters to refuse.
        why: the reason, as the predicate of a sentence, such as "needs --base-url".
    """
    parameters = {str(one.name): one for one in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    given = sorted(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")
    if given:
        raise ValueError(f"{', '.join(option_of(parameters[name]) for name in given)} {why}; leave it out")


def missing(context: Any, told: str) -> ValueError:
    """Return the error for a missing option: the given text, and the example from the command's help."""
    example = _EXAMPLE.search(f"{inspect.cleandoc(context.command.help or '')}\n")
    return ValueError(f"{told}\n\n{example[0].rstrip()}" if example else told)


def refuse_split(context: typer.Context, data: str) -> None:
    """Refuse --split for rows without splits."""
    if data == "testbed" or Path(data).is_file():
        refuse_given(context, ["split"], f"cannot be used with --data {data}, which has no splits")


def model(context: typer.Context, parameter: typer.CallbackParam, name: str | None) -> str | None:
    """Refuse a missing model; one that may be on the hub passes."""
    if name is not None:
        check_model(context, option_of(parameter), name)
    return name


def check_model(context: typer.Context, option: str, name: str) -> None:
    """Raise ValueError, with the option's name, for a missing model."""
    try:
        source = resolve_model(name)
    except ValueError as error:
        raise ValueError(str(error).replace("model", option, 1)) from error
    except OSError as error:
        raise _unreadable(option, name, error) from error
    place = Path(source.location, source.gguf_file or "")
    if place.exists():
        _keep_apart(context, option, place)


def data(context: typer.Context, parameter: typer.CallbackParam, source: Any) -> Any:
    """Refuse missing data; data that may be on the hub passes."""
    return _readable(context, parameter, source, check_source)


def rows(context: typer.Context, parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse a missing file of rows."""
    _readable(context, parameter, path, check_file)
    return path


def _readable(context: typer.Context, parameter: typer.CallbackParam, source: Any, check: Callable[..., None]) -> Any:
    if source is not None:
        try:
            check(source)
        except ValueError as error:
            raise ValueError(f"{option_of(parameter)} {error}") from error
        except OSError as error:
            raise _unreadable(option_of(parameter), source, error) from error
        if Path(source).is_file() or means_path(str(source)):
            _keep_apart(context, option_of(parameter), Path(source))
    return source


def _unreadable(option: str, path: Any, error: OSError) -> ValueError:
    return ValueError(f"{option} is {str(path)!r}, which cannot be read: {error.strerror}; expected another path")


def file(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse a missing file."""
    if path is not None and not os.path.isfile(path):
        raise ValueError(f"{option_of(parameter)} is {str(path)!r}, which is not a file; expected a file to read")
    return path


def present_folder(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse a missing folder."""
    if path is not None and not os.path.isdir(path):
        raise ValueError(f"{option_of(parameter)} is {str(path)!r}, which is not a folder; expected a folder to read")
    return path


def recipe(path: Path) -> Path:
    """Refuse a recipe that is missing or not YAML."""
    load_recipe(path)
    return path


def plan(*keys: str) -> Callable[..., Any]:
    """Return the callback of an experiment's recipe: YAML with some of these keys and no other."""

    def check(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
        if path is not None:
            file(parameter, path)
            try:
                check_names(f"config {str(path)!r}", load_recipe(path), keys)
            except ValueError as error:
                raise ValueError(str(error).replace("config", option_of(parameter), 1)) from error
        return path

    return check


def folder(*names: str) -> Callable[..., Any]:
    """Return the callback of an output folder, which must be writable and whose files must not overwrite an input.

    Args:
        names: names of the files written there, with wildcards.
    """

    def check(context: typer.Context, parameter: typer.CallbackParam, path: Path | None) -> Path | None:
        if path is not None:
            _check_writable(option_of(parameter), path, path)
            _keep_apart(context, option_of(parameter), path, written=names)
        return path

    return check


def new_file(context: typer.Context, parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse a file that cannot be written, or that is an input or another output."""
    if path is not None:
        if os.path.isdir(path):
            raise ValueError(f"{option_of(parameter)} is {str(path)!r}, which is a folder; expected a file")
        _check_writable(option_of(parameter), path, path.absolute().parent)
        _keep_apart(context, option_of(parameter), path, written=())
    return path


def _check_writable(option: str, path: Path, where: Path) -> None:
    # os.path, unlike Path, does not raise for a place that the user may not enter.
    place = next(one for one in (where, *where.absolute().parents) if os.path.exists(one))
    try:
        with tempfile.TemporaryFile(dir=place):
            return
    except NotADirectoryError:
        what = "is a file"
    except OSError as error:
        what = f"cannot be written to ({error.strerror})"
    raise ValueError(f"{option} is {str(path)!r}, but {place} {what}; expected a folder that can be written to")


def _keep_apart(context: typer.Context, option: str, path: Path, *, written: tuple[str, ...] | None = None) -> None:
    """Raise ValueError for an output that would overwrite an input of the same command, or another output.

    Args:
        context: the command's context, which keeps the paths of earlier calls.
        option: option that names the path.
        path: a file or a folder.
        written: for an output, the names of the files written in it; None for an input.
    """
    paths = context.meta.setdefault(_PATHS, {})
    paths[option] = path, written
    for output, (place, names) in paths.items():
        for other, (taken, _) in paths.items():
            if names is not None and output != other and _overwrites(place, names, taken):
                raise ValueError(
                    f"{output} is {str(place)!r}, which would overwrite {other} ({str(taken)!r}); name another"
                )


def _overwrites(place: Path, names: tuple[str, ...], taken: Path) -> bool:
    place, taken = place.expanduser().resolve(), taken.expanduser().resolve()
    if not taken.is_relative_to(place):
        return False
    inside = taken.relative_to(place).parts
    return not inside or any(fnmatch(inside[0], name) for name in names)


def device(name: str | None) -> str | None:
    """Refuse an invalid name of a device; whether the device exists is checked later, with torch."""
    if name is not None:
        check_device_name(name)
    return name


def testbed_judges(parameter: typer.CallbackParam, names: list[str]) -> list[str]:
    """Refuse names that are neither a judge of the testbed nor a folder of a policy."""
    for name in names:
        if name not in JUDGES and not os.path.isdir(name):
            raise ValueError(
                f"{option_of(parameter)} is {name!r}, which is not a folder; expected one, or {', '.join(JUDGES)}"
            )
    return names


def worlds(parameter: typer.CallbackParam, names: str | None) -> str | None:
    """Refuse names that are not worlds of `cepo experiment`, and worlds of different testbeds."""
    one_of(*WORLDS, *REASONERS, commas=True)(parameter, names)
    testbeds = {name.strip().rpartition("-")[0] for name in (names or "").split(",")}
    if len(testbeds) > 1:
        raise ValueError(f"{option_of(parameter)} is {names!r}; expected worlds of one testbed: they share settings")
    return names


def at_least(least: float, most: float = math.inf) -> Callable[..., Any]:
    """Return the callback of an option that takes one or several numbers from `least` to `most`."""

    def check(parameter: typer.CallbackParam, value: Any) -> Any:
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not least <= number <= most:
                limit = "" if most == math.inf else f" and at most {most:g}"
                raise ValueError(f"{option_of(parameter)} is {number}; expected at least {least:g}{limit}")
        return value

    return check


def positive(parameter: typer.CallbackParam, number: float | None) -> float | None:
    """Refuse a number that is not above 0."""
    if number is not None and not number > 0:
        raise ValueError(f"{option_of(parameter)} is {number:g}; expected a number above 0")
    return number


def whole_numbers(least: int) -> Callable[..., Any]:
    """Return the callback of an option that takes distinct integers separated by commas, each at least `least`."""

    def check(parameter: typer.CallbackParam, text: str) -> str:
        told = f"{option_of(parameter)} is {text!r}; expected"
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            raise ValueError(f"{told} whole numbers separated by commas, e.g. 1,2,4") from None
        if min(numbers) < least or len({*numbers}) < len(numbers):
            raise ValueError(f"{told} different numbers of at least {least}")
        return text

    return check


def one_of(*names: str, commas: bool = False) -> Callable[..., Any]:
    """Return the callback of an option that takes one of `names`, or several if repeated or separated by commas."""

    def check(parameter: typer.CallbackParam, value: Any) -> Any:
        given = value if isinstance(value, list) else value.split(",") if commas and value else [value]
        for name in given:
            if name is not None and name.strip() not in names:
                raise ValueError(f"{option_of(parameter)} is {name!r}; expected one of {', '.join(names)}")
        return value

    return check
