"""The oracle: exact Jacobians of a live causal language model by plain autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cepo.jacobian.model import HeldModel, ModelEngine
from cepo.jacobian.passes import Pass, link_jacobians, passes_of
from cepo.jacobian.path import Point, between, path_answer
from cepo.jacobian.protocol import Answer, PathAnswer, PathRequest, Request
from cepo.jacobian.records import Rollout
from cepo.jacobian.targets import sum_of_terms, target_terms


class JacobianEngine(ModelEngine):
    """Computes Jacobians by plain autograd, one rollout and one forward pass at a time.

    Serves any Hugging Face causal language model, in its own dtype, PEFT adapters on or off. The model is restored
    afterwards: training flags as before, `param.grad` untouched, hooks removed, no graph kept. Autocast is switched
    off, so a float32 model is differentiated in float32 even inside a bf16 trainer.

    Each rollout is run by itself, with one backward pass per distinct (target, function, blocked spans), so results do
    not depend on batch size or order.

    Args:
        model: a causal LM, PEFT-wrapped or not.
        adapters: False runs the base model with its adapters disabled (PEFT models only).

    Raises:
        ValueError: as `cepo.jacobian.model.HeldModel`.
    """

    def compute(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Yield the answer to each request, in order; see `cepo.jacobian.protocol.Request`."""
        self._check(request.group for request in requests)
        for request in requests:
            with self._held.prepared():
                answers = []
                for rollout in request.group.rollouts:
                    gradients = self._gradients(rollout, passes_of(request.links))
                    answers.append(link_jacobians(rollout, request.links, gradients, request.context_energy))
            yield answers

    def paths(self, requests: Sequence[PathRequest]) -> Iterator[PathAnswer]:
        """Yield the answer to each path request, in order; see `cepo.jacobian.protocol.PathRequest`."""
        self._check_paths(requests)
        for request in requests:
            with self._held.prepared():
                passes, rollouts = passes_of(request.links), request.group.rollouts
                with torch.no_grad():
                    values = [
                        [
                            {key: float(value) for key, value in self._values(each, passes).items()}
                            for each in (rollout, *others)
                        ]
                        for rollout, others in zip(rollouts, request.counterfactuals, strict=True)
                    ]

                def contract(points: Sequence[Point], request: PathRequest = request) -> list[dict[Pass, Tensor]]:
                    return [
                        self._contraction(
                            request.group.rollouts[at.rollout],
                            request.counterfactuals[at.rollout][at.other],
                            at.fraction,
                            request,
                        )
                        for at in points
                    ]

                answer = path_answer(request, values, contract)
            yield answer

    def _gradients(self, rollout: Rollout, passes: Sequence[Pass]) -> dict[Pass, Tensor]:
        """Return the (T, D) gradient of each pass with respect to all embedding rows, from one forward pass."""
        with _watched(self._held, needs_layers=any(key.blocked for key in passes)) as watch:
            values = self._values(rollout, passes)
            gradients = {}
            for index, key in enumerate(passes):
                watch.blocked = [
                    position
                    for name in key.blocked
                    for position in rollout.spans[name].positions
                    if position < watch.leaf_BTD.shape[1]
                ]
                (gradient_BTD,) = torch.autograd.grad(
                    values[key], [watch.leaf_BTD], retain_graph=index + 1 < len(passes)
                )
                gradient_TD = gradient_BTD[0].to(torch.promote_types(gradient_BTD.dtype, torch.float32))
                padding = (0, 0, 0, len(rollout.token_ids) - gradient_TD.shape[0])
                gradients[key] = nn.functional.pad(gradient_TD, padding).detach()
        return gradients

    def _values(self, rollout: Rollout, passes: Sequence[Pass]) -> dict[Pass, Tensor]:
        """Return the target function of each pass, a scalar, with a graph if gradients are enabled."""
        terms_of = {key: target_terms(rollout, key.target, key.function) for key in passes}
        rows = sorted({term.position - 1 for terms in terms_of.values() for term in terms})
        row_of = {position: index for index, position in enumerate(rows)}
        # Tokens after the last row that predicts a target affect no target function, except through rotary tables that
        # depend on the sequence's length.
        ids, settled = rollout.token_ids, self._held.settled_length
        ids_BT = torch.tensor(
            [ids if len(ids) > settled else ids[: rows[-1] + 1]], device=self._held.embedding.weight.device
        )
        logits_PV = self._held.logits(rows, input_ids=ids_BT, use_cache=False)
        return {
            key: sum_of_terms(logits_PV[[row_of[term.position - 1] for term in terms]], terms)
            for key, terms in terms_of.items()
        }

    def _contraction(
        self, rollout: Rollout, other: Rollout, fraction: float, request: PathRequest
    ) -> dict[Pass, Tensor]:
        """Return each pass's gradient at a point of the path, contracted with E(X) - E(X') row by row: (S,)."""
        source = list(rollout.spans[request.links[0].source].positions)
        with _watched(self._held, needs_layers=False) as watch:
            watch.other_ids, watch.fraction = other.token_ids, fraction
            values = self._values(rollout, passes_of(request.links))
            contracted = {}
            for index, (key, value) in enumerate(values.items()):
                (gradient_BTD,) = torch.autograd.grad(value, [watch.leaf_BTD], retain_graph=index + 1 < len(values))
                rows_SD = gradient_BTD[0, source].to(watch.step_BTD.dtype) * watch.step_BTD[0, source]
                contracted[key] = rows_SD.double().sum(-1).cpu()
        return contracted


