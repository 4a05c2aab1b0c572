"""Exchange the two responses in a judge's prompt, and keep the judge's output as it is."""

from __future__ import annotations

from collections.abc import Sequence

from cepo.jacobian.reading.layout import as_text
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout


def exchanged_prompts(rollouts: Sequence[Rollout], reader: SpanReader) -> list[Rollout | None]:
    """Return each rollout with the responses of its prompt exchanged, or None if that cannot be done exactly.

    The text of the prompt is encoded again, so its length may change; the ids of the completion are kept as sampled.
    It cannot be done if the rollout is malformed, if the two responses are not clearly marked (see
    `SpanReader.responses`), or if encoding the prompt's text does not give its ids.

    Args:
        rollouts: from `reader`.
        reader: reads the exchanged rollouts too.

    Returns:
        One rollout or None per rollout, in order.
    """
    prompts: dict[tuple[int, ...], tuple[int, ...] | None] = {}
    found: list[Rollout | None] = []
    for rollout in rollouts:
        if rollout.malformed is None and rollout.prompt_ids not in prompts:
            prompts[rollout.prompt_ids] = _exchange(rollout, reader)
        prompt_ids = prompts.get(rollout.prompt_ids)
        exchanged = reader.read(prompt_ids, rollout.completion_ids) if prompt_ids and not rollout.malformed else None
        found.append(exchanged if exchanged and not exchanged.malformed else None)
    return found


def _exchange(rollout: Rollout, reader: SpanReader) -> tuple[int, ...] | None:
    responses = reader.responses(rollout)
    if responses is None:
        return None
    prompt = reader.text_of(rollout.prompt_ids)
    (start_a, end_a), (start_b, end_b) = responses
    try:
        if _encode(as_text(prompt), reader) != rollout.prompt_ids:
            return None
        parts = (prompt[:start_a], prompt[start_b:end_b], prompt[end_a:start_b], prompt[start_a:end_a], prompt[end_b:])
        exchanged = b"".join(parts)
        prompt_ids = _encode(as_text(exchanged), reader)
    except UnicodeError:  # bytes that are not text
        return None
    return prompt_ids if reader.text_of(prompt_ids) == exchanged else None


def _encode(text: str, reader: SpanReader) -> tuple[int, ...]:
    return tuple(reader.tokenizer(text, add_special_tokens=False)["input_ids"])
