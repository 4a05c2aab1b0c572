"""Where a thought ends, and the sections that stand after it."""

from __future__ import annotations

from cepo.jacobian.reading.layout import WHITE_SPACE, ByteRange, MalformedError, as_bytes, as_text

THOUGHT = "think"


def after_thought(completion: bytes, tag: str = THOUGHT) -> int:
    """Return where a completion goes on after its thought.

    The thought is everything up to the first closing tag, whether or not its opening tag is in the completion (the
    prompt may have opened it): models rehearse their answer's tags there.

    Returns:
        The offset after the first closing tag; 0 for a completion without a thought.

    Raises:
        MalformedError: for a thought at the start that is never closed.
    """
    opened, closed = f"<{tag}>".encode(), f"</{tag}>".encode()
    end = completion.find(closed)
    if end >= 0:
        return end + len(closed)
    if completion.lstrip(WHITE_SPACE).startswith(opened):
        raise MalformedError(f"unclosed <{tag}>: the output ends inside its thought")
    return 0


def find_section(completion: bytes, tag: str) -> ByteRange | None:
    """Return the content range of the last closed `tag` after the thought, or None where there is none."""
    try:
        start = after_thought(completion)
    except MalformedError:
        return None
    opened = f"<{tag}>".encode()
    end = completion.rfind(f"</{tag}>".encode(), start)
    begin = completion.rfind(opened, start, end) if end >= 0 else -1
    return (begin + len(opened), end) if begin >= 0 else None


def read_section(text: str, tag: str) -> str | None:
    """Return the content of the last closed `tag` after the thought as it was written, or None; never raises."""
    completion = as_bytes(text)
    found = find_section(completion, tag)
    return None if found is None else as_text(completion[slice(*found)])
