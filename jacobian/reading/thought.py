"""Where a thought ends."""

from __future__ import annotations

from cepo.jacobian.reading.layout import WHITE_SPACE, MalformedError


def after_thought(completion: bytes, tag: str) -> int:
    """Return where a completion goes on after its thought, 0 where it has none, or raise MalformedError."""
    opened, closed = f"<{tag}>".encode(), f"</{tag}>".encode()
    end = completion.find(closed)
    if end >= 0:
        return end + len(closed)
    if completion.lstrip(WHITE_SPACE).startswith(opened):
        raise MalformedError(f"unclosed <{tag}>: the output ends inside its thought")
    return 0
