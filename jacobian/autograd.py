"""Exact vector-Jacobian products of a live causal language model: the oracle engine."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cepo.jacobian.records import Group, Link, LinkJacobian, Request, Rollout, Target
from cepo.jacobian.targets import FEWEST_HEAD_ROWS, sum_of_terms, target_positions, target_terms

Answer = list[dict[str, LinkJacobian]]


class Engine(Protocol):
    """What turns rollouts into Jacobians; every engine gives equal results."""

    @property
    def width(self) -> int:
        """D, the size of the embeddings."""

    def refusal(self, rollout: Rollout) -> str | None:
        """Return why the rollout cannot be served, or None."""

    def compute(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Yield the answer to each request, in order: the Jacobians by link name, a dict a rollout or row of signs."""


class Pass(NamedTuple):
    """One cotangent: d(score of a span), with no cotangent flowing through the positions of the blocked spans."""

    target: str
    score: Target
    blocked: tuple[str, ...]


def passes_of(links: Sequence[Link]) -> list[Pass]:
    """Return the distinct cotangents that the links need."""
    passes: dict[Pass, None] = {}
    for link in links:
        passes[_pass_of(link)] = None
        if link.effect == "residual":
            passes[_mediated_pass_of(link)] = None
    return list(passes)


def link_jacobians(
    rollout: Rollout, links: Sequence[Link], gradients: Mapping[Pass, Tensor], context_energy: bool
) -> dict[str, LinkJacobian]:
    """Return the Jacobian of each link by its name.

    Args:
        rollout: what was differentiated.
        links: from `parse_link`.
        gradients: for each of `passes_of(links)` the (T, D) gradient with respect to the embedding rows; rows that
            neither a link nor the context's energy needs may be missing (zero).
        context_energy: whether the records carry it.
    """
    jacobians = {}
    for link in links:
        gradient_TD = gradients[_pass_of(link)]
        source = rollout.spans[link.source].positions
        jac_SD = gradient_TD[list(source)]
        energy = float(gradient_TD.double().square().sum()) if context_energy else None
        if link.effect == "residual":
            through_SD = gradients[_mediated_pass_of(link)][list(source)]
            direction_D = gradient_TD[list(rollout.spans[link.mediator[0]].positions)].mean(0)
            residual_SD = _regress_out(jac_SD, through_SD * direction_D)
            if energy is not None:
                energy += float(residual_SD.double().square().sum() - jac_SD.double().square().sum())
            jac_SD = residual_SD
        targets = target_positions(rollout, link.target, link.score)
        jacobians[link.name] = LinkJacobian(link, jac_SD, source, targets, energy)
    return jacobians


