"""Protects pairs made of any text by rule: one change each, labels that hold, no leak over the split, none lost."""

from collections import Counter
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any

import pytest

from cepo.counterfactual.text.kinds import BY_RULE
from cepo.counterfactual.text.mechanical_text import CLOSINGS, OPENINGS
from cepo.counterfactual.text.pairs import Pair, Source
from cepo.counterfactual.text.relevance import Peers, why_related
from cepo.counterfactual.text.synthesise import synthesise

TOPICS = 24


def topic(number: int) -> list[str]:
    """Six words that belong to one subject and to no other."""
    return [3 * "abcdefghijklmnopqrstuvwx"[number % TOPICS] + ending for ending in ("el", "ar", "um", "os", "ix", "en")]


def preference(number: int) -> Source:
    one, two, three, four, five, six = topic(number)
    prompt = f"Please explain what a beginner in {one} does with {two} and {three}, case {number}."
    chosen = (
        f"The work begins with {one}. Then {four} meets {five} in {six}. After that comes a pause. In all that is "
        "3 + 4 = 7 steps. That is the end."
    )
    return Source(f"row-{number}", prompt, chosen, f"Some people like {two}. Others do not.")


SOURCES = [preference(number) for number in range(48)]
PAIRS = list(synthesise(SOURCES, BY_RULE, seed=5, test_fraction=0.4))
BY_ID = {source.id: source for source in SOURCES}


def made(kind: str, *sources: Source, seed: int = 0) -> list[Pair]:
    return list(synthesise(sources, {kind: BY_RULE[kind]}, seed=seed))


def of_kind(kind: str) -> list[tuple[Pair, Source]]:
    found = [(pair, BY_ID[pair.source_ids[0]]) for pair in PAIRS if pair.kind == kind and pair.kept]
    assert len(found) > 0.8 * len(SOURCES), kind
    return found


def edits(before: str, after: str) -> list[tuple[str, str]]:
    matched = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return [(before[a:b], after[c:d]) for what, a, b, c, d in matched if what != "equal"]


def test_an_irrelevant_pair_shares_no_content_word_with_its_prompt() -> None:
    """The check keeps related prompts out, which stay as rows with the words that they share."""
    for pair, source in of_kind("irrelevant"):
        assert pair.tie
        assert pair.checks == {"unrelated": True}
        assert (pair.chosen, pair.rejected) == (source.chosen, source.rejected)
        assert not {word for word in topic(int(source.id.removeprefix("row-"))) if word in pair.prompt}
    refused = [pair for pair in PAIRS if pair.kind == "irrelevant" and not pair.kept]
    assert refused
    for pair in refused:
        assert pair.checks == {"unrelated": False}
        source = BY_ID[pair.source_ids[0]]
        shared = (pair.reason or "").partition("shares ")[2].split(", ")
        assert all(word in pair.prompt and word in source.prompt for word in shared)


def test_a_prompt_that_names_no_subject_is_never_unrelated() -> None:
    peers = Peers([*SOURCES, Source("vague", "Please explain what that does.", "It explains.", "No.")])
    assert "please" in peers.common_words
    vague = "Please explain what a beginner does."
    assert "names no subject" in (why_related(vague, "Knead the dough.", peers=peers) or "")
    assert why_related("Which rudder suits a small catamaran?", "Knead the dough.", peers=peers) is None
    rudder = why_related("Which Rudder suits a small catamaran?", "The rudder turns.", peers=peers)
    assert rudder == "the prompt may be related: it shares rudder"
    assert "shares 猫" in (why_related("猫はなぜ鳴く", "猫が好き", peers=peers) or "")


def test_a_relevant_response_is_preferred_to_another_prompts() -> None:
    for pair, source in of_kind("relevance"):
        other = BY_ID[pair.source_ids[1]]
        assert (pair.prompt, pair.chosen, pair.rejected) == (source.prompt, source.chosen, other.chosen)
        assert other.prompt != source.prompt
        assert not pair.tie


