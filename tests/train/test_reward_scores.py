"""Protects what a reward model scores: one number for a text whatever its batch, and every text without one named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cepo.jacobian.loading import load_model, resolve_model
from cepo.jacobian.reward_model import new_head, read_last_token
from cepo.train.pair_encoding import PairEncoder, Shown
from cepo.train.reward_scores import RewardModel
from cepo.train.reward_testbed import TEMPLATE, build_reward_model, generate_sources
from tests.models import InDouble, tiny_model
from tests.train.test_pair_encoding import CHAT, build

SOURCES = generate_sources(9, seed=3, cue_agreement=0.5)
PROMPTS, CHOSEN, REJECTED = zip(*((one.prompt, one.chosen, one.rejected) for one in SOURCES), strict=True)


def reward_model_of(form: Any, **options: Any) -> RewardModel:
    model, tokenizer = build_reward_model(form, seed=1)
    shown = Shown(form, TEMPLATE)
    encoder = PairEncoder(tokenizer, shown, max_length=options.pop("max_length", None))
    return RewardModel(read_last_token(model, encoder.verdict_ids), encoder, **options)


@pytest.mark.parametrize("form", ["bradley-terry", "pairwise"])
def test_batches_of_one_and_eight_give_the_same_numbers(form: Any) -> None:
    """Texts of one length and of several, some of them twice."""
    texts = PROMPTS * 2, CHOSEN * 2, REJECTED * 2
    alone, together = (reward_model_of(form, batch_size=size).differences(*texts).values_N for size in (1, 8))
    assert alone.dtype == np.float64
    assert alone.shape == (18,)
    assert np.allclose(alone, together, rtol=0, atol=1e-5)
    assert len(set(alone.tolist())) == 9
    turned = reward_model_of(form).differences(PROMPTS, REJECTED, CHOSEN).values_N
    assert np.allclose(turned, -alone[:9], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pad", [0, 1], ids=["pad-is-bos", "pad-is-eos"])
@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
def test_a_reward_is_the_head_at_the_texts_last_token(template: str | None, pad: int) -> None:
    """Against one text by hand, whatever id pads; every text begins once and ends with the end of text."""
    with InDouble(), torch.no_grad():
        model = new_head(tiny_model("llama", pad_token_id=pad), seed=1)
        encoder = PairEncoder(build(template), Shown())
        scored = RewardModel(read_last_token(model, None), encoder)
        prompts, responses = ["ask", "<s> ask", "one"], ["one two three", "one two three", "two"]
        found = scored.rewards(prompts, responses)
        for place, reward in enumerate(found.values_N):
            ids = encoder.ids(encoder.shown.messages(prompts[place], responses[place]))
            assert ids[:2].count(0) == 1
            assert ids[-1] == 1
            hidden_BTD = model.model(torch.tensor([ids])).last_hidden_state
            assert reward == pytest.approx(float(model.score(hidden_BTD[0, -1])), abs=1e-10)
        assert (found.values_N[0] == found.values_N[1]) == (template is None), "a prompt's own beginning is not doubled"
        assert not found.left_out


def test_texts_without_a_number_are_named_and_the_others_keep_theirs() -> None:
    """Too long a text is not cut, and equal responses are a difference of 0, which is no error."""
    long = "Response:" + " correct" * 60
    model = reward_model_of("bradley-terry", max_length=50)
    found = model.differences([PROMPTS[0]] * 3, [CHOSEN[0], long, CHOSEN[0]], [REJECTED[0], REJECTED[0], CHOSEN[0]])
    assert found.left_out.keys() == {1}
    assert found.left_out[1].startswith("too long: ")
    assert np.isnan(found.values_N).tolist() == [False, True, False]
    assert found.values_N[0] == model.differences(PROMPTS[:1], CHOSEN[:1], REJECTED[:1]).values_N[0] != 0
    assert found.values_N[2] == 0
    assert not len(model.rewards([], []).values_N)
    model.model.score.weight.data.fill_(float("inf"))
    assert model.rewards(PROMPTS[:1], CHOSEN[:1]).left_out[0].startswith("not finite")


def test_a_pairwise_model_gives_no_reward_to_one_response() -> None:
    with pytest.raises(ValueError, match="form is pairwise, which is shown two responses"):
        reward_model_of("pairwise").rewards(PROMPTS, CHOSEN)


def test_any_classifier_with_one_output_is_opened_and_a_language_model_is_not(judge: Path, tmp_path: Path) -> None:
    """A classifier that others trained has no file of ours; a language model would be read with a head of noise."""
    causal, tokenizer = load_model(resolve_model(str(judge)))
    new_head(causal, seed=5).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    opened = RewardModel.open(str(tmp_path))
    assert "SequenceClassification" in type(opened.model).__name__
    assert opened.rewards(["some words"], ["more words"]).values_N.shape == (1,)
    found = opened.rewards(["word"], ["word " * (1 + causal.config.max_position_embeddings)])
    assert f"over max_length {causal.config.max_position_embeddings}" in found.left_out[0]
    with pytest.raises(ValueError, match="a causal language model without reward_model.json"):
        RewardModel.open(str(judge))
