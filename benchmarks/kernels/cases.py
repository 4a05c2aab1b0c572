"""The operations that have a kernel, each with its other implementations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from cepo.kernels.attention.dispatch import attend
from cepo.kernels.head.dispatch import head_log_likelihood
from cepo.kernels.launch import Implementation
from cepo.kernels.norm.dispatch import rms_norm
from cepo.kernels.swiglu.dispatch import swiglu

# What a contender returns: the values, then the gradients of each input, stacked or as a list with one per cotangent;
# None for an output that it does not compute.
Output = tuple[Tensor | list[Tensor] | None, ...]
Function = Callable[..., Tensor]
EAGER = "eager PyTorch"


@dataclass(frozen=True)
class Widths:
    """The shapes of a model and of a group of rollouts, see `sizes.Shapes` for G, Lz and Lx."""

    width: int
    inner: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int
    G: int
    Lz: int
    Lx: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Contender:
    """One implementation of an operation.

    Attributes:
        name: name of its row.
        computes: what exactly it computes, in words.
        run: computes it once.
        needs: "cuda" or the name of a package without which it cannot run, or None.
        compiled: whether it goes through torch.compile, whose first run takes long.
    """

    name: str
    computes: str
    run: Callable[[], Output]
    needs: str | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Operation:
    """One operation at one shape.

    Attributes:
        name: the operation, and whether it is forward, or forward and VJP.
        shapes: its sizes in words.
        truth: computes the true outputs, in float32 or wider, from the same inputs.
        contenders: its implementations, this package's first.
        inputs: tensors that it must read.
        written: bytes that it must write.
        flops: least number of operations that it needs.
        dtype: dtype of the matrix products among them.
    """

    name: str
    shapes: str
    truth: Callable[[], Output]
    contenders: tuple[Contender, ...]
    inputs: tuple[Tensor, ...]
    written: float
    flops: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Way:
    """One way to compute an operation's values and their gradients.

    Attributes:
        name: name of its rows.
        function: inputs -> values.
        computes: how the VJP is computed, in words.
        needs: as in Contender.
        compiled: as in Contender.
        batched: whether vmap takes all cotangents at once; otherwise each has its own backward pass.
        once: whether one forward pass serves several backward passes.
    """

    name: str
    function: Function
    computes: str
    needs: str | None = None
    compiled: bool = False
    batched: bool = False
    once: bool = True


def operations(widths: Widths, device: torch.device, ours: Implementation, seed: int) -> Iterator[Operation]:
    """Yield every operation with a kernel, one at a time, since their inputs are large.

    The stem of a prompt is one sequence with 2 G cotangents (s_X and s_Y of each rollout); a stage is the G rollouts
    after it with 2 cotangents.

    Args:
        widths: shapes.
        device: device to put the inputs on.
        ours: "auto", or "triton" to run the kernels in the interpreter.
        seed: seed of the inputs.
    """
    w = widths
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = w.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    stem, stage = 2 * w.G, 2
    for name, rows, size in (("RMS norm", w.Lz, w.width), ("RMS norm of heads", w.Lz * w.heads, w.head)):
        weight_D = 1.0 + 0.1 * draw(size)
        yield from _with_vjp(
            name,
            f"{rows:,} rows of {size}",
            lambda hidden, how, weight_D=weight_D: rms_norm(hidden, weight_D, epsilon=1e-6, implementation=how),
            [draw(rows, size)],
            draw(stem, rows, size),
            (4.0 * rows * size, 6.0 * stem * rows * size),
            ours,
            [_liger(_liger_norm(weight_D), "a loop over cotangents; forms the frozen weight's gradient too")],
        )
    yield from _with_vjp(
        "SwiGLU",
        f"{w.Lz:,} rows of {w.inner}",
        lambda gate, up, how: swiglu(gate, up, implementation=how),
        [draw(w.Lz, w.inner), draw(w.Lz, w.inner)],
        draw(stem, w.Lz, w.inner),
        (5.0 * w.Lz * w.inner, (9.0 + 2.0 * stem) * w.Lz * w.inner),
        ours,
        [_liger(_liger_swiglu, "a loop over cotangents, forward each time: its VJP overwrites its inputs", once=False)],
    )
    yield from _head(w, draw, device, ours)
    for name, rollouts, past, tokens, count in (
        ("attention of a stage", w.G, w.Lz, w.Lx, stage),
        ("attention of the stem", 1, 0, w.Lz, stem),
    ):
        yield from _attention(name, w, draw, device, ours, (rollouts, past, tokens, count))


def _with_vjp(
    name: str,
    shapes: str,
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    cotangent_C: Tensor,
    flops: tuple[float, float],
    ours: Implementation,
    peers: Sequence[Way] = (),
    *,
    frozen: Sequence[Tensor] = (),
) -> Iterator[Operation]:
    """Yield an operation's forward, and its forward with the gradients of all inputs under C cotangents.

    Args:
        name: name of the operation.
        shapes: its sizes in words.
        function: (inputs, implementation) -> values.
        inputs: inputs, which all get gradients.
        cotangent_C: the cotangents, stacked.
        flops: operations of the forward and of the VJP.
        ours: implementation of this package to measure.
        peers: other implementations.
        frozen: other tensors that the operation reads, which get no gradients.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]

    def definition(*tensors: Tensor) -> Tensor:
        return function(*tensors, "torch")

    compiled, loop = torch.compile(definition, dynamic=False), "forward and backward compiled, a loop over cotangents"
    ways = (
        Way("cepo", lambda *tensors: function(*tensors, ours), "all cotangents in one launch per kernel", batched=True),
        Way(EAGER, definition, "all cotangents by vmap", batched=True),
        Way("torch.compile", compiled, loop, "cuda", compiled=True),
        *peers,
    )
    yield Operation(
        f"{name}, forward",
        shapes,
        _values(definition, wide),
        tuple(Contender(way.name, "values", _values(way.function, inputs), way.needs, way.compiled) for way in ways),
        (*inputs, *frozen),
        float(cotangent_C[0].nbytes),
        flops[0],
        inputs[0].dtype,
    )
    yield Operation(
        f"{name}, forward and VJP",
        f"{shapes}, {len(cotangent_C)} cotangents",
        _values_and_gradients(Way("", definition, ""), wide, cotangent_C.float()),
        tuple(
            Contender(way.name, way.computes, _values_and_gradients(way, leaves, cotangent_C), way.needs, way.compiled)
            for way in ways
        ),
        (*inputs, *frozen, cotangent_C),
        float(cotangent_C[0].nbytes + len(cotangent_C) * sum(tensor.nbytes for tensor in inputs)),
        sum(flops),
        inputs[0].dtype,
    )


