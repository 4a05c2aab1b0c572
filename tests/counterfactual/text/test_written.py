"""Protects pairs by a writer: what is kept is what was asked for, and what is written badly stays, with its reason."""

import contextlib
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cepo.counterfactual.text.kinds import BY_RULE, WRITTEN
from cepo.counterfactual.text.pairs import Pair
from cepo.counterfactual.text.replies import read_attributes, read_differences, read_relevance, read_response
from cepo.counterfactual.text.synthesise import synthesise
from cepo.jacobian.reading.layout import MalformedError
from tests.counterfactual.text.fake_writer import (
    SOURCES,
    TOPICS,
    WEIGHTS,
    FakeWriter,
    by_kind,
    part,
    what_is_asked,
)
from tests.paths import ROOT

KINDS = {"original": BY_RULE["original"], **WRITTEN}


def test_the_documented_calls_are_those_that_are_made() -> None:
    """The cost on paper, per preference with two attributes; the first unrelated prompt passes."""
    writer = FakeWriter()
    made(writer)
    asked = Counter(map(what_is_asked, writer.asked))
    page = (ROOT / "docs" / "reward-models.md").read_text()
    rows = page.split("### What it costs, an estimate")[1].split("| --- |", 1)[1].split("\n\n")[0].splitlines()[1:]
    names = {"check of an edit": "differ", "check of an unrelated prompt": "relevance"}
    shown = dict((cell.strip() for cell in row.split("|")[1:3]) for row in rows)
    per_preference = {"1": 1, "1 to 3": 1, "a": len(WEIGHTS), "2a + 2": 2 * len(WEIGHTS) + 2}
    assert {names.get(name, name): len(SOURCES) * per_preference[calls] for name, calls in shown.items()} == asked


PIECES = (
    *(
        '{"attributes": [',
        '{"name": "accuracy", "weight": 1}',
        '{"name": [], "weight": "1"}',
        "{",
        "}",
        "]",
        ",",
        "null",
    ),
    *('{"differ": [', '"accuracy"', '"other"', '], "better": "A"}', '{"answers": true}', "-Infinity", "\ud800", "\x00"),
    *("<response>", "</response>", "<think>", "</think>", "<thinking>", "text"),
)


def made(writer: FakeWriter, *kinds: str, **options: Any) -> list[Pair]:
    chosen = {name: KINDS[name] for name in kinds or KINDS}
    return list(synthesise(SOURCES, chosen, seed=1, write=writer, generator="fake", **options))


def reasons(pairs: list[Pair]) -> Counter[str]:
    """How often each kind of reason stands in the pairs; those that are kept have none."""
    return Counter(str(pair.reason).partition(":")[0] if not pair.kept else "kept" for pair in pairs)


def attributes(*listed: Any) -> str:
    return json.dumps({"attributes": [{"name": name, "weight": weight} for name, weight in listed]})


def test_an_honest_writers_pairs_are_kept_and_differ_in_what_was_edited_alone() -> None:
    pairs = by_kind(made(FakeWriter()))
    assert {kind: reasons(of_kind) for kind, of_kind in pairs.items()} == {
        "original": Counter(kept=8),
        "degrade": Counter(kept=16),
        "upgrade": Counter(kept=16),
        "irrelevant-by-writer": Counter(kept=8),
        "aligned": Counter(kept=8),
        "paraphrase": Counter(kept=8),
    }
    worse = pairs["degrade"][1]
    assert (worse.chosen, worse.rejected) == ("tides right clear", "tides right vague")
    assert (worse.attribute, worse.weight, worse.direction) == ("clarity", 0.3, "down")
    assert (worse.source_ids, worse.generator, worse.tie) == (("s0",), "fake", False)
    assert worse.checks == {"one_attribute": True, "better": True}
    better = pairs["upgrade"][0]
    assert (better.chosen, better.direction) == ("tides right vague and much longer", "up")
    assert better.rejected == SOURCES[0].rejected
    same = pairs["aligned"][0]
    assert (same.chosen, same.rejected) == (SOURCES[0].chosen, "tides right clear and much longer")
    assert all(pair.tie and pair.checks == {"is_tie": True} for pair in pairs["aligned"] + pairs["paraphrase"])
    assert all(pair.prompt != SOURCES[at].prompt for at, pair in enumerate(pairs["irrelevant-by-writer"]))


