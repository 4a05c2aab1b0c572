"""Tell how many preferences repeat or contradict an earlier one; all of them are used."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable

logger = logging.getLogger("cepo")

Preference = tuple[Hashable, Hashable, Hashable]
"""Prompt, chosen and rejected."""


def warn_of_repeats(preferences: Iterable[Preference]) -> None:
    """Warn once of preferences that are the same as an earlier one, or the same with the responses exchanged.

    Args:
        preferences: those of a data set, without ties.
    """
    seen: set[Preference] = set()
    repeated = contradicting = 0
    for prompt, chosen, rejected in preferences:
        repeated += (prompt, chosen, rejected) in seen
        contradicting += (prompt, rejected, chosen) in seen
        seen.add((prompt, chosen, rejected))
    if repeated or contradicting:
        logger.warning(
            "%d row(s) repeat the pair of an earlier row, and %d contradict one (the same prompt, chosen and rejected "
            "exchanged); all are used",
            repeated,
            contradicting,
        )
