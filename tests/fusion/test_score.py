"""Scores and fusion on a tiny random model, against plain numpy on the matrices that were kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from cepo.counterfactual.nuisance import nuisance_bases
from cepo.counterfactual.permute import permutations
from cepo.fusion.config import RewardConfig
from cepo.fusion.power_mean import power_mean
from cepo.fusion.records import HardenedLink, Measured, score_links
from cepo.fusion.score import RolloutScore, fuse, harden, score_rollouts
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.links import Link
from cepo.jacobian.protocol import Answer, Request
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.records import Group, LinkJacobian, Rollout
from cepo.kernels.spectral import spectral_shares
from tests.models import WIDTH, judge_rollout, span

LAYOUT = JudgeLayout()
LINKS = {"Z->X": 0.2, "X->Y": 0.5, "Z->Y": 0.3, "criteria->analysis": 0.1, "analysis->scores@margin": 1.0}
EVERYTHING = ("phi", "influence", "angles")


def numpy_share(jac_SD: np.ndarray) -> float:
    """Return sigma_1^2 / sum of sigma^2."""
    sigma_N = np.linalg.svd(jac_SD, compute_uv=False)
    return float(sigma_N[0] ** 2 / (sigma_N**2).sum()) if sigma_N.any() else 0.0


def counterfactuals_of(engine: JacobianEngine, rollout: Rollout, link: Link, config: RewardConfig) -> list[np.ndarray]:
    """Return the link's Jacobians with its source permuted, one by one."""
    orders = permutations(rollout, link.source, config.counterfactuals, seed=config.seed, kind=config.permutation)
    answers = [engine.jacobians(Group((permuted,)), [link])[0][link.name] for permuted in orders]
    return [jacobian.jac_SD.double().numpy() for jacobian in answers]


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2, "counterfactuals": 4},
        {"rank": 1, "counterfactuals": 2, "seed": 5, "target": "log_odds", "score": "phi_retained"},
        {"rank": None, "energy": 0.6, "counterfactuals": 4, "permutation": "block", "score": "influence"},
        {"rank": 2, "counterfactuals": 4, "nuisance": "mean", "score": "phi_influence", "p": -1.0},
        {"rank": 3, "counterfactuals": 4, "score": "influence_retained", "p": 0.0, "target": "expected_score"},
    ],
    ids=str,
)
def test_records_equal_numpy(engine: JacobianEngine, options: dict[str, Any]) -> None:
    """Every number of every record follows from the kept matrices by a plain SVD, and the reward from the values."""
    config = RewardConfig(**{"links": LINKS, "score": "influence", "also": EVERYTHING, **options})
    rollout = judge_rollout()
    wide = replace(rollout.spans["prompt"], positions=tuple(range(9)), movable=tuple(range(9)), sentences=(0,) * 9)
    rollout = replace(rollout, spans={**rollout.spans, "prompt": wide})
    (found,) = score_rollouts([rollout], engine, config, LAYOUT, keep_jacobians=True)
    assert list(found.links) == list(LINKS)
    for link in config.parsed_links(LAYOUT):
        record, hardened = found.links[link.name], found.jacobians[link.name]
        base, residual_SD = hardened.base, hardened.residual_SD
        jac_SD, stack = base.jac_SD.double().numpy(), counterfactuals_of(engine, rollout, link, config)
        expected_SD, rank = jac_SD, 0
        if config.nuisance == "mean":
            mean_SD = sum(stack) / len(stack)
            expected_SD = jac_SD - (jac_SD * mean_SD).sum() / (mean_SD**2).sum() * mean_SD
        elif stack:
            _, sigma_N, vectors_DD = np.linalg.svd(np.concatenate(stack))
            held = (sigma_N**2).cumsum() / (sigma_N**2).sum()
            rank = config.rank if config.rank is not None else int((held < config.energy).sum()) + 1
            expected_SD = jac_SD - jac_SD @ vectors_DD[:rank].T @ vectors_DD[:rank]
        scale = np.abs(jac_SD).max()
        assert np.allclose(residual_SD.numpy(), expected_SD, rtol=0, atol=3e-6 * scale)
        assert (record.link, record.function, record.tokens) == (link.name, link.function, len(jac_SD))
        assert (record.counterfactuals, record.rank) == (len(stack), rank)
        assert len(record.nuisance_angles) == min(rank, len(jac_SD))
        assert record.phi == pytest.approx(numpy_share(expected_SD), rel=1e-4)
        assert record.phi_lower <= record.phi <= record.phi_upper
        assert record.phi_base == pytest.approx(numpy_share(jac_SD), rel=1e-6)
        retained = (expected_SD**2).sum() / (jac_SD**2).sum()
        assert record.retained == (pytest.approx(retained, rel=1e-4) if stack else None)
        influence = (jac_SD**2).sum() / base.context_energy
        assert record.influence == pytest.approx(influence, rel=1e-6)
        assert record.norm == pytest.approx(np.linalg.norm(jac_SD), rel=1e-6)
        named = {
            "phi": record.phi,
            "phi_retained": math.sqrt(record.phi * retained),
            "influence": influence,
            "phi_influence": math.sqrt(record.phi * influence),
            "influence_retained": influence * retained,
        }
        assert record.value == pytest.approx(named[config.score], rel=1e-4)
        assert 0.0 < record.value <= 1.0
    values = [found.links[name].value for name in LINKS]
    assert found.reward == pytest.approx(power_mean(values, list(LINKS.values()), config.p), rel=1e-12)
    assert found.malformed is None


