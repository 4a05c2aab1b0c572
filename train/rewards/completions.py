"""Read what TRL passes to a reward: the text of each completion, and whether its prompt had opened a thought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from cepo.jacobian.reading.thought import THOUGHT, open_thought
from cepo.jacobian.reading.thought import thought_opened as ends_in_thought
from cepo.train.rows import THOUGHT_FIELDS, encodable

Completion: TypeAlias = str | Sequence[Mapping[str, Any]]


def read_completions(
    completions: Sequence[Completion],
    *,
    prompts: Sequence[Any] | None = None,
    thought_opened: Sequence[bool] | None = None,
    **_: Any,
) -> list[tuple[str, bool]]:
    """Return the text of each completion, and whether the prompt ended inside a thought, see `find_thought`.

    Args:
        completions: Strings or message lists, see `completion_text`.
        prompts: The prompts of the completions. A string shows whether it ends in a thought. Messages show it only if
            the last one is by the assistant, so that the completion continues it: what a chat template adds is unknown.
        thought_opened: A column of the data set, one value per completion, for models whose chat template opens a
            thought. `cepo train` adds it, and so does binding a `CausalReward` to a trainer.

    Raises:
        ValueError: If a completion is neither a string nor messages, or the column has another length.
    """
    opened: Sequence[bool]
    if thought_opened is not None:
        opened = check_column("thought_opened", thought_opened, len(completions))
    else:
        opened = [ends_in_thought(_prompt_end(prompt)) for prompt in prompts or [""] * len(completions)]
    return [(completion_text(one), bool(is_open)) for one, is_open in zip(completions, opened, strict=True)]


def completion_text(completion: Completion) -> str:
    """Return the text of a completion from TRL.

    Args:
        completion: a string, or messages, of which the assistant's last one is read; its content may be a string, a
            list of parts, or None. A thought that TRL has moved to a field of its own is put back.

    Returns:
        The text; a lone surrogate, which no tokenizer accepts, is replaced by "?".

    Raises:
        ValueError: If the completion is neither.
    """
    if isinstance(completion, str):
        return encodable(completion)
    if not isinstance(completion, Sequence) or not all(isinstance(message, Mapping) for message in completion):
        raise ValueError(f"completions holds a {type(completion).__name__}; expected strings or lists of messages")
    messages: Sequence[Any] = completion
    spoken = [message for message in messages if message.get("role", "assistant") == "assistant"]
    message: Mapping[str, Any] = spoken[-1] if spoken else {}
    thought = next((message[name] for name in THOUGHT_FIELDS if message.get(name)), None)
    before = f"{open_thought(thought)}</{THOUGHT}>\n" if isinstance(thought, str) else ""
    return encodable(before + _content_text(message.get("content")))


def check_column(name: str, values: Sequence[Any] | None, count: int) -> Sequence[Any]:
    """Return a column of the data set; raise ValueError unless it is a list with one value per completion."""
    if values is None:
        raise ValueError(
            f"{name} is None; expected a column {name!r} in the data set (docs/formats.md, Rows for training)"
        )
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        raise ValueError(f"{name} is {values!r}; expected a list of {count} values, one for each completion")
    return values


def _prompt_end(prompt: Any) -> str:
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and prompt:
        prompt = prompt[-1].get("content") if prompt[-1].get("role") == "assistant" else ""
    return _content_text(prompt)


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text") or "") for part in content or () if isinstance(part, Mapping))
