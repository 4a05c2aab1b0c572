"""What an ablation found: means and rank correlations, with intervals over prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy.stats import DegenerateDataWarning, bootstrap

from cepo.benchmarks.ablation.group import REFERENCE, Sweep
from cepo.eval.report.tables import console_table

_BATCH = 100  # resamples held at once: bounds memory for inputs of many thousands of rollouts
_PAPER_SCORE = "phi"
_SHOWN = 48  # rows of a table that one can still read


@dataclass(frozen=True)
class Measures:
    """The numbers of a sweep as arrays; N rollouts, A links, H hardenings, F scores, U link sets, P powers.

    Attributes:
        group_N: number of each rollout's group, from 0 without gaps.
        values_NAHF: S.
        nuisance_angles_NAH: mean principal angle of nuisance and Jacobian in degrees, NaN where nothing is removed.
        rewards_NFUP: fused rewards at the reference hardening.
    """

    group_N: np.ndarray
    values_NAHF: np.ndarray
    nuisance_angles_NAH: np.ndarray
    rewards_NFUP: np.ndarray


@dataclass(frozen=True)
class AblateSummary:
    """What came of a sweep.

    Attributes:
        output: the folder.
        rollouts: rollouts swept.
        groups: prompts they share.
        resumed: groups taken from an earlier run.
        malformed: reason of each row that was left out.
        rows: the rows of `summary.jsonl`.
        seconds: time of this run.
    """

    output: Path
    rollouts: int
    groups: int
    resumed: int
    malformed: Mapping[int, str]
    rows: tuple[Mapping[str, Any], ...]
    seconds: float

    def table(self) -> Table:
        """Return all settings, or of many those that differ from the reference in one respect at most."""
        title = f"{self.output}: {self.rollouts} rollouts of {self.groups} prompts, {len(self.malformed)} malformed"
        table = console_table("link", "K", "rank", "score", "mean S", "Spearman to paper's", "angle", title=title)
        rows = [row for row in self.rows if row["kind"] == "link"]
        if len(rows) > _SHOWN:
            rows = [row for row in rows if _steps_from_reference(row) <= 1]
        for row in rows:
            angle = row["nuisance_angle"]
            table.add_row(
                row["link"],
                str(row["counterfactuals"]),
                rank_label(row),
                row["score"],
                shown(row, "S"),
                shown(row, "spearman_paper"),
                "-" if angle is None else f"{angle:.1f}°",
            )
        return table


def read_measures(folders: Sequence[Path], sweep: Sweep) -> Measures:
    """Read the tables of all groups; their rows stand in the order of the sweep, rollout by rollout."""
    import pyarrow.parquet as pq

    values, nuisance, rewards, numbers = [], [], [], []
    shape_AHF = (len(sweep.links), len(sweep.hardenings), len(sweep.scores))
    shape_HFUP = (len(sweep.hardenings), len(sweep.scores), len(sweep.link_sets), len(sweep.powers))
    at_reference = sweep.hardenings.index(REFERENCE)
    for number, folder in enumerate(folders):
        table = pq.read_table(folder / "ablation.parquet", columns=["S", "nuisance_angle"])
        values.append(table["S"].to_numpy().reshape(-1, *shape_AHF))
        nuisance.append(table["nuisance_angle"].to_numpy().astype(float).reshape(-1, *shape_AHF)[..., 0])
        numbers.append(np.full(len(values[-1]), number))
        reward = pq.read_table(folder / "rewards.parquet", columns=["reward"])["reward"].to_numpy()
        rewards.append(reward.reshape(-1, *shape_HFUP)[:, at_reference])
    _, group_N = np.unique(np.concatenate(numbers), return_inverse=True)
    return Measures(group_N, np.concatenate(values), np.concatenate(nuisance), np.concatenate(rewards))


def summarise(measures: Measures, sweep: Sweep, *, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Return one row per link and setting, and one per fused reward at the reference hardening.

    Intervals are 95% percentile bootstraps over prompts, not rollouts: rollouts of one prompt are not independent
    draws. A single prompt has no interval.

    Args:
        measures: from `read_measures`.
        sweep: what was swept.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    rows: list[dict[str, Any]] = []

    def with_interval(name: str, statistic: Callable[[np.ndarray], np.ndarray]) -> dict[str, float | None]:
        value, low, high = interval(statistic, measures.group_N, resamples=resamples, seed=seed)
        return {name: value, f"{name}_low": low, f"{name}_high": high}

    at_reference = sweep.hardenings.index(REFERENCE)
    for link_at, link in enumerate(sweep.links):
        for at, hardening in enumerate(sweep.hardenings):
            for score_at, score in enumerate(sweep.scores):
                values_N = measures.values_NAHF[:, link_at, at, score_at]
                row = {"kind": "link", "link": link, **asdict(hardening), "score": score, "rollouts": len(values_N)}
                row |= with_interval("S", partial(weighted_mean, values_N))
                others = {"spearman_reference": (at_reference, score_at)}
                if _PAPER_SCORE in sweep.scores:
                    others["spearman_paper"] = (at_reference, sweep.scores.index(_PAPER_SCORE))
                for name in ("spearman_reference", "spearman_paper"):
                    if name not in others:
                        row |= {name: None, f"{name}_low": None, f"{name}_high": None}
                        continue
                    other_at, other_score_at = others[name]
                    other_N = measures.values_NAHF[:, link_at, other_at, other_score_at]
                    row |= with_interval(name, partial(spearman, values_N, other_N))
                angles_N = measures.nuisance_angles_NAH[:, link_at, at]
                row["nuisance_angle"] = float(np.nanmean(angles_N)) if np.isfinite(angles_N).any() else None
                rows.append(row)
    for score_at, score in enumerate(sweep.scores):
        for set_at, chosen in enumerate(sweep.link_sets):
            for power_at, p in enumerate(sweep.powers):
                rewards_N = measures.rewards_NFUP[:, score_at, set_at, power_at]
                row = {"kind": "reward", "links": chosen.name, **asdict(REFERENCE), "score": score, "p": p}
                row |= with_interval("reward", partial(weighted_mean, rewards_N))
                rows.append({**row, "rollouts": len(rewards_N)})
    return rows


def interval(
    statistic: Callable[[np.ndarray], np.ndarray], group_N: np.ndarray, *, resamples: int, seed: int
) -> tuple[float | None, float | None, float | None]:
    """Return a statistic and its 95% percentile bootstrap interval over groups; None where it is not defined.

    Args:
        statistic: from weights (B, N), how often each rollout was drawn, to B values.
        group_N: the group of each rollout, from 0 without gaps.
        resamples: of the bootstrap.
        seed: of the bootstrap; the same draws are made for every statistic.
    """
    groups = int(group_N.max()) + 1
    value = _number(statistic(np.ones((1, len(group_N))))[0])
    if groups < 2 or value is None:
        return value, None, None

    def of_drawn(drawn_BG: np.ndarray, axis: int) -> np.ndarray:
        flat_BG = drawn_BG.reshape(-1, groups).astype(np.int64)
        offsets_BG = flat_BG + groups * np.arange(len(flat_BG))[:, None]
        counts_BG = np.bincount(offsets_BG.ravel(), minlength=groups * len(flat_BG)).reshape(-1, groups)
        return statistic(counts_BG[:, group_N].astype(float)).reshape(drawn_BG.shape[:-1])

    with warnings.catch_warnings():
        # A draw of few prompts can leave no rank correlation; then there is no interval, which is said by None.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = bootstrap(
            (np.arange(groups),),
            of_drawn,
            n_resamples=resamples,
            batch=_BATCH,
            vectorized=True,
            method="percentile",
            random_state=np.random.default_rng(seed),
        )
    low, high = result.confidence_interval
    return value, _number(low), _number(high)


def weighted_mean(x_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return B means of x, each value counted as often as its weight says."""
    return weights_BN @ x_N / weights_BN.sum(1)


