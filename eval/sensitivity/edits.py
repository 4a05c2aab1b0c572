"""Edits of responses: rows with the attribute that was edited, and the testbed's, whose ground truth is known."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from cepo.counterfactual.text.mechanical import show, shows
from cepo.files import BrokenLine, Row, content_hash
from cepo.train.reward_testbed import WORDS, generate_sources
from cepo.train.rows import check_kept, given, read_id, read_pair, read_tie
from cepo.train.source import collect_rows

CLEAN, UNCHECKED = "clean", "unchecked"
"""Kinds of the testbed's edits: of the attribute alone, and of the attribute and something else."""
_SEED_OFFSET = 7_000_003  # keeps the seeds apart from those of training data and of `measure_reward_model`
_FILLERS = ("indeed", "well", "also")
_MOST_CHANGES = 3  # changes besides the attribute's in an unchecked edit


@dataclass(frozen=True)
class Edit:
    """A pair in which one response is an edit of the other.

    Attributes:
        id: the row's own id, or "".
        prompt: what was asked.
        chosen: the better response.
        rejected: the other.
        kind: how the pair was made, such as degrade.
        attribute: what was edited.
        words: the words by which the responses show the attribute; empty if unknown.
        others: for the testbed's unchecked edits, the chosen response with all changes but the attribute's; else None.
        place: place of the row in the data, such as "line 3".
    """

    id: str
    prompt: str
    chosen: str
    rejected: str
    kind: str
    attribute: str
    words: tuple[str, ...] = ()
    others: str | None = None
    place: str = ""

    @property
    def key(self) -> str:
        """Hash of the edit without its place."""
        return content_hash({name: value for name, value in asdict(self).items() if name != "place"})

    @property
    def name(self) -> str:
        """The row's own id, or else its place."""
        return self.id or self.place


def read_edits(
    source: str, *, split: str | None = None, limit: int | None = None
) -> tuple[list[Edit], list[BrokenLine]]:
    """Read edits: preference rows with the `attribute` that was edited; equal rows count once.

    A row may have `id`, `kind`, `attribute_words` (a text, or a list of texts) and `kept`. Left out, with the reason,
    are ties, rows that are not kept or have no attribute, and those whose `direction` is null, which `cepo augment`
    writes for pairs in which neither response is an edit of the other.

    Args:
        source: see `open_source`.
        split: see `open_source`.
        limit: number of edits to stop at; None for all.

    Returns:
        The edits in order, and (row number, reason) of the rows that are not edits.

    Raises:
        ValueError: for a source that cannot be read or holds no edit.
    """
    edits, left_out = collect_rows(source, read_edit, split=split, limit=limit)
    first: dict[str, Edit] = {}
    for edit in edits:
        first.setdefault(edit.key, edit)
    return list(first.values()), left_out


def read_edit(row: Row, place: str) -> Edit:
    """Return the edit of the row at `place`.

    Raises:
        ValueError: with the reason why the row is not an edit.
    """
    check_kept(row)
    attribute, words = given(row, "attribute"), given(row, "attribute_words")
    if read_tie(row, ties=True):
        raise ValueError("is a tie: neither response is better")
    if not isinstance(attribute, str) or ("direction" in row and given(row, "direction") is None):
        raise ValueError("has no attribute, or no direction: neither response is an edit of the other")
    listed = [words] if isinstance(words, str) else list(words) if isinstance(words, list | tuple) else []
    if (words is not None and not listed) or not all(isinstance(word, str) and word.strip() for word in listed):
        raise ValueError(f"column 'attribute_words' holds {words!r}; expected a text, or a list of texts")
    own = read_id(row)
    kind = given(row, "kind")
    return Edit(
        "" if own is None else str(own),
        *read_pair(row),
        "edit" if kind is None else str(kind),
        attribute,
        tuple(listed),
        place=place,
    )


def known_edits(count: int, *, seed: int) -> list[Edit]:
    """Return two edits of each of the testbed's responses: one of the cause's word alone, and one that changes more.

    The unchecked edit also changes one to three things that do not decide the preference: another aspect's word is
    flipped, or a filler word is inserted or deleted.

    Args:
        count: number of responses, at least 1.
        seed: seed of all draws.
    """
    edits = []
    for place, source in enumerate(generate_sources(count, seed=seed + _SEED_OFFSET, cue_agreement=0.5)):
        rng = np.random.default_rng([seed, place])
        others = _with_other_changes(source.chosen, source.cause, rng)
        clean, unchecked = (show(text, source.cause, WORDS, positive=False) for text in (source.chosen, others))
        for kind, rejected, more in ((CLEAN, clean, None), (UNCHECKED, unchecked, others)):
            name, words = f"{source.id}/{kind}", WORDS[source.cause]
            edits.append(Edit(name, source.prompt, source.chosen, rejected, kind, source.cause, words, more))
    return edits


def _with_other_changes(response: str, cause: str, rng: np.random.Generator) -> str:
    """Return the response with one to three changes that do not decide the preference."""
    aspects = rng.permutation([aspect for aspect in WORDS if aspect != cause]).tolist()
    for aspect in aspects[: int(rng.integers(1, _MOST_CHANGES + 1))]:
        words = response.split()
        fillers = [place for place, word in enumerate(words) if word in _FILLERS]
        change = rng.integers(3 if fillers else 2)
        if change == 0:
            response = show(response, aspect, WORDS, positive=not shows(response, aspect, WORDS))
        elif change == 1:
            words.insert(int(rng.integers(1, len(words) + 1)), _FILLERS[rng.integers(len(_FILLERS))])
            response = " ".join(words)
        else:
            del words[fillers[rng.integers(len(fillers))]]
            response = " ".join(words)
    return response
