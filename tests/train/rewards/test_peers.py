"""Protects the published rewards: each formula against an independent computation, and the contract with TRL."""

import itertools
import math
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cepo.jacobian.model import HeldModel
from cepo.jacobian.records import Rollout
from cepo.train import testbed
from cepo.train.grpo import build_rewards, load_config
from cepo.train.rewards.answer import answer_log_probabilities
from cepo.train.rewards.peers import (
    CausalImportance,
    CounterfactualSensitivity,
    LogCausalImportance,
    Necessity,
    PeerReward,
    bernoulli_js,
)
from tests.models import FAMILIES, JUDGE_POSITIONS, InDouble, judge_rollout, span, tiny_model
from tests.paths import ROOT
from tests.train.rewards.test_causal import make_trainer, rows

TARGETS = JUDGE_POSITIONS["scores"]
BOTH = ["criteria", "analysis"]
RATIONALE = JUDGE_POSITIONS["criteria"] + JUDGE_POSITIONS["analysis"]


def score(reward: PeerReward, model: Any, rollouts: Sequence[Rollout]) -> list[float]:
    """Return the rewards of rollouts that no tokenizer wrote."""
    held = HeldModel(model)
    values = []
    with held.prepared(), InDouble():
        for variants in reward.variants(rollouts):
            ids_P = torch.tensor([variants[0].token_ids[place] for place in variants[0].targets])
            values.append(reward.value(answer_log_probabilities(held, variants), ids_P))
    return values


@torch.no_grad()
def alone(model: Any, ids: Sequence[int], targets: Sequence[int]) -> Tensor:
    """Return (P, V) log-probabilities of one sequence, without padding, masks or the reward's own code."""
    with InDouble():
        logits_TV = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return torch.log_softmax(logits_TV.double(), -1)[[target - 1 for target in targets]]


def log_likelihood(log_p_PV: Tensor, rollout: Rollout) -> float:
    return sum(float(row_V[rollout.token_ids[place]]) for row_V, place in zip(log_p_PV, TARGETS, strict=True))


def prefix_log_likelihoods(model: Any, rollout: Rollout, kept: Sequence[int]) -> list[float]:
    """Return log p of the answer after the first k tokens of criteria and analysis, for each k."""
    found = []
    for count in kept:
        ids = list(rollout.token_ids)
        for place in reversed(RATIONALE[count:]):
            del ids[place]
        shift = len(RATIONALE) - count
        found.append(log_likelihood(alone(model, ids, [place - shift for place in TARGETS]), rollout))
    return found


def test_the_divergence_of_two_coins_is_the_textbook_one() -> None:
    """By hand: JS(1/2, 1) = H(3/4) - H(1/2) / 2; opposite coins reach the bound, equal ones nothing."""
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert bernoulli_js(0.5, 1.0) == pytest.approx(entropy - math.log(2) / 2, abs=1e-15)
    assert bernoulli_js(1.0, 0.0) == pytest.approx(math.log(2), abs=1e-15)
    assert bernoulli_js(0.3, 0.3) == 0.0


def test_cir_is_the_mean_divergence_over_truncated_rationales() -> None:
    """Seven tokens of rationale, three prefixes: k = 0, 2, 4, each rebuilt by hand and run alone."""
    model, rollout = tiny_model("qwen3"), judge_rollout(3)
    whole = math.exp(log_likelihood(alone(model, rollout.token_ids, TARGETS), rollout))
    expected = 0.0
    for log_p in prefix_log_likelihoods(model, rollout, (0, 2, 4)):
        p, mean = math.exp(log_p), (math.exp(log_p) + whole) / 2
        for one in (p, whole):
            expected += (one * math.log(one / mean) + (1 - one) * math.log((1 - one) / (1 - mean))) / 2 / 3
    assert score(CausalImportance(prefixes=3, source=BOTH), model, [rollout]) == [pytest.approx(expected, rel=1e-8)]
    assert expected > 0


