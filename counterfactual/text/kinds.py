"""The kinds of pairs that `cepo augment` makes from preferences, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cepo.counterfactual.text.edits import aligned, degrade, paraphrase, upgrade
from cepo.counterfactual.text.irrelevant import irrelevant_by_writer
from cepo.counterfactual.text.mechanical_text import dropped_sentence, irrelevant, relevance, style, wrong_number
from cepo.counterfactual.text.pairs import ORIGINAL, Pair, Source
from cepo.counterfactual.text.synthesise import Kind


def original(source: Source, peers: Sequence[Source], rng: np.random.Generator) -> Iterator[Pair]:
    """Yield the preference itself."""
    yield Pair(source.id, source.prompt, source.chosen, source.rejected, kind=ORIGINAL)


BY_RULE: Mapping[str, Kind] = {
    ORIGINAL: original,
    "irrelevant": irrelevant,
    "relevance": relevance,
    "style": style,
    "wrong-number": wrong_number,
    "dropped-sentence": dropped_sentence,
}
"""Kinds that do not need a model."""

WRITTEN: Mapping[str, Kind] = {
    "degrade": degrade,
    "upgrade": upgrade,
    "irrelevant-by-writer": irrelevant_by_writer,
    "aligned": aligned,
    "paraphrase": paraphrase,
}
"""Kinds that need a writer, a generative model."""
