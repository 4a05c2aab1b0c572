"""Protects the ground truth: effects by hand, edits that touch the criteria alone, the model's own continuations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cepo.eval.causal.interventions import (
    INTERVENTIONS,
    InterventionInput,
    _edits,
    effect_between,
    intervene,
    removal,
    top_places,
    with_criteria,
)
from cepo.eval.causal.judge_model import Verdict, generate, read_verdicts, sample_criteria
from cepo.jacobian.records import Rollout
from cepo.jacobian.targets import sum_of_terms, target_terms
from cepo.train import testbed
from tests.eval.causal.judges import ITEMS, TOKENIZER, prompt_ids, read, rule_judge, tiny_judge


def intervention_input(rollout: Rollout, other: Rollout) -> InterventionInput:
    ids = tuple(other.token_ids[at] for at in other.spans["criteria"].positions)
    return InterventionInput(rollout, ids, (0.0, 0.0, 9.0, 0.0, 0.0, 0.0), (9.0, 0.0, 0.0, 0.0, 0.0, 0.0))


def test_effects_by_hand() -> None:
    """tv is half the sum of differences, the mean of both scores; margin is absolute; a tie is another winner."""
    before = Verdict(({1: 0.7, 2: 0.3}, {1: 1.0}), 2.0, "A", -1.0)
    after = Verdict(({1: 0.2, 2: 0.3, 3: 0.5}, {1: 1.0}), -1.5, None, -2.0)
    tv, margin, flip = effect_between(before, after)
    assert tv == pytest.approx((0.5 + 0.0) / 2)
    assert margin == 3.5
    assert flip == 1.0
    assert effect_between(before, before) == (0.0, 0.0, 0.0)
    far = Verdict(({4: 1.0}, {4: 1.0}), 0.0, "A", 0.0)
    assert effect_between(before, far)[0] == pytest.approx(1.0)


def test_new_criteria_leave_all_else_and_move_it_along() -> None:
    judge = tiny_judge()
    rollout = read(judge, ITEMS[0])
    longer = with_criteria(rollout, TOKENIZER("judge by depth of the answer and safety of the answer")["input_ids"])
    again = judge.reader.read(longer.prompt_ids, longer.completion_ids)
    for name in ("prompt", "criteria", "analysis", "scores"):
        assert longer.spans[name].positions == again.spans[name].positions
    assert longer.numbers == again.numbers
    assert again.spans["criteria"].text == "judge by depth of the answer and safety of the answer"
    assert again.spans["analysis"].text == rollout.spans["analysis"].text
    own = [rollout.token_ids[at] for at in rollout.spans["criteria"].positions]
    assert with_criteria(rollout, own).token_ids == rollout.token_ids


def test_a_verdict_is_the_models_own_whatever_stands_beside_it_in_the_batch() -> None:
    """Distributions, margin and log-likelihood against one rollout's own logits; winner from the likeliest digits."""
    judge = tiny_judge()
    rollouts = [read(judge, item) for item in ITEMS]
    together = read_verdicts(rollouts, judge)
    for rollout, verdict in zip(rollouts, together, strict=True):
        logits_TV = judge.model(input_ids=torch.tensor([rollout.token_ids])).logits[0].detach()
        best = []
        for number, digits in zip(rollout.numbers, verdict.digits, strict=True):
            ids = [token for token, _ in number[0].candidates]
            chances = torch.softmax(logits_TV[number[0].position - 1, ids], 0)
            assert [digits[token] for token in ids] == pytest.approx(chances.tolist(), abs=1e-9)
            best.append(number[0].candidates[int(chances.argmax())][1])
        assert verdict.winner == (None if best[0] == best[1] else "A" if best[0] > best[1] else "B")
        for target, value in (("margin", verdict.margin), ("log_likelihood", verdict.log_likelihood)):
            terms = target_terms(rollout, "scores", target)  # type: ignore[arg-type]
            own = sum_of_terms(logits_TV[[term.position - 1 for term in terms]], terms)
            assert value == pytest.approx(float(own), abs=1e-9)
    alone = [read_verdicts([rollout], replace(judge, tokens_at_once=1))[0] for rollout in rollouts]
    assert [one.margin for one in alone] == pytest.approx([one.margin for one in together], abs=1e-9)


