"""Whether a prompt has nothing to do with a text: a cheap check by the words that they share.

A word is *common* if it stands in many prompts' texts; the others are *content words*. A prompt is unrelated to a text
if it has enough content words to name a subject, and the text has none of them. The check errs on the safe side: a word
that is shared by chance counts as a relation, while a prompt that asks for anything at all ("continue") is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cached_property

from cepo.counterfactual.text.pairs import Source, same_prompt

_COMMON = 0.1  # share of the prompts in whose texts a common word stands
_ALWAYS_CONTENT = 2  # prompts: a word of no more than these is never common, however few prompts there are
_SUBJECT = 3  # content words that a prompt must have
# A word of three letters or more; in scripts without spaces between words, a single character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_\u3040-\u30ff\u3400-\u9fff]{3,}")


class Peers(tuple[Source, ...]):
    """The preferences of one side of a split, among which other prompts and their responses are found."""

    @cached_property
    def by_prompt(self) -> list[list[Source]]:
        """The preferences of each prompt."""
        groups: dict[str, list[Source]] = {}
        for source in self:
            groups.setdefault(same_prompt(source.prompt), []).append(source)
        return list(groups.values())

    @cached_property
    def common_words(self) -> frozenset[str]:
        """The words that say nothing of a text's subject."""
        counts: Counter[str] = Counter()
        for group in self.by_prompt:
            counts.update({word for one in group for word in words_of(one.prompt, one.chosen, one.rejected)})
        least = max(_COMMON * len(self.by_prompt), _ALWAYS_CONTENT)
        return frozenset(word for word, count in counts.items() if count > least)


def why_related(prompt: str, *texts: str, peers: Peers) -> str | None:
    """Return why a prompt may have to do with some of the texts, or None where it is unrelated to all of them."""
    subject = words_of(prompt) - peers.common_words
    if len(subject) < _SUBJECT:
        return f"the prompt names no subject: {len(subject)} content words, expected {_SUBJECT}"
    shared = sorted(subject & words_of(*texts))
    return f"the prompt may be related: it shares {', '.join(shared)}" if shared else None


def words_of(*texts: str) -> frozenset[str]:
    """Return the words of texts, in lower case."""
    return frozenset(word.casefold() for text in texts for word in _WORD.findall(text))