def test_hardening_matters(engine: JacobianEngine) -> None:
    """Four counterfactuals take something away from the Jacobian, and another seed takes something else."""
    rollout = judge_rollout()
    one, other = (
        score_rollouts([rollout], engine, RewardConfig.paper(links={"X->Y": 1.0}, seed=seed, also=("phi",)), LAYOUT)[0]
        for seed in (0, 1)
    )
    assert one.links["X->Y"].retained < 0.9
    assert one.links["X->Y"].phi != one.links["X->Y"].phi_base
    assert one.reward != other.reward


@pytest.mark.parametrize(
    "options", [{"counterfactuals": 0}, {"rank": 0, "counterfactuals": 4}, {"counterfactuals": 0, "nuisance": "mean"}]
)
def test_no_hardening_leaves_the_jacobian(engine: JacobianEngine, options: dict[str, Any]) -> None:
    """K = 0 and rank = 0 are the ablation without hardening: J itself, to the bit, all of it retained."""
    config = RewardConfig(**{"links": LINKS, "score": "influence", "also": EVERYTHING, **options})
    (found,) = score_rollouts([judge_rollout()], engine, config, LAYOUT, keep_jacobians=True)
    for name, record in found.links.items():
        assert torch.equal(found.jacobians[name].base.jac_SD, found.jacobians[name].residual_SD)
        assert (record.phi, record.retained, record.rank) == (record.phi_base, 1.0, 0)
        assert record.nuisance_angles == ()


@pytest.mark.parametrize("score", ["phi", "phi_retained", "influence_retained"])
def test_a_span_without_another_order_is_paid_for_nothing_that_hardening_retains(
    engine: JacobianEngine, score: Any
) -> None:
    """A one-token source has phi = 1; a policy that writes one must not earn the most that a hardened span can."""
    rollout = judge_rollout()
    rollout = replace(rollout, spans={**rollout.spans, "criteria": span("criteria", (11,))})
    config = RewardConfig.paper(links={"X->Y": 1.0}, score=score, also=("phi", "influence"))
    (found,) = score_rollouts([rollout], engine, config, LAYOUT)
    record = found.links["X->Y"]
    assert (record.counterfactuals, record.tokens, record.retained) == (0, 1, None)
    assert record.phi == pytest.approx(1.0, abs=1e-12)
    assert record.influence is not None
    assert record.influence > 0.0
    assert found.reward == (record.phi if score == "phi" else 0.0)


def test_a_span_of_two_tokens_has_one_counterfactual_however_many_are_asked_for(engine: JacobianEngine) -> None:
    rollout = judge_rollout()
    rollout = replace(rollout, spans={**rollout.spans, "criteria": span("criteria", (10, 11))})
    assert len({rollout.token_ids[at] for at in (10, 11)}) == 2
    config = RewardConfig.paper(links={"X->Y": 1.0}, counterfactuals=8)
    assert score_rollouts([rollout], engine, config, LAYOUT)[0].links["X->Y"].counterfactuals == 1


@pytest.mark.parametrize("energy", [math.nan, math.inf])
def test_a_context_energy_that_is_not_finite_is_no_influence_of_zero(engine: JacobianEngine, energy: float) -> None:
    """The source's rows may be finite where another row of the context is not."""

    class Broken(Counting):
        def compute(self, requests: Sequence[Request]) -> Iterator[Answer]:
            for answer in self.engine.compute(requests):
                yield [{name: replace(one, context_energy=energy) for name, one in of.items()} for of in answer]

    config = RewardConfig(links={"X->Y": 1.0}, score="influence")
    (found,) = score_rollouts([judge_rollout()], Broken(engine), config, LAYOUT)
    assert (found.malformed, found.reward) == ("non-finite gradient on X->Y", 0.0)