def test_masked_criteria_have_no_say() -> None:
    judge = tiny_judge()
    rollout = read(judge, ITEMS[0])
    other = with_criteria(rollout, TOKENIZER("so well then here also just")["input_ids"])
    seen = read_verdicts([rollout, other], judge)
    hidden = read_verdicts([rollout, other], judge, masked=True)
    assert effect_between(*seen)[0] > 1e-3
    assert effect_between(*hidden)[:2] == (0.0, 0.0)


def test_greedy_text_is_the_likeliest_token_each_time() -> None:
    """Left padding, hidden positions and the rows beside it change nothing; the text ends at the stop or the limit."""
    judge = tiny_judge()
    contexts = [prompt_ids(item)[: 20 + 3 * number] for number, item in enumerate(ITEMS[:3])]
    hidden = [(4, 5), (), (7,)]
    options: dict[str, Any] = {"limits": [6, 6, 6], "stop": b"</nothing>", "temperature": 0.0, "seed": 0}
    found = generate(contexts, judge, **options, hidden=hidden)
    for context, closed, written in zip(contexts, hidden, found, strict=True):
        ids = list(context)
        for token in written:
            mask = torch.ones(1, len(ids), dtype=torch.long)
            mask[0, list(closed)] = 0
            logits = judge.model(input_ids=torch.tensor([ids]), attention_mask=mask).logits
            assert token == int(logits[0, -1].argmax())
            ids.append(token)
    assert generate(contexts, judge, **options) != found
    stop = judge.pieces.of(list(found[0]))[1]
    cut = generate(contexts[:1], judge, limits=[6], stop=stop, temperature=0.0, seed=0, hidden=hidden[:1])
    assert cut[0] == found[0][: len(cut[0])]
    assert stop in b"".join(judge.pieces.of(list(cut[0])))
    assert len(cut[0]) <= 2


