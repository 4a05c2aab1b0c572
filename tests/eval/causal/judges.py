"""Judges that the tests of the causal evaluation share: a tiny random one, and one that judges by a known rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from cepo.eval.causal.judge_model import JudgeModel
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.jacobian.records import Rollout
from cepo.train import testbed, testbed_judges
from cepo.train.prompts import JUDGE
from tests.models import randomise

TOKENIZER = testbed.build_tokenizer()
ITEMS = testbed.generate_items(6, seed=3, cue_agreement=0.5)


def tiny_judge(seed: int = 0) -> JudgeModel:
    """Return a two-layer judge over the testbed's tokens, 16 wide, far from linear, in float64."""
    config = testbed_judges.build_model(TOKENIZER, seed=0).config
    config.update({"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 6})
    config.layer_types = config.layer_types[:2]
    model = type(testbed_judges.build_model(TOKENIZER, seed=0))(config).double()
    randomise(model, seed)
    return JudgeModel(model.eval(), SpanReader(TOKENIZER, JUDGE), TokenBytes(TOKENIZER))


def prompt_ids(item: testbed.Item) -> list[int]:
    message = [{"role": "user", "content": item.prompt}]
    encoded = TOKENIZER.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def read(judge: JudgeModel, item: testbed.Item, text: str | None = None) -> Rollout:
    return judge.reader.read(prompt_ids(item), TOKENIZER(text or item.completion)["input_ids"])


class RuleModel(torch.nn.Module):
    """A judge by rule: it writes a text that depends on its prompt and, unless it is decorative, on its criteria."""

    def __init__(self, follows: bool, own: Sequence[str]) -> None:
        super().__init__()
        self.follows, self.own = follows, own
        self.generation_config = SimpleNamespace(eos_token_id=TOKENIZER.eos_token_id)
        self.device = torch.device("cpu")
        self.sampled = 0

    def script(self, prefix: Sequence[int]) -> list[int]:
        """Return the whole sequence that the judge would write from here."""
        text = TOKENIZER.decode(prefix)
        item = next(item for item in ITEMS if item.prompt in text)
        written = text.split("<|assistant|>")[1].removeprefix("<specific_criteria>\n")
        criteria = written.split("\n</specific_criteria>")[0]
        named = [aspect for aspect in testbed.ASPECTS if aspect in criteria]
        aspect = named[0] if self.follows and named else item.aspect
        scores = {"A": (8, 2), "B": (2, 8), None: (5, 5)}[testbed.winner_under(item, aspect)]
        completion = replace(
            item, criteria=criteria, analysis="A shows more and B shows less", scores=scores
        ).completion
        return [*prompt_ids(item), *TOKENIZER(completion)["input_ids"], TOKENIZER.eos_token_id]

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, attention_mask: Any = None) -> Any:
        logits = torch.zeros(*input_ids.shape, len(TOKENIZER), dtype=torch.float64)
        for row, ids in enumerate(input_ids.tolist()):
            hidden = [] if attention_mask is None else (attention_mask[row] == 0).nonzero()[:, 0].tolist()
            shown = [TOKENIZER.unk_token_id if at in hidden else token for at, token in enumerate(ids)]
            script = self.script(shown)
            for at in range(len(ids)):
                logits[row, at, script[min(at + 1, len(script) - 1)]] = 20.0
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids: torch.Tensor, attention_mask: Any, generation_config: Any, **_: Any) -> torch.Tensor:
        rows = []
        for row, ids in enumerate(input_ids.tolist()):
            real = attention_mask[row].bool()
            first = int(real.int().argmax())
            shown = [token if seen else TOKENIZER.unk_token_id for token, seen in zip(ids, real.tolist(), strict=True)]
            if generation_config.do_sample:
                text = self.own[self.sampled % len(self.own)] + "\n</specific_criteria>"
                self.sampled += 1
                tail = TOKENIZER(text)["input_ids"]
            else:
                script = self.script(shown[first:])
                tail = script[len(ids) - first :]
            rows.append(torch.tensor([*ids, *tail]))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=TOKENIZER.pad_token_id)


def rule_judge(follows: bool) -> JudgeModel:
    own = [f"judge by {aspect} of the answer" for aspect in testbed.ASPECTS]
    return JudgeModel(RuleModel(follows, own), SpanReader(TOKENIZER, JUDGE), TokenBytes(TOKENIZER))  # type: ignore[arg-type]
