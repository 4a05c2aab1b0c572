"""Read rows: which columns are read, in which order, and what a cell may hold. docs/formats.md ("Rows") says the same.

A column that a row's form does not name is ignored: it never causes a row to be refused, and never replaces another
column. A cell without a value (null, NaN, empty text) counts as a missing column. Every command reads rows here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from cepo.files import Row, counted, kind_of
from cepo.train.prompts import judge_prompt

PAIR = {name: name for name in ("prompt", "chosen", "rejected")}
"""What the columns of a preference are called."""
TIE = "tie"
"""Label of a row in which neither response is better."""
UNASKED_TIE = "is a tie"
"""Beginning of the reason why a tie is left out, which is followed by how to include ties."""
NOT_KEPT = "not kept"
"""Beginning of the reason why a row that `cepo augment` did not keep is left out."""
TIES_OPTION = "pass --ties to include ties"
"""How to include ties with commands that have the option."""
SCORED: dict[str, tuple[str, ...]] = {
    "token ids": ("prompt_ids", "completion_ids"),
    "a prompt with its completion": ("prompt", "completion"),
    "messages with their completion": ("messages", "completion"),
    "a judged pair": ("chosen", "rejected", "judge_output"),
}
"""The columns of each form that holds a completion, by its name; a row has the first form whose columns it has."""
_FORMS = {
    **SCORED,
    "a preference": ("chosen", "rejected"),
    "a question with solutions": ("question", "completions"),
    "a question with its answer": ("question", "answer"),
    "a conversation": ("messages",),
}
_FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
_IMAGES = ("images", "image", "pixel_values")
_ROLES = ("system", "developer", "user", "assistant")
_TOOL_ROLES = ("tool", "function", "ipython")
_TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
_WRITTEN_OUT = tuple(f"[{{{quote}{key}{quote}:" for quote in "'\"" for key in ("role", "content"))  # messages as text


@dataclass(frozen=True)
class Preference:
    """Responses to one prompt, where every chosen one is better than every rejected one.

    Attributes:
        prompt: the prompt; several turns are joined, with their roles.
        chosen: at least one response; several only if the cell is a list of texts.
        rejected: likewise.
    """

    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]


def given(row: Mapping[str, Any], column: str) -> Any:
    """Return a column's value; None if it is missing, null, NaN or empty text."""
    value = row.get(column)
    return None if value == "" or (isinstance(value, float) and math.isnan(value)) else value


def encodable(text: str) -> str:
    """Return the text with lone surrogates replaced by "?", so that tokenizers accept it."""
    return text.encode("utf-8", "replace").decode()


def form_of(row: Row) -> str:
    """Return a row's form and all of its columns, for messages."""
    there = [str(column) for column in row if given(row, column) is not None]
    columns = there + [f"{column} (empty)" for column in row if given(row, column) is None]
    return f"{form_name(there)} ({', '.join(columns) or 'no columns'})"


def form_name(columns: Sequence[str]) -> str:
    """Return the name of the form of a row with these columns, for messages."""
    return next((name for name, form in _FORMS.items() if {*columns}.issuperset(form)), "no known form")


def refuse_images(row: Mapping[str, Any]) -> None:
    """Raise ValueError for a row with images, which no model here would see."""
    seen = next((column for column in _IMAGES if given(row, column) not in (None, [])), None)
    if seen:
        raise ValueError(f"column {seen!r} holds images; only text is read")


def read_preference(row: Row, names: Mapping[str, str] = PAIR) -> Preference:
    """Return the preference of a row.

    The prompt is the column's, or without one the messages before the response in `chosen` and `rejected`. If there are
    both, they must end with the same message.

    Args:
        row: prompt, chosen and rejected, each text or messages; chosen and rejected may also be lists of texts.
        names: the row's names for these three columns.

    Raises:
        ValueError: with the reason why the row cannot be used.
    """
    refuse_images(row)
    chosen, before = _responses(row, names["chosen"])
    rejected, before_rejected = _responses(row, names["rejected"])
    if before and before_rejected and _join(before) != _join(before_rejected):
        raise ValueError(f"columns {names['chosen']!r} and {names['rejected']!r} answer different conversations")
    before = before or before_rejected
    column = names["prompt"]
    if before and given(row, column) is None:
        return Preference(_join(before), chosen, rejected)
    if before and not ask_the_same(read_messages(row, column), before):
        raise ValueError(f"columns {column!r} and {names['chosen']!r} hold different questions; keep the one to answer")
    return Preference(read_dialogue(row, column), chosen, rejected)


