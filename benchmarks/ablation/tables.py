"""The tables of an ablation on disk: one folder of parquet files per group of rollouts, merged at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cepo.benchmarks.ablation.sweep import PAPER_HARDENING, Sweep
from cepo.files import replacing

LINKS, REWARDS = "ablation.parquet", "rewards.parquet"
_MALFORMED = "malformed.json"
_SETTING = {"row": pa.int64(), "group": pa.int64(), "counterfactuals": pa.int64(), "rank": pa.int64()}
_SETTING |= {"tau": pa.float64(), "score": pa.string()}
_MEASURES = dict.fromkeys(("S", "phi", "retained", "influence", "norm"), pa.float64())
_MEASURES |= {"tokens": pa.int64(), "removed_rank": pa.int64(), "nuisance_angle": pa.float64()}
_SCHEMAS = {
    LINKS: pa.schema(list({**_SETTING, "link": pa.string(), **_MEASURES}.items())),
    REWARDS: pa.schema(list({**_SETTING, "links": pa.string(), "p": pa.float64(), "reward": pa.float64()}.items())),
}


@dataclass(frozen=True)
class SweptValues:
    """The numbers of a sweep as arrays of N rollouts, A links, H hardenings, F scores, U link sets and P powers.

    Attributes:
        group_N: number of each rollout's group.
        values_NAHF: S of each link.
        nuisance_angles_NAH: mean principal angle of nuisance and Jacobian in degrees; NaN if nothing is removed.
        rewards_NFUP: fused rewards at the paper's hardening.
    """

    group_N: np.ndarray
    values_NAHF: np.ndarray
    nuisance_angles_NAH: np.ndarray
    rewards_NFUP: np.ndarray


def write_group(
    folder: Path,
    link_rows: Sequence[Mapping[str, Any]],
    reward_rows: Sequence[Mapping[str, Any]],
    malformed: Mapping[int, str],
) -> None:
    """Write what `sweep_group` returned for one group, atomically."""
    with replacing(folder) as unfinished:
        unfinished.mkdir()
        for name, rows in ((LINKS, link_rows), (REWARDS, reward_rows)):
            pq.write_table(pa.Table.from_pylist(list(rows), schema=_SCHEMAS[name]), unfinished / name)
        (unfinished / _MALFORMED).write_text(json.dumps(malformed))


def read_malformed(folder: Path) -> dict[int, str]:
    """Return the reason of each rollout of a group without Jacobians, by row of the input."""
    return {int(row): reason for row, reason in json.loads((folder / _MALFORMED).read_text()).items()}


def merge_groups(output: Path, folders: Sequence[Path]) -> None:
    """Concatenate the groups' tables into one file per table, one group at a time."""
    for name, schema in _SCHEMAS.items():
        with replacing(output / name) as unfinished, pq.ParquetWriter(unfinished, schema) as writer:
            for folder in folders:
                writer.write_table(pq.read_table(folder / name))


def read_values(folders: Sequence[Path], sweep: Sweep) -> SweptValues:
    """Read the tables of all groups; their rows are in the order of the sweep, rollout by rollout."""
    shape_AHF = (len(sweep.links), len(sweep.hardenings), len(sweep.scores))
    shape_HFUP = (len(sweep.hardenings), len(sweep.scores), len(sweep.link_sets), len(sweep.powers))
    of_links = [pq.read_table(folder / LINKS, columns=["group", "S", "nuisance_angle"]) for folder in folders]
    links = pa.concat_tables(of_links)
    rewards = pa.concat_tables([pq.read_table(folder / REWARDS, columns=["reward"]) for folder in folders])
    return SweptValues(
        group_N=links["group"].to_numpy().reshape(-1, *shape_AHF)[:, 0, 0, 0],
        values_NAHF=links["S"].to_numpy().reshape(-1, *shape_AHF),
        nuisance_angles_NAH=links["nuisance_angle"].to_numpy().astype(float).reshape(-1, *shape_AHF)[..., 0],
        rewards_NFUP=rewards["reward"].to_numpy().reshape(-1, *shape_HFUP)[:, sweep.hardenings.index(PAPER_HARDENING)],
    )
