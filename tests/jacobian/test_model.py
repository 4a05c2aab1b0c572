"""The live model: adapters, refusals, surroundings that change nothing, and a model that is left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, T5Config

from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.records import Group, Rollout
from tests.jacobian.test_autograd import LINKS, embeddings, jacobians, link, plain_scores, relative
from tests.models import VOCABULARY, WIDTH, judge_rollout, randomise, tiny_config, tiny_model

in_double = pytest.mark.usefixtures("_in_double")


def lora_model(family: str = "llama", *, seed: int = 3, dropout: float = 0.0, **options: Any) -> nn.Module:
    """Return a PEFT model whose LoRA matrices, both of them, are random."""
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, lora_alpha=4
    )
    model = get_peft_model(tiny_model(family, **options), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model.double().eval()


@in_double
def test_adapters_on_and_off() -> None:
    """With adapters the Jacobians are those of the merged model, without them those of the base model, to the bit."""
    rollout = judge_rollout()
    group = Group((rollout,))
    adapted = lora_model()
    on = JacobianEngine(adapted).jacobians(group, LINKS)[0]
    off = JacobianEngine(adapted, adapters=False).jacobians(group, LINKS)[0]
    again = JacobianEngine(adapted).jacobians(group, LINKS)[0]
    base = jacobians(tiny_model("llama"), rollout)
    merged = jacobians(lora_model().merge_and_unload(), rollout)
    for name in base:
        assert torch.equal(off[name].jac_SD, base[name].jac_SD), name
        assert torch.equal(on[name].jac_SD, again[name].jac_SD), name
        assert relative(on[name].jac_SD, merged[name].jac_SD) < 1e-10, name
        assert relative(on[name].jac_SD, base[name].jac_SD) > 1e-2, name


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": "all-linear"}]
)
def test_adapters_on_the_embeddings(options: dict[str, Any]) -> None:
    """Adapters that wrap or copy the embedding module leave E(A) where it was: what enters the first layer."""
    options = {"target_modules": ["q_proj", "embed_tokens"], **options}
    if "modules_to_save" in options:
        options["target_modules"] = ["q_proj"]
    model = get_peft_model(tiny_model("llama"), LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, **options))
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            parameter.data = parameter.data.double() + 0.3 * noise
            assert "lora" in name or "modules_to_save" in name
    model, rollout = model.eval(), judge_rollout()
    leaf_TD = embeddings(model, rollout).requires_grad_()
    score = plain_scores(model, rollout, leaf_TD[None])["scores", "log_odds"]
    (expected_TD,) = torch.autograd.grad(score.sum(), leaf_TD)
    found = jacobians(model, rollout, [link("X->Y@log_odds")])["X->Y@log_odds"]
    # Without InDouble transformers' own float32 casts limit how well two orders of the same sum agree.
    assert relative(found.jac_SD, expected_TD[list(found.source_positions)]) < 1e-6


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("adapters", [True, False])
def test_adapter_state_is_left_as_found(adapters: bool, trainable: bool) -> None:
    """Switching adapters off for a moment neither freezes trainable matrices nor thaws frozen ones."""
    model = lora_model()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(trainable)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    JacobianEngine(model, adapters=adapters).jacobians(Group((judge_rollout(),)), LINKS)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def mixed_modes(model: nn.Module) -> dict[str, bool]:
    """Put some modules in train mode and some in eval mode, and return which."""
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 1
    return {name: module.training for name, module in model.named_modules()}


def hook_count(model: nn.Module) -> int:
    """Return how many forward and backward hooks hang on the model's modules."""
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (
            *(module._forward_hooks, module._forward_pre_hooks, module._backward_hooks),
            *(module._backward_pre_hooks, module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs),
        )
    )


@pytest.mark.parametrize("build", [lambda: tiny_model("llama"), lora_model], ids=["plain", "lora"])
def test_model_is_left_as_found(build: Callable[[], nn.Module]) -> None:
    """Training flags, gradients, hooks, requires_grad and weights are what they were before."""
    model = build()
    parameters = dict(model.named_parameters())
    kept = next(name for name in parameters if "norm" in name)
    parameters[kept].grad = torch.full_like(parameters[kept], 3.0)
    frozen = next(name for name in parameters if "mlp" in name)
    parameters[frozen].requires_grad_(False)
    modes, weights = mixed_modes(model), {name: value.detach().clone() for name, value in parameters.items()}
    flags, hooks = {name: value.requires_grad for name, value in parameters.items()}, hook_count(model)
    with torch.no_grad():
        JacobianEngine(model).jacobians(Group((judge_rollout(),)), LINKS)
        assert not torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert hook_count(model) == hooks
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[name])
        if name == kept:
            assert torch.equal(value.grad, torch.full_like(value, 3.0))
        else:
            assert value.grad is None