def read_pair(row: Row, names: Mapping[str, str] = PAIR) -> tuple[str, str, str]:
    """Return prompt, chosen and rejected of a row with one response of each kind.

    Raises:
        ValueError: as `read_preference`, and for a row with more responses.
    """
    found = read_preference(row, names)
    if len(found.chosen) + len(found.rejected) > 2:
        raise ValueError(
            f"holds {len(found.chosen)} chosen and {len(found.rejected)} rejected responses; expected one of each"
        )
    return found.prompt, found.chosen[0], found.rejected[0]


def read_tie(row: Row, *, ties: bool | None, way_out: str = TIES_OPTION) -> bool:
    """Return whether a row says that neither response is better, by its column `tie` or by "tie" as its `label`.

    Args:
        row: a preference.
        ties: whether ties are included; None if the caller has no such option.
        way_out: how to include them, for the error.

    Raises:
        ValueError: for a tie that is not included, a column `tie` that holds neither true nor false, or one that
            contradicts the label.
    """
    labelled = str(given(row, "label")).lower() == TIE
    tie = read_flag(row, "tie", default=labelled)
    if labelled and not tie:
        raise ValueError("column 'label' says that the row is a tie, and column 'tie' that it is not")
    if tie and not ties:
        raise ValueError(f"{UNASKED_TIE}; {'only preferences are read here' if ties is None else way_out}")
    return tie


def read_flag(row: Row, column: str, *, default: bool) -> bool:
    """Return a boolean column, which some tables store as text or numbers; raise ValueError for other values."""
    value = given(row, column)
    if value is None:
        return default
    if str(value).lower() not in _FLAGS:
        raise ValueError(f"column {column!r} holds {value!r}; expected true or false")
    return _FLAGS[str(value).lower()]


def check_kept(row: Row) -> None:
    """Raise ValueError, with the row's reason, for a row that `cepo augment` did not keep."""
    if not read_flag(row, "kept", default=True):
        raise ValueError(f"{NOT_KEPT}: {given(row, 'reason') or 'no reason given'}")


def read_judgement(row: Row, *, ties: bool | None = None) -> tuple[list[dict[str, str]], str]:
    """Return the prompt that a row's own judgement answered, and the judgement.

    Args:
        row: a preference with `judge_output`, and `label`: "A" (the default) or "B", the position of the chosen
            response; or a tie, see `read_tie`.
        ties: whether the prompt allowed equal scores; None as for `read_tie`.

    Raises:
        ValueError: with the reason why the row cannot be used, such as a tie that the prompt did not allow.
    """
    tie = read_tie(row, ties=ties)
    query, chosen, rejected = read_pair(row)
    label = given(row, "label")
    if label not in ("A", "B", None) and not (tie and str(label).lower() == TIE):
        raise ValueError(f"column 'label' holds {label!r}; expected 'A' or 'B', where the chosen response was shown")
    _, judgement = read_answer(row, "judge_output", whole=True)
    shown = (rejected, chosen) if label == "B" else (chosen, rejected)
    return judge_prompt(query, *shown, ties=bool(ties)), judgement


def read_id(row: Mapping[str, Any]) -> str | int | float | None:
    """Return a row's own id, as text unless it is a number; None if it has none."""
    value = given(row, "id")
    return value if value is None or isinstance(value, str | int | float) else str(value)


def read_text(row: Row, column: str) -> str:
    """Return a column's text, or that of its parts; raise ValueError if it is blank or not text."""
    return _checked(content_text(_column(row, column), column), column)


def read_reference(row: Row, column: str) -> str:
    """Return a reference answer, a text or a number; ValueError for anything else."""
    number = number_text(_column(row, column))
    return read_text(row, column) if number is None else number


