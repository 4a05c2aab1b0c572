"""Exact vector-Jacobian products of a live causal language model: the oracle engine."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cepo.jacobian.records import Group, Link, LinkJacobian, Rollout, Target
from cepo.jacobian.targets import target_positions, target_score

# What one backward pass is for: target span, score, and the spans whose positions are blocked.
_Pass = tuple[str, Target, tuple[str, ...]]


class Engine(Protocol):
    """What turns rollouts into Jacobians; every engine gives equal results."""

    @property
    def width(self) -> int: ...

    def refusal(self, rollout: Rollout) -> str | None: ...

    def jacobians(self, group: Group, links: Sequence[Link]) -> list[dict[str, LinkJacobian]]: ...


class JacobianEngine:
    """Computes Jacobians by plain autograd, one rollout and one forward pass at a time.

    Serves any Hugging Face causal language model, in its own dtype, PEFT adapters on or off. The model is left as it
    was found: training flags restored, `param.grad` untouched, hooks removed, no graph kept. Autocast is switched off,
    so a float32 model is differentiated in float32 even inside a bf16 trainer.

    Because every rollout is run alone, results do not depend on batch size or order.

    Args:
        model: a causal LM, PEFT-wrapped or not.
        adapters: False runs the base model with its adapters disabled (PEFT models only).

    Raises:
        ValueError: for an encoder-decoder model, a model without input embeddings, a prompt-learning adapter (its
            virtual tokens have no position in token_ids), or adapters=False on a model that has none.
    """

    def __init__(self, model: Any, *, adapters: bool = True) -> None:
        self._peft = model if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else None
        if self._peft is not None and any(c.is_prompt_learning for c in self._peft.peft_config.values()):
            raise ValueError("model carries a prompt-learning adapter; expected LoRA or another weight adapter")
        if not adapters and self._peft is None:
            raise ValueError("adapters is False, but the model is not a PeftModel and has none to switch off")
        self._adapters = adapters
        self._model = self._peft.get_base_model() if self._peft is not None else model
        config = getattr(self._model, "config", None)
        if config is None or not hasattr(self._model, "get_input_embeddings"):
            raise ValueError(f"model is a {type(model).__name__}; expected a Hugging Face causal language model")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("model is an encoder-decoder; expected a decoder-only causal language model")
        self._text_config = config.get_text_config()
        # The class's forward: an instance may carry a wrapper (accelerate's autocast) that must not be entered.
        self._forward = type(self._model).forward
        self._keeps_rows = "logits_to_keep" in inspect.signature(self._forward).parameters

    @property
    def width(self) -> int:
        """D, the size of the embeddings that enter the first layer."""
        return int(self._model.get_input_embeddings().weight.shape[-1])

    def refusal(self, rollout: Rollout) -> str | None:
        """Return why the model cannot take this rollout (too long, ids outside its vocabulary), or None."""
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        limit = getattr(self._text_config, "max_position_embeddings", None) or float("inf")
        tokens = rollout.token_ids
        if len(tokens) > limit:
            return f"too long: {len(tokens)} tokens, and the model takes {limit}"
        outside = [token for token in tokens if not 0 <= token < vocabulary]
        return f"token id {outside[0]} is outside the model's vocabulary of {vocabulary}" if outside else None

    def jacobians(self, group: Group, links: Sequence[Link]) -> list[dict[str, LinkJacobian]]:
        """Return, for each rollout of the group, the Jacobian of each link by the link's name.

        J_AB = d s_B / d E(A), with E(A) the output of the embedding module at the positions of A, by exact reverse
        mode. One forward pass a rollout; one backward pass for every distinct (target, score, blocked spans).

        Args:
            group: well-formed rollouts of one prompt.
            links: from `parse_link`.

        Returns:
            One dict a rollout; matrices are detached, on the model's device, float32 or wider.

        Raises:
            ValueError: if a rollout is malformed or refused.
        """
        for rollout in group.rollouts:
            problem = rollout.malformed or self.refusal(rollout)
            if problem:
                raise ValueError(f"rollouts holds one that has no Jacobians: {problem}")
        with self._prepared():
            return [self._rollout_jacobians(rollout, links) for rollout in group.rollouts]

    def _rollout_jacobians(self, rollout: Rollout, links: Sequence[Link]) -> dict[str, LinkJacobian]:
        mediated: dict[str, _Pass] = {}  # a residual effect also needs what the prompt asks of the mediator
        passes: dict[_Pass, None] = {}
        for link in links:
            passes[_pass_of(link)] = None
            if link.effect == "residual":
                mediated[link.name] = (link.mediator[0], "log_likelihood", ())
                passes[mediated[link.name]] = None
        gradients = self._gradients(rollout, list(passes))
        jacobians = {}
        for link in links:
            gradient_TD = gradients[_pass_of(link)]
            source = rollout.spans[link.source].positions
            jac_SD = gradient_TD[list(source)]
            energy = float(gradient_TD.double().square().sum())
            if link.effect == "residual":
                through_SD = gradients[mediated[link.name]][list(source)]
                direction_D = gradient_TD[list(rollout.spans[link.mediator[0]].positions)].mean(0)
                residual_SD = _regress_out(jac_SD, through_SD * direction_D)
                energy += float(residual_SD.double().square().sum() - jac_SD.double().square().sum())
                jac_SD = residual_SD
            targets = target_positions(rollout, link.target, link.score)
            jacobians[link.name] = LinkJacobian(link, jac_SD, source, targets, energy)
        return jacobians

    def _gradients(self, rollout: Rollout, passes: Sequence[_Pass]) -> dict[_Pass, Tensor]:
        """Return the (T, D) gradient of each pass's score with respect to all embedding rows, from one forward pass."""
        device = self._model.get_input_embeddings().weight.device
        wanted = {key: target_positions(rollout, key[0], key[1]) for key in passes}
        rows = sorted({position - 1 for positions in wanted.values() for position in positions})
        row_of = {position: index for index, position in enumerate(rows)}
        # Tokens after the last row that predicts a target have no part in any score.
        ids_BT = torch.tensor([rollout.token_ids[: rows[-1] + 1]], device=device)
        with _watched(self._model, needs_layers=any(blocked for _, _, blocked in passes)) as watch:
            logits_PV = self._logits(ids_BT, rows)
            scores = {
                key: target_score(logits_PV[[row_of[position - 1] for position in positions]], rollout, key[0], key[1])
                for key, positions in wanted.items()
            }
            gradients = {}
            for index, key in enumerate(passes):
                watch.blocked = [
                    position
                    for name in key[2]
                    for position in rollout.spans[name].positions
                    if position < ids_BT.shape[1]
                ]
                (gradient_BTD,) = torch.autograd.grad(
                    scores[key], [watch.leaf_BTD], retain_graph=index + 1 < len(passes)
                )
                gradient_TD = gradient_BTD[0].to(torch.promote_types(gradient_BTD.dtype, torch.float32))
                padding = (0, 0, 0, len(rollout.token_ids) - gradient_TD.shape[0])
                gradients[key] = nn.functional.pad(gradient_TD, padding).detach()
        return gradients

    def _logits(self, ids_BT: Tensor, rows: Sequence[int]) -> Tensor:
        keep = {"logits_to_keep": torch.tensor(rows, device=ids_BT.device)} if self._keeps_rows else {}
        output = self._forward(self._model, input_ids=ids_BT, use_cache=False, return_dict=True, **keep)
        return output.logits[0] if self._keeps_rows else output.logits[0, list(rows)]

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        """Eval mode, gradients on, autocast off, adapters as asked; everything restored on the way out."""
        modes = [(module, module.training) for module in self._model.modules()]
        trainable = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        device_type = self._model.get_input_embeddings().weight.device.type
        adapters = contextlib.nullcontext() if self._adapters or not self._peft else self._peft.disable_adapter()
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast(device_type, enabled=False),
                adapters,
            ):
                self._model.eval()
                yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, requires_grad in trainable:  # PEFT thaws adapters when it switches them on again
                parameter.requires_grad_(requires_grad)


