"""Check, once per model and before any work, that every layer's gradient is that of the function it computes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# By dtype: relative size of the step, and the largest relative error of the gradient's prediction.
_STEP_AND_TOLERANCE = {torch.bfloat16: (1e-1, 0.4), torch.float16: (3e-2, 0.4)}
_OF_WIDE = (3e-3, 0.05)
_TOKENS = 6
_TRIES = 6  # a step may change which experts a router picks, which is not a fault; it does not happen in every try
_SHOWN = 6
_NO_GRADIENT = "its output carries no gradient"
_NOTHING_ENTERS = "what enters it carries no gradient"


def check_gradients(
    model: nn.Module, layers: Sequence[nn.Module], run: Callable[[Sequence[int]], Any], *, vocabulary: int
) -> None:
    """Raise ValueError if a module's output has no gradient, or a gradient that is not its function's.

    Six tokens are run four times. The input x of each decoder layer is replaced by x, x + u and x - u, with u random
    and small relative to x, so that a fault in one layer does not mask one in another. For each module inside and after
    the layers, with inputs i and outputs o, d = o(+u) - o(-u) is compared with the autograd Jacobian J:
    <d, J (i(+u) - i(-u))> must be |d|^2. An output that varies and does not require grad is a fault as well. Modules at
    fault are tried again with other tokens, and refused if they fail in all six tries.

    Detected: kernels without a backward pass (int8, GPTQ, AWQ, FP8 for inference); outputs that are detached or made
    under no_grad or inference_mode; custom functions that return None, zeros or a wrong gradient; rounding with a
    straight-through gradient; a detach() inside attention. Not detected: faults below the tolerance (5% of a module's
    change; 40% in bfloat16 and float16, where rounding hides more, possibly a detach() in attention); faults in a block
    whose router picked other experts in every try; in experts that none of the six tokens reaches; and faults that
    only longer sequences cause.

    Args:
        model: the model to check; in eval mode, its parameters frozen, gradients on.
        layers: its decoder layers; if empty, the step is taken at the embeddings.
        run: runs the model on token ids, without a cache, and returns its output.
        vocabulary: number of token ids.

    Raises:
        ValueError: naming the modules; or if the output is not finite, so that nothing can be said of gradients.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    stages = list(layers) or [embedding]
    above = {module for module in names if layers and any(layer in module.modules() for layer in layers)} - {*layers}
    watched = [module for module in names if module not in above and module is not embedding]
    step, tolerance = _STEP_AND_TOLERANCE.get(embedding.weight.dtype, _OF_WIDE)  # type: ignore[arg-type]
    suspects: dict[nn.Module, str] = {}
    for attempt in range(_TRIES):
        ids = [((7 + attempt) * place + 3 + attempt) % vocabulary for place in range(_TOKENS)]
        found = _Look(watched, stages, step, tolerance, attempt).faults(partial(run, ids))
        suspects = {module: fault for module, fault in found.items() if module in suspects or attempt == 0}
        if not suspects:
            return
    inner = [m for m in suspects if not any(other is not m and other in suspects for other in m.modules())]
    shown = ", ".join(f"{names[m]} ({type(m).__name__}: {suspects[m]})" for m in inner[:_SHOWN])
    raise ValueError(
        f"model has {len(inner)} layer(s) without an exact gradient: {shown}{', ...' if len(inner) > _SHOWN else ''}; "
        "nothing computed through them would be exact. Expected layers with a backward pass: load the model in "
        "float32, bfloat16 or float16, without inference-only kernels (int8, GPTQ, AWQ, FP8) or detached outputs"
    )


@dataclass
class _Call:
    """One call of a module: its input and output tensors with the step added and with the step subtracted.

    `chosen` holds the tensors that are not floating-point, such as the experts that a router picked.
    """

    inputs: list[list[Tensor]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)
    chosen: list[list[Tensor]] = field(default_factory=list)


