"""Protects gradients of reward models: finite differences, the oracle in float64, and attributions that add up."""

from typing import Any

import pytest
import torch

from cepo.jacobian.reward_model import new_head, read_last_token, rewards
from cepo.jacobian.scalar import attribute_edit, reward_jacobian
from tests.models import InDouble, tiny_model

TEXT, EDIT = [1, 5, 9, 14, 3, 22, 2], [1, 5, 31, 14, 3, 8, 2]
RESPONSE = [2, 3, 4, 5]


def reward_model(family: str, form: str) -> Any:
    model = tiny_model(family)
    return read_last_token(new_head(model, seed=1)) if form == "bradley-terry" else read_last_token(model, (5, 9))


@pytest.mark.parametrize("form", ["bradley-terry", "pairwise"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_jacobian_is_that_of_finite_differences(family: str, form: str) -> None:
    with InDouble():
        model = reward_model(family, form)
        reward, jac_SD = reward_jacobian(model, TEXT, RESPONSE)
        assert reward == pytest.approx(rewards(model, [TEXT])[0], abs=1e-12)
        embedded_BTD = model.get_input_embeddings()(torch.tensor([TEXT])).detach()
        step, mask_BT = 1e-5, torch.ones(1, len(TEXT), dtype=torch.long)
        for row, position in enumerate(RESPONSE):
            for column in (0, 7, 15):
                ends = []
                for sign in (1, -1):
                    moved = embedded_BTD.clone()
                    moved[0, position, column] += sign * step
                    with torch.no_grad():
                        ends.append(float(model(inputs_embeds=moved, attention_mask=mask_BT).logits[0, 0]))
                slope = (ends[0] - ends[1]) / (2 * step)
                assert float(jac_SD[row, column]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("form", ["bradley-terry", "pairwise"])
def test_the_attributions_of_an_edit_add_up_to_the_difference(form: str) -> None:
    with InDouble():
        model = reward_model("llama", form)
        found = attribute_edit(model, TEXT, EDIT, nodes=48)
        ends = rewards(model, [TEXT, EDIT], batch_size=1)
        assert found.difference == pytest.approx(ends[0] - ends[1], abs=1e-12)
        assert found.certificate < 1e-6 * max(1.0, abs(found.difference))
        changed = [place for place, (one, other) in enumerate(zip(TEXT, EDIT, strict=True)) if one != other]
        assert found.attribution_T.nonzero().flatten().tolist() == changed
        back = attribute_edit(model, EDIT, TEXT, nodes=48)
        assert torch.allclose(found.attribution_T, -back.attribution_T, rtol=0, atol=1e-9)
        auto = attribute_edit(model, TEXT, EDIT, tolerance=1e-3)
        assert auto.certificate <= 1e-3 * max(1.0, abs(auto.difference))
        assert 1 < auto.nodes < 64
        assert attribute_edit(model, TEXT, TEXT).attribution_T.abs().sum() == 0


def test_a_path_is_the_oracles_gradient_integrated() -> None:
    """The rows are those of autograd at each point of a plain midpoint rule, contracted with the step."""
    with InDouble():
        model = reward_model("llama", "bradley-terry")
        own, other = (model.get_input_embeddings()(torch.tensor([ids])).detach() for ids in (TEXT, EDIT))
        fraction_M11 = ((torch.arange(200) + 0.5) / 200).view(-1, 1, 1).double()
        at_MTD = (other + fraction_M11 * (own - other)).requires_grad_()
        (gradient_MTD,) = torch.autograd.grad(model(inputs_embeds=at_MTD).logits.sum(), [at_MTD])
        total = (gradient_MTD * (own - other)).sum(-1).mean(0)
        assert torch.allclose(attribute_edit(model, TEXT, EDIT, nodes=48).attribution_T, total, rtol=0, atol=1e-4)


def test_texts_of_other_lengths_are_refused_and_the_model_is_left_as_it_was() -> None:
    model = reward_model("llama", "bradley-terry").train()
    with pytest.raises(ValueError, match="token_ids has 7 tokens and edit_ids 6"):
        attribute_edit(model, TEXT, EDIT[:-1])
    attribute_edit(model, TEXT, EDIT, nodes=1)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
