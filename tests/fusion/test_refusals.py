"""Rollouts and settings that cannot be scored: 0 with a reason, or an error before long work."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from cepo.counterfactual.permute import permutations
from cepo.fusion.config import RewardConfig
from cepo.fusion.score import RolloutScore, score_rollouts
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.protocol import Answer, Request
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.reasoner import ReasonerLayout
from cepo.jacobian.records import Rollout
from tests.models import WIDTH, judge_rollout

LAYOUT = JudgeLayout()
LINKS = {"Z->X": 0.2, "X->Y": 0.5, "Z->Y": 0.3, "criteria->analysis": 0.1, "analysis->scores@margin": 1.0}
EVERYTHING = ("phi", "influence", "angles")


def malformed_rollouts() -> list[Rollout]:
    """Return a rollout without spans, one too long for the model, and one with a foreign token."""
    rollout = judge_rollout(9)
    return [
        Rollout(rollout.prompt_ids, (4, 5), malformed="missing <analysis>"),
        replace(rollout, completion_ids=rollout.completion_ids + (5,) * 60),
        replace(rollout, completion_ids=(*rollout.completion_ids[:-1], 4000)),
    ]


def test_malformed_rollouts_score_nothing(engine: JacobianEngine) -> None:
    """They get 0 and their reason, whatever their task reward, and change no bit of the others' scores."""
    config = RewardConfig(links=LINKS, score="influence", counterfactuals=4, also=EVERYTHING)
    good = [judge_rollout(seed) for seed in range(3)]
    alone = score_rollouts(good, engine, config, LAYOUT, task_rewards=[0.5, 0.25, None])
    first, second, third = malformed_rollouts()
    mixed = score_rollouts(
        [first, good[0], second, good[1], good[2], third],
        engine,
        config,
        LAYOUT,
        task_rewards=[1.0, 0.5, 1.0, 0.25, None, 0.0],
    )
    assert [mixed[1], mixed[3], mixed[4]] == alone
    reasons = [score.malformed for score in (mixed[0], mixed[2], mixed[5])]
    assert reasons[0] == "missing <analysis>"
    assert str(reasons[1]).startswith("too long: 86 tokens")
    assert str(reasons[2]).startswith("token id 4000")
    for index in (0, 2, 5):
        assert (mixed[index].reward, dict(mixed[index].links)) == (0.0, {})
    assert all(score.malformed is None and 0.0 < score.reward <= 1.0 for score in alone)
    assert score_rollouts([], engine, config, LAYOUT) == []
    assert [score.reward for score in score_rollouts([first], engine, config, LAYOUT)] == [0.0]