class _Look:
    """One try: the runs with the step, and the run whose gradients are compared with them."""

    def __init__(
        self, watched: Sequence[nn.Module], stages: Sequence[nn.Module], step: float, tolerance: float, seed: int
    ) -> None:
        self._watched, self._stages = watched, stages
        self._step, self._tolerance, self._seed = step, tolerance, seed
        self._entered: dict[nn.Module, Tensor] = {}
        self._calls: dict[tuple[nn.Module, int], _Call] = {}
        self._count: Counter[tuple[str, nn.Module]] = Counter()
        self._faults: dict[nn.Module, str] = {}
        self._unsettled: set[nn.Module] = set()  # the step changed their discrete choices, so there is no derivative

    def faults(self, run: Callable[[], Any]) -> dict[nn.Module, str]:
        """Return the modules at fault, with a description of each fault."""
        with torch.no_grad():
            with self._hooked(self._record):
                output = run()
            if not all(bool(tensor.isfinite().all()) for tensor in _tensors(output)):
                raise ValueError(
                    f"model's output for {_TOKENS} tokens is not finite: it holds NaN or infinity. Check its weights, "
                    "and the dtype: float16 overflows where float32 and bfloat16 do not"
                )
            for sign in (1.0, -1.0):
                noise = torch.Generator().manual_seed(self._seed)
                with self._hooked(partial(self._moved, sign, noise), after=self._keep):
                    run()
        with self._hooked(self._leaf, before=self._thaw, after=self._compare):
            run()
        return {
            module: fault
            for module, fault in self._faults.items()
            if fault in (_NO_GRADIENT, _NOTHING_ENTERS) or self._unsettled.isdisjoint(module.modules())
        }

    @contextlib.contextmanager
    def _hooked(
        self, entering: Callable[[nn.Module, Tensor], Tensor], before: Any = None, after: Any = None
    ) -> Iterator[None]:
        """Replace the input of each stage by what `entering` returns, and hook each watched module."""

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (entering(module, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": entering(module, kwargs["hidden_states"])}

        self._count.clear()
        handles = []
        for stage in self._stages:
            if stage in self._watched:
                handles.append(stage.register_forward_pre_hook(enter, with_kwargs=True))
            else:  # the embeddings, if no layers are known
                handles.append(stage.register_forward_hook(lambda module, _, output: entering(module, output)))
        for module in self._watched:
            if before:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            if after:
                handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, module: nn.Module, hidden: Tensor) -> Tensor:
        self._entered[module] = hidden.detach().clone()
        return hidden

    def _moved(self, sign: float, noise: torch.Generator, module: nn.Module, hidden: Tensor) -> Tensor:
        entered = self._entered[module]
        factor = 1 + sign * self._step * torch.randn(entered.shape, generator=noise)
        return entered * factor.to(entered)

    def _leaf(self, module: nn.Module, hidden: Tensor) -> Tensor:
        if module is not self._stages[0] and not hidden.requires_grad:
            self._faults[module] = _NOTHING_ENTERS
        return self._entered[module].clone().requires_grad_().clone()  # which a layer may change in place

    def _call(self, which: str, module: nn.Module) -> _Call:
        """Return the record of a module's next call in this run."""
        self._count[which, module] += 1
        return self._calls.setdefault((module, self._count[which, module]), _Call())

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self._call("after", module)
        call.inputs.append([tensor.detach().clone() for tensor in _tensors((args, kwargs))])
        call.outputs.append([tensor.detach().clone() for tensor in _tensors(output)])
        call.chosen.append(_tensors((args, kwargs, output), floating=False))

    def _thaw(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Replace each varying input by a view or a leaf, for gradients with respect to this module's inputs alone."""
        inputs = _tensors((args, kwargs))
        sent = _changes(self._call("before", module).inputs, inputs)
        if sent is None or not torch.is_grad_enabled():  # with gradients disabled, the enclosing module is at fault
            return args, kwargs
        if not self._faults and any(c.any() and not t.requires_grad for t, c in zip(inputs, sent, strict=True)):
            self._faults[module] = _NOTHING_ENTERS
        return _thawed((args, kwargs), sent)

    def _compare(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        inputs, outputs, call = _tensors((args, kwargs)), _tensors(output), self._call("after", module)
        if not torch.is_grad_enabled():
            return output
        sent, came = _changes(call.inputs, inputs), _changes(call.outputs, outputs)
        chosen = _changes(call.chosen, _tensors((args, kwargs, output), floating=False))
        if chosen is None or any(change.any() for change in chosen) or sent is None or came is None:
            self._unsettled.add(module)
            return output
        varied = [(tensor, change) for tensor, change in zip(outputs, came, strict=True) if change.any()]
        given = [(tensor, change) for tensor, change in zip(inputs, sent, strict=True) if change.any()]
        if not varied or not given:
            return output
        if not all(tensor.requires_grad for tensor, _ in varied):
            self._faults[module] = _NO_GRADIENT
            return _thawed(output, came)
        largest = max(float(change.abs().max()) for _, change in varied)  # scaled, since float16 overflows easily
        pulled = torch.autograd.grad(
            [tensor for tensor, _ in varied],
            [tensor for tensor, _ in given],
            [(change / largest).to(tensor.dtype) for tensor, change in varied],
            retain_graph=True,
            materialize_grads=True,
        )
        wanted = sum(float(change.square().sum()) for _, change in varied) / largest
        found = sum(float((g.double() * change).sum()) for g, (_, change) in zip(pulled, given, strict=True)) / wanted
        if not abs(found - 1) <= self._tolerance:
            self._faults[module] = f"its gradient explains {found:.2f} of what its output changes by"
        return output


def _changes(runs: Sequence[Sequence[Tensor]], like: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the difference of each tensor between two runs; None unless there are two runs of these shapes."""
    shapes = [tensor.shape for tensor in like]
    if len(runs) != 2 or any([tensor.shape for tensor in run] != shapes for run in runs):
        return None
    # Infinities of a mask are the same in both: no change, though their difference is NaN.
    return [(plus.double() - minus.double()).where(plus != minus, 0.0) for plus, minus in zip(*runs, strict=True)]


def _thawed(value: Any, changes: Sequence[Tensor]) -> Any:
    """Return the value with its varying tensors replaced: by views, or by leaves if they do not require grad."""
    varies = iter([bool(change.any()) for change in changes])

    def thaw(tensor: Tensor) -> Tensor:
        if not next(varies):
            return tensor
        return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().clone().requires_grad_()

    return _mapped(value, thaw)


def _tensors(value: Any, *, floating: bool = True) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and mappings, in order: the floating-point ones, or the others."""
    found: list[Tensor] = []

    def take(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(value, take, floating)
    return found


def _mapped(value: Any, function: Callable[[Tensor], Tensor], floating: bool = True) -> Any:
    """Return the value with a function applied to its floating-point tensors, or to the others."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() == floating else value
    if isinstance(value, Mapping):
        found = {key: _mapped(one, function, floating) for key, one in value.items()}
        return found if type(value) is dict else type(value)(**found)
    if type(value) in (tuple, list):
        return type(value)(_mapped(one, function, floating) for one in value)
    return value
