"""What an ablation found: means, rank correlations and pooling's fidelity, with intervals over prompts."""

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

from cepo.benchmarks.ablation.group import REFERENCE, Hardening, Sweep
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
        pool_angles: principal angles of pooled and exact subspace in degrees, of each link and pooled hardening; one
            list a rollout.
        rewards_NFUP: fused rewards at the reference hardening.
    """

    group_N: np.ndarray
    values_NAHF: np.ndarray
    nuisance_angles_NAH: np.ndarray
    pool_angles: Mapping[tuple[str, Hardening], Sequence[Sequence[float]]]
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
        table = console_table(
            "link", "K", "rank", "pool", "score", "mean S", "Spearman to paper's", "angle", title=title
        )
        rows = [row for row in self.rows if row["kind"] == "link"]
        if len(rows) > _SHOWN:
            rows = [row for row in rows if _steps_from_reference(row) <= 1]
        for row in rows:
            angle = row["nuisance_angle"]
            table.add_row(
                row["link"],
                str(row["counterfactuals"]),
                rank_label(row),
                row["pool"],
                row["score"],
                shown(row, "S"),
                shown(row, "spearman_paper"),
                "-" if angle is None else f"{angle:.1f}°",
            )
        return table

    def fidelity_table(self) -> Table | None:
        """Return how near pooled nuisance comes to exact, for every K, rank and score; None where nothing is pooled."""
        rows = [row for row in self.rows if row["kind"] == "link" and row["pool"] == "group" and row["counterfactuals"]]
        if not rows:
            return None
        header = ["link", "K", "rank", "score", "median angle", "largest", "Spearman to exact", "within prompts"]
        header += ["rows exact", "pooled"]
        table = console_table(
            *header, title=f'pool="group" against exact, {self.rollouts} rollouts of {self.groups} prompts'
        )
        for row in rows:
            angles = [row["pool_angle_median"], row["pool_angle_largest_median"]]
            table.add_row(
                row["link"],
                str(row["counterfactuals"]),
                rank_label(row),
                row["score"],
                *("-" if angle is None else f"{angle:.1f}°" for angle in angles),
                shown(row, "spearman_exact"),
                shown(row, "within_exact"),
                *("-" if row[name] is None else f"{sum(row[name]):,}" for name in ("rows_exact", "rows_pooled")),
            )
        return table


def read_measures(folders: Sequence[Path], sweep: Sweep) -> Measures:
    """Read the tables of all groups; their rows stand in the order of the sweep, rollout by rollout."""
    import pyarrow.parquet as pq

    values, nuisance, rewards, numbers = [], [], [], []
    pool_angles: dict[tuple[str, Hardening], list[list[float]]] = {
        (link, hardening): [] for link in sweep.links for hardening in sweep.hardenings if hardening.pool == "group"
    }
    shape_AHF = (len(sweep.links), len(sweep.hardenings), len(sweep.scores))
    shape_HFUP = (len(sweep.hardenings), len(sweep.scores), len(sweep.link_sets), len(sweep.powers))
    at_reference = sweep.hardenings.index(REFERENCE)
    for number, folder in enumerate(folders):
        columns = ["S", "nuisance_angle", "pool_angles"]
        table = pq.read_table(folder / "ablation.parquet", columns=columns)
        values.append(table["S"].to_numpy().reshape(-1, *shape_AHF))
        nuisance.append(table["nuisance_angle"].to_numpy().astype(float).reshape(-1, *shape_AHF)[..., 0])
        numbers.append(np.full(len(values[-1]), number))
        if pool_angles:
            angles_NAHF = np.array([*table["pool_angles"].to_pylist(), None], dtype=object)[:-1].reshape(-1, *shape_AHF)
            for (link, hardening), found in pool_angles.items():
                found += angles_NAHF[:, sweep.links.index(link), sweep.hardenings.index(hardening), 0].tolist()
        reward = pq.read_table(folder / "rewards.parquet", columns=["reward"])["reward"].to_numpy()
        rewards.append(reward.reshape(-1, *shape_HFUP)[:, at_reference])
    _, group_N = np.unique(np.concatenate(numbers), return_inverse=True)
    return Measures(group_N, np.concatenate(values), np.concatenate(nuisance), pool_angles, np.concatenate(rewards))


def summarise(
    measures: Measures,
    sweep: Sweep,
    plans: Sequence[Mapping[str, Mapping[str, Sequence[int]]]],
    *,
    resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Return one row for each link and setting, and one for each fused reward at the reference hardening.

    Of pooled settings, `spearman_exact` compares S with its exact twin over all rollouts, `within_exact` after each
    prompt's mean is taken off both. Intervals are 95% percentile bootstraps over prompts, not rollouts: those of one
    prompt are no independent draws (and share one subspace where pooled). There is none for a single prompt.

    Args:
        measures: from `read_measures`.
        sweep: what was swept.
        plans: for each group and K, the forward and backward token rows of the pools "none" and "group".
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
                if hardening.pool == "group":
                    others["spearman_exact"] = (sweep.hardenings.index(_exact_twin(hardening)), score_at)
                for name in ("spearman_reference", "spearman_paper", "spearman_exact"):
                    if name not in others:
                        row |= {name: None, f"{name}_low": None, f"{name}_high": None}
                        continue
                    other_at, other_score_at = others[name]
                    other_N = measures.values_NAHF[:, link_at, other_at, other_score_at]
                    row |= with_interval(name, partial(spearman, values_N, other_N))
                row |= {"within_exact": None, "within_exact_low": None, "within_exact_high": None}
                if hardening.pool == "group":
                    exact_N = measures.values_NAHF[:, link_at, sweep.hardenings.index(_exact_twin(hardening)), score_at]
                    pair = [less_prompt_mean(x_N, measures.group_N) for x_N in (values_N, exact_N)]
                    row |= with_interval("within_exact", partial(spearman, *pair))
                angles_N = measures.nuisance_angles_NAH[:, link_at, at]
                row["nuisance_angle"] = float(np.nanmean(angles_N)) if np.isfinite(angles_N).any() else None
                row |= _fidelity(measures.pool_angles.get((link, hardening), []))
                row |= _planned(plans, hardening)
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


def less_prompt_mean(x_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """Return what is left of x when each prompt's mean is taken off: what GRPO's advantages are made of.

    Rounded to 1e-6, below which float32 Jacobians of equal completions differ: a rank correlation sees every digit.
    """
    means_G = np.bincount(group_N, x_N) / np.bincount(group_N)
    return np.round(x_N - means_G[group_N], 6)


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


def _exact_twin(hardening: Hardening) -> Hardening:
    return Hardening(hardening.counterfactuals, hardening.rank, hardening.tau, "none")


def _fidelity(angles: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Return the median over rollouts of all principal angles, and of each rollout's largest."""
    compared = [list(of_rollout) for of_rollout in angles if of_rollout]
    every = [angle for of_rollout in compared for angle in of_rollout]
    return {
        "pool_angle_median": float(np.median(every)) if every else None,
        "pool_angle_largest_median": float(np.median([max(one) for one in compared])) if compared else None,
    }


def _planned(
    plans: Sequence[Mapping[str, Mapping[str, Sequence[int]]]], hardening: Hardening
) -> dict[str, list[int] | None]:
    """Return forward and backward token rows of all groups, exact and pooled, at the K of a pooled hardening."""
    key = str(hardening.counterfactuals)
    planned = [plan[key] for plan in plans if key in plan] if hardening.pool == "group" else []

    def total(pool: str) -> list[int] | None:
        return [sum(plan[pool][at] for plan in planned) for at in (0, 1)] if planned else None

    return {"rows_exact": total("none"), "rows_pooled": total("group")}


def _steps_from_reference(row: Mapping[str, Any]) -> int:
    """Return in how many of K, rank, pool and score a row differs from the paper's preset."""
    rank_differs = (row["rank"], row["tau"]) != (REFERENCE.rank, REFERENCE.tau)
    others = {"counterfactuals": REFERENCE.counterfactuals, "pool": REFERENCE.pool, "score": _PAPER_SCORE}
    return rank_differs + sum(row[name] != value for name, value in others.items())
