"""Rows to score: which columns are the prompt and the completion, and the rollout of each row."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import TemplateError

from cepo.files import BrokenLine, Row, content_hash, counted
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.reading.thought import without_opening
from cepo.jacobian.records import Rollout
from cepo.train.prompts import own_words
from cepo.train.rows import (
    SCORED,
    ask_the_same,
    encodable,
    form_name,
    form_of,
    given,
    read_answer,
    read_id,
    read_judgement,
    read_messages,
    refuse_images,
)
from cepo.train.source import open_file

logger = logging.getLogger("cepo")

FORMS = "prompt_ids and completion_ids; or prompt (or messages) and completion; or chosen, rejected and judge_output"
_COLUMNS = tuple(SCORED.values())
_Form: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """A row of the input, which may be unusable.

    Attributes:
        place: place in the input, such as "line 3".
        id: the row's own id; None if it has none.
        row: result of `read_row`; None if the row cannot be used.
        task_reward: in [0, 1]; None if the row has none.
        broken: place, and the reason why the row cannot be used; None if it can.
    """

    place: str
    id: str | int | float | None = None
    row: Row | None = None
    task_reward: float | None = None
    broken: str | None = None

    @property
    def name(self) -> str | int | float:
        """Id of the row's record: its own id, or else its place."""
        return self.place if self.id is None else self.id

    @property
    def content(self) -> str:
        """Hash of everything that decides the row's scores."""
        return content_hash(self.id, self.row, self.task_reward, self.broken)

    @property
    def prompt(self) -> Any:
        """The row's prompt as text, messages or token ids; None if the row cannot be used."""
        row = self.row or {}
        return row.get("prompt", row.get("prompt_ids"))

    @property
    def is_text(self) -> bool:
        """Whether the row's prompt is text or messages."""
        return self.row is not None and "prompt" in self.row


def read_input(
    path: Path, *, layout: Layout | None = None, named: str = "input"
) -> tuple[list[Line], list[BrokenLine]]:
    """Return the rows of the input in order, and (number, reason) of each that cannot be used.

    Args:
        path: a file of rows.
        layout: see `read_row`.
        named: the argument that names the file, for errors.

    Raises:
        ValueError: for a file that cannot be read, is empty, or has no row with the columns of a form.
    """
    source = open_file(path)
    lines: list[Line] = []
    numbers: list[int] = []
    first: Row | None = None
    forms: Counter[_Form] = Counter()
    without: dict[int, Row] = {}  # rows without a form, by their index in `lines`
    for number, row in source:
        if isinstance(row, dict):
            first = row if first is None else first
            form = _form(row)
            if form is None:
                without[len(lines)] = row
            else:
                forms[form] += 1
        lines.append(line_of(row, source.place(number), layout=layout))
        numbers.append(number)
    for place, row in without.items() if forms else ():
        ((usual, _),) = forms.most_common(1)
        lines[place] = replace(lines[place], broken=f"{lines[place].place}: {_lack(row, usual)}")
    broken = [(number, line.broken) for number, line in zip(numbers, lines, strict=True) if line.broken is not None]
    if not lines:
        raise ValueError(f"{named} {str(path)!r} is empty; expected rows with {FORMS}")
    if first is None:
        raise ValueError(f"{named} {str(path)!r} has no usable row; {broken[0][1]}")
    if not forms:
        raise ValueError(
            f"{named} {str(path)!r} lacks the column {_missing(first)}; expected rows with {FORMS}. Its first row "
            f"holds {form_of(first)}"
        )
    return lines, broken


def read_lines(path: Path, *, layout: Layout | None = None, named: str = "input") -> list[Line]:
    """Return the rows of a file as `read_input` does, with a warning that counts those that cannot be used."""
    lines, broken = read_input(path, layout=layout, named=named)
    if broken:
        logger.warning("%s: %s cannot be used; the first: %s", path, counted(len(broken), "row"), broken[0][1])
    return lines


def line_of(found: Row | str, place: str, *, layout: Layout | None = None) -> Line:
    """Return the line of a row, or of the reason why it could not be parsed, at `place` in the input."""
    if isinstance(found, str):
        return Line(place, broken=f"{place} is broken: {found}")
    try:
        return Line(place, read_id(found), read_row(found, layout=layout), _task_reward(found))
    except ValueError as reason:
        return Line(place, read_id(found), broken=f"{place}: {reason}")


def rollout_of(line: Line, reader: SpanReader, *, raw: bool = False) -> Rollout:
    """Return the rollout of a line; if the line cannot be used, a malformed rollout without tokens, with the reason."""
    if line.row is None:
        return Rollout((), (), malformed=line.broken)
    try:
        return read_rollout(line.row, reader, raw=raw)
    except ValueError as reason:
        return Rollout((), (), malformed=f"{line.place}: {reason}")


