"""Protects the evidence: definitions are `score_rollouts`' own numbers, baselines by hand, controls that must be 0."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from cepo.counterfactual.nuisance import angles_between, nuisance_bases
from cepo.counterfactual.permute import permute_rollout
from cepo.eval.causal.controls import (
    FOLLOWS,
    IGNORES,
    captum_difference,
    certificate,
    criteria_hidden,
    faithfulness,
    masked_scores,
    randomisation,
    sample_judgements,
)
from cepo.eval.causal.evidence import (
    ANALYSIS_DEFINITION,
    BASELINES,
    CHAINS,
    DEFAULT_LINK,
    HARDENED,
    LINKS,
    PAPER_DEFINITION,
    SWEPT,
    Evidence,
    attention_to_criteria,
    definition,
    gather_evidence,
    nuisance_angles,
    random_angle,
)
from cepo.eval.causal.interventions import removal
from cepo.fusion.config import RewardConfig
from cepo.fusion.records import named_scores
from cepo.fusion.score import score_rollouts
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.links import parse_link
from cepo.jacobian.protocol import Answer, Request
from cepo.jacobian.records import Group
from tests.eval.causal.judges import ITEMS, read, tiny_judge

JUDGE_MODEL = tiny_judge()
ENGINE = JacobianEngine(JUDGE_MODEL.model)
ROLLOUTS = [read(JUDGE_MODEL, item) for item in ITEMS[:2]]


@pytest.fixture(scope="module")
def evidence() -> list[Evidence]:
    return gather_evidence(ROLLOUTS, JUDGE_MODEL, ENGINE, seed=5)


@pytest.mark.parametrize(("count", "rank"), [(0, 0), HARDENED, (1, 1), (8, 4), (2, 8)])
def test_definitions_are_the_numbers_of_score_rollouts(evidence: list[Evidence], count: int, rank: int) -> None:
    """Each Jacobian is computed once and shared by all settings; each number is that setting's, run alone."""
    links = LINKS if (count, rank) in ((0, 0), HARDENED) else (DEFAULT_LINK,)
    config = RewardConfig(links=dict.fromkeys(links, 1.0), counterfactuals=count, rank=rank, seed=5, also=("phi",))
    scored = score_rollouts(ROLLOUTS, ENGINE, config, JUDGE_MODEL.layout)
    for one, rollout in zip(evidence, scored, strict=True):
        for link, record in rollout.links.items():
            named = named_scores(record.phi, record.retained, record.influence)
            for score, value in named.items():
                if (count or "retained" not in score) and (not count or score != "influence"):
                    found = one.values[definition(score, link, count, rank)]
                    assert found == pytest.approx(value, rel=1e-7, abs=1e-12)
            norm = record.norm * math.sqrt(record.retained)
            assert one.values[definition("norm", link, count, rank)] == pytest.approx(norm, rel=1e-6)


def test_the_sweep_and_the_defaults_are_there(evidence: list[Evidence]) -> None:
    values = evidence[0].values
    config = RewardConfig.paper(links={"X->Y": 1.0})
    assert definition(config.score, DEFAULT_LINK, config.counterfactuals, config.rank or 0) == PAPER_DEFINITION
    assert {PAPER_DEFINITION, ANALYSIS_DEFINITION, *BASELINES} <= set(values)
    assert all(definition("phi", DEFAULT_LINK, count, rank) in values for count in (0, *SWEPT) for rank in (0, *SWEPT))
    assert all(math.isfinite(value) for value in values.values())


def test_a_chain_is_the_product_of_shares_and_the_mean_of_shapes(evidence: list[Evidence]) -> None:
    for one in evidence:
        for chain, (first, second) in CHAINS.items():
            influences = one.values[f"influence {first}"], one.values[f"influence {second}"]
            assert one.values[f"influence {chain}"] == pytest.approx(influences[0] * influences[1])
            phis = one.values[f"phi {first} K=4 r=2"], one.values[f"phi {second} K=4 r=2"]
            assert one.values[f"phi {chain} K=4 r=2"] == pytest.approx(math.sqrt(phis[0] * phis[1]))


