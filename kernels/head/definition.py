"""The definitions of the log-likelihood and the log-odds of sampled tokens, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def selected_log_likelihood(logits_PV: Tensor, ids_P: Tensor) -> Tensor:
    """Return log p(id) at each position: logit - logsumexp over the vocabulary.

    Args:
        logits_PV: logits at the positions that predict the targets; half precision is widened to float32.
        ids_P: sampled token ids, int64, in [0, V).

    Returns:
        Tensor (P,), in float32 or wider, values <= 0.
    """
    logits_PV = _widen(logits_PV)
    return logits_PV.gather(-1, ids_P[:, None])[:, 0] - logits_PV.logsumexp(-1)


def selected_log_odds(logits_PV: Tensor, ids_P: Tensor) -> Tensor:
    """Return log p(id) / (1 - p(id)): the sampled token's logit against the logsumexp of all others.

    The log-likelihood of a confident model is flat (its gradient has the factor 1 - p); the log-odds are not. The
    logsumexp of the others masks out the sampled token; log(1 - p) would lose all precision.

    Args:
        logits_PV: logits at the positions that predict the targets; half precision is widened to float32.
        ids_P: sampled token ids, int64, in [0, V); V must be at least 2.

    Returns:
        Tensor (P,), in float32 or wider.
    """
    logits_PV = _widen(logits_PV)
    others_PV = logits_PV.scatter(-1, ids_P[:, None], float("-inf"))
    return logits_PV.gather(-1, ids_P[:, None])[:, 0] - others_PV.logsumexp(-1)


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
