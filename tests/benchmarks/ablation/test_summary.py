"""The summary of a sweep: intervals over prompts, reasons where there are none, and digits in their range."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from cepo.benchmarks.ablation.summary import AblateSummary, summarise_sweep
from cepo.benchmarks.ablation.sweep import plan_sweep
from cepo.benchmarks.ablation.tables import SweptValues
from cepo.fusion.config import RewardConfig


@pytest.mark.parametrize(("prompts", "interval"), [((0, 1), (0.5 - 0.0635, 0.5 + 0.0635)), ((0, 0), (None, None))])
def test_intervals_are_over_prompts(prompts: tuple[int, int], interval: tuple[float | None, float | None]) -> None:
    """Two prompts, 0.01 apart: Student's t with one degree, 12.706, however many rollouts there are."""
    sweep = plan_sweep(
        RewardConfig(links={"X->Y": 1.0}), counterfactuals=(4,), ranks=("2",), powers=(0.0,), scores=("influence",)
    )
    x_N = np.repeat([0.495, 0.505], 50)
    values = SweptValues(
        group_N=np.repeat(prompts, 50),
        values_NAHF=x_N[:, None, None, None],
        nuisance_angles_NAH=np.full((100, 1, 1), np.nan),
        rewards_NFUP=x_N[:, None, None, None],
    )
    for row, name in zip(summarise_sweep(values, sweep), ("S", "reward"), strict=True):
        assert row[name] == pytest.approx(0.5)
        assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx(interval, abs=1e-3)
        assert row.get(f"{name}_why") == (None if interval[0] else "1 prompt")


def test_what_has_no_interval_says_why() -> None:
    """Spans of one token: phi is 1 everywhere, which the table showed as a bare 1.000."""
    config = RewardConfig(links={"X->Y": 1.0})
    sweep = plan_sweep(config, counterfactuals=(4,), ranks=("2",), powers=(0.0,), scores=("phi",))
    ones = np.ones((6, 1, 1, 1))
    rows = summarise_sweep(SweptValues(np.arange(6) // 2, ones, np.full((6, 1, 1), np.nan), ones), sweep)
    assert rows[0]["S_why"] == rows[1]["reward_why"] == "3 equal prompts"
    assert (rows[0]["spearman_paper"], rows[0]["spearman_paper_why"]) == (None, "compared with itself")
    (cells,) = AblateSummary(Path("out"), 6, 3, 0, {}, tuple(rows)).table().rows
    assert cells[4:6] == ["1.000 [undetermined: 3 equal prompts]", "none"]


def test_small_scores_are_shown_with_their_digits_in_their_range_and_no_rank_at_k_0() -> None:
    """Influences of a few ten-thousandths were shown as "0.000 [-0.000, 0.000]", and K = 0 once per rank."""
    config = RewardConfig(links={"X->Y": 1.0})
    sweep = plan_sweep(
        config, counterfactuals=(0, 4), ranks=("1", "2", "tau=0.5"), powers=(0.0,), scores=("influence",)
    )
    assert [(one.counterfactuals, one.rank, one.tau) for one in sweep.hardenings if not one.counterfactuals] == [
        (0, None, None)
    ]
    x_N = np.array([1e-5, 2e-5, 8e-4, 1e-5])
    settings = len(sweep.hardenings)
    values = SweptValues(
        group_N=np.arange(4),
        values_NAHF=np.tile(x_N[:, None, None, None], (1, 1, settings, 1)),
        nuisance_angles_NAH=np.full((4, 1, settings), np.nan),
        rewards_NFUP=x_N[:, None, None, None],
    )
    rows = summarise_sweep(values, sweep)
    assert all(row[f"{name}_low"] == 0.0 for row in rows for name in ("S", "reward") if name in row)
    shown = AblateSummary(Path("out"), 4, 4, 0, {}, tuple(rows)).table().rows
    assert [cells[1:3] for cells in shown] == [["0", "-"], ["4", "1"], ["4", "2"], ["4", "tau=0.5"]]
    assert all(re.fullmatch(r"0\.00021 \[0\.00000, 0\.\d{5}\]", cells[4]) for cells in shown)