def test_attention_is_the_mean_over_heads_layers_and_score_positions(evidence: list[Evidence]) -> None:
    rollout = ROLLOUTS[0]
    criteria, scores = rollout.spans["criteria"].positions, rollout.spans["scores"].positions
    assert JUDGE_MODEL.model.config._attn_implementation == "sdpa"
    JUDGE_MODEL.model.set_attn_implementation("eager")
    try:
        layers = JUDGE_MODEL.model(torch.tensor([rollout.token_ids]), output_attentions=True).attentions
    finally:
        JUDGE_MODEL.model.set_attn_implementation("sdpa")
    for place, at in enumerate(criteria):
        paid = [float(layer[0, head, row - 1, at].detach()) for layer in layers for head in range(4) for row in scores]
        assert evidence[0].attention[place] == pytest.approx(sum(paid) / len(paid), rel=1e-6)
    assert attention_to_criteria(rollout, JUDGE_MODEL) == pytest.approx(evidence[0].attention)
    assert 0.0 < sum(evidence[0].attention) < 1.0
    assert evidence[0].values["attention mass"] == pytest.approx(sum(evidence[0].attention))


def test_the_other_baselines_by_hand(evidence: list[Evidence]) -> None:
    rollout, values = ROLLOUTS[0], evidence[0].values
    assert values["span length"] == len(ROLLOUTS[0].spans["criteria"].text.split())
    between = rollout.token_ids[rollout.spans["criteria"].positions[-1] : rollout.spans["scores"].positions[0]]
    assert values["distance to the scores"] == len(between)
    assert 0.0 <= values["embedding similarity"] <= 1.0


def test_non_finite_gradients_are_told_and_cost_no_other_rollout() -> None:

    class Broken(JacobianEngine):
        def compute(self, requests: Sequence[Request]) -> Iterator[Answer]:
            for request, answer in zip(requests, super().compute(requests), strict=True):
                for rollout, jacobians in zip(request.group.rollouts, answer, strict=True):
                    if rollout.token_ids == ROLLOUTS[0].token_ids:
                        next(iter(jacobians.values())).jac_SD[0, 0] = math.nan
                yield answer

    broken, kept = gather_evidence(ROLLOUTS, JUDGE_MODEL, Broken(JUDGE_MODEL.model), seed=0)
    assert broken.problem is not None
    assert "non-finite gradient" in broken.problem
    assert kept.problem is None


def test_angles_are_the_ones_of_each_rollouts_own_subspaces() -> None:
    options = {"permutation": "uniform", "counterfactuals": 3, "ranks": (1, 2), "seed": 1}
    found = nuisance_angles(ROLLOUTS, ("X->Y", "Z->X"), JUDGE_MODEL, ENGINE, **options)  # type: ignore[arg-type]
    layout = JUDGE_MODEL.layout
    assert len(found) == 2 * 2 * 2
    for record in found:
        rollout, name = ROLLOUTS[record["row"]], record["link"]
        link = parse_link(name, names=layout.names, roles=layout.roles)
        permuted = [permute_rollout(rollout, link.source, k, seed=1) for k in range(3)]
        base_SD, *others = [
            ENGINE.jacobians(Group((one,)), [link])[0][name].jac_SD for one in (rollout, *permuted) if one is not None
        ]
        basis_RD, own_RD = nuisance_bases([others, [base_SD]], rank=record["rank"])
        own = angles_between(basis_RD, own_RD)
        assert record["angle"] == pytest.approx(sum(own) / len(own), abs=1e-5)


def test_six_tokens_are_one_block_and_have_no_block_permutation() -> None:
    options = {"permutation": "block", "counterfactuals": 2, "ranks": (1,), "seed": 1}
    found = nuisance_angles(ROLLOUTS, ("X->Y", "Z->X"), JUDGE_MODEL, ENGINE, **options)  # type: ignore[arg-type]
    assert {record["link"] for record in found} == {"Z->X"}


def test_random_subspaces_are_nearly_orthogonal_in_many_dimensions() -> None:
    """In the plane two random lines are 45 degrees apart on average; the whole space is 0 from itself."""
    assert random_angle(1, 2, draws=4000) == pytest.approx(45.0, abs=1.5)
    assert random_angle(3, 3) == pytest.approx(0.0, abs=1e-4)
    assert random_angle(1, 4096, draws=50) > 88.0


