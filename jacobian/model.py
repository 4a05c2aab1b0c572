"""A live causal language model as engines use it: checked once, prepared for each call, and restored afterwards."""

from __future__ import annotations

import abc
import contextlib
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cepo.jacobian.gradients import check_gradients
from cepo.jacobian.layers import decoder_layers
from cepo.jacobian.links import Link
from cepo.jacobian.positions import position_limit, settled_length
from cepo.jacobian.protocol import Answer, PathAnswer, PathRequest, Request
from cepo.jacobian.records import Group, Rollout
from cepo.jacobian.sharding import check_readable, shape_of, sharding_of
from cepo.jacobian.targets import FEWEST_HEAD_ROWS

_MEDIA = re.compile(
    r"(boi_|eoi_)?(image|video|audio|vision)_.*(token_id|token_index)|(boi|eoi|boa|eoa)_token_(id|index)"
)


class HeldModel:
    """Holds a causal language model that is also used elsewhere, for example in a trainer.

    Args:
        model: a causal LM, PEFT-wrapped or not.
        adapters: False runs the base model with its adapters disabled (PEFT models only).

    Attributes:
        causal_lm: the model without PEFT's wrapper.
        forward: its class's forward method. An instance may have a wrapped one (accelerate's autocast), which is not
            called.
        forward_takes: the names of that method's parameters.

    Raises:
        ValueError: for an encoder-decoder model, a model without input embeddings, a prompt-learning adapter (its
            virtual tokens have no position in token_ids), one that PEFT switches for each text, parameters created in
            inference mode or sharded by FSDP1, or adapters=False on a model that has none.
    """

    def __init__(self, model: Any, *, adapters: bool = True) -> None:
        model = getattr(model, "_orig_mod", model)  # of torch.compile: the same weights
        if isinstance(model, nn.Module):
            sharding_of(model)  # raises for sharding that no engine can read
        self._peft = model if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else None
        if self._peft is not None and any(c.is_prompt_learning for c in self._peft.peft_config.values()):
            raise ValueError("model carries a prompt-learning adapter; expected LoRA or another weight adapter")
        if self._peft is not None and any(_depends_on_wrapper(c) for c in self._peft.peft_config.values()):
            raise ValueError(
                "model carries an adapter that PEFT switches on or mixes for each text, outside of the layers (aLoRA, "
                "X-LoRA or Poly); expected LoRA or another weight adapter"
            )
        if not adapters and self._peft is None:
            raise ValueError("adapters is False, but the model has no adapters (such as LoRA) to switch off")
        self._adapters = adapters
        self.causal_lm = self._peft.get_base_model() if self._peft is not None else model
        config = getattr(self.causal_lm, "config", None)
        if config is None or not hasattr(self.causal_lm, "get_input_embeddings"):
            raise ValueError(f"model is a {type(model).__name__}; expected a Hugging Face causal language model")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("model is an encoder-decoder; expected a decoder-only causal language model")
        fixed = [name for name, parameter in self.causal_lm.named_parameters() if parameter.is_inference()]
        if fixed:
            raise ValueError(
                f"model has {len(fixed)} parameter(s) created in inference mode, {fixed[0]} first, through which no "
                "gradient flows; load it outside torch.inference_mode()"
            )
        self._text_config = config.get_text_config()
        self.forward = type(self.causal_lm).forward
        self.forward_takes = frozenset(inspect.signature(self.forward).parameters)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order; [] if no list of them is found."""
        return decoder_layers(self.causal_lm)

    @cached_property
    def settled_length(self) -> float:
        """Most tokens for which the rotary tables do not depend on the length; see `cepo.jacobian.positions`."""
        limit = position_limit(self._text_config) or 2**20
        with torch.no_grad():
            return settled_length(self.causal_lm, limit)

    @cached_property
    def reads_ids_elsewhere(self) -> bool:
        """Whether the model reads token ids outside its embedding module too, such as for embeddings per layer.

        Tested on six tokens that get the embeddings of six others: the output is then not that of the others.
        """
        vocabulary, device = shape_of(self.embedding.weight)[0], self.embedding.weight.device
        ids_BT, other_BT = (
            torch.tensor([[(step * place + 3) % vocabulary for place in range(6)]], device=device) for step in (7, 5)
        )
        with self.prepared(), torch.no_grad():
            wanted = self.logits([*range(6)], input_ids=other_BT, use_cache=False)
            handle = self.embedding.register_forward_hook(lambda module, inputs, output: module.forward(other_BT))
            try:
                found = self.logits([*range(6)], input_ids=ids_BT, use_cache=False)
            finally:
                handle.remove()
        noise = torch.finfo(self.embedding.weight.dtype).eps ** 0.5  # of kernels that add in any order
        return bool((found - wanted).abs().max() > noise * wanted.abs().max())

    @property
    def embedding(self) -> Any:
        """The input embedding module."""
        return self.causal_lm.get_input_embeddings()

    @cached_property
    def _media_ids(self) -> dict[int, str]:
        """The ids that stand for images, video or sound, each with its name in the config of a multimodal model."""
        found = vars(self.causal_lm.config).items() if self.causal_lm.config is not self._text_config else ()
        return {value: name for name, value in found if isinstance(value, int) and _MEDIA.fullmatch(name)}

    def refusal(self, rollout: Rollout) -> str | None:
        """Return why the model cannot run this rollout (too long, unknown ids, images), or None."""
        vocabulary = shape_of(self.embedding.weight)[0]
        limit, tokens = position_limit(self._text_config), rollout.token_ids
        if limit is not None and len(tokens) > limit:
            return f"too long: {len(tokens)} tokens, and the model takes {limit}"
        media = self._media_ids
        for token in tokens:
            if not 0 <= token < vocabulary:
                return f"token id {token} is outside the model's vocabulary of {vocabulary}"
            if token in media:
                return f"token id {token} does not stand for text ({media[token]}); only text can be run"
        return None

    def logits(self, rows: list[int], **inputs: Any) -> Tensor:
        """Return the logits (P, V) at some positions of one sequence.

        Args:
            rows: positions, at least one; fewer than FEWEST_HEAD_ROWS are filled up with copies of the last row.
            **inputs: keyword arguments of the forward pass.
        """
        padded = [*rows, *rows[-1:] * (FEWEST_HEAD_ROWS - len(rows))]
        keeps_rows = "logits_to_keep" in self.forward_takes
        if keeps_rows:
            inputs["logits_to_keep"] = torch.tensor(padded, device=self.embedding.weight.device)
        logits_PV: Tensor = self.forward(self.causal_lm, return_dict=True, **inputs).logits[0]
        return logits_PV if keeps_rows else logits_PV[padded]

    def check_gradients(self) -> None:
        """Raise ValueError if a layer has no exact gradient; see `cepo.jacobian.gradients`."""
        if sharding_of(self.causal_lm) == "tensor parallel":
            return  # inside layers that are split over ranks, gradients are partial sums, so the check would fail

        def run(ids: Sequence[int]) -> Any:
            ids_BT = torch.tensor([list(ids)], device=self.embedding.weight.device)
            return self.forward(self.causal_lm, input_ids=ids_BT, use_cache=False, return_dict=True)

        with self.prepared():
            check_gradients(self.causal_lm, self.layers, run, vocabulary=shape_of(self.embedding.weight)[0])

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Set eval mode, gradients on, autocast and compilation off, adapters as asked; restore everything on exit.

        Raises:
            ValueError: if the model is sharded and not inside `cepo.jacobian.sharding.readable`.
        """
        check_readable(self.causal_lm)
        modes = [(module, module.training) for module in self.causal_lm.modules()]
        trainable = [(parameter, parameter.requires_grad) for parameter in self.causal_lm.parameters()]
        adapters = contextlib.nullcontext() if self._adapters or not self._peft else self._peft.disable_adapter()
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast(self.embedding.weight.device.type, enabled=False),
                # Compiled code runs hooks as they were when it was made, or not at all.
                torch.compiler.set_stance("force_eager"),
                adapters,
            ):
                self.causal_lm.eval()
                for parameter, _ in trainable:  # no weight gradients, so no activations are saved for them
                    parameter.requires_grad_(False)
                yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, requires_grad in trainable:  # PEFT sets requires_grad when it enables adapters again
                parameter.requires_grad_(requires_grad)