def spearman(x_N: np.ndarray, y_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return B rank correlations of x and y, each pair counted as often as its weight says; NaN where one is constant.

    Ties share their mean rank, and so do the copies of a pair that was drawn more than once: the result is Spearman's
    rho of the resample written out.
    """
    ranks_BN, others_BN = _ranks(x_N, weights_BN), _ranks(y_N, weights_BN)
    total_B1 = weights_BN.sum(1, keepdims=True)
    ranks_BN = ranks_BN - (weights_BN * ranks_BN).sum(1, keepdims=True) / total_B1
    others_BN = others_BN - (weights_BN * others_BN).sum(1, keepdims=True) / total_B1
    product_B = (weights_BN * ranks_BN * others_BN).sum(1)
    energies_B = (weights_BN * ranks_BN**2).sum(1) * (weights_BN * others_BN**2).sum(1)
    return np.where(energies_B > 0.0, product_B / np.sqrt(np.where(energies_B > 0.0, energies_B, 1.0)), np.nan)


def rank_label(row: Mapping[str, Any]) -> str:
    """Return a row's rank as the user wrote it."""
    return f"tau={row['tau']:g}" if row["rank"] is None else str(row["rank"])


def shown(row: Mapping[str, Any], name: str) -> str:
    """Return a number of a row with its interval, for people."""
    if row[name] is None:
        return "-"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")


def _ranks(x_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return the mean rank of each value's ties, in each of B resamples."""
    order_N = np.argsort(x_N, kind="stable")
    _, starts, tie_N = np.unique(x_N[order_N], return_index=True, return_inverse=True)
    counts_BU = np.add.reduceat(weights_BN[:, order_N], starts, axis=1)
    ranks_BN = np.empty_like(weights_BN)
    ranks_BN[:, order_N] = (counts_BU.cumsum(1) - counts_BU / 2 + 0.5)[:, tie_N]
    return ranks_BN


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _steps_from_reference(row: Mapping[str, Any]) -> int:
    """Return in how many of K, rank and score a row differs from the paper's preset."""
    rank_differs = (row["rank"], row["tau"]) != (REFERENCE.rank, REFERENCE.tau)
    others = {"counterfactuals": REFERENCE.counterfactuals, "score": _PAPER_SCORE}
    return rank_differs + sum(row[name] != value for name, value in others.items())
