"""The decoder layers of a causal language model."""

from __future__ import annotations

from typing import Any

from torch import nn


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the layers of a causal LM (without PEFT's wrapper), in order; [] where no list of them is found."""
    count = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = (module for module in (decoder or model).modules() if isinstance(module, nn.ModuleList))
    return next((list(modules) for modules in lists if len(modules) == count), [])
