"""The summary of an augmentation: pairs by kind, checks, reasons and the filter's scores, as tables and a page."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np

from cepo.counterfactual.text.filter import TAU, certainty
from cepo.counterfactual.text.pairs import Pair
from cepo.eval.augment.answers import JournaledWriter
from cepo.eval.report.figures import histogram
from cepo.eval.report.numbers import digits
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import PageTable
from cepo.files import BrokenLine

_CUTS = (0.0, 0.5 - TAU, 0.5 + TAU, 1 - TAU, 1.0)  # bounds of p, at the filter's thresholds


class AugmentSummary:
    """Counts pairs as they are written.

    Args:
        writer: the writer whose answers the pairs are made from.
        broken: (number, reason) of each row of the data that could not be used.
        kinds: names of the kinds that were asked for; a kind without pairs is shown with 0.
    """

    def __init__(self, writer: JournaledWriter, broken: tuple[BrokenLine, ...], kinds: tuple[str, ...]) -> None:
        self.writer, self.broken, self.kinds = writer, broken, kinds
        self.pairs: Counter[tuple[str, str, bool]] = Counter()
        """Counts by kind, side of the split, and whether pairs are kept."""
        self.checks: Counter[tuple[str, str, bool]] = Counter()
        """Counts by kind, check, and whether it was passed."""
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.certainties: dict[str, list[float]] = {}
        self._counted: tuple[str, tuple[str, ...]] = ("", ())

    def count(self, pair: Pair) -> Pair:
        """Count a pair and return it."""
        self.pairs[pair.kind, str(pair.split), pair.kept] += 1
        # Of ties that are drawn in turn, only the first counts: without a check it would have been used.
        if not pair.tie or (pair.kind, pair.source_ids) != self._counted:
            self.checks.update((pair.kind, check, passed) for check, passed in pair.checks.items())
        self._counted = (pair.kind, pair.source_ids)
        if pair.reason:
            self.reasons[pair.kind, pair.reason.partition(":")[0]] += 1
        if pair.base_difference is not None:
            self.certainties.setdefault(pair.kind, []).append(certainty(pair.base_difference))
        return pair

    def tables(self) -> dict[str, PageTable]:
        """Return the tables for console and page by title; those without rows are left out."""
        pairs = []
        for kind in dict.fromkeys((*self.kinds, *(kind for kind, _, _ in self.pairs))):
            kept = [self.pairs[kind, side, True] for side in ("train", "test")]
            dropped = sum(self.pairs[kind, side, False] for side in ("train", "test"))
            pairs.append([kind, str(sum(kept) + dropped), *map(str, kept), str(dropped)])
        checks = []
        for kind, check in dict.fromkeys((kind, check) for kind, check, _ in self.checks):
            failed, passed = self.checks[kind, check, False], self.checks[kind, check, True]
            checks.append([kind, check, str(failed + passed), str(failed), digits(failed / (failed + passed))])
        scored = []
        for kind, values in self.certainties.items():
            scored.append([kind, str(len(values)), *map(str, np.histogram(values, bins=_CUTS)[0])])
        parts = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(_CUTS)]
        reasons = [[kind, reason, str(count)] for (kind, reason), count in self.reasons.most_common()]
        failures = [[reason, str(count)] for reason, count in self.writer.failed.most_common()]
        tables: dict[str, PageTable] = {
            "pairs": (["kind", "made", "kept, train", "kept, test", "not kept"], pairs),
            "checks": (["kind", "check", "checked", "failed", "share failed"], checks),
            "why pairs are not kept": (["kind", "reason", "pairs"], reasons),
            "p, how surely the filter's model prefers the chosen response": (["kind", "scored", *parts], scored),
            "prompts without an answer": (["reason", "prompts"], failures),
            "rows that could not be used": (
                ["row", "reason"],
                [[str(number), reason] for number, reason in self.broken],
            ),
        }
        return {title: table for title, table in tables.items() if table[1]}


def write_page(path: Path, summary: AugmentSummary, facts: dict[str, str]) -> None:
    """Write the page: facts, tables, and the distribution of the filter's scores."""
    figures = {}
    if summary.certainties:
        caption = f"Scores of the filter's model: preferences below {_CUTS[3]:g} are kept, and ties outside the middle"
        figures[caption] = histogram(summary.certainties, across="p of the chosen response", marks=_CUTS[1:-1])
    write_report(
        path,
        title="cepo augment",
        summary=facts,
        figures=figures,
        tables=summary.tables(),
        notes=[
            "Pairs that are not kept stay in pairs.jsonl with their reason; training leaves them out. A tie that fails "
            "its check is a false one: its responses differ in what its prompt asks for."
        ],
    )
