"""Read a writer's replies, without their thoughts: a rewritten response between tags, everything else as JSON.

Every reader raises only MalformedError, with the reason; the part of the reason before the colon is its kind.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

from cepo.counterfactual.text.prompts import END_OF_RESPONSE, MOST_ATTRIBUTES, OTHER
from cepo.jacobian.reading.layout import MalformedError, as_bytes
from cepo.jacobian.reading.thought import after_thought

_RESPONSE = "response"
_SLACK = 0.01  # allowed error of the weights' sum, since they are written with two decimals
_OBJECT = re.compile(r'{\s*"')
_SHOWN = 60  # most characters of a value in a reason


def read_attributes(reply: str | Exception) -> dict[str, float]:
    """Return the weight of each attribute that the reply names; the weights sum to 1."""
    listed = _member(reply, "attributes", list, "attributes")
    if not 1 <= len(listed) <= MOST_ATTRIBUTES:
        raise MalformedError(f"malformed attributes: {len(listed)} of them; expected 1 to {MOST_ATTRIBUTES}")
    weights: dict[str, float] = {}
    for entry in listed:
        name, weight = (entry.get("name"), entry.get("weight")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not name.strip() or isinstance(weight, bool | str | None | list | dict):
            raise MalformedError(f"malformed attributes: {_shown(entry)}; expected a name and a weight")
        if not 0 < weight <= 1:
            raise MalformedError(f"malformed weights: {name} has {weight}; expected more than 0, at most 1")
        weights[" ".join(_valid(name).split())] = float(weight)
    if len({name.casefold() for name in weights} | {OTHER}) != len(listed) + 1:
        raise MalformedError(f"malformed attributes: {', '.join(weights)}; expected different names, none {OTHER!r}")
    if abs(sum(weights.values()) - 1) > _SLACK:
        raise MalformedError(f"malformed weights: they sum to {sum(weights.values()):.3g}; expected 1")
    return weights


def read_response(reply: str | Exception) -> str:
    """Return the rewritten response in a reply: the text between the first opening tag and the last closing tag."""
    text = _written(reply)
    begin, end = text.find(f"<{_RESPONSE}>"), text.rfind(f"</{_RESPONSE}>")
    response = text[begin + len(f"<{_RESPONSE}>") : end].strip() if 0 <= begin < end else ""
    if not response:
        raise MalformedError(f"no edit: nothing between <{_RESPONSE}> and </{_RESPONSE}> in {_shown(text)}")
    if END_OF_RESPONSE in response:
        raise MalformedError(f"no edit: it holds the mark {END_OF_RESPONSE!r} of its prompt")
    return response


def read_differences(reply: str | Exception, attributes: Sequence[str]) -> tuple[set[str], str]:
    """Return the attributes (possibly `OTHER`) in which two responses differ, and the better: "A", "B" or "neither"."""
    known = {name.casefold(): name for name in [*attributes, OTHER]}
    names = _member(reply, "differ", list, "check")
    strange = [name for name in names if not isinstance(name, str) or name.strip().casefold() not in known]
    if strange:
        raise MalformedError(f"malformed check: it names {_shown(strange[0])}; expected some of {', '.join(known)}")
    better = _member(reply, "better", str, "check").strip().upper()
    if better not in ("A", "B", "NEITHER"):
        raise MalformedError(f"malformed check: {_shown(better)} is better; expected A, B or neither")
    return {known[name.strip().casefold()] for name in names}, "neither" if better == "NEITHER" else better


def read_relevance(reply: str | Exception) -> bool:
    """Return whether either response answers the prompt."""
    return bool(_member(reply, "answers", bool, "check"))


def same_text(first: str, second: str) -> bool:
    """Return whether two responses are the same up to white space."""
    return first.split() == second.split()


def _written(reply: str | Exception) -> str:
    """Return a reply without its thought."""
    if isinstance(reply, Exception):
        raise MalformedError(f"no answer: {reply}")
    try:
        start = after_thought(as_bytes(reply), sections=(_RESPONSE,))
    except MalformedError as unclosed:
        raise MalformedError(f"no answer: {unclosed}") from None
    return as_bytes(reply)[start:].decode("utf-8", "replace")


def _member(reply: str | Exception, name: str, kind: type, what: str) -> Any:
    """Return a member of the first JSON object in a reply that has it with this type; other text is ignored."""
    text = _written(reply)
    for opening in _OBJECT.finditer(text):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.JSONDecoder().raw_decode(text, opening.start())[0].get(name)
            if isinstance(found, kind):
                return found
    raise MalformedError(f"malformed {what}: no JSON object with {name!r}, a {kind.__name__}, in {_shown(text)}")


def _valid(text: str) -> str:
    """Return the text with lone surrogates, which JSON allows but files do not, replaced by question marks."""
    return text.encode("utf-8", "replace").decode()


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