def test_a_style_changes_nothing_that_is_said() -> None:
    """And every style is made; letters and digits of the response stay as they are, in their order."""
    pairs = of_kind("style")
    assert {pair.attribute for pair, _ in pairs} == {"opening line", "closing line", "bullets", "exclamation marks"}
    for pair, source in pairs:
        assert pair.tie
        assert pair.chosen in (source.chosen, source.rejected)
        assert pair.chosen != pair.rejected
        said = pair.rejected
        for line in (*OPENINGS, *CLOSINGS):
            said = said.removeprefix(f"{line}\n\n").removesuffix(f"\n\n{line}")
        assert [c for c in said if c.isalnum()] == [c for c in pair.chosen if c.isalnum()]


def test_a_wrong_number_is_one_digit_of_a_result() -> None:
    for pair, source in of_kind("wrong-number"):
        assert pair.chosen == source.chosen
        assert not pair.tie
        ((before, after),) = edits(pair.chosen, pair.rejected)
        assert before == "7"
        assert after.isdigit()
        assert after != "7"
    none = replace(SOURCES[0], chosen="It opened in 2019. Call 555-0100 = yes.")
    assert not made("wrong-number", none)


@pytest.mark.parametrize(
    ("solution", "results"),
    [
        ("so 2 * 9 = $18 per day", {"18"}),
        ("16 - 3 - 4 = <<16-3-4=9>>9 eggs", {"9"}),
        (r"$5 \times 400 = 2,000$", {"2,000"}),
        ("2 * 3 = 6, and 7 is left", {"6"}),
        ("x = 5 and y = 7", set()),
    ],
)
def test_results_are_found_as_they_are_written(solution: str, results: set[str]) -> None:
    """Whatever digit is drawn, what changes lies in a result."""
    sources = [replace(SOURCES[0], id=f"s{number}", chosen=solution) for number in range(20)]
    pairs = made("wrong-number", *sources)
    assert len(pairs) == (len(sources) if results else 0)
    for pair in pairs:
        ((before, after),) = edits(pair.chosen, pair.rejected)
        assert pair.attribute_words is not None
        right, wrong = pair.attribute_words  # what `cepo eval sensitivity` takes for the attribute
        assert right in results
        assert wrong in pair.rejected
        assert before in right
        assert after in wrong
        assert len(before) == len(after) == 1


def test_a_dropped_sentence_is_whole_and_said_something_of_its_own() -> None:
    for pair, source in of_kind("dropped-sentence"):
        assert pair.chosen == source.chosen
        assert not pair.tie
        _, _, _, four, five, six = topic(int(source.id.removeprefix("row-")))
        assert pair.rejected == pair.chosen.replace(f" Then {four} meets {five} in {six}.", "")
        assert pair.attribute_words == (f" Then {four} meets {five} in {six}.",), "all that was removed"
    two = replace(SOURCES[0], chosen="One sentence stands here. Another follows it.")
    assert not made("dropped-sentence", two)


def test_the_split_comes_before_synthesis() -> None:
    sides: dict[Any, set[Any]] = {}
    for pair in PAIRS:
        for prompt in (pair.prompt, *(BY_ID[name].prompt for name in pair.source_ids)):
            sides.setdefault(prompt, set()).add(pair.split)
    assert all(len(of_prompt) == 1 for of_prompt in sides.values())
    assert {pair.split for pair in PAIRS} == {"train", "test"}


def test_pairs_are_the_same_again_whatever_the_order_and_the_other_kinds() -> None:
    assert list(synthesise(SOURCES, BY_RULE, seed=5, test_fraction=0.4)) == PAIRS
    assert len({pair.id for pair in PAIRS}) == len(PAIRS)
    assert Counter(pair.kind for pair in PAIRS)["original"] == len(SOURCES)
    for kind in BY_RULE:
        assert made(kind, *SOURCES) == made(kind, *SOURCES)
    assert made("style", *SOURCES) != made("style", *SOURCES, seed=1)
    styled = {pair.id: pair for pair in PAIRS if pair.kind == "style"}
    alone = {pair.id: pair for pair in made("style", *reversed(SOURCES), seed=5)}
    assert {name: pair.rejected for name, pair in alone.items()} == {n: pair.rejected for n, pair in styled.items()}


def test_a_prompt_that_is_alone_on_its_side_makes_no_pair_with_another() -> None:
    for kind in ("irrelevant", "relevance"):
        assert not made(kind, SOURCES[0])
