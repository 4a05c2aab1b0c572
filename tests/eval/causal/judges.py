"""A tiny random judge over the testbed's tokens, far from linear, for the tests of the causal evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from cepo.eval.causal.judge import Judge
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout
from cepo.train import testbed, testbed_model
from cepo.train.prompts import JUDGE
from tests.models import randomise

TOKENIZER = testbed.build_tokenizer()
ITEMS = testbed.generate_items(6, seed=3, cue_agreement=0.5)


def tiny_judge(seed: int = 0) -> Judge:
    """Return a two-layer judge, 16 wide, in float64."""
    built = testbed_model.build_model(TOKENIZER, seed=0)
    config = built.config
    config.update({"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 6})
    config.layer_types = config.layer_types[:2]
    model = type(built)(config).double()
    randomise(model, seed)
    return Judge("judgements", model.eval(), SpanReader(TOKENIZER, JUDGE))


def read(judge: Judge, item: testbed.Item, text: str | None = None) -> Rollout:
    message = [{"role": "user", "content": item.prompt}]
    encoded = TOKENIZER.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True)
    return judge.reader.read(encoded["input_ids"], TOKENIZER(text or item.completion)["input_ids"])


def judgements(judge: Judge, items: Sequence[testbed.Item] = ITEMS) -> list[Rollout]:
    """Return the gold judgement of each item."""
    return [read(judge, item) for item in items]