def test_masked_criteria_have_exactly_no_influence() -> None:
    """Exactly 0, not nearly; and the mask is gone afterwards."""
    found = masked_scores(ROLLOUTS, JUDGE_MODEL)
    assert len(found) == 6
    assert set(found.values()) == {0.0}
    link = parse_link("X->Y", names=JUDGE_MODEL.layout.names, roles=JUDGE_MODEL.layout.roles)
    (answer,) = ENGINE.jacobians(Group((ROLLOUTS[0],)), [link])
    assert float(answer["X->Y"].jac_SD.abs().max()) > 1e-6
    positions = ROLLOUTS[0].spans["criteria"].positions[:-1]
    with criteria_hidden(JUDGE_MODEL.model, positions):  # one criteria token is still seen
        (answer,) = ENGINE.jacobians(Group((ROLLOUTS[0],)), [link])
    assert answer["X->Y"].jac_SD[:-1].abs().max() == 0.0
    assert answer["X->Y"].jac_SD[-1].abs().max() > 0.0


def test_pairs_are_certified_by_interventions_alone() -> None:
    follows, ignores = {"follows_swap": FOLLOWS, "flips": 0.9}, {"follows_swap": 0.0, "flips": IGNORES}
    assert certificate(follows, ignores) is None
    assert "follows 0.89" in str(certificate({**follows, "follows_swap": 0.89}, ignores))
    assert "flip 0.11" in str(certificate(follows, {**ignores, "flips": 0.11}))


def test_redrawn_parameters_start_as_they_were_and_leave_the_judge_alone() -> None:
    before = {name: weight.clone() for name, weight in JUDGE_MODEL.model.named_parameters()}
    steps = randomisation(ROLLOUTS, JUDGE_MODEL, seed=0)
    assert [step["redrawn"] for step in steps] == [
        "nothing",
        "top 1 of 2 layers",
        "top 2 of 2 layers",
        "and the embeddings",
    ]
    for by_draw in steps[0]["saliency"].values():
        assert np.array(by_draw) == pytest.approx(1.0)
    assert all(np.array(by_draw).min() < 0.999 for by_draw in steps[-1]["saliency"].values())
    first, second = (step["influence"] for step in steps[:2])
    assert first[0] == first[1]  # nothing is redrawn yet
    assert second[0] != first[0]
    assert second[0] != second[1]  # every draw is another model
    for name, weight in JUDGE_MODEL.model.named_parameters():
        assert torch.equal(before[name], weight)
    again = randomisation(ROLLOUTS, JUDGE_MODEL, seed=0)
    assert again[-1]["influence"] == steps[-1]["influence"]


@pytest.mark.skipif(importlib.util.find_spec("captum") is None, reason="captum, an optional extra, is not installed")
def test_captum_finds_the_same_gradient() -> None:
    difference = captum_difference(ROLLOUTS, JUDGE_MODEL)
    assert difference is not None
    assert difference < 1e-6


def test_faithfulness_compares_the_gradient_with_a_random_ranking() -> None:
    saliency = [(0.0, 0.0, 5.0, 0.0, 0.0, 1.0), (3.0, 0.0, 0.0, 0.0, 0.0, 1.0)]
    records = faithfulness(ROLLOUTS, saliency, JUDGE_MODEL, seed=0)
    assert len(records) == 3 * 2 * 2
    own = removal(ROLLOUTS, saliency, 0.5, JUDGE_MODEL)
    found = [one for one in records if one["share"] == 0.5 and one["ranking"] == "gradient"]
    assert [(one["comprehensiveness"], one["sufficiency"]) for one in found] == own


def test_judgements_are_sampled_from_the_prompts_own_tokens() -> None:
    found = sample_judgements(JUDGE_MODEL, ITEMS[:2], seed=0)
    assert [rollout.prompt_ids for rollout in found] == [rollout.prompt_ids for rollout in ROLLOUTS]
    assert all(rollout.malformed is not None for rollout in found)
    assert np.all([len(rollout.completion_ids) <= 64 for rollout in found])