def combine(answers: Answer, signs: Sequence[Sequence[float]]) -> Answer:
    """Return the rollouts' Jacobians summed with each row of signs, or the answers as they are where there are none."""
    if not signs:
        return answers
    combined: Answer = []
    for row in signs:
        combined.append({})
        for name, first in answers[0].items():
            jac_SD = sum(sign * answer[name].jac_SD for sign, answer in zip(row, answers, strict=True))
            combined[-1][name] = LinkJacobian(first.link, jac_SD, first.source_positions, (), None)  # type: ignore[arg-type]
    return combined


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
        self.model = self._peft.get_base_model() if self._peft is not None else model
        config = getattr(self.model, "config", None)
        if config is None or not hasattr(self.model, "get_input_embeddings"):
            raise ValueError(f"model is a {type(model).__name__}; expected a Hugging Face causal language model")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("model is an encoder-decoder; expected a decoder-only causal language model")
        self._text_config = config.get_text_config()
        # The class's forward: an instance may carry a wrapper (accelerate's autocast) that must not be entered.
        self.forward = type(self.model).forward
        self._keeps_rows = "logits_to_keep" in inspect.signature(self.forward).parameters

    @property
    def width(self) -> int:
        """D, the size of the embeddings that enter the first layer."""
        return int(self.model.get_input_embeddings().weight.shape[-1])

    def refusal(self, rollout: Rollout) -> str | None:
        """Return why the model cannot take this rollout (too long, ids outside its vocabulary), or None."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        limit = getattr(self._text_config, "max_position_embeddings", None) or float("inf")
        tokens = rollout.token_ids
        if len(tokens) > limit:
            return f"too long: {len(tokens)} tokens, and the model takes {limit}"
        outside = [token for token in tokens if not 0 <= token < vocabulary]
        return f"token id {outside[0]} is outside the model's vocabulary of {vocabulary}" if outside else None

    def jacobians(self, group: Group, links: Sequence[Link], *, context_energy: bool = True) -> Answer:
        """Return, for each rollout of the group, the Jacobian of each link by the link's name.

        J_AB = d s_B / d E(A), with E(A) the output of the embedding module at the positions of A, by exact reverse
        mode. One forward pass a rollout; one backward pass for every distinct (target, score, blocked spans).

        Args:
            group: well-formed rollouts of one prompt.
            links: from `parse_link`.
            context_energy: whether the records carry it.

        Returns:
            One dict a rollout; matrices are detached, on the model's device, float32 or wider.

        Raises:
            ValueError: if a rollout is malformed or refused.
        """
        return next(self.compute([Request(group, tuple(links), context_energy)]))

    def compute(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Yield the answer to each request, in order; see `jacobians` and `cepo.jacobian.records.Request`."""
        self.check(requests)
        for request in requests:
            with self.prepared():
                answers = []
                for rollout in request.group.rollouts:
                    gradients = self._gradients(rollout, passes_of(request.links))
                    answers.append(link_jacobians(rollout, request.links, gradients, request.context_energy))
            yield combine(answers, request.signs)

    def check(self, requests: Sequence[Request]) -> None:
        """Raise ValueError if a rollout of the requests has no Jacobians."""
        for request in requests:
            for rollout in request.group.rollouts:
                problem = rollout.malformed or self.refusal(rollout)
                if problem:
                    raise ValueError(f"rollouts holds one that has no Jacobians: {problem}")

    def _gradients(self, rollout: Rollout, passes: Sequence[Pass]) -> dict[Pass, Tensor]:
        """Return the (T, D) gradient of each pass's score with respect to all embedding rows, from one forward pass."""
        device = self.model.get_input_embeddings().weight.device
        terms_of = {key: target_terms(rollout, key.target, key.score) for key in passes}
        rows = sorted({term.position - 1 for terms in terms_of.values() for term in terms})
        row_of = {position: index for index, position in enumerate(rows)}
        filled = rows + rows[-1:] * (FEWEST_HEAD_ROWS - len(rows))
        # Tokens after the last row that predicts a target have no part in any score.
        ids_BT = torch.tensor([rollout.token_ids[: rows[-1] + 1]], device=device)
        with _watched(self.model, needs_layers=any(key.blocked for key in passes)) as watch:
            logits_PV = self._logits(ids_BT, filled)
            scores = {
                key: sum_of_terms(logits_PV[[row_of[term.position - 1] for term in terms]], terms)
                for key, terms in terms_of.items()
            }
            gradients = {}
            for index, key in enumerate(passes):
                watch.blocked = [
                    position
                    for name in key.blocked
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
        output = self.forward(self.model, input_ids=ids_BT, use_cache=False, return_dict=True, **keep)
        return output.logits[0] if self._keeps_rows else output.logits[0, list(rows)]

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Eval mode, gradients on, autocast off, adapters as asked; everything restored on the way out."""
        modes = [(module, module.training) for module in self.model.modules()]
        trainable = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        device_type = self.model.get_input_embeddings().weight.device.type
        adapters = contextlib.nullcontext() if self._adapters or not self._peft else self._peft.disable_adapter()
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast(device_type, enabled=False),
                adapters,
            ):
                self.model.eval()
                for parameter, _ in trainable:  # no weight gradient is ever wanted, so no activation is kept for one
                    parameter.requires_grad_(False)
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


def _pass_of(link: Link) -> Pass:
    return Pass(link.target, link.score, link.mediator if link.effect == "direct" else ())


def _mediated_pass_of(link: Link) -> Pass:
    """A residual effect also needs what the prompt asks of the mediator."""
    return Pass(link.mediator[0], "log_likelihood", ())


def _regress_out(jac_SD: Tensor, mediated_SD: Tensor) -> Tensor:
    """Return J less its Frobenius projection on the mediated component (zero where that component is zero)."""
    energy = mediated_SD.square().sum()
    coefficient = torch.where(
        energy > 0, (jac_SD * mediated_SD).sum() / energy.clamp_min(torch.finfo(energy.dtype).tiny), 0
    )
    return jac_SD - coefficient * mediated_SD
