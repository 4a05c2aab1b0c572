"""Compile every kernel ahead of time, no GPU needed, and tabulate registers, spills and shared memory.

`python -m cepo.kernels.compile` prints the table for A100 and H100; with the argument 80 or 90, for one of them.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cepo.kernels.launch import COUNTS, Variant

SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may use, by compute capability
_PRODUCTS = ("tt.dot", "ttng.warp_group_dot")  # at once and asynchronous, in Triton's GPU dialect
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Compiled:
    """One variant of a kernel, compiled for one architecture.

    Attributes:
        kernel: its name.
        form: dtype, constants, warps and stages.
        arch: compute capability, 80 or 90.
        registers: per thread.
        spilled_bytes: registers written to memory and read back.
        shared_bytes: shared memory per block.
        mixes_products: whether its loop prefetches and has both synchronous (mma) and asynchronous (wgmma) products. A
            tile that both read gets a single buffer, and Triton (3.6 and 3.7) refills it without waiting for the
            asynchronous product: on an H200 a gradient was wrong by a quarter.
        error: why it does not compile.
    """

    kernel: str
    form: str
    arch: int
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    mixes_products: bool = False
    error: str = ""

    @property
    def falls_short(self) -> str:
        """Why the kernel can't be used; empty if it compiles, spills nothing, fits in memory and waits for reads."""
        if self.error or self.mixes_products:
            return self.error or "refills a buffer that an asynchronous product reads"
        fits = self.spilled_bytes == 0 and self.shared_bytes <= SHARED_LIMITS[self.arch]
        return "" if fits else "spills or shared memory"


def compile_all(arch: int) -> Iterator[Compiled]:
    """Compile every kernel with every tile of its tables, every dtype and every option.

    Not every combination: where a tile is far from every limit, some of its variants represent the others.

    Args:
        arch: compute capability, 80 (A100) or 90 (H100).

    Yields:
        One row per kernel and form; one that does not compile is a row with its error, never an exception.
    """
    from cepo.kernels.attention.forward import forward_variants
    from cepo.kernels.attention.vjp import vjp_variants
    from cepo.kernels.head.log_odds import log_odds_variants
    from cepo.kernels.norm.triton import norm_variants
    from cepo.kernels.swiglu.triton import swiglu_variants

    for variants in (forward_variants, vjp_variants, log_odds_variants, norm_variants, swiglu_variants):
        for variant in variants(arch):
            yield _compile(variant, arch)


def as_table(rows: list[Compiled]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| target | kernel | form | registers | spilled bytes | shared bytes | limit | falls short |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        numbers = [row.registers, row.spilled_bytes, row.shared_bytes, SHARED_LIMITS[row.arch]]
        cells = [f"sm_{row.arch}", row.kernel, row.form, *map(str, numbers), row.falls_short]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def form_of(variant: Variant) -> str:
    """Return the dtype, constants, warps and stages that a kernel is compiled for."""
    constants = " ".join(f"{key}={variant.constants[key]}" for key in sorted(variant.constants) if key != "INTERPRETED")
    return f"{_DTYPES[variant.dtype]} {constants} warps={variant.tile.warps} stages={variant.tile.stages}"


def _compile(variant: Variant, arch: int) -> Compiled:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, form = variant.kernel.__name__, form_of(variant)
    source = ASTSource(
        fn=variant.kernel,
        signature={argument: _type_of(argument, variant) for argument in variant.kernel.arg_names},
        constexprs={(variant.kernel.arg_names.index(key),): value for key, value in variant.constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, argument in enumerate(variant.kernel.arg_names)
            if argument not in (*variant.constants, *COUNTS) and not argument.endswith("_f32")
        },
    )
    knobs.nvidia.dump_ptxas_log = True  # ptxas -v of the run that makes the binary
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.tile.options)
    except Exception as error:  # the compilers below raise many kinds; the row carries the reason
        reason = " ".join(str(error).split())[:200]
        return Compiled(name, form, arch, error=f"{type(error).__name__}: {reason}")
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    if registers is None or not spills:
        raise RuntimeError(f"ptxas -v names no registers and spills (empty for a cached kernel): {log.getvalue()!r}")
    mixes = variant.tile.stages > 1 and all(f" {product} " in compiled.asm["ttgir"] for product in _PRODUCTS)
    return Compiled(name, form, arch, int(registers[1]), sum(map(int, spills)), compiled.metadata.shared, mixes)


def _type_of(argument: str, variant: Variant) -> str:
    """Return an argument's type by its name: ..._f32_ptr, ..._i64_ptr, ..._ptr (in the dtype), ..._f32 or i32."""
    if argument in variant.constants:
        return "constexpr"
    for ending, kind in (("_f32_ptr", "*fp32"), ("_i64_ptr", "*i64"), ("_ptr", f"*{_DTYPES[variant.dtype]}")):
        if argument.endswith(ending):
            return kind
    return "fp32" if argument.endswith("_f32") else "i32"


if __name__ == "__main__":
    print(as_table([row for arch in sys.argv[1:] or ("80", "90") for row in compile_all(int(arch))]))