class _Watch:
    """The leaf that stands for the embeddings during one forward pass, and the positions no cotangent may pass."""

    def __init__(self) -> None:
        self.leaf_BTD: Tensor = torch.empty(0)
        self.blocked: list[int] = []

    def embed(self, module: nn.Module, inputs: Any, output_BTD: Tensor) -> Tensor:
        self.leaf_BTD = output_BTD.detach().clone().requires_grad_()
        return self.leaf_BTD

    def enter_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._guard(args[0] if args else kwargs["hidden_states"])

    def leave_layer(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._guard(output[0] if isinstance(output, tuple) else output)

    def _guard(self, hidden_BTD: Tensor) -> None:
        if hidden_BTD.requires_grad:
            hidden_BTD.register_hook(self._cut)

    def _cut(self, cotangent_BTD: Tensor) -> Tensor:
        if not self.blocked:
            return cotangent_BTD
        index = torch.tensor(self.blocked, device=cotangent_BTD.device)
        return cotangent_BTD.index_fill(-2, index, 0.0)


@contextlib.contextmanager
def _watched(model: Any, *, needs_layers: bool) -> Iterator[_Watch]:
    """Put the leaf in place of the embeddings' output and, for blocked paths, a guard at every layer's door.

    Information leaves a position only through what its layers' inputs become (keys, values, the residual stream), so
    cutting the cotangent of every layer's input and of the last output at the blocked positions is the path-specific
    derivative with those positions' keys and values held fixed.
    """
    watch = _Watch()
    handles = [model.get_input_embeddings().register_forward_hook(watch.embed)]
    try:
        if needs_layers:
            layers = _decoder_layers(model)
            handles += [layer.register_forward_pre_hook(watch.enter_layer, with_kwargs=True) for layer in layers]
            handles.append(layers[-1].register_forward_hook(watch.leave_layer))
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _decoder_layers(model: Any) -> list[nn.Module]:
    count = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in (decoder or model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(
        f"links asks for a direct effect, but no list of {count} layers was found in {type(model).__name__}; "
        "ask for ':total' or ':residual' instead"
    )


def _pass_of(link: Link) -> _Pass:
    return link.target, link.score, link.mediator if link.effect == "direct" else ()


def _regress_out(jac_SD: Tensor, mediated_SD: Tensor) -> Tensor:
    """Return J less its Frobenius projection on the mediated component (zero where that component is zero)."""
    energy = mediated_SD.square().sum()
    coefficient = torch.where(
        energy > 0, (jac_SD * mediated_SD).sum() / energy.clamp_min(torch.finfo(energy.dtype).tiny), 0
    )
    return jac_SD - coefficient * mediated_SD
