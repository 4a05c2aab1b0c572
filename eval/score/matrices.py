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

_SETTINGS = "settings"  # key of the metadata, whose other keys are row numbers


def save_matrices(folder: Path, row: int, content: str, rollout: Rollout, score: RolloutScore) -> None:
    """Write a row's token ids and, for each link, its base and residual Jacobian and their positions.

    Args:
        folder: folder of the unfinished run. Its settings are checked elsewhere, so files record only row contents.
        row: number in the input, from 0.
        content: see `Line.content`.
        rollout: the row's rollout.
        score: the rollout's score, with its Jacobians.
    """
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
        save_file(tensors, unfinished, {str(row): content})


def check_matrices(file: Path, settings: str) -> None:
    """Raise ValueError if the file exists and was not written with these settings (their hash)."""
    if not file.is_file():
        return
    try:
        found = _stamps(file).get(_SETTINGS)
    except SafetensorError as error:
        raise ValueError(
            f"--save-jacobians is {str(file)!r}, which exists and is not a safetensors file ({error}); name another"
        ) from error
    if found != settings:
        what = "was not written by cepo score" if found is None else "holds matrices of another model or other settings"
        raise ValueError(f"--save-jacobians is {str(file)!r}, which {what}; name another file, or move this one away")


def rows_with_matrices(folder: Path, file: Path | None) -> dict[int, str]:
    """Return the content hash of each row with matrices in an unfinished run's folder or, failing that, in the file.

    Args:
        folder: see `save_matrices`.
        file: a file that passed `check_matrices`, or None.
    """
    rows = _rows(file) if file is not None and file.is_file() else {}
    for shard in _shards(folder).values():
        rows |= _rows(shard)
    return rows


def drop_matrices(folder: Path, *, keep: Collection[int]) -> None:
    """Delete the matrices in the folder except those of the rows to keep."""
    for row, shard in _shards(folder).items():
        if row not in keep:
            shard.unlink()


def merge_matrices(folder: Path, file: Path, settings: str, *, keep: Collection[int]) -> None:
    """Add all matrices of the folder to the file, which keeps only those of the rows to keep."""
    tensors: dict[str, torch.Tensor] = {}
    stamps = {_SETTINGS: settings}
    for path in [file, *_shards(folder).values()]:
        if path.is_file():
            taken = {row: content for row, content in _rows(path).items() if path != file or row in keep}
            stamps |= {str(row): content for row, content in taken.items()}
            with safe_open(path, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    if int(key.split("/")[0]) in taken:
                        tensors[key] = opened.get_tensor(key)
    with replacing(file) as unfinished:
        save_file(tensors, unfinished, stamps)


def _shards(folder: Path) -> dict[int, Path]:
    return {int(path.stem): path for path in sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem))}


def _rows(file: Path) -> dict[int, str]:
    return {int(name): content for name, content in _stamps(file).items() if name != _SETTINGS}


def _stamps(file: Path) -> dict[str, str]:
    """Return the file's metadata: the hash of the settings, and the content hash of each row by its number."""
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}
