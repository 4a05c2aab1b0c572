"""Let engines run policies whose parameters are sharded over ranks, without unsharding them for good.

| mode | what a rank holds besides its shards | collectives |
| --- | --- | --- |
| gathered | the whole model | one per group of parameters, and one vote at the end |
| in step | embeddings, norm and head, and one layer at a time | each forward or backward: one vote, and one per layer |

In both modes, the hooks of FSDP2 or DeepSpeed are removed from the modules, so that engines see a plain model. In step,
a layer is gathered just before it runs forward, and just before a backward pass reads one of its weights: the graph
saves a reference to the weight in its place (`torch.autograd.graph.saved_tensors_hooks`). So a backward pass may start
anywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from cepo.jacobian.group.cost import free_memory
from cepo.jacobian.layers import decoder_layers

Sharding = Literal["none", "fsdp2", "zero3", "tensor parallel"]
Mode = Literal["auto", "gather", "step"]

# What a rank votes for; the largest vote wins.
_DONE, _FORWARD, _BACKWARD, _FAILED = range(4)
# The function of `watching_saved`: torch calls only the innermost saved-tensor hooks, which here are `_Walk`'s.
_KEEP: ContextVar[Callable[[Tensor], Tensor]] = ContextVar("cepo_keep_saved", default=lambda tensor: tensor)
_FRAMEWORKS = ("torch.distributed.fsdp.", "deepspeed.")


class RankFailedError(RuntimeError):
    """Another rank failed, so this one cannot continue either."""


def sharding_of(model: Any) -> Sharding:
    """Return how a model's parameters are sharded.

    Raises:
        ValueError: for FSDP1, and for FSDP2 and tensor parallelism together.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise ValueError(
            "model is sharded by FSDP1 (FullyShardedDataParallel), whose flat parameters hold no layer's weights; "
            "expected FSDP2 (fsdp_version: 2 in accelerate, fully_shard in torch), DeepSpeed ZeRO-3 or DDP"
        )
    splits = any((getattr(module, "_tp_size", None) or 1) > 1 for module in modules)
    if any(isinstance(module, FSDPModule) for module in modules):
        if splits:
            raise ValueError("model is sharded by FSDP2 and split by tensor parallelism; expected one of the two")
        return "fsdp2"
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return "zero3"
    return "tensor parallel" if splits or any(isinstance(each, DTensor) for each in parameters) else "none"


@contextlib.contextmanager
def readable(model: Any, mode: Mode = "auto") -> Iterator[None]:
    """Let engines run a sharded model inside this context, which all ranks enter and leave together.

    A model that is not sharded by FSDP2 or ZeRO-3 is left as it is.

    Args:
        model: the outermost module that was sharded, PEFT-wrapped or not.
        mode: "gather", "step", or "auto": gathered if the whole model takes at most half of the free memory of the
            rank that has least, else in step.

    Raises:
        ValueError: for an unknown mode, and as `sharding_of`.
        RankFailedError: as `gathered` and `in_step`.
    """
    check_mode(mode)
    kind = sharding_of(model)
    if kind not in ("fsdp2", "zero3"):
        yield
        return
    with in_step(model) if mode == "step" or (mode == "auto" and not _fits(model)) else gathered(model):
        yield


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Hold all parameters of a sharded model on every rank; inside, ranks run independently.

    Raises:
        RankFailedError: on leaving, if another rank raised inside.
    """
    with _hooks_off(model), _whole(list(model.modules())):
        try:
            yield
        except BaseException:
            _vote(_FAILED)
            raise
        _vote(_DONE)


@contextlib.contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Hold one layer of a sharded model at a time; inside, ranks may run unequal numbers of passes.

    Before each forward and each backward pass, ranks vote on which comes next. A rank that wants another one takes part
    in gathering the layers, in the same order. On leaving, a rank goes on doing so until all are done.

    Raises:
        ValueError: if no list of decoder layers is found.
        RankFailedError: at the next vote, if another rank raised inside.
    """
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = decoder_layers(bare)
    if not layers:
        raise ValueError(f"model is a {type(bare).__name__} without a list of layers; expected one, or mode 'gather'")
    in_layers = {id(module) for layer in layers for module in layer.modules()}
    resident = [module for module in model.modules() if id(module) not in in_layers]
    with _hooks_off(model), _whole(resident), contextlib.closing(_Walk(layers)) as walk:
        try:
            yield
        except BaseException:
            walk.fail()
            raise
        walk.leave()


def check_mode(mode: str) -> None:
    """Raise ValueError unless `mode` is the name of a mode."""
    if mode not in get_args(Mode):
        raise ValueError(f"sharded is {mode!r}; expected one of {', '.join(get_args(Mode))}")


def check_readable(model: Any) -> None:
    """Raise ValueError if a model is sharded and this is not inside `readable`."""
    weight_VD = model.get_input_embeddings().weight
    missing = isinstance(weight_VD, DTensor) or (hasattr(weight_VD, "ds_id") and weight_VD.numel() == 0)
    if missing and (kind := sharding_of(model)) != "tensor parallel":
        raise ValueError(
            f"model is sharded ({kind}), so no rank holds its weights; call the engine inside "
            "cepo.jacobian.sharding.readable(model), on every rank"
        )


