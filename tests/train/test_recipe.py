"""Recipes that cannot be read: the reason is told in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from cepo.benchmarks.experiment.recipe import read_plan


@pytest.mark.parametrize(
    ("text", "reason"), [("arms: [\n{", r"found '<stream end>' \(line 2\)"), ("a: 1\n", "it lacks 'arms'")]
)
def test_what_is_wrong_with_a_recipe_is_told_in_words(text: str, reason: str, tmp_path: Path) -> None:
    """Not by the name of a class of Python's."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_plan(tmp_path / "out", recipe)