def test_sampling_depends_on_its_seed_alone() -> None:
    judge = tiny_judge()
    options: dict[str, Any] = {"limits": [8] * 4, "stop": b"!", "temperature": 1.0}
    state = torch.random.get_rng_state()
    first = generate([prompt_ids(ITEMS[0])] * 4, judge, **options, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == generate([prompt_ids(ITEMS[0])] * 4, judge, **options, seed=1)
    assert first != generate([prompt_ids(ITEMS[0])] * 4, judge, **options, seed=2)
    assert len(set(first)) > 1


def test_sampled_criteria_are_what_stands_before_the_closing_tag() -> None:
    """White space and the tag are cut; criteria that are empty or never closed are None."""
    judge = rule_judge(follows=True)
    judge.model.own = ["judge by depth of the answer", "", "\n"]
    rollout = read(judge, ITEMS[0])
    (found,) = sample_criteria([rollout], judge, count=3, seed=0)
    assert found == [tuple(TOKENIZER("judge by depth of the answer")["input_ids"]), None, None]
    (unclosed,) = sample_criteria([read(tiny_judge(), ITEMS[0])], tiny_judge(), count=2, seed=0)
    assert unclosed == [None, None]


@pytest.mark.parametrize("follows", [True, False])
def test_effects_follow_the_judges_rule(follows: bool) -> None:
    """A judge by rule: the swapped and the resampled criteria decide where it follows them, and nothing does if not."""
    judge = rule_judge(follows)
    rollouts = []
    for item in ITEMS:
        scores = {"A": (8, 2), "B": (2, 8)}[item.label]
        rollouts.append(read(judge, replace(item, scores=scores, analysis="A shows more and B shows less")))
    inputs = [intervention_input(rollout, rollouts[number - 1]) for number, rollout in enumerate(rollouts)]
    found = intervene(inputs, judge, resamples=len(testbed.ASPECTS), seed=0)
    for number, (item, effects) in enumerate(zip(ITEMS, found, strict=True)):
        assert tuple(effects) == INTERVENTIONS
        total = {name: modes["total"] for name, modes in effects.items()}
        swap, resample, mask, truncate = (total[name] for name in ("swap", "resample", "mask", "truncate"))
        assert swap is not None
        assert resample is not None
        assert mask is not None
        assert truncate is not None
        if not follows:
            assert all(effect is None or effect.tv < 1e-6 for effect in total.values())
            continue
        turned = testbed.winner_under(item, ITEMS[number - 1].aspect) != item.label
        assert swap.flip == float(turned)
        assert swap.tv == pytest.approx(float(turned), abs=1e-6)
        others = [testbed.winner_under(item, aspect) != item.label for aspect in testbed.ASPECTS]
        assert resample.flip == pytest.approx(sum(others) / len(others))
        assert resample.draws == len(testbed.ASPECTS)
        assert (mask.flip, mask.draws, mask.malformed) == (0.0, 1, 0)
        assert truncate.flip == 0.0  # the aspect stands in the first half


def test_broken_continuations_are_counted_and_left_out() -> None:
    """A model of random weights never comes to two scores: no total effect, the direct one is there."""
    judge = tiny_judge()
    rollouts = [read(judge, item) for item in ITEMS[:2]]
    found = intervene([intervention_input(rollouts[0], rollouts[1])], judge, resamples=2, seed=0)
    assert found[0]["swap"]["total"] is None
    assert found[0]["swap"]["direct"] is not None
    assert found[0]["resample"]["direct"] is None


def test_edits_by_hand() -> None:
    """Truncation keeps the first half of the lines; deletions take a fifth, at least one; lengths as they say."""
    judge = tiny_judge()
    lines = [f"judge by {aspect} of the answer" for aspect in ("depth", "safety", "style")]
    item = replace(ITEMS[0], criteria="\n".join(lines))
    rollout = read(judge, item)
    ranking = tuple(float(place) for place in range(len(rollout.spans["criteria"].positions)))
    other = tuple(TOKENIZER(lines[0])["input_ids"])
    filler = TOKENIZER(" so well")["input_ids"]
    edits = _edits(
        InterventionInput(rollout, other, ranking, ranking[::-1]), judge.pieces, filler, 3, np.random.default_rng(0), 0
    )
    texts = {name: [TOKENIZER.decode(ids) for ids in found] for name, found in edits.items()}
    assert texts["swap"] == [lines[0]]
    assert texts["truncate"] == ["\n".join(lines[:2])]
    assert texts["filler"] == [" so well" * 10]
    assert len(texts["shuffle"]) == len(texts["delete random"]) == 3
    whole = [rollout.token_ids[at] for at in rollout.spans["criteria"].positions]
    assert all(sorted(ids) == sorted(whole) and list(ids) != whole for ids in edits["shuffle"])
    assert edits["delete top gradient"] == [tuple(whole[:-4])]
    assert edits["delete top attention"] == [tuple(whole[4:])]
    single = _edits(
        InterventionInput(read(judge, ITEMS[0]), (), (1.0,) * 6, (1.0,) * 6),
        judge.pieces,
        filler,
        1,
        np.random.default_rng(0),
        0,
    )
    assert TOKENIZER.decode(single["truncate"][0]) == f"judge by {ITEMS[0].aspect}"
    assert single["swap"] == []


def test_deletions_take_the_top_tokens() -> None:
    assert top_places((0.1, 0.9, 0.5, 0.9), 0.5) == {1, 3}
    assert top_places((0.1, 0.9, 0.5, 0.9), 0.1) == {1}
    assert top_places((1.0, 1.0, 1.0), 0.5) == {0, 1}


def test_comprehensiveness_and_sufficiency_by_hand() -> None:
    """One token out, and that token alone: the change of the scores' log-likelihood, all else as sampled."""
    judge = tiny_judge()
    rollout = read(judge, ITEMS[0])
    ids = [rollout.token_ids[at] for at in rollout.spans["criteria"].positions]
    ((without, alone),) = removal([rollout], [(0.0, 0.0, 1.0, 0.0, 0.0, 0.0)], 0.1, judge)
    full, rest, top = (
        verdict.log_likelihood
        for one in (rollout, with_criteria(rollout, ids[:2] + ids[3:]), with_criteria(rollout, ids[2:3]))
        for verdict in read_verdicts([one], judge)
    )
    assert without == pytest.approx(full - rest, abs=1e-9)
    assert alone == pytest.approx(full - top, abs=1e-9)
    ((nothing, all_of_it),) = removal([rollout], [tuple(range(6))], 1.0, judge)
    assert all_of_it == pytest.approx(0.0, abs=1e-9)
    assert abs(nothing) > 1e-6


def test_a_number_of_resamples_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="resamples is 0; expected at least 1"):
        intervene([], tiny_judge(), resamples=0, seed=0)
