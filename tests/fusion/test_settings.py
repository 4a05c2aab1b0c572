"""Protects settings by name: types as they are declared, and a place for LoRA, before a trainer is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
from peft import get_peft_model

from cepo.fusion.settings import check_settings
from cepo.train import testbed, testbed_model
from cepo.train.run import lora_config, run_trainer


def _take(
    n: int = 0, x: float | None = None, s: str = "", m: Mapping[str, int] = {}, w: Literal["a", "b"] = "a"
) -> None:
    """Take one setting of each kind."""


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"n": True}, "k.n is True; expected an integer"),
        ({"n": 1.0}, "k.n is 1.0; expected an integer"),
        ({"x": "1e-5"}, "k.x is '1e-5'; expected a number or null; YAML spells numbers"),
        ({"s": None}, "k.s is None; expected text"),
        ({"m": [1]}, r"k.m is \[1\]; expected a mapping"),
        ({"w": "c"}, "k.w is 'c'; expected a or b"),
        ({"y": 1}, "k holds the unknown key y; expected some of n, x, s, m, w"),
    ],
)
def test_what_is_not_declared_is_refused_by_its_key(given: Mapping[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_settings("k", given, _take)


def test_what_is_declared_passes() -> None:
    check_settings("k", {"n": 1, "x": 2, "s": "", "m": {"a": 1}, "w": "b"}, _take)
    check_settings("k", {"x": None}, _take)


@pytest.mark.parametrize("names", ["foo", ["norm"]])
def test_lora_without_a_place_in_the_model_names_its_key(names: object, tmp_path: Path) -> None:
    """What peft says when it is applied is told by the recipe's key, and no other error of a trainer is."""
    model = testbed_model.build_model(testbed.build_tokenizer(), seed=0)
    with pytest.raises(ValueError, match="^lora.target_modules does not fit the model: Target module"):
        run_trainer(lambda: get_peft_model(model, lora_config({"target_modules": names})), tmp_path, None)

    def refuse() -> None:
        raise ValueError("no room")

    with pytest.raises(ValueError, match="^no room$"):
        run_trainer(refuse, tmp_path, None)


def test_words_that_yaml_reads_as_another_type_are_shown_in_quotes() -> None:
    def take(ties: Literal["true", "wrong"] = "true") -> None:
        """Take one word."""

    with pytest.raises(ValueError, match='k.ties is True; expected "true" or wrong'):
        check_settings("k", {"ties": True}, take)