def test_log_cir_is_the_signed_mean_log_ratio_and_is_clipped() -> None:
    """More prefixes than tokens are every prefix once; a divergence would lose the sign."""
    model = tiny_model("qwen3")
    rollouts = [judge_rollout(seed) for seed in range(4)]
    expected = []
    for rollout in rollouts:
        prefixes = prefix_log_likelihoods(model, rollout, range(7))
        expected.append(log_likelihood(alone(model, rollout.token_ids, TARGETS), rollout) - sum(prefixes) / 7)
    assert min(expected) < 0 < max(expected)
    found = score(LogCausalImportance(prefixes=99, source=BOTH), model, rollouts)
    assert found == pytest.approx(expected, rel=1e-10)
    clipped = score(LogCausalImportance(prefixes=99, source=BOTH, bound=0.05), model, rollouts)
    assert clipped == [math.copysign(min(abs(value), 0.05), value) for value in found]


def test_csr_is_the_divergence_under_another_prompts_rationale() -> None:
    """Two prompts: the only donor of each is the other's, so the edited ids are known without the code that edits."""
    model = tiny_model("qwen3")
    one, other = judge_rollout(1), judge_rollout(2, prompt_seed=7)
    edited = list(one.token_ids)
    for place in RATIONALE:
        edited[place] = other.token_ids[place]
    own_PV, edited_PV = alone(model, one.token_ids, TARGETS), alone(model, edited, TARGETS)
    expected = sum(
        float(torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=p) for p in pair)))
        for pair in zip(own_PV, edited_PV, strict=True)
    ) / len(TARGETS)
    assert score(CounterfactualSensitivity(source=BOTH, edits=3), model, [one, other])[0] == pytest.approx(
        expected, rel=1e-8
    )
    assert score(CounterfactualSensitivity(source=BOTH, bound=1e-3), model, [one, other]) == [1e-3, 1e-3]


def test_csr_without_a_donor_is_zero_and_permutations_need_none() -> None:
    """Completions of one prompt are no donors for each other."""
    model = tiny_model("qwen3")
    rollouts = [judge_rollout(1), judge_rollout(2)]
    assert score(CounterfactualSensitivity(), model, rollouts) == [0.0, 0.0]
    permuted = CounterfactualSensitivity(edit="permutation", edits=2)
    assert min(score(permuted, model, rollouts)) > 0
    for variants, rollout in zip(permuted.variants(rollouts), rollouts, strict=True):
        for variant in variants[1:]:
            pairs = enumerate(zip(variant.token_ids, rollout.token_ids, strict=False))
            assert {place for place, (new, old) in pairs if new != old} <= set(JUDGE_POSITIONS["criteria"])


def test_csr_uses_every_order_of_a_short_span_once() -> None:
    """Three tokens have five other orders; a longer span beside them goes on after these are used up."""
    rollout, analysis = judge_rollout(1), JUDGE_POSITIONS["analysis"]
    own = [rollout.token_ids[place] for place in analysis]
    assert len(set(own)) == 3
    others = set(itertools.permutations(own)) - {tuple(own)}
    reward = CounterfactualSensitivity(edit="permutation", edits=8, source="analysis")
    ((_, *edited),) = reward.variants([rollout])
    assert Counter(tuple(one.token_ids[place] for place in analysis) for one in edited) == Counter(others)
    ((_, *edited),) = CounterfactualSensitivity(edit="permutation", edits=8, source=BOTH).variants([rollout])
    assert len({one.token_ids for one in edited}) == 8
    assert {tuple(one.token_ids[place] for place in analysis) for one in edited} == {*others, tuple(own)}


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma"])
def test_necessity_hides_the_rationale_and_leaves_every_other_token_in_its_place(family: str) -> None:
    """The rest of the sequence is run on a cache that never held the rationale, at its own positions."""
    model, rollout = tiny_model(family), judge_rollout(5)
    first, last = min(RATIONALE), max(RATIONALE)
    spans = {**rollout.spans, "criteria": span("criteria", range(first, last + 1))}
    hidden = replace(rollout, spans=spans)
    ids = torch.tensor([rollout.token_ids])
    with torch.no_grad(), InDouble():
        cache = model(input_ids=ids[:, :first], use_cache=True).past_key_values
        places = torch.arange(last + 1, ids.shape[1])[None]
        rest_TV = model(input_ids=ids[:, last + 1 :], past_key_values=cache, position_ids=places).logits[0]
    log_p_PV = torch.log_softmax(rest_TV.double(), -1)[[target - last - 2 for target in TARGETS]]
    expected = log_likelihood(alone(model, rollout.token_ids, TARGETS), rollout) - log_likelihood(log_p_PV, rollout)
    assert score(Necessity(), model, [hidden]) == [pytest.approx(expected, rel=1e-8)]
    assert score(Necessity(bound=1e-3), model, [hidden]) == [math.copysign(1e-3, expected)]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_batching_change_nothing(family: str) -> None:
    """Variants of unequal lengths, hidden ones among them, in one pass and each alone."""
    held, rollouts = HeldModel(tiny_model(family)), [judge_rollout(1), judge_rollout(2)]
    variants = [v for group in CausalImportance(source=BOTH).variants(rollouts) for v in group]
    variants += [v for group in Necessity(source=BOTH).variants(rollouts) for v in group]
    with held.prepared(), InDouble():
        together = torch.stack(list(answer_log_probabilities(held, variants)))
        single = torch.stack([one for variant in variants for one in answer_log_probabilities(held, [variant])])
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together, single, rtol=1e-9, atol=1e-9)


