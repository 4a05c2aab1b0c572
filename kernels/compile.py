"""Compile every kernel ahead of time, no GPU needed, and tabulate registers, spills and shared memory.

`python -m cepo.kernels.compile` prints the table for A100 and H100; architectures may be named: `... 80 90 100 gfx942`.
With `--one-form` each kernel is compiled in the first of its forms only.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cepo.kernels.launch import Variant

SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use
GFX942_SHARED_LIMIT = 64 * 1024
# Numbers that models and our chunks make multiples of 16, which Triton is told at a launch (loads get wider).
_ALIGNED = ("size", "first", "columns", "columns_each")
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Compiled:
    """One kernel in one form on one target; registers and spills are None where no assembler tells them."""

    kernel: str
    form: str
    target: str
    registers: int | None
    spilled_bytes: int | None
    shared_bytes: int
    shared_limit: int
    error: str = ""

    @property
    def fits(self) -> bool:
        """Tell whether it compiled, spills nothing and fits the shared memory."""
        return not self.error and not self.spilled_bytes and self.shared_bytes <= self.shared_limit


def main(targets: list[str]) -> None:
    """Print the table for the targets named on the command line."""
    one_form = "--one-form" in targets
    named = [target for target in targets if target != "--one-form"]
    rows = [row for target in named or ["80", "90"] for row in compile_all(target, one_form=one_form)]
    print(as_table(rows))


def compile_all(target: str, *, one_form: bool = False) -> Iterator[Compiled]:
    """Compile every kernel in every form of its tables.

    Args:
        target: "80", "90" or "100" for NVIDIA (100 takes the tiles of 90), "gfx942" for AMD (the tiles of 80,
            one stage).
        one_form: take the first form of each kernel only.

    Yields:
        One row a kernel and form; what fails to compile is a row with its error, never an exception.
    """
    tables = 80 if target in ("80", "gfx942") else 90
    seen = set()
    for variant in all_variants(tables):
        if not one_form or variant.kernel.__name__ not in seen:
            seen.add(variant.kernel.__name__)
            yield compile_variant(variant, target)


def all_variants(arch: int) -> Iterator[Variant]:
    """Yield every form in which the package launches a kernel on an architecture (80 or 90)."""
    from cepo.kernels.attention.forward import forward_variants
    from cepo.kernels.attention.vjp import vjp_variants
    from cepo.kernels.head.expected import expected_variants
    from cepo.kernels.head.log_odds import head_variants
    from cepo.kernels.layers.triton import layer_variants
    from cepo.kernels.projection.gram import gram_variants
    from cepo.kernels.projection.triton import projection_variants

    yield from forward_variants(arch)
    yield from vjp_variants(arch)
    yield from head_variants(arch)
    yield from expected_variants(arch)
    yield from layer_variants(arch)
    yield from projection_variants(arch)
    yield from gram_variants(arch)


def compile_variant(variant: Variant, target: str) -> Compiled:
    """Compile one kernel in one form; see `compile_all`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target), 32)
    limit = GFX942_SHARED_LIMIT if amd else SHARED_LIMITS[int(target)]
    name = variant.kernel.__name__
    tile = variant.tile
    constants = " ".join(f"{key}={value}" for key, value in variant.constants.items() if key != "INTERPRETED")
    form = f"{_DTYPES[variant.dtype]} {constants} warps={tile.warps} stages={tile.stages}"
    source = ASTSource(
        fn=variant.kernel,
        signature={argument: _type_of(argument, variant) for argument in variant.kernel.arg_names},
        constexprs={(variant.kernel.arg_names.index(key),): value for key, value in variant.constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, argument in enumerate(variant.kernel.arg_names)
            if argument not in variant.constants
            and (argument.endswith("_ptr") or "_stride_" in argument or argument in _ALIGNED)
        },
    )
    options = {"num_warps": tile.warps, "num_stages": 1 if amd else tile.stages}
    try:
        compiled = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # the compilers below raise what they like; the row carries the reason
        reason = " ".join(str(error).split())[:200]
        return Compiled(name, form, gpu_name(target), None, None, 0, limit, f"{type(error).__name__}: {reason}")
    if amd:
        registers, spilled = _amd_registers(compiled.asm["amdgcn"])
    else:
        registers, spilled = _nvidia_registers(compiled.asm["ptx"], int(target))
    return Compiled(name, form, gpu_name(target), registers, spilled, compiled.metadata.shared, limit)


def gpu_name(target: str) -> str:
    """Return the target as the makers write it."""
    return target if target.startswith("gfx") else f"sm_{target}"


def as_table(rows: list[Compiled]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| target | kernel | form | registers | spilled bytes | shared bytes | limit | falls short |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        reason = row.error or ("" if row.fits else "spills or shared memory")
        numbers = [row.registers, row.spilled_bytes, row.shared_bytes, row.shared_limit]
        cells = [row.target, row.kernel, row.form, *("?" if value is None else str(value) for value in numbers), reason]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def _type_of(argument: str, variant: Variant) -> str:
    """Return an argument's type by its name: ..._f32_ptr, ..._i64_ptr, ..._ptr (the form's dtype), ..._f32, or i32."""
    if argument in variant.constants:
        return "constexpr"
    for ending, kind in (("_f32_ptr", "*fp32"), ("_i64_ptr", "*i64"), ("_ptr", f"*{_DTYPES[variant.dtype]}")):
        if argument.endswith(ending):
            return kind
    return "fp32" if argument.endswith("_f32") else "i32"


def _nvidia_registers(ptx: str, arch: int) -> tuple[int, int]:
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={architecture}", str(path), "-o", str(path) + ".o"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if registers is None or not spills:
        raise RuntimeError(f"ptxas -v said nothing of registers and spills: {log[:300]!r}")
    return int(registers[1]), sum(map(int, spills))


def _amd_registers(assembly: str) -> tuple[int | None, int | None]:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch: Any = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    return (int(registers[1]) if registers else None), (int(scratch[1]) if scratch else None)


if __name__ == "__main__":
    main(sys.argv[1:])
