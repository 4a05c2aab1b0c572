"""Warn of texts in words that the tokenizer does not know, about which a model's scores say nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger("cepo")

_MOST = 0.25  # share of a text's tokens that may be unknown, as names and symbols often are


class UnknownTokens:
    """Warns once if more than a quarter of a text's tokens are unknown.

    A tokenizer whose unknown token is also its end or beginning of text, or padding, can write any text, so no token
    counts as unknown.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        others = [getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos", "pad")]
        unknown = getattr(tokenizer, "unk_token_id", None)
        self._unknown = None if unknown in others else unknown
        self._told = False

    def check(self, token_ids: Sequence[int]) -> None:
        """Log a warning if too many tokens are unknown and none was logged before."""
        if self._unknown is None or self._told or not token_ids:
            return
        share = sum(token == self._unknown for token in token_ids) / len(token_ids)
        if share > _MOST:
            self._told = True
            logger.warning(
                "%.0f%% of the tokens of a text are unknown to the model's tokenizer, which reads all such words as "
                "the same token, so its scores say nothing about them; expected a model for the text's language",
                100 * share,
            )