def _values(function: Function, inputs: Sequence[Tensor]) -> Callable[[], Output]:
    def run() -> Output:
        with torch.no_grad():
            return (function(*inputs),)

    return run


def _values_and_gradients(way: Way, leaves: Sequence[Tensor], cotangent_C: Tensor) -> Callable[[], Output]:
    """Return a function that computes the values, and the gradients of all leaves under all cotangents."""
    used = [leaf for leaf in leaves if leaf.numel()]

    def gradients(output: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, used, row, retain_graph=way.once)

    def run() -> Output:
        output = way.function(*leaves)
        if way.batched:
            return (output.detach(), *torch.func.vmap(lambda row: gradients(output, row))(cotangent_C))
        each = []
        for place, row in enumerate(cotangent_C):
            output = output if way.once or not place else way.function(*leaves)
            each.append(gradients(output, row if way.once else row.clone()))
        return (output.detach(), *map(list, zip(*each, strict=True)))

    return run


def _head(w: Widths, draw: Callable[..., Tensor], device: torch.device, ours: Implementation) -> Iterator[Operation]:
    rows = w.G * w.Lx
    weight_VD = draw(w.vocabulary, w.width, scale=w.width**-0.5)
    ids_P = torch.arange(rows, device=device) * 7919 % w.vocabulary
    hidden_PD = draw(rows, w.width)
    products = 2.0 * rows * w.vocabulary * w.width
    forward, both = _with_vjp(
        "log-likelihood through the head",
        f"{rows:,} rows, vocabulary {w.vocabulary:,}",
        # Cast, because the true values are computed in float32.
        lambda hidden, how: head_log_likelihood(hidden, weight_VD.to(hidden.dtype), ids_P, implementation=how),
        [hidden_PD],
        torch.ones(1, rows, device=device),
        (products, 2.0 * products),
        ours,
        frozen=[weight_VD],
    )

    def liger() -> Output:
        leaf_PD = hidden_PD.detach().requires_grad_()
        loss = _liger_functions().liger_fused_linear_cross_entropy(leaf_PD, weight_VD, ids_P, reduction="sum")
        return None, [-torch.autograd.grad(loss, leaf_PD)[0]]

    fused = Contender("Liger-Kernel", "the gradient of the sum alone, logits in chunks of rows", liger, "liger_kernel")
    yield from (forward, replace(both, contenders=(*both.contenders, fused)))


