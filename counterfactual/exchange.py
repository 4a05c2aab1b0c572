"""The two responses exchanged in a judge's prompt, and everything that the judge wrote kept."""

from __future__ import annotations

from collections.abc import Sequence

from cepo.jacobian.reading.layout import as_text
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout


def exchanged_prompts(rollouts: Sequence[Rollout], reader: SpanReader) -> list[Rollout | None]:
    """Return each rollout with the responses of its prompt exchanged, or None where that cannot be done exactly.

    The text of the prompt is encoded again, so its length may change; the ids of the completion stay as they were
    sampled. It cannot be done where the rollout is malformed, where nothing marks the two responses clearly (see
    `SpanReader.responses`), or where the ids of the prompt are not those of its own text.

    Args:
        rollouts: from `reader`.
        reader: reads the exchanged rollouts too.
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
