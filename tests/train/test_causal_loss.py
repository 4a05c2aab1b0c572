"""Protects the mathematics of the causal loss: its value, its gradient, and what the policy is made to read."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from cepo.jacobian.records import Rollout
from cepo.train.causal_loss import CausalLoss, divergence, interchange, sensitivity
from cepo.train.prompts import JUDGE, REASONER
from cepo.train.readings import Reading, donor_pool, pack_readings, read_with_donors
from tests.models import InDouble, judge_rollout, tiny_model

LINK = CausalLoss().parsed_links(JUDGE)[0]


def test_all_objectives_equal_a_case_worked_out_by_hand() -> None:
    p, q = (0.5, 0.5, 0.0), (0.25, 0.25, 0.5)  # m is 3/8, 3/8, 2/8
    by_hand = 0.5 * math.log(4 / 3) + 0.5 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    own = torch.tensor([[p, (1.0, 1.0, 1.0)]], dtype=torch.float64).clamp(min=1e-300).log()
    donor = torch.tensor([[q, (1.0, 1.0, 1.0)]], dtype=torch.float64).log() + 7.0  # logits, not log-probabilities
    both, first = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    assert divergence(own, donor, first).item() == pytest.approx(by_hand, abs=1e-14)
    assert divergence(own, donor, both).item() == pytest.approx(by_hand / 2, abs=1e-14)  # equal at the second token
    assert divergence(own, donor, both) == divergence(donor, own, both)
    kl = 0.5 * math.log(2) + 0.5 * math.log(2)  # KL(p, q), its third term 0
    assert sensitivity(own, donor, first).item() == pytest.approx(kl, abs=1e-14)
    assert CausalLoss(objective="divergence").distance is divergence
    assert CausalLoss(objective="csr").distance is sensitivity
    assert sensitivity(own, donor, both).item() == pytest.approx(kl / 2, abs=1e-14)
    nll = interchange(donor, torch.tensor([[2, 0]]), both)
    assert nll.item() == pytest.approx((math.log(2) + math.log(3)) / 2, abs=1e-14)
    assert divergence(own, donor, ~both).item() == interchange(donor, torch.tensor([[2, 0]]), ~both).item() == 0.0


def test_divergence_is_bounded_by_log_two_with_finite_gradients_and_computes_in_float32() -> None:
    own = torch.tensor([[[80.0, -80.0]]], dtype=torch.bfloat16, requires_grad=True)
    value = divergence(own, -own.detach(), torch.tensor([[True]]))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(math.log(2), abs=1e-6)
    value.sum().backward()
    assert own.grad is not None
    assert own.grad.isfinite().all()


def rollouts() -> list[Rollout]:
    """Three prompts, two completions each."""
    return [judge_rollout(10 * prompt + number, prompt_seed=prompt) for prompt in range(3) for number in range(2)]


@pytest.mark.parametrize("objective", ["divergence", "csr", "interchange"])
def test_the_gradient_of_the_loss_is_that_of_finite_differences(objective: str) -> None:
    """A tiny model in float64; one random direction in the space of all weights that the head and the layers have."""
    settings = CausalLoss(objective=objective, donors=2)  # type: ignore[arg-type]
    own, *_ = rollouts()
    pool = donor_pool(rollouts(), LINK, settings, [True] * 6)
    packed = pack_readings([read_with_donors(own, LINK, pool, settings)], padding=0)
    ids, targets = packed["ids_BRT"][0], packed["targets_BRT"][0, :, 1:]
    assert packed["tokens_BRT"].all()  # equal lengths here: no padding
    model = tiny_model("qwen3")

    def loss() -> torch.Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        if objective == "interchange":
            return interchange(logits, ids[:, 1:], targets).mean()
        return settings.distance(logits[:1].expand_as(logits[1:]), logits[1:], targets[1:]).mean()

    generator = torch.Generator().manual_seed(1)
    weights = list(model.parameters())
    direction = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
    with InDouble():
        gradients = torch.autograd.grad(loss(), weights)
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        step, values = 1e-6, []
        with torch.no_grad():
            for sign in (1, -2):
                for weight, d in zip(weights, direction, strict=True):
                    weight.add_(d, alpha=sign * step)
                values.append(float(loss()))
    assert slope != 0.0
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_divergence_reads_donor_content_in_the_own_place_and_nothing_after_the_target() -> None:
    settings, (own, *_) = CausalLoss(donors=2, objective="divergence"), rollouts()
    pool = donor_pool(rollouts(), LINK, settings, [False] * 6)  # what was earned plays no part
    first, *others = read_with_donors(own, LINK, pool, settings)
    assert first == Reading(own.token_ids[:24], (20, 22, 23))
    assert len(others) == 2
    theirs = {r.token_ids[16:19] for r in rollouts()[2:]}
    for other in others:
        assert other.targets == first.targets
        assert other.ids[16:19] in theirs
        assert (other.ids[:16], other.ids[19:]) == (first.ids[:16], first.ids[19:])


def test_interchange_reads_a_donors_source_to_verdict_in_the_own_context_and_only_from_the_right() -> None:
    settings, donors = CausalLoss(objective="interchange"), rollouts()
    longer = judge_rollout(99, prompt_seed=7)
    spans = longer.spans
    shifted = {name: replace(s, positions=tuple(p + 2 for p in s.positions)) for name, s in spans.items()}
    shifted["analysis"] = replace(spans["analysis"], positions=(16, 17, 18, 19, 20), movable=(16, 17, 18, 19, 20))
    ids = longer.completion_ids
    longer = replace(longer, completion_ids=(*ids[:9], 5, 6, *ids[9:]), spans=shifted, numbers=())
    pool = donor_pool([*donors, longer], LINK, settings, [False] * 6 + [True])
    (reading,) = read_with_donors(donors[0], LINK, pool, settings)
    assert reading.ids == donors[0].token_ids[:16] + longer.token_ids[16:26]  # lengths need not agree
    assert reading.targets == (22, 24, 25)
    assert read_with_donors(longer, LINK, pool, settings) == []  # alone with its own prompt


def test_texts_that_are_longer_than_the_policy_takes_are_not_read() -> None:
    """The own criteria and a donor's analysis can be too long together, where each completion fits."""
    own = judge_rollout(1, prompt_seed=1)
    where = {"criteria": (10,), "analysis": (13, 14, 15, 16, 17, 18)}  # verdict as long after an analysis from 13 on
    settings, longer = CausalLoss(), judge_rollout(2, prompt_seed=2, positions=where)
    shorter = judge_rollout(3, prompt_seed=3)
    pool = donor_pool([longer, shorter], LINK, settings, [True] * 2)
    everything = replace(settings, donors=2)
    assert sorted(len(one.ids) for one in read_with_donors(own, LINK, pool, everything)) == [24, 27]
    for seed in range(8):  # whichever is drawn first
        (reading,) = read_with_donors(own, LINK, pool, replace(settings, seed=seed), most=26)
        assert len(reading.ids) == 24
    assert len(read_with_donors(own, LINK, pool, everything, most=27)) == 2
    compared = replace(settings, objective="divergence")
    pool = donor_pool([longer, shorter], LINK, compared, [True] * 2)
    assert len(read_with_donors(own, LINK, pool, compared, most=24)) == 2
    assert read_with_donors(own, LINK, pool, compared, most=23) == []