def test_a_trainer_gets_rewards_metrics_and_its_model_back(tmp_path: Path) -> None:
    """The contract of CausalReward: bound, nothing left behind, malformed scores 0 and is counted, pickles."""
    tokenizer = testbed.build_tokenizer()
    rewards = [CausalImportance(source=BOTH), LogCausalImportance(), CounterfactualSensitivity(), Necessity()]
    trainer = make_trainer("grpo", tokenizer, list(rewards), tmp_path)
    trainer.model.train()
    batch = rows(tokenizer, testbed.generate_items(4, seed=5, cue_agreement=0.5))
    batch["completion_ids"][3] = batch["completion_ids"][3][:5]
    for reward in rewards:
        with pytest.raises(ValueError, match="not bound"):
            reward(**batch)
        metrics: dict[str, float] = {}
        extra: dict[str, list[Any]] = {}
        assert reward.bind(trainer) is reward
        values = reward(**batch, log_metric=metrics.__setitem__, log_extra=extra.__setitem__)
        assert values[3] == 0.0
        assert 0.0 not in values[:3]
        assert metrics[f"{reward.__name__}/malformed"] == 0.25
        assert metrics[f"{reward.__name__}/unchanged"] == 0.0
        assert extra[f"{reward.__name__} malformed"][:3] == [None] * 3
        backwards = {name: column[::-1] for name, column in batch.items()}
        assert reward(**backwards) == values[::-1]
        assert pickle.loads(pickle.dumps(reward)).bind(trainer)(**batch) == values
    trainer.args.generation_batch_size = trainer.num_generations
    with pytest.raises(ValueError, match="1 prompt at a time.*edit='permutation'"):
        CounterfactualSensitivity().bind(trainer)
    CounterfactualSensitivity(edit="permutation").bind(trainer)
    assert trainer.model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in trainer.model.parameters())


def test_recipes_name_them_and_refuse_settings_that_they_do_not_have(tmp_path: Path) -> None:
    """`cepo train` and `cepo experiment` build rewards from these mappings."""
    recipe = ROOT / "train" / "recipes" / "testbed.yaml"
    good = [
        {"name": "cir", "prefixes": 2},
        {"name": "log_cir"},
        {"name": "csr", "edit": "donor"},
        {"name": "necessary"},
    ]
    functions, _ = build_rewards(load_config(recipe, {"rewards": good}))
    assert [function.__name__ for function in functions] == ["cir", "log_cir", "csr", "necessary"]
    functions, _ = build_rewards(load_config(recipe, {"rewards": good, "kind": "reasoning"}))
    assert [function.source for function in functions] == [("rationale",)] * 4
    for bad, complaint in (
        ({"name": "cir", "bound": 1.0}, "bound"),
        ({"name": "cir", "prefixes": 0}, "prefixes is 0"),
        ({"name": "csr", "edit": "swap"}, "edit is 'swap'"),
        ({"name": "csr", "edits": 0}, "edits is 0"),
        ({"name": "necessary", "bound": 0}, "bound is 0"),
        ({"name": "necessary", "source": "scores"}, "source is 'scores'"),
    ):
        with pytest.raises(ValueError, match=complaint):
            build_rewards(load_config(recipe, {"rewards": [bad]}))
