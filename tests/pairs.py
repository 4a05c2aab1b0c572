"""Pairs read back from the rows that `cepo augment` writes."""

from cepo.counterfactual.text.pairs import Pair
from cepo.files import Row


def read_pair(row: Row) -> Pair:
    """Return the pair of a row; TypeError for a field that a pair does not have, or lacks."""
    words = row["attribute_words"]
    lists = {"source_ids": tuple(row["source_ids"]), "attribute_words": None if words is None else tuple(words)}
    return Pair(**{**row, **lists})