def test_the_attributes_of_a_prompt_are_asked_once_and_sources_together() -> None:
    writer = FakeWriter()
    made(writer, "degrade", "upgrade", "aligned")
    asked = Counter(map(what_is_asked, writer.asked))
    assert asked["attributes"] == len(SOURCES)
    assert asked["degrade"] == asked["upgrade"] == 2 * len(SOURCES)
    assert asked["differ"] <= 5 * len(SOURCES)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ('{"attributes": [', "malformed attributes"),
        ("I would rather not.", "malformed attributes"),
        ("<think> so many", "no answer"),
        (TimeoutError("no answer within 300 s"), "no answer"),
        ('{"attributes": "accuracy"}', "malformed attributes"),
        (attributes(), "malformed attributes"),
        (attributes(*((f"a{at}", 0.1) for at in range(10))), "malformed attributes"),
        (attributes(("accuracy", 0.5), ("Accuracy", 0.5)), "malformed attributes"),
        ('{"attributes": ["accuracy"]}', "malformed attributes"),
        (attributes(("accuracy", 0.5), ("clarity", 0.3)), "malformed weights"),
        (attributes(("accuracy", 1.5), ("clarity", -0.5)), "malformed weights"),
        ('{"attributes": [{"name": "accuracy", "weight": NaN}]}', "malformed weights"),
        ("{" * 5000, "malformed attributes"),
    ],
)
def test_bad_attributes_drop_the_pair_and_nothing_else(reply: Any, reason: str) -> None:
    pairs = by_kind(made(FakeWriter(attributes=reply)))
    for kind in ("degrade", "upgrade", "aligned", "paraphrase"):
        assert reasons(pairs[kind]) == {reason: len(SOURCES)}
    assert reasons(pairs["original"] + pairs["irrelevant-by-writer"]) == {"kept": 2 * len(SOURCES)}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("tides wrong", "no edit"),
        ("<response> </response>", "no edit"),
        ("</response> <response>", "no edit"),
        ("<response>tides wrong\n[End of response]</response>", "no edit"),
        (ConnectionError("the server answered 500"), "no answer"),
        (lambda text: f"<response>{TOPICS_IN[text.split('Explain ')[1].split()[0]]}</response>", "unchanged edit"),
    ],
)
def test_a_bad_or_unchanged_edit_drops_its_pair(reply: Any, reason: str) -> None:
    pairs = made(FakeWriter(degrade=reply), "degrade")
    assert reasons(pairs) == {reason: 2 * len(SOURCES)}
    assert all(pair.chosen == pair.rejected for pair in pairs)
    assert {pair.attribute for pair in pairs} == set(WEIGHTS)


TOPICS_IN = {topic: f"  {topic}   right\nclear " for topic in TOPICS}


def test_a_writer_that_changes_more_or_the_other_way_is_found_out_by_the_second_call() -> None:
    both = FakeWriter(degrade=lambda text: f"<response>{text.split('Explain ')[1].split()[0]} wrong vague</response>")
    assert reasons(made(both, "degrade")) == {"other change": 2 * len(SOURCES)}

    turned = FakeWriter(upgrade=lambda text: f"<response>{part(text, 'Response')} really</response>")
    assert set(reasons(made(turned, "upgrade"))) == {"other change"}
    false = FakeWriter(paraphrase=lambda text: "<response>another matter, wrong</response>")
    pairs = made(false, "paraphrase")
    assert reasons(pairs) == {"false tie": len(SOURCES)}
    assert all(pair.checks == {"is_tie": False} for pair in pairs)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("They are alike.", "malformed check"),
        ('{"differ": ["tone"], "better": "A"}', "malformed check"),
        ('{"differ": [["accuracy"]], "better": "A"}', "malformed check"),
        ('{"differ": ["accuracy"], "better": "both"}', "malformed check"),
        ('{"differ": ["accuracy", "other"], "better": "A"}', "other change"),
        (OSError("no connection"), "no answer"),
    ],
)
def test_a_check_that_cannot_be_read_or_finds_more_drops_the_pair(reply: Any, reason: str) -> None:
    assert set(reasons(made(FakeWriter(differ=reply), "degrade", "upgrade"))) == {reason}


