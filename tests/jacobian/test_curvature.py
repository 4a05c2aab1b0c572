"""Protects the second-order expansion of an effect: against the written-out Hessian, and its own definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cepo.jacobian.curvature import expansions
from cepo.jacobian.model import HeldModel
from tests.jacobian.group.test_paths import counterfactuals
from tests.jacobian.test_autograd import link
from tests.models import InDouble, judge_rollout, tiny_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("text", ["criteria->analysis", "X->Y", "Z->Y:total"])
def test_terms_are_those_of_the_written_out_hessian(family: str, text: str) -> None:
    """<J, d> and -d^T H d / 2 by autograd's dense Hessian of the whole sequence, run without a cache."""
    with InDouble():
        model, rollout, wanted = tiny_model(family, attention="sdpa"), judge_rollout(), link(text)
        (other,) = counterfactuals(rollout, wanted.source, 1)
        ids_BT = torch.tensor([rollout.token_ids])
        own_BTD = model.get_input_embeddings()(ids_BT).detach()
        step_BTD = own_BTD - model.get_input_embeddings()(torch.tensor([other.token_ids])).detach()
        targets = rollout.spans[wanted.target].positions
        source = list(rollout.spans[wanted.source].positions)

        def value(rows_SD: Tensor) -> Tensor:
            embedded_BTD = own_BTD.index_put((torch.tensor([0]), torch.tensor(source)), rows_SD)
            logits_TV = model(inputs_embeds=embedded_BTD, use_cache=False).logits[0]
            log_p_TV = torch.log_softmax(logits_TV, -1)
            return sum((log_p_TV[at - 1, ids_BT[0, at]] for at in targets), torch.zeros(()))

        model.set_attn_implementation("eager")
        rows_SD, step_SD = own_BTD[0, source], step_BTD[0, source]
        gradient_SD = torch.autograd.functional.jacobian(value, rows_SD)
        hessian_SDSD = torch.autograd.functional.hessian(value, rows_SD)
        curvature = torch.einsum("sd,sdtf,tf->", step_SD, hessian_SDSD, step_SD)
        model.set_attn_implementation("sdpa")
        (found,) = expansions(HeldModel(model), rollout, [other], [wanted])[wanted.name]
    assert found.first == pytest.approx(float((gradient_SD * step_SD).sum()), rel=1e-8, abs=1e-10)
    assert found.second == pytest.approx(-0.5 * float(curvature), rel=1e-8, abs=1e-10)
    assert found.total == found.first + found.second
    assert model.config._attn_implementation == "sdpa"
    assert all(weight.grad is None for weight in model.parameters())
