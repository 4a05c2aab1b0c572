"""Results of an ablation: means, and rank correlations with the paper's values, with intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cepo.benchmarks.ablation.sweep import PAPER_HARDENING, Sweep, rank_label
from cepo.benchmarks.ablation.tables import SweptValues
from cepo.eval.rank_statistics import rank_correlations
from cepo.eval.report.numbers import digits
from cepo.eval.report.tables import ConsoleTable
from cepo.eval.statistics import DIFFERENCE, SHARE, Estimate, estimates, mean, undetermined
from cepo.fusion.config import PAPER

_SHOWN = 48  # rows of a table that is still readable
_NOT_SWEPT = undetermined(f"the paper's score, {PAPER['score']}, is not swept")


@dataclass(frozen=True)
class AblateSummary:
    """The result of a sweep.

    Attributes:
        output: folder of the results.
        rollouts: number of rollouts swept.
        groups: number of their prompts.
        resumed: groups taken from an earlier run.
        malformed: reason of each row that was left out.
        rows: the rows of `summary.jsonl`.
    """

    output: Path
    rollouts: int
    groups: int
    resumed: int
    malformed: Mapping[int, str]
    rows: tuple[Mapping[str, Any], ...]

    def table(self) -> ConsoleTable:
        """Return all settings; of more than 48, those that differ from the paper's in at most one respect."""
        title = (
            f"{self.output}: {self.rollouts} rollouts of {self.groups} prompts, {len(self.malformed)} malformed. "
            "Spearman: rank correlation with the paper's S, its interval in summary.jsonl"
        )
        rows = [row for row in self.rows if row["kind"] == "link"]
        if len(rows) > _SHOWN:
            rows = [row for row in rows if _steps_from_paper(row) <= 1]
        header = ("link", "K", "rank", "score", "mean S", "Spearman", "angle")
        return ConsoleTable(header, [_cells(row) for row in rows], title)


def summarise_sweep(found: SweptValues, sweep: Sweep) -> list[dict[str, Any]]:
    """Return one row per link and setting, and one per fused reward at the paper's hardening.

    `spearman_reference` compares S with the same score at the paper's hardening, `spearman_paper` with the paper's S.
    Intervals are over prompts, not rollouts, since rollouts of one prompt are not independent. A single prompt has no
    interval, nor has the comparison of a score with itself; the column NAME_why has the reason. Intervals of S and of
    rewards are cut to [0, 1], but get no pseudo-units at 0 and 1, which would dominate an influence of a few
    thousandths.

    Args:
        found: from `read_values`.
        sweep: what was swept.
    """
    over_prompts = partial(estimates, clusters=found.group_N, unit="prompt")
    at_paper = sweep.hardenings.index(PAPER_HARDENING)
    settings = [(hardening, score) for hardening in sweep.hardenings for score in sweep.scores]
    rollouts = len(found.group_N)
    rows: list[dict[str, Any]] = []
    for at_link, link in enumerate(sweep.links):
        values_NM = found.values_NAHF[:, at_link].reshape(rollouts, -1)
        means = over_prompts(mean, values_NM, within=SHARE)
        # Correlations of all M settings with the F scores at the paper's hardening.
        correlations = iter(
            over_prompts(
                *(rank_correlations, values_NM, found.values_NAHF[:, at_link, at_paper]),
                ends=DIFFERENCE,
                lacking="a score is the same everywhere",
            )
        )
        angles_NH = found.nuisance_angles_NAH[:, at_link]
        for (hardening, score), of_setting in zip(settings, means, strict=True):
            to_score = {name: next(correlations) for name in sweep.scores}
            if hardening == PAPER_HARDENING:
                to_score[score] = Estimate(to_score[score].value, count=rollouts, why="compared with itself")
            angles_N = angles_NH[:, sweep.hardenings.index(hardening)]
            rows.append(
                {"kind": "link", "link": link, **asdict(hardening), "score": score, "rollouts": rollouts}
                | _interval("S", of_setting)
                | _interval("spearman_reference", to_score[score])
                | _interval("spearman_paper", to_score.get(PAPER["score"], _NOT_SWEPT))
                | {"nuisance_angle": float(np.nanmean(angles_N)) if np.isfinite(angles_N).any() else None}
            )
    rewards = iter(over_prompts(mean, found.rewards_NFUP.reshape(rollouts, -1), within=SHARE))
    for score in sweep.scores:
        for chosen in sweep.link_sets:
            for p in sweep.powers:
                row = {"kind": "reward", "links": chosen.name, **asdict(PAPER_HARDENING), "score": score, "p": p}
                rows.append({**row, **_interval("reward", next(rewards)), "rollouts": rollouts})
    return rows


def _interval(name: str, found: Estimate) -> dict[str, float | str | None]:
    """Return the columns of an estimate; None for what is not determined, and the reason in `NAME_why`."""
    known = [value if math.isfinite(value) else None for value in (found.value, found.low, found.high)]
    columns = dict(zip((name, f"{name}_low", f"{name}_high"), known, strict=True))
    return {**columns, **({f"{name}_why": found.why} if found.why else {})}


def _cells(row: Mapping[str, Any]) -> list[str]:
    value, low, high, correlation, angle = (
        math.nan if row[name] is None else row[name]
        for name in ("S", "S_low", "S_high", "spearman_paper", "nuisance_angle")
    )
    setting = [row["link"], str(row["counterfactuals"]), rank_label(row), row["score"]]
    return [
        *setting,
        str(Estimate(value, low, high, why=row.get("S_why", ""))),
        digits(correlation),
        "-" if math.isnan(angle) else f"{angle:.1f}°",
    ]


def _steps_from_paper(row: Mapping[str, Any]) -> int:
    """Return the number of K, rank and score in which a row differs from the paper's values."""
    size = (row["rank"], row["tau"])
    rank_differs = size not in ((PAPER_HARDENING.rank, PAPER_HARDENING.tau), (None, None))  # at K = 0 there is none
    others = ("counterfactuals", "score")
    return rank_differs + sum(row[name] != PAPER[name] for name in others)
