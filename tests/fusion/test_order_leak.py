"""The order leak against plain log-likelihoods, what it takes off S, and a judge that copies its verdict."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from cepo.counterfactual.exchange import exchanged_prompts
from cepo.fusion.config import RewardConfig
from cepo.fusion.order_leak import less_leak, order_leaks
from cepo.fusion.score import score_rollouts
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.reading.judge import write_judgement
from cepo.jacobian.reading.reasoner import ReasonerLayout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout
from cepo.train import testbed, testbed_model
from cepo.train.prompts import JUDGE, UNGUARDED_JUDGE

ITEMS = testbed.generate_items(3, seed=5, cue_agreement=0.5)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return testbed_model.build_model(testbed.build_tokenizer(), seed=0).double()


def read(layout: Any, *, copied: bool = False) -> tuple[list[Rollout], list[Rollout | None]]:
    """Return two gold rollouts of each item and those with the responses exchanged."""
    tokenizer = testbed.build_tokenizer()
    reader, rollouts = SpanReader(tokenizer, layout), []
    for item in ITEMS:
        messages = [{"role": "user", "content": item.prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for scores in ((8, 3), (2, 7)):
            criteria = item.criteria + (f" \\boxed{{{scores[0]}, {scores[1]}}}" if copied else "")
            text = write_judgement(criteria, item.analysis, scores) + tokenizer.eos_token
            rollouts.append(reader.read(tokenizer(prompt).input_ids, tokenizer(text).input_ids, messages))
    return rollouts, exchanged_prompts(rollouts, reader)


@torch.no_grad()
def likelihood(model: Any, rollout: Rollout) -> float:
    """Return the log-likelihood of the criteria, teacher-forced."""
    chances_TV = torch.log_softmax(model(torch.tensor([rollout.token_ids])).logits[0], -1)
    return sum(float(chances_TV[at - 1, rollout.token_ids[at]]) for at in rollout.spans["criteria"].positions)


@pytest.mark.parametrize("engine", [JacobianEngine, GroupEngine])
def test_the_leak_is_the_change_of_the_criterias_likelihood(model: Any, engine: Any) -> None:
    """Protects the definition, on both engines, and that a rollout without an exchanged prompt has none."""
    rollouts, exchanged = read(JUDGE)
    exchanged[1] = None
    found = order_leaks(dict(enumerate(rollouts)), dict(enumerate(exchanged)), engine(model), JUDGE)
    expected = {
        index: likelihood(model, own) - likelihood(model, other)
        for index, (own, other) in enumerate(zip(rollouts, exchanged, strict=True))
        if other is not None
    }
    assert found == pytest.approx(expected, abs=1e-9)
    assert len(found) == 5
    assert min(map(abs, found.values())) > 1e-4


def test_the_leak_is_taken_off_s_and_recorded(model: Any) -> None:
    """Protects the reward: with a weight it is the one without, less the weight times tanh(leak / 2), at least 0.

    S of a link, of a chain and the reward are one value: what is recorded is what is paid.
    """
    rollouts, exchanged = read(JUDGE)
    rollouts.append(replace(rollouts[0], spans={}, numbers=(), malformed="no tags"))
    engine = GroupEngine(model)
    plain = RewardConfig(links={"X->Y": 1.0}, score="influence")
    before = [score.reward for score in score_rollouts(rollouts[:-1], engine, plain, JUDGE)]
    for weight in (0.0, 0.5, 100.0):
        config = replace(plain, also=("order_leak",), leak_weight=weight)
        scores = score_rollouts(rollouts, engine, config, JUDGE, exchanged=[*exchanged, None])
        assert (scores[-1].reward, scores[-1].order_leak) == (0.0, None)
        for score, own in zip(scores[:-1], before, strict=True):
            assert score.order_leak is not None
            taken = weight * max(0.0, math.tanh(score.order_leak / 2))
            assert score.reward == pytest.approx(max(0.0, own - taken))
            assert score.reward == score.values["X->Y"] == score.links["X->Y"].value
    with pytest.raises(ValueError, match="exchanged is None, for 7 rollouts"):
        score_rollouts(rollouts, engine, config, JUDGE)
    (first, *_) = score_rollouts(rollouts[:2], engine, RewardConfig(), JUDGE)
    assert first.order_leak is None


def test_a_leak_costs_only_where_it_is_known_and_positive() -> None:
    """Protects criteria that are likelier the other way round, or whose prompt could not be exchanged."""
    assert less_leak(0.6, None, 1.0) == less_leak(0.6, -3.0, 1.0) == 0.6
    assert [less_leak(value, 2.0 * math.atanh(0.3), 1.0) for value in (0.6, 0.1)] == pytest.approx([0.3, 0.0])


def test_copied_verdicts_earn_nothing(model: Any) -> None:
    """Protects against the hack: the same judgements with their verdict in the criteria score 0, with the reason."""
    honest, copied = read(JUDGE)[0], read(JUDGE, copied=True)[0]
    scores = score_rollouts(
        [*honest, *copied], GroupEngine(model), RewardConfig(links={"X->Y": 1.0}, score="influence"), JUDGE
    )
    assert all(score.reward > 0.0 for score in scores[:6])
    assert [score.reward for score in scores[6:]] == [0.0] * 6
    assert scores[6].malformed == "scores in <specific_criteria>: '\\\\boxed{8, 3}'"
    assert all(rollout.malformed is None for rollout in read(UNGUARDED_JUDGE, copied=True)[0])


def test_settings_that_cannot_work_are_refused() -> None:
    """Protects from a run that would find out late: a reasoner has no responses, and a weight is a number >= 0."""
    config = RewardConfig(links={"rationale->answer": 1.0}, leak_weight=1.0)
    with pytest.raises(ValueError, match="the prompt of a reasoner has none"):
        config.parsed_links(ReasonerLayout())
    for weight in (-1.0, math.nan, math.inf, "much"):
        with pytest.raises(ValueError, match="leak_weight is"):
            RewardConfig(leak_weight=weight)  # type: ignore[arg-type]
