"""The matrices of `cepo score --save-jacobians`: one file per row during a run, one file for all rows at its end."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cepo.files import replacing
from cepo.fusion.score import RolloutScore
from cepo.jacobian.records import Rollout


def save_matrices(folder: Path, row: int, rollout: Rollout, score: RolloutScore) -> None:
    """Write a row's token ids and, for each link, its base and residual Jacobian and their positions."""
    tensors = {f"{row}/token_ids": torch.tensor(rollout.token_ids)}
    for name, link in score.jacobians.items():
        jacobian = link.base
        tensors[f"{row}/{name}/base"] = jacobian.jac_SD.cpu().contiguous()
        # Without hardening the residual is the base itself, and safetensors refuses shared storage.
        tensors[f"{row}/{name}/residual"] = link.residual_SD.cpu().clone().contiguous()
        tensors[f"{row}/{name}/source_positions"] = torch.tensor(jacobian.source_positions)
        tensors[f"{row}/{name}/target_positions"] = torch.tensor(jacobian.target_positions)
    folder.mkdir(exist_ok=True)
    with replacing(folder / f"{row}.safetensors") as unfinished:
        save_file(tensors, unfinished)


def rows_with_matrices(folder: Path, file: Path | None) -> set[int]:
    """Return the rows that have matrices in the folder of an unfinished run, or in the file of an earlier one."""
    rows = set(_files(folder))
    if file is not None and file.is_file():
        with safe_open(file, framework="pt") as opened:
            rows |= {_row(key) for key in opened.keys()}  # noqa: SIM118
    return rows


def drop_matrices(folder: Path, *, keep: Collection[int]) -> None:
    """Delete the matrices in the folder of rows that are scored again."""
    for row, file in _files(folder).items():
        if row not in keep:
            file.unlink()


def merge_matrices(folder: Path, file: Path, *, keep: Collection[int]) -> None:
    """Write all matrices of the folder into one file, beside those of the rows to keep that it already holds."""
    tensors: dict[str, torch.Tensor] = {}
    for path in [file, *_files(folder).values()]:
        if path.is_file():
            with safe_open(path, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    if path != file or _row(key) in keep:
                        tensors[key] = opened.get_tensor(key)
    with replacing(file) as unfinished:
        save_file(tensors, unfinished)


def check_matrices(file: Path) -> None:
    """Raise ValueError if the file exists and does not hold matrices."""
    if not file.is_file():
        return
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"--save-jacobians is {str(file)!r}, which exists and is not a safetensors file ({error}); name another"
        ) from error


def _files(folder: Path) -> dict[int, Path]:
    return {int(path.stem): path for path in sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem))}


def _row(key: str) -> int:
    return int(key.split("/")[0])
