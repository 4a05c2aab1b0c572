"""Protects the group engine on Triton kernels: interpreted_engine.py, in a process where Triton interprets.

And what holds without Triton: plain PyTorch unless asked for otherwise, refusals by name, a clean way back.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from cepo.jacobian.engines import new_engine
from cepo.jacobian.group import trial as trial_module
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.group.run import SegmentRun, backward
from cepo.jacobian.group.swaps import Swaps, find_swaps, swapped
from cepo.jacobian.records import Group
from tests.jacobian.group.ragged import PAPER, assert_same, ragged_rollout
from tests.models import tiny_model
from tests.paths import ROOT


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is published for Linux only")
def test_the_engine_on_kernels_in_the_interpreter() -> None:
    """Every test of interpreted_engine.py."""
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "tests.kernels.checks"]
    tests = str(ROOT / "tests" / "jacobian" / "group" / "interpreted_engine.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tests],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def test_auto_takes_nothing_over_on_the_cpu_and_triton_by_name_is_refused_there() -> None:
    """The default and "auto" run the model's own forwards; "triton" is refused when the engine is made."""
    model = tiny_model("llama", dtype=torch.float32)
    assert find_swaps(model, type(model).forward, "auto") == find_swaps(model, type(model).forward, "torch") == Swaps()
    found = [new_engine("group", model, kernels=kernels) for kernels in ("torch", "auto")]  # type: ignore[arg-type]
    group = Group((ragged_rollout(0),))
    assert_same(found[1].jacobians(group, PAPER), found[0].jacobians(group, PAPER), 0.0)  # type: ignore[attr-defined]
    with pytest.raises((ValueError, RuntimeError), match="needs tensors on CUDA|not installed"):
        GroupEngine(model, kernels="triton")
    with pytest.raises(ValueError, match="expected 'auto', 'torch' or 'triton'"):
        GroupEngine(model, kernels="cuda")  # type: ignore[arg-type]


def test_kernels_that_fail_their_trial_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With "auto", a kernel that raises or computes something else costs speed, never a Jacobian."""
    model = tiny_model("llama", dtype=torch.float32)
    group = Group((ragged_rollout(0),))
    wanted = GroupEngine(model).jacobians(group, PAPER)

    def wrong(hidden_ND: torch.Tensor) -> torch.Tensor:
        return hidden_ND * 2.0

    def fails(hidden_ND: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    for forward, reason in ((wrong, "gave another"), (fails, "no such instruction")):

        def one_swap(model: Any, own: Any, kernels: str, forward: Any = forward) -> Swaps:
            return Swaps(forwards=((model.model.norm, forward),)) if kernels == "auto" else Swaps()

        monkeypatch.setattr(trial_module, "find_swaps", one_swap)
        engine = GroupEngine(model, kernels="auto")
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="cepo"):
            assert_same(engine.jacobians(group, PAPER), wanted, 1e-6)
        assert "continues without kernels" in caplog.text
        assert reason in caplog.text
        assert engine.unserved is None
        assert "forward" not in model.model.norm.__dict__


def test_forwards_of_others_stay_and_come_back() -> None:
    """A forward that somebody put on an instance is neither replaced nor removed; a half-done swap is undone."""
    model = tiny_model("llama", dtype=torch.float32)
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    own = first.forward
    first.forward = own
    swaps = Swaps(forwards=((first, torch.zeros_like), (second, torch.zeros_like)))

    def fail_inside() -> None:
        with swapped(swaps):
            assert first.__dict__["forward"] == own
            assert second.forward is torch.zeros_like
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert first.__dict__["forward"] == own
    assert "forward" not in second.__dict__


def test_the_batched_backward_asks_custom_functions_for_their_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's batches reach a custom function's vmap rule: is_grads_batched would not (no private torch names)."""
    sizes = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(value: torch.Tensor) -> torch.Tensor:
            return 2.0 * value

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def vmap(info: Any, in_dims: Any, value: torch.Tensor) -> tuple[torch.Tensor, int]:
            sizes.append(info.batch_size)
            return Doubled.apply(value), in_dims[0]

    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return 2.0 * value

        @staticmethod
        def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:
            return Doubled.apply(cotangent)

    leaf, unused = torch.ones(1, 2, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    run = SegmentRun([], leaf, Outer.apply(leaf))
    cotangents = torch.arange(18.0).reshape(3, 1, 2, 3)
    found, nothing = backward(run, [cotangents], [leaf, unused], keep=True)
    assert torch.equal(found, 2.0 * cotangents)
    assert torch.equal(nothing, torch.zeros(3, 4))
    assert sizes == [3]
    (alone,) = backward(run, [cotangents[:1]], [leaf])
    assert torch.equal(alone, 2.0 * cotangents[:1])
    assert sizes == [3]
    for folder in ("kernels", "jacobian"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "torch._C" not in path.read_text(), path