def number_text(value: Any) -> str | None:
    """Return a finite number in plain digits, 18 for the 18.0 that a table makes of 18; None for anything else.

    A number of single precision, as tables may store it, is written as it was meant: 0.1, not 0.100000001490116.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return None
    if value.is_integer():
        return str(int(value))
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return format(Decimal(str(single) if float(single) == value else f"{value:.15g}"), "f")


def read_dialogue(row: Row, column: str) -> str:
    """Return a prompt as text: a single message as it is, several messages joined with their roles.

    Raises:
        ValueError: if it is blank, or neither text nor messages.
    """
    turns = _turns(_column(row, column), column)
    if turns is None:
        return read_text(row, column)
    return _join([{"role": turn["role"], "content": _checked(_said(turn, column), column)} for turn in turns])


def read_answer(row: Row, column: str, *, whole: bool = False) -> tuple[list[dict[str, Any]], str]:
    """Return the messages before an answer ([] if the column is text), and the answer, which may be blank.

    The assistant's last message is the answer; messages after it are ignored.

    Args:
        row: a row.
        column: name of a column with text or messages.
        whole: whether to refuse an answer whose thought is in a field of its own, since it is not all that was written.

    Raises:
        ValueError: with the reason why the column cannot be used.
    """
    value = _column(row, column)
    turns = _turns(value, column)
    if turns is None:
        return [], content_text(value, column)
    spoken = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not spoken:
        raise ValueError(f"column {column!r} holds no message by the assistant")
    answer = turns[spoken[-1]]
    thought = next((name for name in THOUGHT_FIELDS if answer.get(name)), None)
    if whole and thought is not None:
        raise ValueError(
            f"column {column!r} holds a thought beside the answer, in {thought!r}; expected it in the content, as the "
            "model wrote it (<think>...</think>)"
        )
    return plain_messages(turns[: spoken[-1]], column), _said(answer, column)


def read_messages(row: Row, column: str) -> str | list[dict[str, Any]]:
    """Return a prompt as text (which may be blank), or as messages whose content is text.

    Raises:
        ValueError: with the reason why the column cannot be used.
    """
    value = _column(row, column)
    turns = _turns(value, column)
    return content_text(value, column) if turns is None else plain_messages(turns, column)


def ask_the_same(prompt: str | list[dict[str, Any]], before: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a prompt and the messages before an answer end with the same text, up to white space."""
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return str(asked).split() == str(before[-1]["content"]).split()


def plain_messages(turns: Sequence[Row], column: str) -> list[dict[str, Any]]:
    """Return messages with their content as text, and without keys whose value is None (which tables add)."""
    return [
        {key: value for key, value in turn.items() if value is not None} | {"content": _said(turn, column)}
        for turn in turns
    ]


def content_text(content: Any, column: str) -> str:
    """Return the text of a message's content: itself, or that of its parts, joined.

    Raises:
        ValueError: for any other content; a part that is not text is named by its type.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        if isinstance(content, list):
            raise ValueError(f"column {column!r} is a list, but not one of messages with role and content")
        raise ValueError(f"column {column!r} holds {kind_of(content)}, not text")
    other = next((part.get("type") for part in content if part.get("type", "text") not in _TEXT_PARTS), None)
    if other is not None:
        raise ValueError(f"column {column!r} holds a part of type {other!r}; only text is read")
    if not all(isinstance(part.get("text"), str) for part in content):
        raise ValueError(f"column {column!r} is a list, but not one of messages with role and content")
    return "".join(part["text"] for part in content)


def is_storable(text: str) -> bool:
    """Return whether a text is valid Unicode, without lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _responses(row: Row, column: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Return the responses of a column, and the messages before them."""
    value = _column(row, column)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        if blank := [text for text in value if not text.strip()]:
            raise ValueError(f"column {column!r} holds {counted(len(blank), 'blank response')} among {len(value)}")
        return tuple(_checked(text, column) for text in value), []
    before, answer = read_answer(row, column)
    for turn in before:
        _checked(turn["content"], column)
    return (_checked(answer, column),), before


def _turns(value: Any, column: str) -> list[Row] | None:
    """Return a value's messages, where a single message needs no list; None if it holds none."""
    if isinstance(value, str) and value.startswith(_WRITTEN_OUT):
        raise ValueError(f"column {column!r} holds messages that are written out as text; expected a list")
    turns = [value] if isinstance(value, dict) and "role" in value else value
    if not isinstance(turns, list) or not any(isinstance(turn, dict) and "role" in turn for turn in turns):
        return None
    if not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns):
        raise ValueError(f"column {column!r} is a list, but not one of messages with role and content")
    return turns


def _said(turn: Row, column: str) -> str:
    """Return the text of a message."""
    if turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError(
            f"column {column!r} holds a message that calls tools; tool calls and their results are not read"
        )
    if turn["role"] in _TOOL_ROLES:
        raise ValueError(f"column {column!r} holds a tool's result (role {turn['role']!r}), which is not read")
    if turn["role"] not in _ROLES:
        raise ValueError(
            f"column {column!r} holds a message of the role {turn['role']!r}; expected {', '.join(_ROLES)}"
        )
    return content_text(turn.get("content"), column)


def _join(turns: Sequence[Mapping[str, Any]]) -> str:
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)


def _column(row: Row, column: str) -> Any:
    if given(row, column) is None and row.get(column) != "":  # whether empty text will do depends on the column
        raise ValueError(f"column {column!r} is missing; the row holds {form_of(row)}")
    return row[column]


def _checked(text: str, column: str) -> str:
    if not text.strip():
        raise ValueError(f"column {column!r} is blank")
    if not is_storable(text):
        raise ValueError(f"column {column!r} holds a lone surrogate; expected valid Unicode text")
    return text