def _attention(
    name: str,
    w: Widths,
    draw: Callable[..., Tensor],
    device: torch.device,
    ours: Implementation,
    sizes: tuple[int, int, int, int],
) -> Iterator[Operation]:
    rollouts, past, tokens, count = sizes
    lengths_B = torch.full((rollouts,), past, device=device)
    scale = w.head**-0.5
    shapes = [(w.heads, tokens), (w.key_heads, past), (w.key_heads, past), (w.key_heads, tokens), (w.key_heads, tokens)]
    inputs = [draw(rollouts, *shape, w.head) for shape in shapes]

    def attention(
        query: Tensor, past_key: Tensor, past_value: Tensor, key: Tensor, value: Tensor, how: Implementation
    ) -> Tensor:
        return attend(query, past_key, past_value, key, value, lengths_B, scale=scale, implementation=how)

    def sdpa(query: Tensor, past_key: Tensor, past_value: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        bias: Any = causal_lower_right(tokens, past + tokens)
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(query, keys, values, attn_mask=bias, scale=scale, enable_gqa=w.heads != w.key_heads)

    flexible: list[Any] = []  # the mask and the compiled function, made when first run

    def flex(query: Tensor, past_key: Tensor, past_value: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not flexible:
            module = importlib.import_module("torch.nn.attention.flex_attention")
            mask = module.create_block_mask(
                lambda b, h, row, place: place <= row + past, None, None, tokens, past + tokens, device=str(device)
            )
            flexible.extend([mask, torch.compile(module.flex_attention, dynamic=False)])
        keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        mask, attention = flexible
        found: Tensor = attention(query, keys, values, block_mask=mask, scale=scale, enable_gqa=True)
        return found

    products = 4.0 * rollouts * w.heads * w.head * tokens * (past + tokens / 2)
    yield from _with_vjp(
        name,
        f"{rollouts} x {w.heads} heads ({w.key_heads} of keys) of {w.head}, {tokens} tokens after {past}",
        attention,
        inputs,
        draw(count, rollouts, w.heads, tokens, w.head),
        # The VJP recomputes the scores once, and computes dP, dQ, dK and dV for each cotangent.
        (products, (0.5 + 2.0 * count) * products),
        ours,
        [
            Way("SDPA", sdpa, "a loop over cotangents, keys concatenated"),
            Way("FlexAttention", flex, "compiled, a loop over cotangents, keys concatenated", "cuda", compiled=True),
        ],
    )


def _liger(function: Function, computes: str, *, once: bool = True) -> Way:
    return Way("Liger-Kernel", function, computes, "liger_kernel", once=once)


def _liger_norm(weight_D: Tensor) -> Function:
    return lambda hidden_ND: _liger_functions().liger_rms_norm(hidden_ND, weight_D, 1e-6, in_place=False)


def _liger_swiglu(gate_ND: Tensor, up_ND: Tensor) -> Tensor:
    gated_ND: Tensor = _liger_functions().liger_swiglu(gate_ND.clone(), up_ND.clone())
    return gated_ND


def _liger_functions() -> Any:
    return importlib.import_module("liger_kernel.transformers.functional")
