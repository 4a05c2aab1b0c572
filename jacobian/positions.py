"""How many tokens a model takes, and up to which length its rotary tables do not depend on the length."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

_SHORTEST = 8


def position_limit(config: Any) -> int | None:
    """Return the most tokens of a sequence by a model's config; None where the config names no limit."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def settled_length(model: nn.Module, longest: int) -> float:
    """Return the number of tokens up to which rotary tables do not depend on the length; inf if they never do.

    LongRoPE and dynamic NTK scaling change the frequencies of all positions once a sequence is longer than the original
    context. Keys computed for a prefix are then wrong for the whole sequence. Each rotary module is asked for its table
    at the same positions in sequences of different lengths; only the position ids differ. The length at which the table
    changes is found by bisection.

    Args:
        model: the model.
        longest: most tokens of a sequence that the model takes.

    Returns:
        Tokens; 0 if a rotary module cannot be called this way.
    """
    tables = ((module, kind) for module in model.modules() for kind in _kinds(module))
    return min((_settled(module, kind, longest) for module, kind in tables), default=math.inf)


def _kinds(module: nn.Module) -> list[dict[str, Any]]:
    """Return the keyword arguments for each kind of table that a rotary module makes; [] for other modules."""
    makes_tables = "position_ids" in inspect.signature(type(module).forward).parameters
    if not makes_tables or any(True for _ in module.parameters()):
        return []
    kinds = getattr(module, "rope_type", None)
    return [{"layer_type": kind} for kind in kinds] if isinstance(kinds, dict) else [{}]


def _settled(module: nn.Module, layer: dict[str, Any], longest: int) -> float:
    device = next((buffer.device for buffer in module.buffers()), None)
    like = torch.zeros(1, device=device)

    def tables(length: int) -> list[Tensor]:
        at = torch.tensor([[1, 2, 3, length - 1]], device=device)
        found = [table[:, :3] for table in module(like, at, **layer)]
        module(like, at[:, :1], **layer)  # a short sequence resets what a long one changed in the module
        return found

    def is_settled(length: int) -> bool:
        return all(torch.equal(one, other) for one, other in zip(tables(length), short, strict=True))

    try:
        short = tables(_SHORTEST)
        low, high = _SHORTEST, longest
        if high <= low or is_settled(high):
            return math.inf
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if is_settled(middle) else (low, middle)
    except Exception:  # a third-party module may take other arguments; nothing is known of its tables
        return 0
    return low
