"""Protects where a reward is read: the last token of the mask, whatever the padding, the batch and the token's id."""

from typing import Any

import pytest
import torch

from cepo.jacobian.reward_model import as_batch, new_head, read_last_token, rewards
from tests.models import InDouble, tiny_model

TEXTS = [[1, 5, 9, 2], [1, 7, 2, 8, 3, 2], [1, 4, 2], [1, 30, 2, 2, 11, 6, 2, 2], [1, 2]] + [
    [1, n, 2] for n in (3, 5, 6)
]


def reward_model(family: str, form: str, **options: Any) -> Any:
    model = tiny_model(family, **options)
    return read_last_token(new_head(model, seed=1)) if form == "bradley-terry" else read_last_token(model, (5, 9))


@pytest.mark.parametrize("form", ["bradley-terry", "pairwise"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("pad", [0, 2], ids=["own-pad", "pad-is-eos"])
def test_a_text_has_one_reward(family: str, form: str, pad: int) -> None:
    """Batches of 1 and 8, padding left and right with any id, ids and embeddings; texts end in the end-of-text id."""
    with InDouble(), torch.no_grad():
        model = reward_model(family, form, pad_token_id=pad)
        alone = torch.tensor(rewards(model, TEXTS, batch_size=1), dtype=torch.float64)
        assert len(set(alone.tolist())) == len(TEXTS)
        for side in ("left", "right"):
            ids_BT, mask_BT = as_batch(TEXTS, side=side)  # type: ignore[arg-type]
            ids_BT = torch.where(mask_BT.bool(), ids_BT, pad)
            by_ids = model(input_ids=ids_BT, attention_mask=mask_BT).logits
            embedded = model.get_input_embeddings()(ids_BT)
            by_embeddings = model(inputs_embeds=embedded, attention_mask=mask_BT).logits
            assert by_ids.shape == (len(TEXTS), 1)
            assert torch.allclose(by_ids[:, 0], alone, rtol=0, atol=1e-10)
            assert torch.allclose(by_embeddings, by_ids, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["bradley-terry", "pairwise"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_around_the_model_changes_nothing_of_it(family: str, form: str) -> None:
    """PEFT hands on arguments that a model's layers do not take; a fresh LoRA adds nothing to the number."""
    from peft import LoraConfig, get_peft_model

    task, target = ("SEQ_CLS" if form == "bradley-terry" else "CAUSAL_LM"), "all-linear"
    bare = reward_model(family, form, dtype=torch.float32)
    expected = rewards(bare, TEXTS)
    adapted = get_peft_model(bare, LoraConfig(task_type=task, target_modules=target)).eval()
    assert rewards(adapted, TEXTS) == expected


def test_the_reward_is_that_of_transformers_where_padding_has_an_id_of_its_own() -> None:
    """And where it has not, transformers reads another token: the reason for reading by the mask."""
    from transformers import LlamaForSequenceClassification

    model = reward_model("llama", "bradley-terry", pad_token_id=0)
    ids_BT, mask_BT = as_batch(TEXTS)
    with torch.no_grad():
        ours = model(input_ids=ids_BT, attention_mask=mask_BT).logits
        theirs = LlamaForSequenceClassification.forward(model, input_ids=ids_BT, attention_mask=mask_BT).logits
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
        model.config.pad_token_id = 2
        padded = torch.where(mask_BT.bool(), ids_BT, 2)
        theirs = LlamaForSequenceClassification.forward(model, input_ids=padded, attention_mask=mask_BT).logits
    assert not torch.allclose(ours, theirs, rtol=0, atol=1e-2)


def test_a_pairwise_number_is_the_logit_of_a_less_that_of_b() -> None:
    plain = tiny_model("gemma2")  # its logits are capped: the head's weights alone would give another number
    ids = torch.tensor([TEXTS[1]])
    with torch.no_grad():
        logits_V = plain(input_ids=ids).logits[0, -1]
    found = rewards(reward_model("gemma2", "pairwise"), [TEXTS[1]])
    assert found[0] == pytest.approx(float(logits_V[5] - logits_V[9]), abs=1e-12)
