"""Check settings by name and type against the signature of the class or function that takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
_WORDS |= {Mapping: "a mapping", Sequence: "a list"}


def check_settings(
    where: str,
    given: Mapping[str, Any],
    *takers: Callable[..., Any],
    but: Collection[str] = (),
    others: Collection[str] = (),
) -> None:
    """Raise ValueError for a setting that does not exist, or whose value is not of the declared type.

    Args:
        where: key under which the settings are, for error messages; "" for the top level.
        given: values by name.
        takers: classes or functions whose keyword arguments the settings are.
        but: names of their arguments that are not settings.
        others: names of settings that the caller reads itself, for the error; they are not in `given`.
    """
    declared: dict[str, Any] = {}
    for taker in takers:
        hints = get_type_hints(getattr(taker, "__init__") if isinstance(taker, type) else taker)  # noqa: B009 (for mypy)
        names = (one.name for one in inspect.signature(taker).parameters.values() if one.kind is not one.VAR_KEYWORD)
        declared |= {name: hints.get(name, Any) for name in names if name not in but}
    check_names(where, given, [*others, *declared])
    for name, value in given.items():
        if not _fits(value, declared[name]):
            key = f"{where}.{name}" if where else name
            raise ValueError(f"{key} is {value!r}; expected {_told(declared[name])}{_as_number(value, declared[name])}")


def check_names(where: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ValueError for a setting whose name is not known."""
    unknown = [str(name) for name in given if name not in {*known}]
    if unknown:
        raise ValueError(f"{where} holds the unknown key {', '.join(unknown)}; expected some of {', '.join(known)}")


def _options(hint: Any) -> list[Any]:
    """Return the alternatives that a type hint allows."""
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        return [option for part in get_args(hint) for option in _options(part)]
    return [hint]


def _fits(value: Any, hint: Any) -> bool:
    return any(_is_a(value, option) for option in _options(hint))


def _is_a(value: Any, option: Any) -> bool:
    if get_origin(option) is Literal:
        return any(type(value) is type(known) and value == known for known in get_args(option))
    kind = get_origin(option) or option
    if kind is Any or not isinstance(kind, type):  # Any is a class since Python 3.11
        return True
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is Sequence and isinstance(value, str))


def _told(hint: Any) -> str:
    """Return what a type hint allows, in words."""
    words: list[str] = []
    for option in _options(hint):
        kind = get_origin(option) or option
        words += (
            map(_spelled, get_args(option)) if kind is Literal else [_WORDS.get(kind, getattr(kind, "__name__", ""))]
        )
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _spelled(known: Any) -> str:
    """Return a value as YAML spells it; strings that YAML would read as another type are quoted."""
    return f'"{known}"' if known in ("true", "false", "null") else str(known)


def _as_number(value: Any, hint: Any) -> str:
    """Return a hint for a number that YAML reads as text, such as 1e-5; "" for any other value."""
    try:
        number = float(value) if isinstance(value, str) and float in _options(hint) else None
    except ValueError:
        number = None
    return "" if number is None else "; YAML spells numbers as in 1.0e-5, .inf and .nan"
