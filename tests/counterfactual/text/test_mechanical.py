"""Protects pairs made by rule: one change per edit, true ties, and no prompt or response on both sides of the split."""

import json
from collections import Counter
from typing import Any

import pytest

from cepo.counterfactual.text.mechanical import make_pairs, show, shows
from cepo.counterfactual.text.pairs import Pair
from cepo.eval.sensitivity.edits import read_edit
from cepo.train.reward_testbed import WORDS, generate_sources
from tests.pairs import read_pair

KINDS: Any = ("original", "degrade", "upgrade", "irrelevant", "rrm")
SOURCES = generate_sources(60, seed=3, cue_agreement=0.9)
PAIRS = list(make_pairs(SOURCES, WORDS, kinds=KINDS, seed=3, test_fraction=0.3))


def test_an_edit_changes_the_causes_word_and_nothing_else() -> None:
    by_id = {source.id: source for source in SOURCES}
    edits = [pair for pair in PAIRS if pair.kind in ("degrade", "upgrade")]
    assert len(edits) == 2 * len(SOURCES)
    for pair in edits:
        source = by_id[pair.source_ids[0]]
        old, new = pair.rejected.split(), pair.chosen.split()
        assert [(a, b) for a, b in zip(old, new, strict=True) if a != b] == [WORDS[source.cause][::-1]]
        assert pair.attribute == source.cause
        assert read_edit(pair.row(), "line 1").words == pair.attribute_words == WORDS[source.cause]
        assert (pair.direction == "down") == (pair.chosen == source.chosen)
        assert not pair.tie


def test_neutrals_are_ties_and_the_control_has_none() -> None:
    """Those drawn before one passed the check stay, with the reason; the share of false ties can be counted."""
    cause_of = {source.prompt: source.cause for source in SOURCES}
    for rule, wanted in (("true", True), ("wrong", False)):
        pairs = list(make_pairs(SOURCES, WORDS, kinds=["irrelevant"], seed=3, ties=rule))  # type: ignore[arg-type]
        kept = [pair for pair in pairs if pair.kept]
        assert len(kept) >= 0.9 * len(SOURCES)
        for pair in pairs:
            cause = cause_of[pair.prompt]
            is_tie = shows(pair.chosen, cause, WORDS) == shows(pair.rejected, cause, WORDS)
            assert pair.checks == {"is_tie": is_tie}
            assert pair.kept == (is_tie is wanted)
            assert pair.kept or pair.reason
            assert pair.tie
    unchecked = list(make_pairs(SOURCES, WORDS, kinds=["irrelevant"], seed=3, ties="unchecked"))
    assert 0.2 < sum(pair.checks["is_tie"] for pair in unchecked) / len(unchecked) < 0.8


def test_the_split_comes_before_synthesis() -> None:
    """No prompt of one side is in a pair of the other, as its own or as an unrelated one; nor is any response."""
    sides: dict[str, set[Any]] = {}
    own = {source.id: source for source in SOURCES}
    for pair in PAIRS:
        sides.setdefault(pair.prompt, set()).add(pair.split)
        for name in pair.source_ids:
            sides.setdefault(own[name].prompt, set()).add(pair.split)
    assert all(len(of_prompt) == 1 for of_prompt in sides.values())
    assert {pair.split for pair in PAIRS} == {"train", "test"}


def test_pairs_do_not_depend_on_the_other_kinds_and_are_the_same_again() -> None:
    assert list(make_pairs(SOURCES, WORDS, kinds=KINDS, seed=3, test_fraction=0.3)) == PAIRS
    alone = list(make_pairs(SOURCES, WORDS, kinds=["rrm"], seed=3, test_fraction=0.3))
    assert alone == [pair for pair in PAIRS if pair.kind == "rrm"]
    assert Counter(pair.tie for pair in alone) == {False: 2 * len(SOURCES), True: len(SOURCES)}
    assert len({pair.id for pair in PAIRS}) == len(PAIRS)


def test_a_row_holds_every_field_and_reads_back() -> None:
    for pair in PAIRS[:20]:
        row = json.loads(json.dumps(pair.row()))
        assert read_pair(row) == pair
    assert set(PAIRS[0].row()) == {
        *("id", "split", "kind", "tie", "prompt", "chosen", "rejected", "attribute", "weight", "direction"),
        "attribute_words",
        *("source_ids", "generator", "checks", "base_difference", "kept", "reason"),
    }
    with pytest.raises(ValueError, match="split is 'dev'"):
        Pair("a", "p", "c", "r", split="dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without a reason"):
        Pair("a", "p", "c", "r", kept=False)
    with pytest.raises(ValueError, match="tie is 1"):
        Pair("a", "p", "c", "r", tie=1)  # type: ignore[arg-type]


def test_words_are_whole_and_stand_once() -> None:
    assert show("Response: correctly correct", "accuracy", WORDS, positive=False) == "Response: correctly wrong"
    with pytest.raises(ValueError, match="shows accuracy 2 times"):
        shows("correct wrong", "accuracy", WORDS)


def test_too_few_prompts_are_refused_by_name() -> None:
    alone = [source for source in SOURCES if source.prompt == SOURCES[0].prompt]
    for kind, complaint in (("irrelevant", "no prompt with a cause"), ("rrm", "expected two for rrm")):
        with pytest.raises(ValueError, match=complaint):
            list(make_pairs(alone, WORDS, kinds=[kind], seed=0))  # type: ignore[list-item]
