"""Log-likelihood and log-odds of target tokens from hidden states; the Triton kernels never store the (P, V) logits."""

from __future__ import annotations

import torch
from torch import Tensor

from cepo.kernels.cotangents import differentiable
from cepo.kernels.head.definition import selected_log_likelihood, selected_log_odds
from cepo.kernels.launch import Implementation, unit_last, use_triton


def head_log_likelihood(
    hidden_PD: Tensor, weight_VD: Tensor, ids_P: Tensor, *, implementation: Implementation = "auto"
) -> Tensor:
    """Return log p(id) of each row under softmax(W h).

    The definition is `selected_log_likelihood(h W^T, ids)`. The kernels compute the log-odds, whose log-sigmoid is
    log p. So nothing cancels where p is near 1, not even in the gradient's factor 1 - p.

    Args:
        hidden_PD: last hidden states (after the final norm) at the positions that predict the targets.
        weight_VD: the head's weight, tied or not, of the same dtype, V at least 2. Frozen: Triton gives it no gradient.
        ids_P: target token ids, int64, in [0, V). (Triton returns NaN for an id outside.)
        implementation: "auto" takes Triton exactly when the tensors are on CUDA.

    Returns:
        Tensor (P,), in float32 or wider, values <= 0.

    Raises:
        ValueError: if shapes or dtypes don't fit together, or Triton is asked for and can't serve them.
        RuntimeError: if Triton is needed and is missing, or the device is too old.
    """
    if not use_triton(implementation, hidden_PD, weight_VD, ids_P):
        return selected_log_likelihood(hidden_PD @ weight_VD.T, ids_P)
    return torch.nn.functional.logsigmoid(_triton_log_odds(hidden_PD, weight_VD, ids_P))


def head_log_odds(
    hidden_PD: Tensor, weight_VD: Tensor, ids_P: Tensor, *, implementation: Implementation = "auto"
) -> Tensor:
    """Return log p(id) / (1 - p(id)) of each row under softmax(W h); the rest is as for `head_log_likelihood`."""
    if not use_triton(implementation, hidden_PD, weight_VD, ids_P):
        return selected_log_odds(hidden_PD @ weight_VD.T, ids_P)
    return _triton_log_odds(hidden_PD, weight_VD, ids_P)


def _triton_log_odds(hidden_PD: Tensor, weight_VD: Tensor, ids_P: Tensor) -> Tensor:
    from cepo.kernels.head.log_odds import log_odds_forward, log_odds_vjp

    _check_rows(hidden_PD, weight_VD)
    if ids_P.shape != hidden_PD.shape[:1] or ids_P.dtype != torch.int64 or weight_VD.shape[0] < 2:
        raise ValueError(
            f"expected int64 ids of shape ({hidden_PD.shape[0]},) and V at least 2, got {ids_P.dtype} of "
            f"{tuple(ids_P.shape)} and V {weight_VD.shape[0]}"
        )
    tensors = unit_last(hidden_PD), unit_last(weight_VD).detach(), ids_P.contiguous()
    return differentiable(log_odds_forward, log_odds_vjp, *tensors)


def _check_rows(hidden_PD: Tensor, weight_VD: Tensor) -> None:
    fits = hidden_PD.ndim == weight_VD.ndim == 2 and hidden_PD.shape[1] == weight_VD.shape[1]
    if not fits or hidden_PD.dtype != weight_VD.dtype:
        seen = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in (hidden_PD, weight_VD)]
        raise ValueError(f"expected hidden rows (P, D) and a weight (V, D) of one dtype, got {seen}")