@pytest.mark.parametrize("broken", ["o_proj", "norm"])
def test_model_is_left_as_found_after_an_exception(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass that dies (out of memory, say) leaves flags and hooks as they were."""
    model = tiny_model("llama")
    modes, hooks = mixed_modes(model), hook_count(model)
    module = model.model.layers[1].self_attn.o_proj if broken == "o_proj" else model.model.norm

    def fail(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(module, "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            jacobians(model, judge_rollout())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert hook_count(model) == hooks
    assert torch.is_grad_enabled()
    assert jacobians(model, judge_rollout())["X->Y@log_odds"].jac_SD.norm() > 0


def test_live_dropout_is_off() -> None:
    """A policy in train mode with dropout gives what it gives in eval mode, and stays in train mode."""
    rollout = judge_rollout()
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = jacobians(model, rollout)
    found = jacobians(model.train(), rollout)
    assert all(module.training for module in model.modules())
    for name in expected:
        assert torch.equal(found[name].jac_SD, expected[name].jac_SD)
    adapted = lora_model(dropout=0.5)
    expected, found = jacobians(adapted, rollout), jacobians(adapted.train(), rollout)
    assert torch.equal(found["X->Y@margin"].jac_SD, expected["X->Y@margin"].jac_SD)


def test_gradient_checkpointing_changes_nothing() -> None:
    """A trainer that recomputes activations gets the same Jacobians, direct effect included."""
    rollout, model = judge_rollout(), tiny_model("llama")
    expected = jacobians(model, rollout)
    model.gradient_checkpointing_enable()
    found = jacobians(model.train(), rollout)
    for name in expected:
        assert torch.equal(found[name].jac_SD, expected[name].jac_SD)


def test_a_compiled_part_blocks_what_it_should() -> None:
    """In compiled code the hooks that cut the direct effect are as they were when it was made, or are not run."""
    rollout, model, direct = judge_rollout(), tiny_model("llama"), link("Z->Y")
    expected = jacobians(model, rollout, [direct])[direct.name].jac_SD
    model.model.compile(backend="eager")
    assert torch.equal(jacobians(model, rollout, [direct])[direct.name].jac_SD, expected)


def test_streams_between_layers_are_blocked_at_their_tokens() -> None:
    """Hyper-connections give each token several hidden states, (B, T, N, D); here two, which sum to the plain one."""
    rollout, model, direct = judge_rollout(), tiny_model("llama"), link("Z->Y")
    expected = jacobians(model, rollout, [direct])[direct.name].jac_SD
    first, last = model.model.layers
    plain = first.forward, last.forward
    first.forward = lambda *args, **options: torch.stack(
        [share * plain[0](*args, **options) for share in (0.3, 0.7)], 2
    )
    last.forward = lambda hidden_BTND, **options: plain[1](hidden_BTND.sum(2), **options)
    assert relative(jacobians(model, rollout, [direct])[direct.name].jac_SD, expected) < 1e-6


def in_no_grad() -> Any:
    """Return a context without gradients."""
    return torch.no_grad()


def in_inference_mode() -> Any:
    """Return a context in inference mode."""
    return torch.inference_mode()


def in_autocast() -> Any:
    """Return a context that computes in bfloat16."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("context", [in_no_grad, in_inference_mode, in_autocast])
def test_surroundings_change_nothing(context: Callable[[], Any]) -> None:
    """No-grad, inference mode and a bf16 trainer's autocast leave a float32 result as it is, bit for bit."""
    model, rollout = tiny_model("qwen3", dtype=torch.float32), judge_rollout()
    expected = jacobians(model, rollout)
    with context():
        found = jacobians(model, rollout)
    for name in expected:
        assert found[name].jac_SD.dtype == torch.float32
        assert torch.equal(found[name].jac_SD, expected[name].jac_SD)
        assert found[name].context_energy == expected[name].context_energy
        assert not found[name].jac_SD.requires_grad


@pytest.mark.parametrize("wrapped", ["plain", "peft"])
def test_autocast_wrapper_on_the_instance_is_not_entered(wrapped: str) -> None:
    """accelerate replaces `model.forward` on the instance by a bf16 autocast; the engine calls the class's own."""
    rollout = judge_rollout()
    model = tiny_model("llama", dtype=torch.float32) if wrapped == "plain" else lora_model().float()
    expected = jacobians(model, rollout)
    calls = 0

    def wrap(module: nn.Module) -> None:
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return inner(*args, **kwargs)

        module.forward = forward

    wrap(model)
    if wrapped == "peft":
        wrap(model.get_base_model())
    found = jacobians(model, rollout)
    assert calls == 0
    for name in expected:
        assert torch.equal(found[name].jac_SD, expected[name].jac_SD)


def test_refuses_what_the_model_cannot_take() -> None:
    """Too long rollouts and foreign token ids get a reason, and are never run."""
    engine = JacobianEngine(tiny_model("llama"))
    rollout = judge_rollout()
    assert engine.refusal(rollout) is None
    assert engine.refusal(replace(rollout, completion_ids=(5,) * 55)) is None  # 64 exactly
    long = replace(rollout, completion_ids=(5,) * 56)
    assert engine.refusal(long) == "too long: 65 tokens, and the model takes 64"
    for bad in (VOCABULARY, -1):
        foreign = replace(rollout, completion_ids=(*rollout.completion_ids[:-1], bad))
        assert engine.refusal(foreign) == f"token id {bad} is outside the model's vocabulary of {VOCABULARY}"
    malformed = Rollout(rollout.prompt_ids, (5,), malformed="missing <analysis>")
    for bad_rollout, reason in ((long, "too long"), (malformed, "missing <analysis>")):
        with pytest.raises(ValueError, match=reason):
            engine.jacobians(Group((rollout, bad_rollout)), LINKS)
    assert engine.width == WIDTH


@in_double
def test_a_multimodal_model_reads_text_alone() -> None:
    """Without images it is its language model, in both engines; ids that stand for images are refused by name."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=tiny_config("llama"),
        vision_config=CLIPVisionConfig(**vision, image_size=16, patch_size=8),
        image_token_index=2,
    )
    model: Any = LlavaForConditionalGeneration(config).double().eval()
    randomise(model, 0)
    text: Any = tiny_model("llama")
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    rollout = judge_rollout()
    (wanted,) = JacobianEngine(text).jacobians(Group((rollout,)), LINKS)
    for engine in (JacobianEngine(model), GroupEngine(model)):
        (found,) = engine.jacobians(Group((rollout,)), LINKS)
        assert all(relative(found[name].jac_SD, wanted[name].jac_SD) < 1e-10 for name in wanted)
        with_image = replace(rollout, prompt_ids=(2, *rollout.prompt_ids[1:]))
        assert "does not stand for text (image_token_i" in str(engine.refusal(with_image))
    assert JacobianEngine(text).refusal(with_image) is None


def prompt_tuned() -> nn.Module:
    """Return a model with two virtual tokens before the text."""
    return get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))


def activated_lora() -> nn.Module:
    """Return a model whose adapter begins at a token of the text."""
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"], alora_invocation_tokens=[5])
    return get_peft_model(tiny_model("llama"), config)


def encoder_decoder() -> nn.Module:
    """Return a tiny T5."""
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=VOCABULARY, **shape))


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (encoder_decoder, {}, "encoder-decoder"),
        (prompt_tuned, {}, "prompt-learning"),
        (activated_lora, {}, "switches on or mixes for each text"),
        (tiny_model, {"adapters": False}, "the model has no adapters"),
        (lambda: nn.Linear(2, 2), {}, "Linear"),
    ],
    ids=["encoder-decoder", "prompt-tuning", "aLoRA", "no adapters", "no language model"],
)
def test_constructor_refuses(build: Callable[[], nn.Module], options: dict[str, bool], message: str) -> None:
    """A model whose Jacobians would be wrong is refused before any work, by a message that says why."""
    with pytest.raises(ValueError, match=message):
        JacobianEngine(build(), **options)


@pytest.fixture(autouse=True)
def _grad_enabled() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()