def test_a_check_that_follows_position_keeps_half_at_most() -> None:
    pairs = made(FakeWriter(differ='{"differ": ["accuracy"], "better": "A"}'), "degrade")
    edited = [pair for pair in pairs if pair.attribute == "accuracy"]
    assert set(reasons(edited)) == {"kept", "wrong direction"}


def test_false_ties_under_other_prompts_are_kept_out_and_their_share_can_be_counted() -> None:
    near = ("chess", "bees", "bread")  # both responses have something to say to prompts about these
    relevant = FakeWriter(
        relevance=lambda text: json.dumps({"answers": any(word in part(text, "Query") for word in near)})
    )
    pairs = made(relevant, "irrelevant-by-writer")
    assert all(pair.checks == {"unrelated": pair.kept} for pair in pairs)
    assert all(any(word in pair.prompt for word in near) != pair.kept for pair in pairs)
    assert 0 < sum(not pair.kept for pair in pairs) < len(SOURCES)
    never = made(FakeWriter(relevance='{"answers": true}'), "irrelevant-by-writer")
    assert set(reasons(never)) == {"related prompt"}
    assert set(Counter(pair.source_ids for pair in never).values()) <= {2, 3}  # its own prompt may have been drawn
    assert len({(pair.source_ids, pair.prompt) for pair in never}) == len(never)
    unread = made(FakeWriter(relevance='{"answers": "no"}'), "irrelevant-by-writer")
    assert set(reasons(unread)) == {"malformed check"}


def test_the_split_comes_first_and_a_prompt_that_is_alone_has_no_other() -> None:
    pairs = made(FakeWriter(), test_fraction=0.2)
    side = {pair.id: pair.split for pair in pairs if pair.kind == "original"}
    own = {source.prompt: side[source.id] for source in SOURCES}
    assert set(side.values()) == {"train", "test"}
    assert all(pair.split == own[pair.prompt] for pair in pairs)
    assert all(pair.split == side[name] for pair in pairs for name in pair.source_ids)
    alone = list(
        synthesise(SOURCES[:1], {"irrelevant-by-writer": KINDS["irrelevant-by-writer"]}, seed=1, write=FakeWriter())
    )
    assert not alone  # there is no other prompt on its side


def test_pairs_do_not_depend_on_how_many_sources_are_asked_together() -> None:
    assert made(FakeWriter(), at_once=1) == made(FakeWriter(), at_once=5) == made(FakeWriter())
    assert len({pair.id for pair in made(FakeWriter())}) == len(made(FakeWriter()))


def test_a_kind_that_asks_needs_a_writer() -> None:
    with pytest.raises(ValueError, match="write is None"):
        list(synthesise(SOURCES, WRITTEN, seed=1))


def test_replies_are_read_after_the_thought_and_through_what_stands_around() -> None:
    thought = '<think>{"attributes": [{"name": "length", "weight": 1}]}</think>'
    fenced = f"```json\n{attributes(('depth', 0.666), ('tact', 0.33))}\n```"
    assert read_attributes(f"{thought}\nWeights in {{}}:\n{fenced}") == {
        "depth": 0.666,
        "tact": 0.33,
    }
    assert read_attributes(attributes(("a\ud800b", 1))) == {"a?b": 1.0}
    assert (
        read_response("<think><response>no</response></think><response>a <response> b</response>") == "a <response> b"
    )
    assert read_differences('{"differ": [" Accuracy "], "better": "Neither"}', ["accuracy"]) == (
        {"accuracy"},
        "neither",
    )
    with pytest.raises(MalformedError, match="no answer: unclosed <think>"):
        read_response("<think><response>still thinking</response>")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text())
def test_any_reply_is_read_or_refused_with_a_reason(reply: str) -> None:
    for read in (read_attributes, read_response, read_relevance, lambda text: read_differences(text, ["accuracy"])):
        with contextlib.suppress(MalformedError):
            read(reply)