def read_rollout(row: Row, reader: SpanReader, *, raw: bool = False) -> Rollout:
    """Return the rollout of a row, marked malformed with the reason if its completion is.

    Text is encoded once, here, and the spans are found on the resulting ids. Lone surrogates, which no tokenizer
    encodes, become "?". A thought that the chat template opens is opened once, see `without_opening`.

    Args:
        row: see `read_row`.
        reader: finds the spans, with the model's tokenizer.
        raw: whether to take prompt text as it is, without the chat template but with one start-of-text token.

    Raises:
        ValueError: with the reason why the row cannot be used: its columns, a chat template that refuses its messages,
            or a prompt that is already rendered and is not raw.
    """
    tokenizer, messages, row = reader.tokenizer, None, read_row(row, layout=reader.layout)
    if "prompt_ids" in row:
        prompt_ids, completion_ids = row["prompt_ids"], row["completion_ids"]
    else:
        prompt, completion = row["prompt"], encodable(row["completion"])
        if raw and isinstance(prompt, str):
            prompt_ids = reader.prompts.raw_ids(encodable(prompt))
        else:
            messages = [{**message, "content": encodable(message["content"])} for message in _as_messages(prompt)]
            if any(reader.prompts.is_rendered(own_words(message["content"])) for message in messages):
                way_out = "score with --raw, or give the messages" if isinstance(prompt, str) else "give its text"
                raise ValueError(
                    "its prompt is already rendered: it begins as the chat template begins one, and would be rendered "
                    f"again; {way_out} alone"
                )
            try:
                prompt_ids = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=True
                )["input_ids"]
            except (TemplateError, ValueError, TypeError) as error:
                raise ValueError(f"the chat template refuses the messages: {error}") from error
            completion = without_opening(completion, reader.text_of(prompt_ids), reader.layout.thought_tag)
        completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if not prompt_ids:
        raise ValueError("the prompt has no tokens")
    return reader.read(prompt_ids, completion_ids, messages)


def read_row(row: Row, *, layout: Layout | None = None) -> Row:
    """Return the columns of a row that are scored: `prompt_ids` and `completion_ids`, or `prompt` and `completion`.

    `prompt` is text or messages and `completion` is text. Of a completion given as messages, the assistant's last is
    scored and those before it continue the prompt. A judged pair becomes the judge's prompt and its judgement. See
    docs/formats.md.

    Args:
        row: a row of the input.
        layout: format of the completions, which says whether the prompt of a judged pair allowed equal scores; None for
            a judge's, where the caller has no option for ties.

    Raises:
        ValueError: with the reason why the row cannot be used.
    """
    form = _form(row)
    if form is None:
        raise ValueError(_lack(row))
    refuse_images(row)
    if "prompt_ids" in form:
        for column in form:
            if not isinstance(row[column], list) or not all(type(token) is int for token in row[column]):
                raise ValueError(f"column {column!r} holds {str(row[column])[:40]!r}; expected a list of integers")
        return {column: row[column] for column in form}
    if "judge_output" in form:
        if layout is not None and not isinstance(layout, JudgeLayout):
            raise ValueError(f"holds {form_of(row)}, which only --kind judge scores")
        judged, judgement = read_judgement(row, ties=None if layout is None else layout.ties)
        return {"prompt": judged, "completion": judgement}
    if "completion" not in form:
        before, completion = read_answer(row, "messages", whole=True)
        if not before:
            raise ValueError("column 'messages' holds nothing before the answer")
        return {"prompt": before, "completion": completion}
    prompt = read_messages(row, form[0])
    before, completion = read_answer(row, "completion", whole=True)
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise ValueError(f"column {form[0]!r} ends with a message by the assistant, as if it held the completion too")
    if _other_judgement(row) not in (None, completion):
        raise ValueError("columns 'completion' and 'judge_output' differ; keep the one to score")
    if not before or ask_the_same(prompt, before):
        return {"prompt": prompt, "completion": completion}
    if before[0]["role"] != "assistant":
        raise ValueError(f"columns {form[0]!r} and 'completion' hold different questions; keep the one to answer")
    return {"prompt": [*_as_messages(prompt), *before], "completion": completion}


def _form(row: Row) -> _Form | None:
    """Return the form of a row, or None; an empty answer counts as present only if no form is found without it."""
    there = {column for column in row if given(row, column) is not None}
    conversation = row["messages"] if isinstance(row.get("messages"), list) else []
    ends_with_answer = any(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in conversation[-1:])
    forms = (*_COLUMNS, ("messages",)) if ends_with_answer else _COLUMNS
    empty = {column for column in ("completion", "judge_output") if row.get(column) == ""}
    return next((form for columns in (there, there | empty) for form in forms if columns.issuperset(form)), None)


def _lack(row: Row, usual: _Form = ()) -> str:
    """Return why a row without a form cannot be used; `usual` is the most frequent form of the file."""
    missing = _missing(row, usual)
    told = f"lacks the column {missing}: it holds {form_of(row)}"
    if missing == "completion" and given(row, "messages") is not None:
        told += ", and its messages (role, content) do not end with an assistant's"
    return f"{told}; most other rows hold {form_name(usual)} ({', '.join(usual)})" if usual else told


def _missing(row: Row, usual: _Form = ()) -> str:
    """Return a column that a row without a form lacks: of the form that its columns suggest, or else of `usual`."""
    there = {column for column in row if given(row, column) is not None}
    form: _Form = ("messages" if "messages" in there else "prompt", "completion")
    if there & set(_COLUMNS[0]):
        form = _COLUMNS[0]
    elif "completion" not in there and there & set(_COLUMNS[-1]):
        form = _COLUMNS[-1]
    elif "completion" not in {*there, *usual} and not there.issuperset(usual):
        form = usual
    return next(column for column in form if column not in there)


def _other_judgement(row: Row) -> str | None:
    """Return the judgement in `judge_output`; None if there is none, or if the column cannot be a judgement."""
    try:
        return None if given(row, "judge_output") is None else read_answer(row, "judge_output")[1]
    except ValueError:
        return None


def _task_reward(row: Row) -> float | None:
    task = given(row, "task_reward")
    try:
        value = math.nan if isinstance(task, bool) else float(task if task is not None else 0.0)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"column 'task_reward' holds {task!r}; expected a number in [0, 1]")
    return None if task is None else value


def _as_messages(prompt: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
