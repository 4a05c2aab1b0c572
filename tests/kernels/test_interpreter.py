"""Protects the Triton kernels' values and gradients: interpreted_*.py, run by Triton's interpreter.

In a process of its own: TRITON_INTERPRET=1 counts when triton is imported, and would spoil every later compilation.
And how the implementation is chosen: plain PyTorch on the CPU, a refusal where Triton was asked for by name.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cepo.kernels.attention.dispatch import attend
from cepo.kernels.head.dispatch import head_log_likelihood
from cepo.kernels.launch import takes_over, use_triton
from tests.paths import ROOT


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is published for Linux only")
def test_every_kernel_equals_its_definition_in_the_interpreter() -> None:
    files = sorted(map(str, (ROOT / "tests" / "kernels").glob("*/interpreted_*.py")))
    assert len(files) == 4
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "tests.kernels.checks"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_auto_is_plain_pytorch_on_the_cpu_and_triton_by_name_is_refused_there() -> None:
    tensors = [torch.zeros(1, 1, length, 16) for length in (2, 3, 3, 2, 2)]
    lengths_B = torch.tensor([3])
    assert not use_triton("auto", *tensors)
    attend(*tensors, lengths_B, scale=0.25)
    head_log_likelihood(torch.zeros(2, 16), torch.zeros(5, 16), torch.tensor([0, 1]))
    for refused in (
        lambda: attend(*tensors, lengths_B, scale=0.25, implementation="triton"),
        lambda: head_log_likelihood(
            torch.zeros(2, 16), torch.zeros(5, 16), torch.tensor([0, 1]), implementation="triton"
        ),
    ):
        with pytest.raises((ValueError, RuntimeError), match="needs tensors on CUDA|not installed"):
            refused()
    with pytest.raises(ValueError, match="expected 'auto', 'torch' or 'triton'"):
        use_triton("cuda", *tensors)  # type: ignore[arg-type]


def test_auto_takes_nothing_over_on_cuda_where_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the default, and Triton is published for Linux only."""
    monkeypatch.setitem(sys.modules, "triton", None)
    with FakeTensorMode():
        on_cuda = torch.empty(2, device="cuda")
    assert on_cuda.is_cuda
    assert not takes_over("auto", on_cuda)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        takes_over("triton", on_cuda)


def test_the_plain_path_never_imports_triton() -> None:
    """Importing the entry points and using them on the CPU works where triton cannot be imported at all."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from cepo.kernels.attention import dispatch; from cepo.kernels.head import dispatch as head\n"
        "from cepo.kernels.norm import dispatch; from cepo.kernels.swiglu import dispatch\n"
        "arguments = torch.zeros(2, 16), torch.zeros(5, 16), torch.tensor([0, 1])\n"
        "head.head_log_odds(*arguments)\n"
        "try: head.head_log_odds(*arguments, implementation='triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.strip().endswith("triton is not installed"), result.stderr