def test_donors_do_not_depend_on_order_and_a_malformed_completion_has_none() -> None:
    for objective in ("divergence", "csr", "interchange"):
        settings = CausalLoss(objective=objective, donors=1)  # type: ignore[arg-type]
        pool = donor_pool(rollouts(), LINK, settings, [True] * 6)
        backwards = donor_pool(rollouts()[::-1], LINK, settings, [True] * 6) * 2  # two ranks may send the same
        for rollout in rollouts():
            assert read_with_donors(rollout, LINK, pool, settings) == read_with_donors(
                rollout, LINK, backwards, settings
            )
        other = read_with_donors(rollouts()[0], LINK, pool, replace(settings, seed=3))
        assert other != read_with_donors(rollouts()[0], LINK, pool, settings)
        broken = replace(rollouts()[0], malformed="missing <scores>")
        assert read_with_donors(broken, LINK, pool, settings) == []
        assert donor_pool([broken], LINK, settings, [True]) == []


def test_targets_of_ragged_readings_end_in_the_last_column() -> None:
    packed = pack_readings([[Reading((3, 4, 5), (1, 2))], [Reading((6, 7), (1,))], [None]], padding=9)
    assert packed["ids_BRT"].tolist() == [[[3, 4, 5]], [[9, 6, 7]], [[9, 9, 9]]]
    assert packed["tokens_BRT"].long().tolist() == [[[1, 1, 1]], [[0, 1, 1]], [[0, 0, 0]]]
    assert packed["targets_BRT"].long().tolist() == [[[0, 1, 1]], [[0, 0, 1]], [[0, 0, 0]]]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"weight": -1.0}, "weight is -1.0"),
        ({"weight": "much"}, "weight is 'much'"),
        ({"donors": 0}, r"donors \(K\) is 0"),
        ({"objective": "magic"}, "objective is 'magic'"),
        ({"links": "X->Y"}, "expected a list"),
        ({"links": ["X->Q"]}, "unknown span 'Q'"),
        ({"links": ["Z->Y"]}, "whose source is the prompt"),
        ({"links": ["X->Y@log_odds"]}, "without an effect"),
        ({"links": ["X->Y", "criteria->scores"]}, "names one link twice"),
        ({"links": ["criteria->analysis"]}, "follow from the source alone"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        CausalLoss(**changes).parsed_links(JUDGE)


def test_the_default_link_is_the_layouts_last() -> None:
    assert [link.name for link in CausalLoss().parsed_links(JUDGE)] == ["analysis->scores"]
    assert [link.name for link in CausalLoss().parsed_links(REASONER)] == ["rationale->answer"]