@contextlib.contextmanager
def watching_saved(keep: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Call a function with each tensor that the graph saves for backward, and save what it returns instead.

    Weights of layers that are gathered in step are not passed to it: the graph saves only references to them.
    """
    token = _KEEP.set(keep)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            yield
    finally:
        _KEEP.reset(token)


def shape_of(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, whether or not this rank holds all of it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


class _Weight(NamedTuple):
    """A reference to a weight, or to a view of one, that the graph saves in its place."""

    layer: int
    parameter: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Walk:
    """Gathers layers one by one, in the same order on every rank.

    An operation is a forward or backward pass of any rank. It gathers every layer once, in forward or reverse order,
    whether or not this rank reads them.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._parts = [list(layer.modules()) for layer in layers]
        self._operation = _DONE
        self._reached = 0  # number of layers gathered so far in this operation
        self._held = -1  # index of the layer that is gathered now, -1 for none
        self._layer, self._saving = contextlib.ExitStack(), contextlib.ExitStack()
        self._over = False
        self._handles = [
            handle
            for index, layer in enumerate(layers)
            for handle in (
                layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index), prepend=True),
                layer.register_forward_hook(lambda *_, index=index: self._exit(index), always_call=True),
            )
        ]

    def close(self) -> None:
        """Release the layer that is gathered, and remove the hooks."""
        self._layer.close()
        for handle in self._handles:
            handle.remove()

    def fail(self) -> None:
        """Tell the other ranks that this one failed."""
        if not self._over:
            self._finish()
            self._over = True
            _vote(_FAILED)

    def leave(self) -> None:
        """Take part in the other ranks' operations until all are done."""
        self._begin(_DONE)

    def _enter(self, layer: int) -> None:
        self._reach(_FORWARD, layer)

        def pack(tensor: Tensor) -> Any:
            owner = tensor if tensor._base is None else tensor._base
            if not isinstance(owner, nn.Parameter):
                return _KEEP.get()(tensor)
            offset = int(tensor.storage_offset() - owner.storage_offset())
            return _Weight(layer, owner, tensor.size(), tensor.stride(), offset)

        def unpack(saved: Any) -> Tensor:
            return self._weight(saved) if isinstance(saved, _Weight) else saved

        self._saving.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))

    def _exit(self, layer: int) -> None:
        self._saving.close()
        if self._operation == _FORWARD and layer + 1 == self._reached == len(self._parts):
            self._finish()

    def _weight(self, saved: _Weight) -> Tensor:
        """Return a saved weight, in a backward pass."""
        # Hooks (of `check_gradients`) may go back through a layer during its forward pass: then it is still held.
        if self._held != saved.layer and self._reach(_BACKWARD, saved.layer):
            Variable._execution_engine.queue_callback(self._finish)  # at the end of this backward pass
        held = saved.parameter.detach()
        return held.as_strided(saved.size, saved.stride, held.storage_offset() + saved.offset)

    def _reach(self, operation: int, layer: int) -> bool:
        """Gather layers in order up to this one, for a pass of this rank; return whether a new pass begins."""
        steps = layer + 1 if operation == _FORWARD else len(self._parts) - layer
        begins = operation != self._operation or steps < self._reached
        if begins:
            self._begin(operation)
        while self._reached < steps:
            self._gather_next()
        return begins

    def _begin(self, operation: int) -> None:
        """Vote until this operation wins, taking part in those that win before."""
        self._finish()
        if self._over:
            raise RankFailedError("another rank failed; its own error says why")
        while True:
            try:
                voted = _vote(operation)
            except RankFailedError:
                self._over = True
                raise
            self._operation, self._reached = voted, 0
            if voted == operation:
                return
            self._finish()

    def _finish(self) -> None:
        """Gather the remaining layers of the operation, since the other ranks do."""
        while self._operation != _DONE and self._reached < len(self._parts):
            self._gather_next()
        self._release()
        self._operation = _DONE

    def _gather_next(self) -> None:
        self._release()
        self._held = self._reached if self._operation == _FORWARD else len(self._parts) - 1 - self._reached
        self._reached += 1
        self._layer.enter_context(_whole(self._parts[self._held]))

    def _release(self) -> None:
        self._held = -1
        self._layer.close()


@contextlib.contextmanager
def _whole(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Gather the parameters of these modules, without those of their children."""
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    partitioned = [
        parameter for module in modules for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_id")
    ]
    with contextlib.ExitStack() as stack:
        for module in sharded:
            module.reshard()  # what a generation left gathered may be out of date
            stack.callback(module.reshard)
            module.unshard()
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        yield


@contextlib.contextmanager
def _hooks_off(model: nn.Module) -> Iterator[None]:
    """Remove the sharding frameworks' hooks from all modules, and restore them in their order on exit."""
    before = []
    try:
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                before.append((hooks, dict(hooks)))
                for key, hook in list(hooks.items()):
                    if getattr(hook, "__module__", "").startswith(_FRAMEWORKS):
                        del hooks[key]
        yield
    finally:
        for hooks, were in before:
            hooks.clear()
            hooks.update(were)


def _vote(operation: int) -> int:
    """Return the largest vote of all ranks.

    Raises:
        RankFailedError: if another rank voted that it failed.
    """
    votes_1 = torch.tensor([operation], device=_device())
    dist.all_reduce(votes_1, dist.ReduceOp.MAX)
    voted = int(votes_1)
    if voted == _FAILED and operation != _FAILED:
        raise RankFailedError("another rank failed; its own error says why")
    return voted


def _fits(model: Any) -> bool:
    """Return whether every rank has room for the whole model; all ranks return the same."""
    needed = sum(
        getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size() for parameter in model.parameters()
    )
    device = _device()
    free = free_memory(device) / (dist.get_world_size() if device.type == "cpu" else 1)  # ranks share a host's memory
    rooms_1 = torch.tensor([free / 2 - needed], dtype=torch.float64, device=device)
    dist.all_reduce(rooms_1, dist.ReduceOp.MIN)
    return float(rooms_1) >= 0.0


def _device() -> torch.device:
    """Return the device on which collectives run; parameters may be offloaded to another."""
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if accelerator is None or dist.get_backend() == "gloo" else accelerator