class _Watch:
    """The leaf that replaces the embeddings in one forward pass, and the positions at which cotangents are cut."""

    def __init__(self) -> None:
        self.leaf_BTD: Tensor = torch.empty(0)
        self.blocked: list[int] = []
        self.other_ids: Sequence[int] = ()  # of the counterfactual, if the leaf is on the path from one
        self.fraction = 1.0
        self.step_BTD: Tensor = torch.empty(0)  # E(X) - E(X')

    def embed(self, module: nn.Module, inputs: Any, output_BTD: Tensor) -> Tensor:
        own_BTD = output_BTD.detach()
        if self.other_ids:
            ids_BT = torch.tensor([self.other_ids[: own_BTD.shape[1]]], device=own_BTD.device)
            own_BTD, self.step_BTD = between(own_BTD, module.forward(ids_BT).detach(), self.fraction)
        self.leaf_BTD = own_BTD.clone().requires_grad_()
        return self.leaf_BTD.clone()  # which a model may scale in place, as a leaf may not be

    def enter_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._guard(args[0] if args else kwargs["hidden_states"])

    def leave_layer(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._guard(output[0] if isinstance(output, (tuple, list)) else output)

    def _guard(self, hidden_BTD: Tensor) -> None:
        if hidden_BTD.requires_grad:
            hidden_BTD.register_hook(self._cut)

    def _cut(self, cotangent_BTD: Tensor) -> Tensor:
        if not self.blocked:
            return cotangent_BTD
        index = torch.tensor(self.blocked, device=cotangent_BTD.device)
        # Between layers there can be several streams: (B, T, N, D) with hyper-connections, (N, B, T, D) in Gemma 3n.
        tokens_axis = 1 if cotangent_BTD.shape[1] == self.leaf_BTD.shape[1] else -2
        return cotangent_BTD.index_fill(tokens_axis, index, 0.0)


@contextlib.contextmanager
def _watched(model: HeldModel, *, needs_layers: bool) -> Iterator[_Watch]:
    """Replace the embedding module's output by the leaf and, for blocked spans, hook the input of every layer.

    Information leaves a position only through its layers' inputs (as keys, values and the residual stream). So cutting
    the cotangents of every layer's input and of the last output at the blocked positions gives the path-specific
    derivative, with those positions' keys and values held fixed.
    """
    watch = _Watch()
    handles = [model.embedding.register_forward_hook(watch.embed)]
    try:
        if needs_layers:
            layers = model.layers
            if not layers:
                raise ValueError(
                    "links asks for a direct effect, but no list of decoder layers was found in "
                    f"{type(model.causal_lm).__name__}; ask for ':total' or ':residual' instead"
                )
            handles += [layer.register_forward_pre_hook(watch.enter_layer, with_kwargs=True) for layer in layers]
            handles.append(layers[-1].register_forward_hook(watch.leave_layer))
        yield watch
    finally:
        for handle in handles:
            handle.remove()
