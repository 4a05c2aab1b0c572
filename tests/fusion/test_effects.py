"""Effect scores and chains: their formulas, donors' bookkeeping, and what is computed for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from cepo.counterfactual.donors import candidates, drawn
from cepo.counterfactual.permute import permutations
from cepo.fusion.config import RewardConfig
from cepo.fusion.records import effect_scores
from cepo.fusion.requests import Compared
from cepo.fusion.score import pools_of, score_rollouts
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.links import parse_chain
from cepo.jacobian.protocol import PathAnswer, PathRequest, Request
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.reasoner import ReasonerLayout
from cepo.jacobian.records import Group, LinkPath, Rollout
from tests.jacobian.test_autograd import link
from tests.models import VOCABULARY, judge_rollout, tiny_model

LAYOUT = JudgeLayout()
ROLLOUTS = [judge_rollout(seed, prompt_seed=100 + seed // 2) for seed in range(6)]
CHAIN = "criteria->analysis->scores"


@pytest.fixture(scope="module")
def engine() -> JacobianEngine:
    torch.set_num_threads(1)
    return JacobianEngine(tiny_model())


class Counting:
    """An engine that counts what it is asked for."""

    def __init__(self, engine: JacobianEngine) -> None:
        self.engine, self.jacobians, self.nodes = engine, 0, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def compute(self, requests: Sequence[Request]) -> Iterator[Any]:
        self.jacobians += len(requests)
        return self.engine.compute(requests)

    def paths(self, requests: Sequence[PathRequest]) -> Iterator[PathAnswer]:
        self.nodes += [request.nodes for request in requests]
        return self.engine.paths(requests)


def compared(own: float, others: Sequence[float], sums: Sequence[float] = ()) -> Compared:
    nodes = 1 if sums else 0
    attribution_S = torch.zeros(1) if sums else None
    return Compared("donors", LinkPath(link("X->Y"), own, tuple(others), tuple(sums), attribution_S, (1,), (2,), nodes))


def test_named_scores_by_hand() -> None:
    """effect and path are tanh(delta / 2), explained is 1 - s(X) / s(X'), each 0 where negative."""
    found = effect_scores(compared(-1.0, (-3.0, -4.0), (1.0, 3.0)))
    assert found["effect"] == pytest.approx(math.tanh(2.5 / 2))
    assert found["path"] == pytest.approx(math.tanh(2.0 / 2))
    assert found["explained"] == pytest.approx(1 - 1.0 / 3.5)
    worse = effect_scores(compared(-4.0, (-1.0,)))
    assert worse == {"effect": 0.0, "explained": 0.0}
    assert effect_scores(compared(0.0, (0.0,))) == {"effect": 0.0, "explained": 0.0}
    assert effect_scores(Compared("nothing", None)) == {"effect": 0.0, "explained": 0.0, "path": 0.0}
    assert effect_scores(None) == {}


@pytest.mark.parametrize("score", ["effect", "explained", "path"])
def test_scores_are_those_of_the_definition(engine: JacobianEngine, score: Any) -> None:
    """Donors drawn by hand and values asked of the engine one by one give the same S, chain and reward."""
    config = RewardConfig(links={CHAIN: 2.0, "X->Y": 1.0}, score=score, donors=2, nodes=3, join=-1.0, p=0.5, seed=4)
    scores = score_rollouts(ROLLOUTS, engine, config, LAYOUT)
    pools = pools_of(ROLLOUTS, config.parsed_links(LAYOUT))
    for rollout, found in zip(ROLLOUTS, scores, strict=True):
        values = {}
        for text in ("criteria->analysis", "analysis->scores", "X->Y"):
            one = link(text)
            kind, others = drawn(rollout, one.source, pools[one.source], 2, seed=4)
            assert len(others) == 2
            asked = PathRequest(Group((rollout,)), (others,), (one,), 3 if score == "path" else 0)
            record = next(engine.paths([asked]))[0][text]
            kept = found.links[text]
            assert (kept.donors, kept.against, kept.nodes) == (2, kind, 3 if score == "path" else 0)
            assert kept.delta == pytest.approx(record.delta)
            assert (kept.path_sum is None) == (score != "path")
            values[text] = effect_scores(Compared("donors", record))[score]
            assert kept.value == pytest.approx(values[text])
        first, second = values["criteria->analysis"], values["analysis->scores"]
        chained = 2 / (1 / first + 1 / second) if first and second else 0.0
        assert found.values == pytest.approx({CHAIN: chained, "X->Y": values["X->Y"]})
        fused = ((2 * chained**0.5 + values["X->Y"] ** 0.5) / 3) ** 2
        assert found.reward == pytest.approx(fused)


def test_the_weakest_link_joins_by_default(engine: JacobianEngine) -> None:
    for found in score_rollouts(ROLLOUTS, engine, RewardConfig(links={CHAIN: 1.0}, score="explained"), LAYOUT):
        assert found.reward == found.values[CHAIN] == min(record.value for record in found.links.values())


def test_scores_do_not_depend_on_batch_or_order() -> None:
    """With the same pool, alone or backwards, in either engine."""
    model = tiny_model(dtype=torch.float32)
    config = RewardConfig(links={CHAIN: 1.0}, score="path", nodes=2)
    pools = pools_of(ROLLOUTS, config.parsed_links(LAYOUT))
    whole = score_rollouts(ROLLOUTS, GroupEngine(model), config, LAYOUT)
    for engine in (GroupEngine(model), JacobianEngine(model)):
        backwards = score_rollouts(ROLLOUTS[::-1], engine, config, LAYOUT)[::-1]
        alone = [score_rollouts([one], engine, config, LAYOUT, pools=pools)[0] for one in ROLLOUTS]
        for found in (backwards, alone):
            assert [one.reward for one in found] == pytest.approx([one.reward for one in whole], rel=1e-4, abs=1e-6)


def test_only_what_is_read_is_computed(engine: JacobianEngine) -> None:
    for options, jacobians, nodes in (
        ({"score": "effect"}, 0, {0}),
        ({"score": "path", "nodes": 2}, 0, {2}),
        ({"score": "influence"}, 3, set()),
        ({"score": "influence", "also": ("effect",)}, 3, {0}),
        ({"score": "effect", "also": ("influence", "path"), "nodes": 1}, 3, {1}),
    ):
        counting = Counting(engine)
        found = score_rollouts(ROLLOUTS, counting, RewardConfig(links={CHAIN: 1.0}, **options), LAYOUT)
        assert (counting.jacobians, set(counting.nodes)) == (jacobians, nodes), options
        record = found[0].links["criteria->analysis"]
        assert (record.influence is None) == (jacobians == 0)
        assert (record.delta is None) == (not nodes)


def test_a_span_without_donors_is_zero_or_permuted_as_told(engine: JacobianEngine) -> None:
    alone = [one for one in ROLLOUTS if one.prompt_ids == ROLLOUTS[0].prompt_ids]
    config = RewardConfig(links={"criteria->analysis": 1.0}, score="effect")
    for found in score_rollouts(alone, engine, config, LAYOUT):
        record = found.links["criteria->analysis"]
        assert (found.reward, record.delta, record.donors, record.against) == (0.0, None, 0, "nothing")
    told = score_rollouts(alone, engine, replace(config, no_donor="permute"), LAYOUT)
    for rollout, found in zip(alone, told, strict=True):
        record = found.links["criteria->analysis"]
        permuted = permutations(rollout, "criteria", 3, seed=0)
        asked = PathRequest(Group((rollout,)), (permuted,), (link("criteria->analysis"),))
        assert (record.donors, record.against) == (3, "permuted")
        assert record.delta == pytest.approx(next(engine.paths([asked]))[0]["criteria->analysis"].delta)


@pytest.mark.parametrize("no_donor", ["zero", "permute"])
def test_a_span_of_which_no_token_can_be_exchanged_is_not_called_the_same(engine: Any, no_donor: Any) -> None:
    """Its only token holds part of a tag too. It has no effect of 0: nothing was measured."""
    spans = ROLLOUTS[0].spans
    stuck = replace(ROLLOUTS[0], spans={**spans, "criteria": replace(spans["criteria"], movable=(), sentences=())})
    config = RewardConfig(links={"criteria->analysis": 1.0}, no_donor=no_donor)
    for rollouts in ([stuck], [stuck, *ROLLOUTS[2:]]):
        record = score_rollouts(rollouts, engine, config, LAYOUT)[0].links["criteria->analysis"]
        assert (record.value, record.delta, record.donors, record.against) == (0.0, None, 0, "immovable")


def test_what_the_model_refuses_is_no_donor(engine: JacobianEngine) -> None:
    """A tokenizer may know tokens that the model has no embedding for, and a file of donors may be another model's."""
    config = RewardConfig(links={"X->Y": 1.0}, score="explained")
    foreign = judge_rollout(9, prompt_seed=200)
    at = foreign.spans["criteria"].movable[0] - len(foreign.prompt_ids)
    ids = (*foreign.completion_ids[:at], VOCABULARY, *foreign.completion_ids[at + 1 :])
    foreign = replace(foreign, completion_ids=ids)
    links = config.parsed_links(LAYOUT)
    with_it, without = (
        score_rollouts(ROLLOUTS, engine, config, LAYOUT, pools=pools_of([*ROLLOUTS, *more], links))
        for more in ([foreign], [])
    )
    assert with_it == without


def test_donors_that_say_the_same_have_no_effect(engine: JacobianEngine) -> None:
    own, other = ROLLOUTS[0], ROLLOUTS[2]
    ids = list(other.token_ids)
    for at, token in zip(other.spans["criteria"].positions, own.spans["criteria"].positions, strict=True):
        ids[at] = own.token_ids[token]
    split = len(other.prompt_ids)
    same = replace(other, prompt_ids=tuple(ids[:split]), completion_ids=tuple(ids[split:]))
    config = RewardConfig(links={"criteria->analysis": 1.0}, score="effect")
    (found,) = score_rollouts([own], engine, config, LAYOUT, pools={"criteria": candidates([same], "criteria")})
    record = found.links["criteria->analysis"]
    assert (found.reward, record.delta, record.donors, record.against) == (0.0, 0.0, 0, "same")


def test_a_non_finite_effect_scores_nothing(engine: JacobianEngine) -> None:
    class Broken(Counting):
        def paths(self, requests: Sequence[PathRequest]) -> Iterator[PathAnswer]:
            for request, answer in zip(requests, self.engine.paths(requests), strict=True):
                broken = [rollout is ROLLOUTS[1] for rollout in request.group.rollouts]
                yield [
                    {name: replace(path, own=math.nan) if bad else path for name, path in of_links.items()}
                    for bad, of_links in zip(broken, answer, strict=True)
                ]

    config = RewardConfig(links={CHAIN: 1.0}, score="effect")
    found = score_rollouts(ROLLOUTS, Broken(engine), config, LAYOUT)
    assert found[1].malformed == "non-finite effect on criteria->analysis"
    assert (found[1].reward, dict(found[1].links)) == (0.0, {})
    assert all(one.malformed is None for place, one in enumerate(found) if place != 1)


def test_chains_are_read() -> None:
    known: dict[str, Any] = {"names": LAYOUT.names, "roles": LAYOUT.roles, "chain": LAYOUT.chain}
    chain = parse_chain("Z -> X->analysis->Y@margin", **known)
    assert [one.name for one in chain.links] == [
        "prompt->criteria",
        "criteria->analysis",
        "analysis->scores@margin",
    ]
    assert [one.function for one in chain.links] == ["log_likelihood", "log_likelihood", "margin"]
    assert {one.effect for one in chain.links} == {"total"}
    own = parse_chain("chain", **known)
    assert (own.name, [one.name for one in own.links]) == ("chain", ["criteria->analysis", "analysis->scores"])
    reasoner = ReasonerLayout()
    of_reasoner = parse_chain("chain", names=reasoner.names, roles=reasoner.roles, chain=reasoner.chain)
    assert [one.name for one in of_reasoner.links] == ["prompt->rationale", "rationale->answer"]
    assert parse_chain("X->Y", **known).links == (link("X->Y"),)
    for text, complaint in (
        ("criteria->analysis->scores:direct", "is a chain with an effect"),
        ("criteria->scores->analysis", "by causality"),
        ("criteria->nothing->scores", "unknown span 'nothing'"),
        ("criteria->analysis->scores@size", "'size'"),
    ):
        with pytest.raises(ValueError, match=complaint):
            parse_chain(text, **known)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"links": {"Z->Y": 1.0}}, "expected 'prompt->scores:total', or another score than 'effect'"),
        ({"links": {"X->Y@margin": 1.0}}, "has no likelihood to explain"),
        ({"links": {"X->Y@log_odds": 1.0}, "score": "explained"}, "expects log_likelihood"),
        ({"links": {"chain": 1.0, CHAIN: 1.0}}, "names one link twice, as 'chain' and"),
        ({"donors": 0}, "donors is 0"),
        ({"nodes": 0}, "nodes is 0"),
        ({"nodes": "many"}, "nodes is 'many'"),
        ({"no_donor": "guess"}, "no_donor is 'guess'; expected zero or permute"),
        ({"join": math.nan}, "join is NaN"),
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        RewardConfig(**{"links": {CHAIN: 1.0}, "score": "effect", **options}).chains(LAYOUT)


def test_a_malformed_rollout_is_passed_over(engine: JacobianEngine) -> None:
    broken = Rollout((1, 2), (3,), malformed="missing <analysis>")
    config = RewardConfig(links={CHAIN: 1.0}, score="effect")
    found = score_rollouts([broken, *ROLLOUTS], engine, config, LAYOUT)
    assert found[0].malformed == "missing <analysis>"
    assert [one.reward for one in found[1:]] == [one.reward for one in score_rollouts(ROLLOUTS, engine, config, LAYOUT)]
