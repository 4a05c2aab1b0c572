"""Protects the plots of `cepo ablate`: they show the values that were asked for, and no others."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from cepo.benchmarks.ablation import figures
from cepo.benchmarks.ablation.sweep import plan_sweep
from cepo.fusion.config import RewardConfig

LINKS = ("Z->X", "X->Y")


def drawn(monkeypatch: pytest.MonkeyPatch, counterfactuals: list[int], ranks: list[str]) -> dict[str, list[Axes]]:
    """Return the panels of each plot of a sweep of two links, where S is K + rank / 100."""
    config = RewardConfig(links=dict.fromkeys(LINKS, 0.5), score="phi")
    sweep = plan_sweep(config, counterfactuals=counterfactuals, ranks=ranks, powers=[0.2], scores=["phi"])
    rows: list[dict[str, Any]] = [
        {"kind": "link", "link": link, "score": "phi", "counterfactuals": one.counterfactuals, "rank": one.rank}
        | {"tau": one.tau, "S": one.counterfactuals + (one.rank or 0) / 100, "S_low": None, "S_high": None}
        for link in LINKS
        for one in sweep.hardenings
    ]
    found: dict[str, list[Axes]] = {}
    monkeypatch.setattr(figures, "write_png", lambda path, figure: found.update({path.name: figure.axes}))
    reward = {"kind": "reward", "links": "all", "counterfactuals": 4, "rank": 2, "tau": None, "score": "phi", "p": 0.2}
    figures.draw_figures(Path(), [*rows, {**reward, "reward": 0.5}], sweep.asked)
    return found


def shown(panel: Axes) -> dict[str, Any]:
    """Return a panel's title, and by label its curves' values, or the height of a horizontal line."""
    curves = {str(bars.get_label()): [float(y) for y in bars[0].get_ydata()] for bars in panel.containers}
    lines = {
        str(line.get_label()): float(line.get_ydata()[0])
        for line in panel.lines
        if not str(line.get_label()).startswith("_")
    }
    ticks = [label.get_text() for label in panel.get_xticklabels()]
    return {"title": panel.get_title(), "ticks": ticks, "curves": curves, "lines": lines}


def test_every_value_that_was_asked_for_is_drawn_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's K = 4 and rank 2 are in the sweep whatever was asked for; the ranks at K = 2 were never drawn."""
    found = drawn(monkeypatch, [0, 2], ["1", "2"])
    bare = {"Z->X, K = 0": 0.0, "X->Y, K = 0": 0.0}
    assert [shown(panel) for panel in found["s_against_k.png"]] == [
        {"title": f"score phi, rank {rank}", "ticks": ["2"], "lines": bare}
        | {"curves": {link: [2 + rank / 100] for link in LINKS}}
        for rank in (1, 2)
    ]
    (at_two,) = found["s_against_rank.png"]
    assert shown(at_two) == {
        "title": "score phi, K = 2",
        "ticks": ["1", "2"],
        "curves": {link: [2.01, 2.02] for link in LINKS},
        "lines": bare,
    }
    assert shown(found["reward_against_p.png"][0])["title"] == "score phi, K = 4, rank 2"


@pytest.mark.parametrize(
    ("counterfactuals", "ranks", "against_k", "against_rank"),
    [
        ([0], ["2"], ["K = 0"], ["K = 0"]),
        ([3], ["tau=0.5"], ["tau=0.5"], ["K = 3"]),
        ([1, 4], ["2", "tau=0.5"], ["rank 2", "tau=0.5"], ["K = 1", "K = 4"]),
    ],
)
def test_there_is_a_panel_for_each_value_that_is_held(
    counterfactuals: list[int],
    ranks: list[str],
    against_k: list[str],
    against_rank: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = drawn(monkeypatch, counterfactuals, ranks)
    titles = {name: [panel.get_title().removeprefix("score phi, ") for panel in found[name]] for name in found}
    assert (titles["s_against_k.png"], titles["s_against_rank.png"]) == (against_k, against_rank)
