"""Protects settings by name: types as they are declared, and a place for LoRA, before a trainer is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pytest
import torch

from cepo.train import testbed, testbed_judges
from cepo.train.run import check_lora, lora_config
from cepo.train.settings import check_settings


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


def test_lora_without_a_place_in_the_model_names_its_key() -> None:
    """The check leaves the model and the random numbers as they are."""
    model = testbed_judges.build_model(testbed.build_tokenizer(), seed=0)
    state, names = torch.get_rng_state(), [name for name, _ in model.named_parameters()]
    check_lora(model, lora_config({"r": 2}))
    with pytest.raises(ValueError, match="lora.target_modules is 'foo'"):
        check_lora(model, lora_config({"target_modules": "foo"}))
    assert torch.equal(state, torch.get_rng_state())
    assert names == [name for name, _ in model.named_parameters()]