class Poisoned:
    """An engine that returns a NaN in one link of one rollout."""

    def __init__(self, engine: JacobianEngine, victim: tuple[int, ...], name: str) -> None:
        self.engine, self.victim, self.name, self.width = engine, victim, name, engine.width

    def refusal(self, rollout: Rollout) -> str | None:
        """Refuse nothing more than the engine does."""
        return self.engine.refusal(rollout)

    def compute(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Poison the victim's matrix."""
        for request, found in zip(requests, self.engine.compute(requests), strict=True):
            for rollout, of_links in zip(request.group.rollouts, found, strict=True):
                if rollout.completion_ids == self.victim and self.name in of_links:
                    of_links[self.name].jac_SD[0, 0] = math.nan
            yield found


@pytest.mark.parametrize("permuted", [False, True])
def test_non_finite_gradient_scores_nothing(engine: JacobianEngine, permuted: bool) -> None:
    """A NaN in a Jacobian, base or counterfactual, costs its own rollout the reward, and no other's."""
    rollouts, config = [judge_rollout(0), judge_rollout(1)], RewardConfig.paper(links={"Z->X": 1.0, "X->Y": 1.0})
    victim = permutations(rollouts[0], "criteria", 3, seed=0)[2] if permuted else rollouts[0]
    found = score_rollouts(rollouts, Poisoned(engine, victim.completion_ids, "X->Y"), config, LAYOUT)
    assert found[0] == RolloutScore({}, 0.0, "non-finite gradient on X->Y")
    assert found[1] == score_rollouts(rollouts, engine, config, LAYOUT)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"links": {}}, "links is empty"),
        ({"links": "X->Y"}, "links is 'X->Y'; expected a mapping"),
        ({"links": {"X->Y": "a"}}, "links holds the weight 'a'"),
        ({"links": {"X->Y": -1.0}}, "links, by weight, is"),
        ({"links": {"X->Y": 0.0}}, "links, by weight, is"),
        ({"links": {"X->Y": math.nan}}, "links, by weight, is"),
        ({"task_weight": -0.1}, "task_weight is"),
        ({"task_weight": math.inf}, "task_weight is"),
        ({"p": math.nan}, "p is NaN"),
        ({"counterfactuals": -1}, "counterfactuals"),
        ({"counterfactuals": 1.5}, "counterfactuals"),
        ({"permutation": "shuffle"}, "permutation is 'shuffle'"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": None}, "exactly one"),
        ({"energy": 0.5}, "exactly one"),
        ({"rank": None, "energy": 1.5}, "energy is 1.5"),
        ({"nuisance": "pca"}, "nuisance is 'pca'"),
        ({"score": "psi"}, "score is 'psi'"),
        ({"score": "phi_retained"}, "score is 'phi_retained'.*counterfactuals"),
        ({"score": "influence_retained"}, "score is 'influence_retained'.*counterfactuals"),
        ({"also": ("phi", "size")}, "also is .*'size'"),
        ({"also": "phi"}, "also is 'phi'; expected a list"),
        ({"p": "inf"}, "p is 'inf'; expected a number"),
        ({"task_weight": "1"}, "task_weight is '1'; expected a number"),
        ({"rank": None, "energy": "0.5"}, "energy is '0.5'; expected a number or null"),
        ({"join": None}, "join is None; expected a number"),
        ({"donors": True}, "donors is True; expected an integer"),
        ({"counterfactuals": True}, "counterfactuals is True; expected an integer"),
        ({"seed": "x"}, "seed is 'x'; expected an integer"),
        ({"links": {"X->Y": True}}, "links holds the weight True; expected a number >= 0"),
    ],
    ids=str,
)
def test_bad_config(options: dict[str, Any], message: str) -> None:
    """A wrong setting is refused when it is written down, by its name and with what came."""
    with pytest.raises(ValueError, match=message):
        RewardConfig(**options)


def test_config_is_checked_against_layout_and_model(engine: JacobianEngine) -> None:
    """An unknown link, an unknown target and a rank above d are refused before any Jacobian is computed."""
    for options, message in (
        ({"links": {"X->W": 1.0}}, "unknown span 'W'"),
        ({"target": "entropy"}, "target is 'entropy'"),
        ({"rank": WIDTH + 1}, f"rank is {WIDTH + 1}, but the model's embeddings have d = {WIDTH}"),
    ):
        with pytest.raises(ValueError, match=message):
            score_rollouts([judge_rollout()], engine, RewardConfig(**options), LAYOUT)
    RewardConfig(rank=WIDTH).check_width(engine.width)
    RewardConfig(rank=None, energy=0.9).check_width(1)
    with pytest.raises(ValueError, match="unknown span 'analysis'"):
        RewardConfig(links={"analysis->answer": 1.0}).parsed_links(ReasonerLayout())


@pytest.mark.parametrize("task", [1.5, -0.5, math.nan])
def test_bad_task_reward(engine: JacobianEngine, task: float) -> None:
    """A task reward outside [0, 1] is the caller's mistake."""
    with pytest.raises(ValueError, match="task_rewards"):
        score_rollouts([judge_rollout()], engine, RewardConfig(), LAYOUT, task_rewards=[task])


class Unused(Poisoned):
    """An engine that must not be asked for anything."""

    def compute(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Fail."""
        raise AssertionError("work had begun")


@pytest.mark.parametrize("tasks", [[0.5, 1.5], [0.5], [0.5, 0.5, 0.5], []], ids=str)
def test_bad_task_rewards_are_refused_before_long_work(engine: JacobianEngine, tasks: list[float]) -> None:
    """One reward a rollout, all in [0, 1]: anything else is refused before the first Jacobian."""
    rollouts = [judge_rollout(0), judge_rollout(1)]
    with pytest.raises(ValueError, match="task_rewards"):
        score_rollouts(rollouts, Unused(engine, (), ""), RewardConfig(), LAYOUT, task_rewards=tasks)
