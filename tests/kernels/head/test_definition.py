"""Log-probability and log-odds of the sampled tokens, against the full softmax in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cepo.kernels.head.definition import selected_log_likelihood, selected_log_odds


def logits(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return float64 logits (6, 9) and the sampled ids, first and last of the vocabulary among them."""
    return scale * torch.randn(6, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64), torch.tensor(
        [0, 8, 3, 3, 7, 1]
    )


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_selected_equals_log_softmax(scale: float) -> None:
    """log p and log p / (1 - p) of the sampled tokens, and their gradients, from the full softmax in float64."""
    logits_PV, ids_P = logits(scale)
    for function in (selected_log_likelihood, selected_log_odds):
        leaf_PV, other_PV = (logits_PV.clone().requires_grad_() for _ in range(2))
        log_p_P = torch.log_softmax(other_PV, -1)[range(6), ids_P]
        mask_PV = torch.nn.functional.one_hot(ids_P, 9).bool()
        log_rest_P = torch.log_softmax(other_PV, -1).masked_fill(mask_PV, -torch.inf).logsumexp(-1)
        expected_P = log_p_P - log_rest_P if function is selected_log_odds else log_p_P
        found_P = function(leaf_PV, ids_P)
        assert found_P.dtype == torch.float64
        assert torch.allclose(found_P, expected_P, rtol=1e-12, atol=1e-12)
        found_P.sum().backward()
        expected_P.sum().backward()
        assert torch.allclose(leaf_PV.grad, other_PV.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_odds_stay_alive_where_the_model_is_sure(dtype: torch.dtype) -> None:
    """At p = 1 - e^-200 the log-likelihood has no gradient left; the log-odds keep a unit one and every digit."""
    row_PV = torch.zeros(1, 5, dtype=dtype)
    row_PV[0, 2] = 200.0
    ids_P = torch.tensor([2])
    leaf_PV = row_PV.clone().requires_grad_()
    odds_P = selected_log_odds(leaf_PV, ids_P)
    assert float(odds_P.detach()) == pytest.approx(200.0 - math.log(4.0), rel=1e-6)
    odds_P.sum().backward()
    assert leaf_PV.grad[0].float().tolist() == pytest.approx([-0.25, -0.25, 1.0, -0.25, -0.25])
    flat_PV = row_PV.clone().requires_grad_()
    selected_log_likelihood(flat_PV, ids_P).sum().backward()
    assert float(flat_PV.grad.abs().max()) < 1e-30


def test_log_odds_are_the_logit_of_p() -> None:
    """The masked form equals log p - log(1 - p) where that can be computed, on both sides of a half."""
    logits_PV, ids_P = logits(4.0)
    ids_P[:3] = logits_PV[:3].argmax(-1)
    p_P = logits_PV.softmax(-1)[range(6), ids_P]
    assert torch.allclose(selected_log_odds(logits_PV, ids_P), torch.logit(p_P), rtol=1e-12, atol=1e-12)
    assert p_P.min() < 0.02
    assert p_P.max() > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    """The sums run in float32: half precision costs the rounding of the logits, not that of the logsumexp."""
    logits_PV, ids_P = logits(5.0)
    half_PV = logits_PV.to(dtype)
    for function in (selected_log_likelihood, selected_log_odds):
        found_P = function(half_PV, ids_P)
        assert found_P.dtype == torch.float32
        assert torch.allclose(found_P.double(), function(half_PV.double(), ids_P), rtol=1e-5, atol=1e-5)
