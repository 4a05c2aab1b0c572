"""Protects what is measured of a judgement: values against their definitions, and controls that must come out."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace

import pytest
import torch

from cepo.counterfactual.donors import with_donors
from cepo.eval.causal import controls
from cepo.eval.causal.controls import (
    FOLLOWS,
    IGNORES,
    captum_difference,
    certificate,
    criteria_hidden,
    masked_scores,
    randomisation,
)
from cepo.eval.causal.cost import relative_costs
from cepo.eval.causal.judge import sample_judgements
from cepo.eval.causal.measures import CHAIN, DONORS, ESTIMATES, FRESH_DONORS, Measured, links_of, measure
from cepo.fusion.score import pools_of
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.protocol import PathRequest
from cepo.jacobian.records import Group
from cepo.train.rewards.peers import LogCausalImportance
from tests.eval.causal.judges import ITEMS, TOKENIZER, judgements, read, tiny_judge

JUDGE = tiny_judge()
POOL = judgements(JUDGE)
POOLS = pools_of(POOL, links_of(JUDGE))
ROLLOUTS = POOL[:2]


@pytest.fixture(scope="module")
def measured() -> list[Measured]:
    return measure([*ROLLOUTS, read(JUDGE, ITEMS[0], "no tags")], JUDGE, POOLS, seed=5)


def test_effects_are_the_oracles_with_the_scores_donors(measured: list[Measured]) -> None:
    """The effect, S of it, and S of the chain by their definitions; the exact effect has donors of its own."""
    (rollout, *_), (one, *_) = ROLLOUTS, measured
    deltas = {}
    for link in links_of(JUDGE):
        others = with_donors(rollout, link.source, POOLS[link.source], DONORS, seed=5)
        request = PathRequest(Group((rollout,)), (others,), (link,))
        ((answer,),) = JacobianEngine(JUDGE.model).paths([request])
        deltas[link.name] = answer[link.name].delta
        assert one.nats["effect"][link.name] == pytest.approx(deltas[link.name], abs=1e-9)
    values = one.values["effect"]
    assert values == pytest.approx(
        {
            **{name: max(0.0, math.tanh(delta / 2)) for name, delta in deltas.items()},
            "chain": max(0.0, math.tanh(min(deltas[name] for name in CHAIN) / 2)),
        },
        abs=1e-9,
    )
    for link in links_of(JUDGE):
        others = with_donors(rollout, link.source, POOLS[link.source], FRESH_DONORS, seed=5)  # all of a small pool
        ((answer,),) = JacobianEngine(JUDGE.model).paths([PathRequest(Group((rollout,)), (others,), (link,))])
        assert one.exact[link.name] == pytest.approx(answer[link.name].delta, abs=1e-9)
    assert one.exact["chain"] == min(one.exact[name] or 0.0 for name in CHAIN)


def test_approximations_are_of_the_same_donors(measured: list[Measured]) -> None:
    """Paths and their attributions are the oracle's, the expansion's first term the gradient at the rollout."""
    one = measured[0]
    assert set(one.nats) == set(ESTIMATES)
    for link in links_of(JUDGE):
        others = with_donors(ROLLOUTS[0], link.source, POOLS[link.source], DONORS, seed=5)
        request = PathRequest(Group((ROLLOUTS[0],)), (others,), (link,), nodes=16)
        ((path,),) = JacobianEngine(JUDGE.model).paths([request])
        assert one.nats["path 16"][link.name] == pytest.approx(path[link.name].path_sum, abs=1e-9)
        assert sum(one.attributions[link.name]) == pytest.approx(one.nats["path 16"][link.name], abs=1e-9)
        (answer,) = JacobianEngine(JUDGE.model).jacobians(Group((ROLLOUTS[0],)), [link])
        places = list(ROLLOUTS[0].spans[link.source].positions)
        embed = JUDGE.model.get_input_embeddings().weight.detach()
        ids = [torch.tensor([each.token_ids[at] for at in places]) for each in (ROLLOUTS[0], *others)]
        steps = [embed[ids[0]] - embed[other] for other in ids[1:]]
        first = sum(float((answer[link.name].jac_SD * step).sum()) for step in steps) / len(steps)
        assert one.nats["gradient"][link.name] == pytest.approx(first, abs=1e-6)  # norms are in float32
    assert one.values["gradient"]["chain"] == min(one.values["gradient"][name] for name in CHAIN)


def test_published_rewards_read_what_the_place_names(measured: list[Measured]) -> None:
    reward = LogCausalImportance(source=["criteria", "analysis"], layout=JUDGE.layout)
    (expected,) = reward.values(JUDGE.held, reward.variants([ROLLOUTS[1]]))
    assert measured[1].values["log_cir"]["both->scores"] == expected
    assert set(measured[1].values["embedding similarity"]) == {"both->scores"}


def test_what_cannot_be_measured_has_a_reason(measured: list[Measured]) -> None:
    assert [one.problem for one in measured[:2]] == [None, None]
    assert measured[2].problem
    assert measured[2].values == {}


def test_a_large_model_can_be_asked_for_estimates_alone(measured: list[Measured]) -> None:
    (few,) = measure(ROLLOUTS[:1], JUDGE, POOLS, seed=5, most_nodes=2, estimates_only=True)
    assert set(few.values) == {"effect", "explained", "gradient", "second order", "path 1", "path 2"}
    for name, nats in few.nats.items():
        assert nats == pytest.approx(measured[0].nats[name], abs=1e-12)
    assert few.exact == pytest.approx(measured[0].exact, abs=1e-12)
    assert {name: sum(found) for name, found in few.attributions.items()} == pytest.approx(few.nats["path 2"])


def test_costs_count_rows() -> None:
    """A path costs more with every node, the gradient at the rollout less than the effect of three donors."""
    three = {source: [replace(one, verdict="?") for one in pool] for source, pool in POOLS.items()}
    costs = relative_costs(ROLLOUTS, JUDGE, three, seed=5)
    assert costs["effect"] == 1.0
    assert costs["gradient"] < costs["second order"] < costs["path 1"] < costs["path 2"] < costs["path 16"]
    nodes = (costs["path 16"] - costs["path 8"]) / 8
    assert costs["path 2"] - costs["path 1"] == pytest.approx(nodes)


def test_masked_criteria_have_exactly_no_influence_and_no_effect() -> None:
    """Exactly 0, not nearly; and the mask is gone afterwards."""
    found = masked_scores(ROLLOUTS, JUDGE, POOLS)
    assert len(found) == 6
    assert set(found.values()) == {0.0}
    link = links_of(JUDGE)[2]
    (answer,) = JUDGE.engine.jacobians(Group((ROLLOUTS[0],)), [link])
    assert float(answer[link.name].jac_SD.abs().max()) > 1e-6
    with criteria_hidden(JUDGE.model, ROLLOUTS[0].spans["criteria"].positions[:-1]):  # one token is still seen
        (answer,) = JacobianEngine(JUDGE.model).jacobians(Group((ROLLOUTS[0],)), [link])
    assert answer[link.name].jac_SD[:-1].abs().max() == 0.0
    assert answer[link.name].jac_SD[-1].abs().max() > 0.0


def test_the_pair_is_certified_by_interventions_alone() -> None:
    follows, ignores = {"follows_swap": FOLLOWS, "flips": 0.9}, {"follows_swap": 0.0, "flips": IGNORES}
    assert certificate(follows, ignores) is None
    assert "follows 0.89" in str(certificate({**follows, "follows_swap": 0.89}, ignores))
    assert "flip 0.11" in str(certificate(follows, {**ignores, "flips": 0.11}))


def test_redrawn_parameters_leave_the_judge_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "_REDRAWN", 1)
    before = {name: weight.clone() for name, weight in JUDGE.model.named_parameters()}
    steps = randomisation(POOL[:3], JUDGE, POOLS, seed=0)
    assert [step["redrawn"] for step in steps] == ["top 1 of 2 layers", "top 2 of 2 layers", "and the embeddings"]
    assert all(-1.0 <= step["effect"] <= 1.0 for step in steps)
    assert all(torch.equal(before[name], weight) for name, weight in JUDGE.model.named_parameters())


@pytest.mark.skipif(importlib.util.find_spec("captum") is None, reason="captum is of an extra: make test-bench")
def test_captum_finds_the_same_gradient() -> None:
    difference = captum_difference(ROLLOUTS, JUDGE)
    assert difference is not None
    assert difference < 1e-6


def test_judgements_are_sampled_from_the_prompts_own_tokens() -> None:
    """Some of each item, item by item; what random weights write has no verdict, and no known mode."""
    found = sample_judgements(JUDGE, ITEMS[:2], completions=2, seed=0)
    assert [one.rollout.prompt_ids for one in found] == [ROLLOUTS[place].prompt_ids for place in (0, 0, 1, 1)]
    assert {one.mode for one in found} == {"other"}
    assert all(one.rollout.completion_ids[-1] == TOKENIZER.eos_token_id for one in found)