class ModelEngine(abc.ABC):
    """Base class of the engines on a live model.

    Args:
        model: a causal LM, PEFT-wrapped or not; or the `HeldModel` of another engine, already checked.
        adapters: False runs the base model with its adapters disabled (PEFT models only).

    Raises:
        ValueError: as `HeldModel`; for layers without an exact gradient; for a model that is sharded and not inside
            `cepo.jacobian.sharding.readable`.
    """

    def __init__(self, model: Any, *, adapters: bool = True) -> None:
        self._held = model if isinstance(model, HeldModel) else HeldModel(model, adapters=adapters)
        if self._held is not model:
            self._held.check_gradients()

    @property
    def width(self) -> int:
        """D, the size of the embeddings that enter the first layer."""
        return int(shape_of(self._held.embedding.weight)[-1])

    def refusal(self, rollout: Rollout) -> str | None:
        """Return why the model cannot run this rollout (too long, ids outside its vocabulary), or None."""
        return self._held.refusal(rollout)

    def jacobians(self, group: Group, links: Sequence[Link], *, context_energy: bool = True) -> Answer:
        """Return, for each rollout of the group, the Jacobian of each link by the link's name.

        J_AB = d s_B / d E(A), with E(A) the output of the embedding module at the positions of A, by exact reverse
        mode.

        Args:
            group: well-formed rollouts of one prompt.
            links: from `parse_link`.
            context_energy: whether to record it; it costs a backward pass through the whole prompt.

        Returns:
            One dict per rollout; matrices are detached, on the model's device, float32 or wider.

        Raises:
            ValueError: if a rollout is malformed or refused.
        """
        return next(self.compute([Request(group, tuple(links), context_energy)]))

    @abc.abstractmethod
    def compute(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Yield the answer to each request, in order; see `cepo.jacobian.protocol.Request`."""

    @abc.abstractmethod
    def paths(self, requests: Sequence[PathRequest]) -> Iterator[PathAnswer]:
        """Yield the answer to each path request, in order; see `cepo.jacobian.protocol.PathRequest`."""

    def _check(self, groups: Iterable[Group]) -> None:
        """Raise ValueError if a rollout is malformed or the model cannot run it."""
        for group in groups:
            for rollout in group.rollouts:
                problem = rollout.malformed or self.refusal(rollout)
                if problem:
                    raise ValueError(f"rollouts holds one that cannot be run: {problem}")

    def _check_paths(self, requests: Sequence[PathRequest]) -> None:
        """Raise ValueError if a rollout or a counterfactual, or a path between them, cannot be run."""
        self._check(request.group for request in requests)
        self._check(Group((other,)) for request in requests for others in request.counterfactuals for other in others)
        if any(request.nodes for request in requests) and self._held.reads_ids_elsewhere:
            raise ValueError(
                f"a {type(self._held.causal_lm).__name__} also reads token ids outside its input embeddings, so a path "
                "between embeddings is not a path between texts; expected the score effect or explained, and no path "
                "in also (nodes 0)"
            )


def _depends_on_wrapper(config: Any) -> bool:
    """Tell whether an adapter needs what PEFT's wrapper works out from each text: without it, aLoRA is the base."""
    return config.peft_type in ("XLORA", "POLY") or bool(getattr(config, "alora_invocation_tokens", None))


@contextlib.contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Use the model's own eager attention, which supports batched and second backward passes."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
