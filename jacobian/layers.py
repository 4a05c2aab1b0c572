"""Find the decoder layers of a causal language model, and truncate it to the first of them."""

from __future__ import annotations

from typing import Any

from torch import nn


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the layers of a causal LM (without PEFT's wrapper), in order; [] if no list of them is found."""
    count = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = (module for module in (decoder or model).modules() if isinstance(module, nn.ModuleList))
    return next((list(modules) for modules in lists if len(modules) == count), [])


def keep_first_layers(model: Any, count: int) -> None:
    """Remove all but the first layers of a causal LM, in place.

    Raises:
        ValueError: for less than one layer, or more than there are.
    """
    layers = decoder_layers(model)
    if not 0 < count <= len(layers):
        raise ValueError(f"layers is {count}; the model has {len(layers)}")
    model.get_decoder().layers = nn.ModuleList(layers[:count])
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
