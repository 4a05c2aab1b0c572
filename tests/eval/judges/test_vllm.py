"""Protects judging with vLLM, of which a stand-in answers as the real one does: ids, and log-probabilities by id."""

import math
import sys
import types
from typing import Any

import pytest

from cepo.eval.judges.settings import JudgeSettings, row_seed
from cepo.eval.judges.vllm import VllmJudge
from cepo.jacobian.loading import ModelSource
from cepo.jacobian.reading.judge import read_scores
from cepo.train import testbed
from tests.eval.judges.fake_judge import judged, messages

TOKENIZER = testbed.build_tokenizer()
IDS = TOKENIZER.get_vocab()


class StandIn(types.ModuleType):
    """Writes a newline where a judgement is asked for, and "8, 6}" where a forced verdict is."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.calls: list[tuple[list[list[int]], list[dict[str, Any]]]] = []
        self.options: dict[str, Any] = {}
        self.SamplingParams = lambda **values: values

        def engine(**options: Any) -> Any:
            self.options = options
            return types.SimpleNamespace(generate=self.generate)

        self.LLM = engine

    def generate(self, prompts: list[dict[str, list[int]]], sampling: list[dict[str, Any]], **_: Any) -> list[Any]:
        self.calls.append(([prompt["prompt_token_ids"] for prompt in prompts], sampling))
        results = []
        for values in sampling:
            ids = [IDS["Ċ"], TOKENIZER.eos_token_id]
            if "allowed_token_ids" in values:
                ids = TOKENIZER("8, 6}}")["input_ids"]
            told = [{token: types.SimpleNamespace(logprob=math.log(0.5))} for token in ids]
            told[0] |= {IDS["4"]: types.SimpleNamespace(logprob=math.log(0.5))}
            output = types.SimpleNamespace(token_ids=ids, logprobs=told)
            results.append(types.SimpleNamespace(outputs=[output]))
        return results


def test_vllm_is_asked_with_ids_and_forced_by_a_second_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    TOKENIZER.save_pretrained(tmp_path)
    settings = JudgeSettings("testbed", backend="vllm", force_format=True, max_new_tokens=5, seed=4)
    judge = VllmJudge(ModelSource("testbed", str(tmp_path)), settings)
    found = judged(judge, [messages("Query"), messages("Query: A")])
    assert stand_in.options["model"] == str(tmp_path)
    (first, sampling), (second, forced) = stand_in.calls
    assert first[0] == judge.prompts.encode(messages("Query"))
    assert [values["max_tokens"] for values in sampling] == [5, 5]
    assert sampling[0]["seed"] == row_seed(4, messages("Query"))
    # The end of the turn is not continued from: what is asked next holds the newline, then the opening.
    opening = TOKENIZER("\n<scores>\n\\boxed{")["input_ids"]
    assert second[0] == [*first[0], IDS["Ċ"], *opening]
    assert {IDS[token] for token in ("8", "}", ",Ġ")} <= set(forced[0]["allowed_token_ids"])
    assert [read_scores(judgement.text) for judgement in found] == [(8.0, 6.0)] * 2
    assert found[0].soft == pytest.approx((6.0, 6.0))
    assert found[0].forced
    assert not found[0].cut
    assert found[0].token_ids == (IDS["Ċ"], *opening, *TOKENIZER("8, 6}")["input_ids"])