class Counting:
    """An engine that counts what it is asked for, and the calls of functions that a test watches."""

    def __init__(self, engine: JacobianEngine) -> None:
        self.engine, self.width = engine, engine.width
        self.counterfactuals = self.energies = 0

    def refusal(self, rollout: Rollout) -> str | None:
        """Refuse what the engine refuses."""
        return self.engine.refusal(rollout)

    def compute(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Count the counterfactual rollouts and the base rollouts with context energy."""
        self.counterfactuals += sum(len(request.group.rollouts) for request in requests[1:])
        self.energies += sum(len(request.group.rollouts) for request in requests if request.context_energy)
        return self.engine.compute(requests)


@pytest.mark.parametrize(
    ("options", "counterfactuals", "energies", "spectra", "stacks", "own"),
    [
        ({}, 0, 2, 0, 0, 0),
        ({"counterfactuals": 3}, 0, 2, 0, 0, 0),  # the score does not read them
        ({"score": "phi"}, 0, 0, 2, 0, 0),  # without counterfactuals the residual is the base: one spectrum
        ({"score": "phi", "also": ("phi",)}, 0, 0, 2, 0, 0),
        ({"score": "phi", "counterfactuals": 3}, 6, 0, 2, 2, 0),
        ({"score": "phi", "counterfactuals": 3, "also": ("phi",)}, 6, 0, 4, 2, 0),
        ({"score": "phi_retained", "counterfactuals": 3}, 6, 0, 2, 2, 0),
        ({"score": "influence_retained", "counterfactuals": 3}, 6, 2, 0, 2, 0),
        ({"counterfactuals": 3, "also": ("angles",)}, 6, 2, 0, 2, 2),
        ({"score": "phi", "counterfactuals": 3, "also": ("influence", "angles")}, 6, 2, 2, 2, 2),
    ],
    ids=str,
)
def test_nothing_is_computed_that_nobody_reads(
    engine: JacobianEngine,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    counterfactuals: int,
    energies: int,
    spectra: int,
    stacks: int,
    own: int,
) -> None:
    """Two rollouts, one link: counterfactuals, context energies, spectra and subspaces, counted; fields or None."""
    counted = {"spectra": 0, "stacks": 0, "own": 0}

    def count_shares(jacs_SD: Sequence[torch.Tensor]) -> Any:
        counted["spectra"] += len(jacs_SD)
        return spectral_shares(jacs_SD)

    def count_bases(name: str) -> Any:
        def counting(stacks_SD: Sequence[Sequence[torch.Tensor]], **how: Any) -> Any:
            counted[name] += sum(bool(jacs_SD) for jacs_SD in stacks_SD)
            return nuisance_bases(stacks_SD, **how)

        return counting

    monkeypatch.setattr("cepo.fusion.records.spectral_shares", count_shares)
    monkeypatch.setattr("cepo.fusion.records.nuisance_bases", count_bases("own"))
    monkeypatch.setattr("cepo.fusion.score.nuisance_bases", count_bases("stacks"))
    config = RewardConfig(**{"links": {"X->Y": 1.0}, "score": "influence", **options})
    counting = Counting(engine)
    found = score_rollouts([judge_rollout(0), judge_rollout(1)], counting, config, LAYOUT)
    assert (counting.counterfactuals, counting.energies) == (counterfactuals, energies)
    assert counted == {"spectra": spectra, "stacks": stacks, "own": own}
    for one in found:
        record = one.links["X->Y"]
        assert {record.phi is None, record.phi_lower is None, record.phi_upper is None} == {spectra == 0}
        assert (record.phi_base is None) == (spectra == 0 or (spectra == 2 and counterfactuals > 0))
        assert (record.influence is None) == (energies == 0)
        assert (record.nuisance_angles == ()) == (own == 0)
        assert record.counterfactuals == counterfactuals // 2
        assert 0.0 < record.value <= 1.0


def test_zero_jacobian_scores_zero() -> None:
    """A zero matrix has no phi, no influence and no retained share, and makes no NaN."""
    link = Link("X->Y", "criteria", "scores", "total", (), "log_likelihood")
    zero_SD = torch.zeros(3, WIDTH)
    for score in ("phi", "phi_retained", "influence", "phi_influence", "influence_retained"):
        jacobian = LinkJacobian(link, zero_SD, (1, 2, 3), (5,), 0.0)
        hardened = HardenedLink(0, jacobian, 0, 0, torch.zeros(0, WIDTH), zero_SD)
        (record,) = score_links([Measured.by_gradient(hardened)], score=score, also=("phi",))  # type: ignore[arg-type]
        assert (record.value, record.phi, record.influence, record.retained, record.norm) == (0.0,) * 5


def assert_same(one: RolloutScore, other: RolloutScore) -> None:
    """Assert that all of two scores is the same but for rounding."""
    assert one.malformed == other.malformed
    assert one.reward == pytest.approx(other.reward, rel=1e-9)
    assert one.links.keys() == other.links.keys()
    for name, record in one.links.items():
        theirs = asdict(other.links[name])
        for field, value in asdict(record).items():
            wanted = theirs[field] if value is None or isinstance(value, str) else pytest.approx(theirs[field], 1e-9)
            assert value == wanted, field


def test_batch_and_order_do_not_matter(engine: JacobianEngine) -> None:
    """Scores are the same to rounding alone, together, reversed, and with the groups of two prompts interleaved."""
    config = RewardConfig(links=LINKS, score="influence", counterfactuals=4, also=EVERYTHING)
    rollouts = [judge_rollout(seed, prompt_seed=100 + seed % 2) for seed in range(4)]
    assert len({rollout.prompt_ids for rollout in rollouts}) == 2
    tasks = [0.1, 0.9, 0.5, 1.0]
    together = score_rollouts(rollouts, engine, config, LAYOUT, task_rewards=tasks)
    backwards = score_rollouts(rollouts[::-1], engine, config, LAYOUT, task_rewards=tasks[::-1])[::-1]
    doubled = score_rollouts([*rollouts, *rollouts], engine, config, LAYOUT, task_rewards=tasks * 2)
    reordered = replace(config, links=dict(reversed(list(LINKS.items()))))
    other_order = score_rollouts(rollouts, engine, reordered, LAYOUT, task_rewards=tasks)
    for place, (rollout, task) in enumerate(zip(rollouts, tasks, strict=True)):
        (alone,) = score_rollouts([rollout], engine, config, LAYOUT, task_rewards=[task])
        for other in (backwards[place], alone, doubled[place], doubled[place + 4], other_order[place]):
            assert_same(together[place], other)
    assert len({score.reward for score in together}) == 4


@pytest.mark.parametrize(("most", "calls"), [(2**23, 1), (0, 2)])
def test_small_groups_are_hardened_together(
    engine: JacobianEngine, monkeypatch: pytest.MonkeyPatch, most: int, calls: int
) -> None:
    """One call hardens both prompts' Jacobians while they are small; large ones are not kept. The scores are equal."""
    config = RewardConfig(links=LINKS, score="phi", counterfactuals=2)
    rollouts = [judge_rollout(seed, prompt_seed=100 + seed % 2) for seed in range(4)]
    wanted = score_rollouts(rollouts, engine, config, LAYOUT)
    hardened: list[int] = []

    def counting(gradients: Sequence[Any], of: RewardConfig) -> Any:
        hardened.append(len(gradients))
        return harden(gradients, of)

    monkeypatch.setattr("cepo.fusion.score.harden", counting)
    monkeypatch.setattr("cepo.fusion.score._HARDENED_TOGETHER", most)
    found = score_rollouts(rollouts, engine, config, LAYOUT)
    assert hardened == [len(LINKS) * 4 // calls] * calls
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)


def test_fuse_by_hand() -> None:
    """The paper's preset: weights 0.7, 0.1, 0.1, 0.1 at p = 0.2 with a task reward, equal thirds without one."""
    values, config = {"Z->X": 0.5, "X->Y": 0.25, "Z->Y": 1.0}, RewardConfig.paper()
    expected = (0.7 * 0.8**0.2 + 0.1 * (0.5**0.2 + 0.25**0.2 + 1.0)) ** 5
    assert fuse(values, config, 0.8) == pytest.approx(expected, rel=1e-12)
    assert fuse(values, config) == pytest.approx(((0.5**0.2 + 0.25**0.2 + 1.0) / 3) ** 5, rel=1e-12)
    assert fuse(values, config, 0.0) == pytest.approx((0.1 * (0.5**0.2 + 0.25**0.2 + 1.0)) ** 5, rel=1e-12)
    assert fuse(values, replace(config, p=0.0), 0.0) == 0.0
    shown = RewardConfig(links={"Z->X": 0.0, "X->Y": 2.0}, task_weight=0.0, p=-math.inf)
    assert fuse({"X->Y": 0.25, "Z->X": 0.1}, shown, 0.01) == 0.25  # weight 0: computed and shown, not fused
    for bad in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="task_rewards"):
            fuse(values, config, bad)


def test_task_reward_goes_in(engine: JacobianEngine) -> None:
    """Each rollout is fused with its own task reward, or with none."""
    config = RewardConfig(links={"X->Y": 1.0, "Z->X": 3.0}, task_weight=4.0, p=1.0)
    rollouts = [judge_rollout(seed) for seed in range(3)]
    plain = score_rollouts(rollouts, engine, config, LAYOUT)
    fused = score_rollouts(rollouts, engine, config, LAYOUT, task_rewards=[1.0, None, 0.0])
    for before, after, task in zip(plain, fused, (1.0, None, 0.0), strict=True):
        values = {name: record.value for name, record in before.links.items()}
        links = 0.25 * values["X->Y"] + 0.75 * values["Z->X"]
        assert before.reward == pytest.approx(links, rel=1e-12)
        assert after.reward == pytest.approx(links if task is None else (links + task) / 2, rel=1e-12)
        assert after.links == before.links
