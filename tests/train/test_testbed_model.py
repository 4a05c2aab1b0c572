"""Protects the fitting of a testbed's model: what its loss is of, and a killed call that goes on."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from cepo.train import testbed_model
from cepo.train.testbed import build_tokenizer, generate_items, with_criterion
from cepo.train.testbed_model import build_model, fit

ITEMS = generate_items(12, seed=4, cue_agreement=0.5)
PROMPTS = [item.prompt for item in ITEMS]
TEXTS = [item.completion for item in ITEMS]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_what_is_given_is_read_but_not_taught(tokenizer: PreTrainedTokenizerFast) -> None:
    """The loss is of the tokens after the given ones, which it depends on, computed one sample at a time."""
    given = ["", *(with_criterion(item, item.aspect) for item in ITEMS[1:3])]
    model = build_model(tokenizer, seed=2)
    terms = []
    for prompt, text, opening in zip(PROMPTS[:3], TEXTS[:3], given, strict=True):
        context = tokenizer(f"<|user|>{prompt}<|assistant|>{opening}").input_ids
        ids = [*context, *tokenizer(text.removeprefix(opening)).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        terms += [-logprobs_TV[place - 1, ids[place]] for place in range(len(context), len(ids))]
    losses = fit(model, tokenizer, PROMPTS[:3], TEXTS[:3], given=given, batch_size=3)
    assert losses == pytest.approx([torch.stack(terms).mean().item()], rel=1e-5)


def test_a_killed_call_goes_on_to_the_same_weights(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, optimiser, schedule and losses are those of a call that was never killed."""
    monkeypatch.setattr(testbed_model, "_STATE_EVERY", 2)
    whole, killed, resumed = (build_model(tokenizer, seed=seed) for seed in (0, 0, 1))
    losses = fit(whole, tokenizer, PROMPTS, TEXTS, batch_size=2)
    steps: list[int] = []

    def kill(step: int, _loss: float) -> None:
        steps.append(step)
        if step == 3:
            raise KeyboardInterrupt

    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        fit(killed, tokenizer, PROMPTS, TEXTS, batch_size=2, state=state, progress=kill)
    again = fit(
        resumed, tokenizer, PROMPTS, TEXTS, batch_size=2, state=state, progress=lambda step, _: steps.append(step)
    )
    assert again == losses
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert steps == [1, 2, 3, 3, 4, 5, 6]
