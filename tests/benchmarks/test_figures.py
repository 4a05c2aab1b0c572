"""Protects the documentation's pictures: every recorded run is in them, and the same rows give the same bytes."""

import json
from pathlib import Path

import pytest

from cepo.benchmarks.figures import draw_documentation, draw_speed, draw_training


def test_the_pictures_are_small_and_the_same_each_time(tmp_path: Path) -> None:
    first, second = draw_documentation(tmp_path / "first"), draw_documentation(tmp_path / "second")
    assert [path.name for path in first] == ["training.png", "speed.png", "ablation.png"]
    for path, again in zip(first, second, strict=True):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(content) < 100 * 1024
        assert content == again.read_bytes()


def test_every_run_is_a_dot_and_every_arm_a_mean() -> None:
    """No seed is left out: two arms, three runs, so three dots and two bars in each panel."""
    rows = [
        {"arm": "task", "seed": 1, "flipped": 0.2, "turned": 0.1},
        {"arm": "causal", "seed": 1, "flipped": 0.5, "turned": 0.4},
        {"arm": "causal", "seed": 7, "flipped": 0.9, "turned": 0.6},
    ]
    flipped, turned = draw_training(rows).axes
    for panel, dots, means in ((flipped, [0.2, 0.5, 0.9], [0.2, 0.7]), (turned, [0.1, 0.4, 0.6], [0.1, 0.5])):
        drawn = [(line.get_marker(), line.get_xdata()[0]) for line in panel.lines]
        assert [x for marker, x in drawn if marker == "o"] == dots
        assert [x for marker, x in drawn if marker == "|"] == pytest.approx(means)
    assert [label.get_text() for label in flipped.get_yticklabels()] == ["task (1 seed)", "causal (2 seeds)"]


def test_a_contender_without_a_time_has_no_bar() -> None:
    row = {"section": "peers", "model": "m", "dtype": "float32", "device": "cpu", "threads": 2}
    row |= {"shapes": dict.fromkeys(("G", "Lz", "Lx", "Ly", "K"), 2)}
    rows = [{**row, "case": name, "speedup": value} for name, value in (("a", 1.0), ("b", None), ("group: c", 3.0))]
    (axes,) = draw_speed([*rows, {**rows[0], "section": "static"}]).axes
    assert [(bar.get_width(), bar.get_facecolor()[:3] == (0.6, 0.6, 0.6)) for bar in axes.patches] == [
        (1.0, True),
        (3.0, False),
    ]


def test_broken_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="testbed-training.jsonl is not a file"):
        draw_documentation(tmp_path / "figures", tmp_path)
    (tmp_path / "testbed-training.jsonl").write_text(json.dumps({"arm": "task"}) + "\n{broken\n")
    with pytest.raises(ValueError, match="testbed-training.jsonl, line 2 is not JSON"):
        draw_documentation(tmp_path / "figures", tmp_path)
    assert not (tmp_path / "figures").exists()
