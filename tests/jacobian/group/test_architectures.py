"""Other architectures, and rotary tables that change with the length: served, or handed to the oracle."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
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
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.protocol import PathRequest, Request
from cepo.jacobian.records import Group
from tests.jacobian.group.ragged import PAPER, assert_same, ragged_rollout
from tests.jacobian.test_autograd import link
from tests.models import VOCABULARY, judge_rollout, randomise, tiny_model

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
