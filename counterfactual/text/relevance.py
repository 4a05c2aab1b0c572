"""Check whether a prompt is unrelated to a text, by the words that they share.

A word is *common* if the texts of many prompts contain it; the others are *content words*. A prompt is unrelated to a
text if it has enough content words to name a subject, and the text has none of them. The check errs on the safe side: a
word that is shared by chance counts as a relation, and a prompt that could be about anything ("continue") is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cached_property

from cepo.counterfactual.text.pairs import Source, same_prompt

_COMMON = 0.1  # a word is common if the texts of more than this share of the prompts contain it
_ALWAYS_CONTENT = 2  # but not if it occurs for at most this many prompts
_SUBJECT = 3  # least content words of a prompt
# A word of three letters or more; in scripts without spaces between words, a single character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_\u3040-\u30ff\u3400-\u9fff]{3,}")


class Peers(tuple[Source, ...]):
    """The preferences on one side of a split, from which other prompts and responses are drawn."""

    @cached_property
    def by_prompt(self) -> list[list[Source]]:
        """The preferences, grouped by prompt."""
        groups: dict[str, list[Source]] = {}
        for source in self:
            groups.setdefault(same_prompt(source.prompt), []).append(source)
        return list(groups.values())

    @cached_property
    def common_words(self) -> frozenset[str]:
        """Words that say nothing about a text's subject."""
        counts: Counter[str] = Counter()
        for group in self.by_prompt:
            counts.update({word for one in group for word in words_of(one.prompt, one.chosen, one.rejected)})
        least = max(_COMMON * len(self.by_prompt), _ALWAYS_CONTENT)
        return frozenset(word for word, count in counts.items() if count > least)


def why_related(prompt: str, *texts: str, peers: Peers) -> str | None:
    """Return why a prompt may be related to one of the texts, or None if it is unrelated to all of them."""
    subject = words_of(prompt) - peers.common_words
    if len(subject) < _SUBJECT:
        return f"the prompt names no subject: {len(subject)} content words, expected {_SUBJECT}"
    shared = sorted(subject & words_of(*texts))
    return f"the prompt may be related: it shares {', '.join(shared)}" if shared else None


def words_of(*texts: str) -> frozenset[str]:
    """Return the words of texts, case-folded."""
    return frozenset(word.casefold() for text in texts for word in _WORD.findall(text))
