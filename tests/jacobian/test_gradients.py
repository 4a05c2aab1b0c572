"""Layers without a backward pass, or with a wrong one, are refused by name by both engines; sound models pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.engine import GroupEngine
from tests.jacobian.group.test_architectures import OTHERS
from tests.models import FAMILIES, randomise, tiny_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class _Wrapped(nn.Module):
    """A linear layer in the manner of a kernel."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear


class NoBackward(_Wrapped):
    """A kernel for inference alone."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.linear(x)


class InferenceMode(_Wrapped):
    """The same in inference mode."""

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def through(function: type[torch.autograd.Function]) -> type[_Wrapped]:
    """Return a layer whose input goes through a custom function."""

    class Through(_Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(function.apply(x))

    return Through


class NoneGradient(torch.autograd.Function):
    """A copy that forgets its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        return None


class ZeroGradient(NoneGradient):
    """A copy whose gradient is zeros."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


class StraightThrough(NoneGradient):
    """Activations in four bits, differentiated as if they were not rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        unit = x.abs().amax(-1, keepdim=True) / 7
        return (x / unit).round() * unit

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def put(model: Any, wrapper: Callable[[nn.Module], nn.Module], names: tuple[str, ...], layers: Any = (0, 1)) -> Any:
    """Return a copy of the model with wrapped linear layers."""
    model = copy.deepcopy(model)
    for layer in (model.model.layers[index] for index in layers):
        for name in names:
            part = layer.self_attn if name in ATTENTION else layer.mlp
            setattr(part, name, wrapper(getattr(part, name)))
    return model


@pytest.mark.parametrize("engine", [GroupEngine, JacobianEngine])
@pytest.mark.parametrize(("names", "count"), [(ATTENTION + MLP, 14), (MLP, 6)], ids=["all", "MLPs"])
def test_kernels_without_backward_are_refused(engine: Any, names: tuple[str, ...], count: int) -> None:
    """Every cut layer is counted and the first are named, before any rollout is there."""
    with pytest.raises(
        ValueError, match=rf"{count} layer\(s\).*layers\.0\.\w+\.{names[0]} \(NoBackward: .*no gradient"
    ):
        engine(put(tiny_model(dtype=torch.float32), NoBackward, names))


@pytest.mark.parametrize(
    "wrapper",
    [NoBackward, InferenceMode, through(NoneGradient), through(ZeroGradient), through(StraightThrough)],
    ids=["no_grad", "inference mode", "None", "zeros", "rounded"],
)
def test_one_layer_is_enough(wrapper: Any) -> None:
    """One bad projection of one layer, whose share of the whole is small, is found and is the only one named."""
    with pytest.raises(
        ValueError, match=r"1 layer\(s\) without an exact gradient: model\.layers\.1\.self_attn\.q_proj "
    ):
        JacobianEngine(put(tiny_model(), wrapper, ("q_proj",), (1,)))


@pytest.mark.parametrize("wrapper", [NoBackward, through(ZeroGradient)], ids=["no_grad", "zeros"])
def test_narrow_dtypes(wrapper: Any) -> None:
    """Rounding in bfloat16 hides no missing gradient."""
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj "):
        JacobianEngine(put(tiny_model(dtype=torch.bfloat16), wrapper, ("down_proj",), (1,)))


def test_dynamic_int8_is_refused() -> None:
    """torch.ao's dynamic quantisation, whose kernels know no backward pass."""
    quantised = torch.ao.quantization.quantize_dynamic(tiny_model(dtype=torch.float32), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"15 layer\(s\).*q_proj"):
        JacobianEngine(quantised)


def detached(part: str) -> nn.Module:
    """Return a model whose part detaches what it returns."""
    model: Any = tiny_model()
    module = model.get_submodule(part)

    class Detached(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            found: Tensor = super().forward(*args, **kwargs).detach()
            return found

    module.__class__ = Detached
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("part", ["model.layers.1", "model.layers.0.mlp", "model.norm", "lm_head"])
def test_detached_outputs_are_refused(part: str) -> None:
    """Also those of a whole layer, of the last norm and of the head."""
    with pytest.raises(ValueError, match=rf"1 layer\(s\) without an exact gradient: {part} "):
        JacobianEngine(detached(part))


def test_detach_inside_attention_is_refused() -> None:
    """All modules of the layer have gradients; the function between them has only a part of its own."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any) -> Any:
        key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
        shares = (query @ key.mT * scaling).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9).softmax(-1)
        return (shares.detach() @ value).transpose(1, 2), None

    AttentionInterface.register("detached_shares", attend)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn \(LlamaAttention: its gradient explains 0\.\d\d"):
        JacobianEngine(tiny_model(attention="detached_shares"))


def test_weights_of_inference_mode_are_refused() -> None:
    """A model that was loaded in inference mode."""
    with torch.inference_mode():
        model = tiny_model()
    with pytest.raises(ValueError, match=r"created in inference mode, model\.embed_tokens\.weight first"):
        JacobianEngine(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_sound_models_pass(name: str, dtype: torch.dtype) -> None:
    """Norms, rotary tables under no_grad, residuals as arguments, routers, recurrences and windows are no fault."""
    if name in FAMILIES:
        JacobianEngine(tiny_model(name, dtype=dtype, tied=True))
        return
    config = OTHERS[name][0]
    config._experts_implementation = "eager"  # the grouped matrix product takes no width this small
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model, 0)
    JacobianEngine(model.to(dtype).eval())


def test_trained_and_compiled_models_pass() -> None:
    """LoRA, frozen weights, gradient checkpointing, train mode and torch.compile change nothing of the check."""
    model: Any = tiny_model(dtype=torch.float32)
    JacobianEngine(torch.compile(model, backend="eager"))
    model.gradient_checkpointing_enable()
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules="all-linear"))
    for adapters in (True, False):
        JacobianEngine(adapted.train(), adapters=adapters)
    assert all(module.training for module in adapted.modules())
    assert any(parameter.requires_grad for parameter in adapted.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_called_a_missing_backward_pass(value: float) -> None:
    """The gradient of NaN says nothing about kernels; the user is told of the weights."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = value
    with pytest.raises(ValueError, match="output for 6 tokens is not finite.*Check its weights"):
        JacobianEngine(model)
