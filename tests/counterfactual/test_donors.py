"""Donors: content of other prompts, fitted to the span, drawn by seed, content and the set of candidates alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cepo.counterfactual.donors import Candidate, candidates, drawn, replace_span, with_donors
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Digit, Rollout
from cepo.train.prompts import JUDGE
from cepo.train.testbed import build_tokenizer, generate_items
from tests.models import judge_rollout


def ids_of(rollout: Rollout, source: str) -> tuple[int, ...]:
    return tuple(rollout.token_ids[at] for at in rollout.spans[source].movable)


ROLLOUTS = [judge_rollout(seed, prompt_seed=100 + seed % 4) for seed in range(12)]


def test_donors_are_other_prompts_contents_and_nothing_else_moves() -> None:
    pool = candidates(ROLLOUTS, "criteria")
    own = ROLLOUTS[0]
    others = {ids_of(each, "criteria") for each in ROLLOUTS if each.prompt_ids != own.prompt_ids}
    others_in = with_donors(own, "criteria", pool, 3, seed=0)
    assert len(others_in) == 3
    assert len({ids_of(each, "criteria") for each in others_in}) == 3
    for each in others_in:
        assert ids_of(each, "criteria") in others
        moved = [at for at, (a, b) in enumerate(zip(own.token_ids, each.token_ids, strict=True)) if a != b]
        assert set(moved) <= set(own.spans["criteria"].movable)
        assert each.spans == own.spans
        assert each.prompt_ids == own.prompt_ids


def test_the_draw_depends_on_the_set_of_candidates_alone() -> None:
    pool = candidates(ROLLOUTS, "criteria")
    wanted = with_donors(ROLLOUTS[3], "criteria", pool, 2, seed=5)
    shuffled = pool + pool[:5]
    random.Random(0).shuffle(shuffled)
    assert with_donors(ROLLOUTS[3], "criteria", shuffled, 2, seed=5) == wanted
    assert with_donors(ROLLOUTS[3], "criteria", candidates(reversed(ROLLOUTS), "criteria"), 2, seed=5) == wanted
    assert any(with_donors(ROLLOUTS[3], "criteria", pool, 2, seed=seed) != wanted for seed in range(6, 10))


def test_donors_are_tiled_and_cropped() -> None:
    own = ROLLOUTS[0]  # four tokens of criteria
    fitted = with_donors(own, "criteria", [Candidate("x", (7, 8, 9)), Candidate("y", (5, 6, 5, 6, 5, 6))], 5, seed=0)
    assert {ids_of(each, "criteria") for each in fitted} == {(7, 8, 9, 7), (5, 6, 5, 6)}


def test_donors_that_led_to_another_verdict_come_alone() -> None:
    """What led to the same verdict cannot tell its cause: such donors serve only where there are no others."""
    own = ROLLOUTS[0]
    same = [Candidate("x", (7, 8, 9, 6), own.verdict), Candidate("y", (5, 6, 5, 6), own.verdict)]
    other = [Candidate("x", (9, 9, 8, 8), "other"), Candidate("z", (7, 8, 9, 6), "other")]
    for pool, kind, wanted in ((same, "same verdict", same), ([*same, *other], "donors", other)):  # one led to both
        told, chosen = drawn(own, "criteria", pool, 3, seed=0)
        assert told == kind
        assert {ids_of(each, "criteria") for each in chosen} == {each.ids for each in wanted}


def test_a_tie_is_a_third_verdict() -> None:
    """Donors of a tie led to a winner, either one, and a tie is a donor of both; else ties would score 0 by chance."""
    won, places = ROLLOUTS[0], ROLLOUTS[0].spans["scores"].positions[:2]
    tie = replace(won, numbers=tuple((Digit(at, ((won.token_ids[at], 7.0),)),) for at in places))
    contents = {">": (7, 8, 9, 6), "<": (5, 6, 5, 7), "=": (9, 9, 8, 8)}
    pool = [Candidate("x", ids, verdict) for verdict, ids in contents.items()]
    for own, verdict in ((won, won.verdict), (tie, "=")):
        chosen = with_donors(own, "criteria", pool, 3, seed=0)
        assert {ids_of(each, "criteria") for each in chosen} == {*contents.values()} - {contents[verdict]}


def test_a_verdict_is_which_score_is_greater() -> None:
    """Not how the scores are written: 8, 3 and 9, 5 conclude alike."""
    own = ROLLOUTS[0]
    places = own.spans["scores"].positions[:2]
    for a, b, verdict in ((8.0, 3.0, ">"), (9.0, 5.0, ">"), (3.0, 8.0, "<"), (7.5, 7.5, "=")):
        numbers = tuple((Digit(at, ((own.token_ids[at], value),)),) for at, value in zip(places, (a, b), strict=True))
        assert replace(own, numbers=numbers).verdict == verdict
    ten = (
        Digit(places[0], ((own.token_ids[places[0]], 1.0),)),
        Digit(places[1], ((own.token_ids[places[1]], 9.0),)),
    )
    assert replace(own, numbers=(ten, ten[1:])).verdict == ">"  # 10 against 9


def test_an_answer_written_otherwise_is_no_other_verdict() -> None:
    """A donor of the same answer, "Yes." for "yes", cannot tell its cause, and S was near 0 as if nothing had been."""
    scores = ROLLOUTS[0].spans["scores"]

    def verdict(answer: str) -> str:
        return replace(ROLLOUTS[0], numbers=(), spans={"scores": replace(scores, text=answer)}).verdict

    for first, second in (("Yes.", "yes"), ("18", "$18"), ("1,800", "1800"), ("(B)", "b")):
        assert verdict(first) == verdict(second)
    for first, second in (("18", "19"), (".5", "5"), ("?", '"')):
        assert verdict(first) != verdict(second)


def test_the_same_words_and_the_own_prompt_are_no_donors() -> None:
    own = ROLLOUTS[0]
    same = [Candidate("elsewhere", ids_of(own, "criteria"))]
    assert drawn(own, "criteria", same, 2, seed=0) == ("same", ())
    alone = candidates([each for each in ROLLOUTS if each.prompt_ids == own.prompt_ids], "criteria")
    assert drawn(own, "criteria", alone, 2, seed=0) == ("nothing", ())


def test_the_same_pair_in_the_other_order_is_no_donor() -> None:
    """Judges are asked in both orders: a criterion of the same pair would hide what the own one caused."""
    tokenizer = build_tokenizer()
    item = generate_items(1, seed=0, cue_agreement=0.5)[0]
    query, first, second = item.prompt.split("\n")
    exchanged = [query, second.replace("Response B", "Response A"), first.replace("Response A", "Response B")]
    messages = [[{"role": "user", "content": text}] for text in (item.prompt, "\n".join(exchanged))]
    texts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in messages]
    prompts, completion = tokenizer(texts)["input_ids"], tokenizer(item.completion)["input_ids"]
    reader = SpanReader(tokenizer, JUDGE)
    own, other = (reader.read(prompt, completion, message) for prompt, message in zip(prompts, messages, strict=True))
    assert own.prompt_ids != other.prompt_ids
    assert own.malformed is other.malformed is None
    assert drawn(own, "criteria", candidates([own, other], "criteria"), 2, seed=0) == ("nothing", ())


def test_a_large_pool_is_thinned_by_content() -> None:
    many = [judge_rollout(seed, prompt_seed=seed) for seed in range(40)]
    few = candidates(many, "analysis", most=10)
    assert len(few) == 10
    assert few == candidates(many[::-1], "analysis", most=10)
    assert set(few) <= set(candidates(many, "analysis"))


def test_malformed_rollouts_give_nothing() -> None:
    assert candidates([Rollout((1,), (2,), malformed="missing <analysis>")], "criteria") == []


def test_replace_span_wants_one_token_for_each() -> None:
    with pytest.raises(ValueError, match="shorter|argument"):
        replace_span(ROLLOUTS[0], "criteria", (1, 2))
