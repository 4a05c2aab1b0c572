"""What the kernel tests share: their device, poisoned allocation, launch counting, one tolerance table.

The interpreted_*.py files run in two ways: on the CPU in the process that test_interpreter.py starts, whose plugin this
file is, and compiled on a GPU by tests/gpu/.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

# Largest error over the largest true value of the same tensor. float32 products are exact to rounding. Half precisions:
# probabilities and their gradients pass through the inputs' dtype before a product, and outputs are rounded once
# (the interpreter truncates to bfloat16: a whole unit, 2^-8 of the value, where hardware has half of it).
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = tuple(TOLERANCES)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def pytest_configure() -> None:
    """Interpret faster, from the start of the process."""
    stay_patched()


def stay_patched() -> None:
    """Let Triton's interpreter put its functions into triton.language once per file of kernels, and leave them there.

    It does so at every launch and again at every call of one kernel function by another, which takes a third of the
    time; and it takes them out again, which only a process that also compiles would need.
    """
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Callable[..., object]) -> object:
        file = function.__globals__["__name__"]
        if file not in patched:
            patched.add(file)
            patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every torch.empty with NaN: an element that no kernel writes fails the comparison."""
    with torch.device("meta"):  # torch keeps the set of functions that `with device:` serves: these, not the poisoned
        torch.empty(0)
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*args: object, _allocate: Callable[..., Tensor] = allocate, **kwargs: object) -> Tensor:
            tensor = _allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the launches of each of our kernels by name; refuse a grid that would take the interpreter too long."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    assert triton.knobs.runtime.interpret == INTERPRETED
    counts: Counter[str] = Counter()
    launcher = InterpretedFunction if INTERPRETED else JITFunction
    launch = launcher.__getitem__

    def counted(kernel: Any, grid: object) -> object:
        if not kernel.fn.__module__.startswith("cepo."):  # other libraries have Triton kernels too
            return launch(kernel, grid)
        programs = 1
        for size in grid if isinstance(grid, tuple) else (grid,):
            programs *= int(size)
        assert programs < 100 or not INTERPRETED, f"{kernel.__name__} would run {programs} programs"
        counts[kernel.__name__] += 1
        return launch(kernel, grid)

    monkeypatch.setattr(launcher, "__getitem__", counted)
    return counts


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normals that depend on neither the device nor the dtype, but for its rounding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def assert_close(got: Tensor, expected: Tensor, name: str = "") -> None:
    """Compare with a float64 tensor by the tolerance of what was got, relative to the largest true value."""
    assert got.shape == expected.shape
    assert expected.dtype == torch.float64
    if got.numel() == 0:
        return
    error = float((got.double() - expected).abs().max())
    bound = TOLERANCES[got.dtype] * float(expected.abs().max())
    assert error <= bound, f"{name}: error {error:.3e} over the bound {bound:.3e}, {got.dtype}"  # NaN fails too


def batched_gradients(output: Any, inputs: list[Tensor], *cotangents: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients for a batch of cotangents as the engine asks for them."""
    return torch.func.vmap(lambda *rows: torch.autograd.grad(output, inputs, rows, retain_graph=True))(*cotangents)


def assert_gradients(operation: Callable[..., Tensor], inputs: list[Tensor], count: int) -> None:
    """Compare values and C gradients of each input with the definition in float64, implementation="torch"."""
    output = operation(*inputs, implementation="triton")
    cotangents = normal(9, count, *output.shape, dtype=output.dtype)
    gradients = batched_gradients(output, inputs, cotangents)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    true = operation(*wide, implementation="torch")
    assert output.dtype == inputs[0].dtype
    assert_close(output.detach(), true.detach(), "values")
    each = [torch.autograd.grad(true, wide, row.double(), retain_graph=True) for row in cotangents]
    for got, rows in zip(gradients, zip(*each, strict=True), strict=True):
        assert got.dtype == inputs[0].dtype
        assert_close(got, torch.stack(rows), "gradients")
