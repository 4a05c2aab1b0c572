"""Recipes that cannot be read: the reason is told in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import cepo.benchmarks.reward_model.command
from cepo.benchmarks.experiment.recipe import read_plan
from cepo.train.recipe import load_recipe, read_yaml


@pytest.mark.parametrize(
    ("text", "reason"), [("arms: [\n{", r"found '<stream end>' \(line 2\)"), ("a: 1\n", "it lacks 'arms'")]
)
def test_what_is_wrong_with_a_recipe_is_told_in_words(text: str, reason: str, tmp_path: Path) -> None:
    """Not by the name of a class of Python's."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_plan(tmp_path / "out", recipe)


@pytest.mark.parametrize("read", [load_recipe, lambda path: read_plan(path.parent / "out", path)])
def test_a_key_that_stands_twice_is_refused_by_name_and_line(read: Callable[[Path], object], tmp_path: Path) -> None:
    """PyYAML takes the last of two equal keys in silence: half of a run's settings would be others than one reads."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1\ngrpo:\n  beta: 1\n  max_steps: 2\n  beta: 3\n")
    with pytest.raises(ValueError, match=r"the key 'beta' is already on line 3; expected once \(line 5\)"):
        read(recipe)
    recipe.write_text("seed: 1\nseed: 2")
    with pytest.raises(ValueError, match="'seed' is already on line 1"):
        cepo.benchmarks.reward_model.command.read_plan(recipe)


def test_merged_mappings_may_override_a_key() -> None:
    """A merge is no repetition, also one of a mapping that was merged itself."""
    assert read_yaml("a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}")["c"] == {"x": 3}
