"""Protects how verdicts are generated and read: soft scores, batches, forced verdicts, patience with servers."""

import http.server
import json
import math
import re
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from cepo.eval.judges import transformers as local
from cepo.eval.judges.encoding import PromptEncoder
from cepo.eval.judges.expected import expected_scores
from cepo.eval.judges.journal import JudgeTask, collect_judgements
from cepo.eval.judges.server import ServerJudge, _retry_after
from cepo.eval.judges.settings import Judgement, JudgeSettings, check_judge, decisive_settings, row_seed, winner
from cepo.eval.judges.transformers import TransformersJudge
from cepo.eval.judges.vllm import VllmJudge
from cepo.jacobian.loading import ModelSource
from cepo.jacobian.reading.judge import forced_opening, read_scores
from cepo.train import testbed, testbed_model
from tests.eval.judges.fake_judge import judged

VERDICT = "<scores>\\boxed{8, 6}</scores>"


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Expected scores


def expect(pieces: Sequence[bytes], likely: Mapping[int, Mapping[bytes, float]]) -> tuple[float, float] | None:
    return expected_scores(pieces, lambda at: likely.get(at, {}))


def test_expected_scores_are_the_means_of_the_digits_normalised_to_one() -> None:
    pieces = [b"so <scores>", b"\\boxed{", b"8", b", ", b"6", b"}", b"</scores>"]
    likely = {2: {b"8": 0.3, b"4": 0.1, b"the": 0.6}, 4: {b"6": 0.5, b"7": 0.5}}
    assert expect(pieces, likely) == pytest.approx((7.0, 6.5))


def test_a_number_inside_a_longer_token_is_compared_with_tokens_of_the_same_frame() -> None:
    pieces = [b"<scores>\\boxed", b"{8,", b" 6}", b"</scores>"]
    likely = {1: {b"{8,": 0.5, b"{2,": 0.5, b"9": 0.9, b"{9": 0.9}, 2: {b" 6}": 0.25, b" 10}": 0.75, b"6": 0.9}}
    assert expect(pieces, likely) == pytest.approx((5.0, 0.25 * 6 + 0.75 * 10))


@pytest.mark.parametrize("written", [[b"1", b"0"], [b"1"]])
def test_where_10_is_two_tokens_the_mass_of_1_is_split_by_the_zero_behind_it(written: list[bytes]) -> None:
    pieces = [b"<scores>\\boxed{", *written, b", ", b"6", b"}</scores>"]
    likely = {1: {b"1": 0.5, b"8": 0.5}, 2: {b"0": 0.8, b", ": 0.2}, len(written) + 2: {b"6": 1.0}}
    assert expect(pieces, likely) == pytest.approx((0.5 * 8 + 0.5 * (0.8 * 10 + 0.2 * 1), 6.0))


def test_a_zero_that_carries_a_mark_makes_10_of_1_too() -> None:
    pieces = [b"<scores>\\boxed{", b"1", b"0, ", b"6", b"}</scores>"]
    likely = {1: {b"1": 0.5, b"8": 0.5}, 2: {b"0, ": 0.6, b"0": 0.2, b"5": 0.1, b", ": 0.1}, 3: {b"6": 1.0}}
    assert expect(pieces, likely) == pytest.approx((0.5 * 8 + 0.5 * (0.8 * 10 + 0.2 * 1), 6.0))


@pytest.mark.parametrize(
    ("written", "first", "second", "expected"),
    [
        ("85", {b"8": 0.5, b"7": 0.5}, {b"5": 0.5, b"9": 0.25, b", ": 0.25}, 0.5 * 75 + 0.5 * (42.5 + 22.25 + 2.0)),
        ("100", {b"1": 0.5, b"9": 0.5}, {b"0": 1.0}, 0.5 * 90 + 0.5 * 100),
        ("62", {b"62": 1.0}, {}, 62.0),
    ],
)
def test_a_score_above_10_is_read_on_a_scale_to_100(
    written: str, first: dict[bytes, float], second: dict[bytes, float], expected: float
) -> None:
    """A digit that was not written is followed by those that were, as far as they stay on the scale."""
    digits = [written.encode()] if written == "62" else [bytes([byte]) for byte in written.encode()]
    pieces = [b"<scores>\\boxed{", *digits, b", ", b"6", b"}</scores>"]
    likely = {1: first, 2: second, 3: {b"0": 1.0} if len(digits) == 3 else {}, len(digits) + 2: {b"6": 1.0}}
    found = expect(pieces, likely)
    assert found is not None
    assert found[0] == pytest.approx(expected)


def test_where_another_number_was_written_1_counts_as_one() -> None:
    pieces = [b"<scores>\\boxed{", b"8", b", ", b"6", b"}</scores>"]
    assert expect(pieces, {1: {b"1": 0.5, b"8": 0.5}, 2: {b"0": 0.9}, 3: {b"6": 1.0}}) == pytest.approx((4.5, 6.0))


def test_10_as_one_token_counts_as_ten_and_a_decimal_part_as_written() -> None:
    pieces = [b"<scores>\\boxed{", b"10", b", ", b"7", b".", b"5", b"}</scores>"]
    likely = {1: {b"10": 0.5, b"1": 0.0, b"9": 0.5}, 3: {b"7": 0.5, b"6": 0.5}}
    assert expect(pieces, likely) == pytest.approx((9.5, 7.0))


def test_bytes_that_are_no_text_shift_nothing() -> None:
    pieces = [b"\xf0\x9f<scores>{1, 2}\\boxed{", b"9", b", ", b"3", b"}", b"</scores>"]
    assert expect(pieces, {1: {b"9": 1.0}, 3: {b"3": 0.5, b"5": 0.5}}) == pytest.approx((9.0, 4.0))


@pytest.mark.parametrize(
    "text",
    ["", "<scores>\\boxed{8}</scores>", "<scores>\\boxed{80000, 6}</scores>", "<think><scores>\\boxed{8, 6}</scores>"],
)
def test_without_a_verdict_on_a_scale_there_are_no_expected_scores(text: str) -> None:
    pieces = [bytes([byte]) for byte in text.encode()]
    assert expected_scores(pieces, lambda at: {b"8": 0.5, b"6": 0.5}) is None


def test_a_distribution_without_a_number_gives_no_expected_scores() -> None:
    assert expect([b"<scores>\\boxed{", b"8", b", ", b"6", b"}</scores>"], {1: {b"8": 1.0}, 3: {b"x": 1.0}}) is None


def test_winner_reads_ties_and_nothing() -> None:
    assert [winner(scores) for scores in ((8, 6), (2, 9), (5, 5), None)] == ["A", "B", "tie", None]


def test_a_forced_opening_closes_a_thought_that_is_still_open() -> None:
    """Scores inside an unclosed thought would never be read."""
    for text in ("", "<think>hm", "<think>hm</think>so"):
        assert read_scores(text + forced_opening(text) + "7, 3}\n</scores>") == (7.0, 3.0)


# Settings


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"backend": "tgi"}, "backend is 'tgi'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "cuda:99"}, "device is 'cuda:99'"),
        ({"model": "./nowhere"}, "model is './nowhere'"),
        ({"base_url": "http://localhost"}, "base_url is"),
        ({"backend": "server"}, "base_url is None"),
        ({"backend": "server", "base_url": "localhost:8000"}, "base_url is 'localhost:8000'"),
        ({"backend": "server", "base_url": "http://localhost", "force_format": True}, "force_format"),
        ({"backend": "server", "base_url": "http://localhost", "timeout_s": 0.0}, "timeout_s 0"),
    ],
)
def test_settings_that_cannot_work_are_named_before_anything_is_loaded(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_judge(JudgeSettings(**{"model": "smollm2", **change}))


def test_vllm_that_is_not_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install vllm"):
        check_judge(JudgeSettings("owner/name", backend="vllm"))


def test_the_key_is_never_shown_and_speed_settings_decide_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    settings = JudgeSettings(str(tmp_path), api_key="sk-secret")
    assert "sk-secret" not in repr(settings)
    decisive = decisive_settings(settings)
    assert decisive == decisive_settings(replace(settings, batch_size=3, device="cuda", concurrency=1))
    assert decisive != decisive_settings(replace(settings, max_new_tokens=3))


def test_weights_decide_by_their_content_and_not_by_their_folders_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    one, two = (JudgeSettings(str(tmp_path / name)) for name in ("one", "two"))
    assert decisive_settings(one) == decisive_settings(two)
    before = decisive_settings(one)
    (tmp_path / "one" / "model.safetensors").write_bytes(b"trained")
    assert decisive_settings(one) != before


def test_a_server_is_known_by_its_address_and_its_name_of_the_model() -> None:
    settings = JudgeSettings("name", backend="server", base_url="http://localhost:1/v1")
    assert decisive_settings(settings)["model"] == "name"
    for change in ({"model": "other"}, {"base_url": "http://localhost:2/v1"}):
        assert decisive_settings(replace(settings, **change)) != decisive_settings(settings)


# transformers

TOKENIZER = testbed.build_tokenizer()
IDS = TOKENIZER.get_vocab()


def random_model(seed: int = 0) -> Any:
    """The testbed's model, untrained, in float64: its choices have no near ties that a batch could turn."""
    return testbed_model.build_model(TOKENIZER, seed=seed).double()


def chain_model(following: Mapping[str, Mapping[str, float]]) -> Any:
    """A Llama whose next-token logits depend on the last token alone, as told; what is not told goes on with a newline.

    Its layers add nothing to the residual stream, and its embeddings are one-hot.
    """
    size = len(TOKENIZER)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=256,
        rms_norm_eps=1e-12,
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, config.hidden_size))
        logits = torch.full((size, config.hidden_size), -30.0, dtype=torch.float64)
        logits[IDS["Ċ"], :] = 0.0
        for before, options in following.items():
            logits[IDS["Ċ"], IDS[before]] = -30.0
            for after, logit in options.items():
                logits[IDS[after], IDS[before]] = logit
        model.lm_head.weight.copy_(logits / config.hidden_size**0.5)  # the norm scales a one-hot up to that
    return model


CHAIN = {
    "<|assistant|>": {"<scores>": 0.0},
    "<scores>": {"\\boxed{": 0.0},
    "\\boxed{": {"8": 2.0, "5": 1.0},
    "8": {",Ġ": 0.0},
    "5": {",Ġ": 0.0},
    ",Ġ": {"6": 1.0, "9": 0.0},
    "6": {"}": 0.0},
    "9": {"}": 0.0},
    "}": {"</scores>": 0.0},
}


def local_judge(model: Any, **settings: Any) -> TransformersJudge:
    values = {"max_new_tokens": 12, "dtype": "float64", **settings}
    return TransformersJudge(model, TOKENIZER, JudgeSettings("testbed", **values))


def prompts(count: int = 6) -> list[list[dict[str, str]]]:
    """Prompts that share a beginning of more than 16 tokens and differ in length."""
    items = testbed.generate_items(count, seed=3, cue_agreement=0.5)
    opening = "Query: " + " ".join(item.prompt.replace("\n", " ") for item in items[:1]) + "\n"
    return [messages(opening + "\n".join(item.prompt for item in items[: n + 1][-1 - n % 2 :])) for n in range(count)]


def test_a_verdict_ends_the_judgement_and_its_expected_scores_are_the_softmax_of_the_digits() -> None:
    (found,) = judged(local_judge(chain_model(CHAIN)), [messages("Query")])
    first = (8 * math.exp(2) + 5 * math.exp(1)) / (math.exp(2) + math.exp(1))
    second = (6 * math.exp(1) + 9) / (math.exp(1) + 1)
    assert found.text == VERDICT
    assert found.token_ids == tuple(TOKENIZER(VERDICT)["input_ids"])
    assert found.tokens == len(found.token_ids)
    assert found.soft == pytest.approx((first, second))
    assert not found.forced
    assert found.error is None


def test_scores_rehearsed_in_a_thought_that_the_template_opened_do_not_end_the_judgement() -> None:
    tokenizer = testbed.build_tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    judge = TransformersJudge(chain_model(CHAIN), tokenizer, JudgeSettings("testbed", max_new_tokens=12))
    assert judge.texts.text(TOKENIZER(VERDICT)["input_ids"]) == "<think>" + VERDICT
    assert judge.texts.verdict_length(TOKENIZER(VERDICT)["input_ids"]) is None


def test_batches_order_and_the_shared_beginning_change_no_judgement(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instructions' keys and values are computed once; a prompt alone has none to share."""
    asked = prompts()
    model = random_model()
    alone = [judged(local_judge(model), [prompt])[0] for prompt in asked]
    together = judged(local_judge(model, batch_size=4), asked)
    turned = judged(local_judge(model, batch_size=3), asked[::-1])[::-1]
    shared: list[int] = []
    padded = local._padded
    monkeypatch.setattr(
        local, "_padded", lambda ids, width, own, pad: shared.append(own) or padded(ids, width, own, pad)
    )
    again = judged(local_judge(model, batch_size=4), asked)
    assert min(shared) > 16
    for one, *others in zip(alone, together, turned, again, strict=True):
        assert {other.token_ids for other in others} == {one.token_ids}
        assert {other.text for other in others} == {one.text}


def test_expected_scores_kept_while_generating_are_those_of_a_second_pass() -> None:
    """Also in a padded batch, behind a shared beginning, for verdicts forced from the cache."""
    model, asked = random_model(), prompts()
    judge = local_judge(model, batch_size=4, force_format=True)
    for prompt, found in zip(asked, judged(judge, asked), strict=True):
        prompt_ids = judge.prompts.encode(prompt)
        assert isinstance(prompt_ids, list)
        assert found.token_ids is not None
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt_ids, *found.token_ids]])).logits[0, len(prompt_ids) - 1 :]
        probabilities_TV = logits_TV.softmax(-1)

        def likely(at: int, probabilities_TV: torch.Tensor = probabilities_TV) -> dict[bytes, float]:
            return {str(digit).encode(): float(probabilities_TV[at, IDS[str(digit)]]) for digit in range(10)}

        pieces = [*judge.texts.pieces(found.token_ids), b"\n</scores>"]
        assert found.forced
        assert found.soft == pytest.approx(expected_scores(pieces, likely, found.verdicts), abs=1e-6)


def test_a_forced_verdict_is_read_counted_and_keeps_what_was_written_before() -> None:
    model, asked = random_model(), prompts()
    free = judged(local_judge(model), asked)
    forced = judged(local_judge(model, force_format=True), asked)
    assert [found.scores for found in free] == [None] * len(asked)
    for before, after in zip(free, forced, strict=True):
        scores = after.scores
        assert scores is not None
        assert all(1 <= score <= 10 for score in scores)
        assert after.forced
        assert after.text.startswith(before.text + "\n<scores>\n\\boxed{")
        assert before.token_ids is not None
        assert after.token_ids is not None
        written = before.token_ids[:-1] if before.token_ids[-1] == TOKENIZER.eos_token_id else before.token_ids
        assert after.token_ids[: len(written)] == written
        assert after.tokens > before.tokens
        assert after.cut == before.cut
    assert any(found.cut for found in forced)


def test_forcing_from_the_cache_equals_running_the_whole_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models whose cache cannot be masked take the second way."""
    model, asked = random_model(1), prompts()
    free = judged(local_judge(model), asked)
    ends = [
        free[row].token_ids[at] for row, at in ((0, 2), (1, 5), (2, 8)) if free[row].token_ids
    ]  # rows of unlike length
    model.generation_config.eos_token_id = ends
    quick = judged(local_judge(model, force_format=True, batch_size=6), asked)
    monkeypatch.setattr(local, "_is_plain", lambda cache: False)
    slow = judged(local_judge(model, force_format=True, batch_size=6), asked)
    assert [found.token_ids for found in quick] == [found.token_ids for found in slow]
    for one, other in zip(quick, slow, strict=True):
        assert one.soft == pytest.approx(other.soft, abs=1e-6)


def test_a_verdict_that_was_written_is_never_forced() -> None:
    chain = CHAIN | {"A": {"<scores>": 0.0}}
    (found,) = judged(local_judge(chain_model(chain), force_format=True), [messages("Query")])
    assert (found.text, found.forced) == (VERDICT, False)


def test_a_draw_hangs_on_the_seed_and_the_prompt_alone() -> None:
    model, asked = random_model(), prompts()

    def drawn(order: Sequence[int], **settings: Any) -> dict[int, tuple[int, ...] | None]:
        judge = local_judge(model, temperature=1.0, **settings)
        found = judged(judge, [asked[row] for row in order])
        return {row: judgement.token_ids for row, judgement in zip(order, found, strict=True)}

    once = drawn(range(6), batch_size=6, seed=7)
    assert drawn([3, 0, 5, 1, 4, 2], batch_size=2, seed=7) == once
    assert drawn(range(6), batch_size=6, seed=8) != once
    assert len(set(once.values())) > 1


def test_a_draw_follows_the_softmax() -> None:
    """Noise on the logits is a draw: the shares of 8 and 5 are those of the softmax at the temperature."""
    judge = local_judge(chain_model(CHAIN), temperature=2.0, batch_size=200)
    words = [word.strip("Ġ") for word in IDS if word.startswith("Ġ")]
    asked = [messages(f"Query: {first} {second}") for first in words[:20] for second in words[:20]]
    first = [read_scores(found.text) for found in judged(judge, asked)]
    share = sum(scores is not None and scores[0] == 8 for scores in first) / sum(scores is not None for scores in first)
    assert share == pytest.approx(1 / (1 + math.exp(-1 / 2)), abs=0.08)  # 3 standard errors of 400 draws


def test_a_prompt_that_is_too_long_is_told_and_the_others_are_judged() -> None:
    found = judged(local_judge(chain_model(CHAIN)), [messages("Query"), messages("Query " * 300)])
    assert found[0].error is None
    assert found[1].error is not None
    assert "256" in found[1].error


def test_a_prompt_leaves_room_for_the_verdict_that_is_forced_after_it() -> None:
    """A model with learned positions would fail in the middle of the run."""
    free, forcing = (local_judge(chain_model(CHAIN), force_format=force) for force in (False, True))
    lengths = [len(forcing.prompts.encode(messages("Query " * count))) for count in range(260)]
    asked = [messages("Query " * max(at for at, tokens in enumerate(lengths) if tokens + 12 <= 256))]
    assert judged(free, asked)[0].error is None
    (found,) = judged(forcing, asked)
    assert found.error is not None
    assert "256" in found.error


def test_a_raw_prompt_is_that_of_cepo_score_and_never_ends_the_text() -> None:
    """A tokenizer that ends every text would have the judge go on after the end of its prompt."""
    tokenizer = testbed.build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    (query,) = messages("Query")
    ids = PromptEncoder(tokenizer, JudgeSettings("testbed", raw=True)).encode([query])
    assert ids == tokenizer(f"{query['content']}\n\n", add_special_tokens=False)["input_ids"]


def test_a_tokenizer_without_a_chat_template_needs_raw() -> None:
    tokenizer = testbed.build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="--raw"):
        TransformersJudge(random_model(), tokenizer, JudgeSettings("testbed"))
    settings = JudgeSettings("testbed", raw=True, max_new_tokens=2)
    (found,) = judged(TransformersJudge(random_model(), tokenizer, settings), [messages("Query")])
    assert found.tokens == 2


def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = random_model(), prompts()
    whole = judged(local_judge(model, batch_size=6), asked)
    write = TransformersJudge._write

    def scarce(self: Any, ids_rows: Any, *rest: Any) -> Any:
        if len(ids_rows) > 2:
            raise torch.OutOfMemoryError("no memory")
        return write(self, ids_rows, *rest)

    monkeypatch.setattr(TransformersJudge, "_write", scarce)
    halved = judged(local_judge(model, batch_size=6), asked)
    assert [found.token_ids for found in halved] == [found.token_ids for found in whole]


# vLLM, of which a stand-in answers as the real one does: ids, and log-probabilities by id


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


# Servers


class Server:
    """A loopback server whose answers a function decides, from the number of the request (0 first) and its body."""

    def __init__(self, answer: Callable[["Handler", int, dict[str, Any]], None]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.times: list[float] = []
        self.closing = threading.Event()
        lock = threading.Lock()
        server = self

        class Bound(Handler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    server.requests.append(body | {"path": self.path})
                    server.headers.append(dict(self.headers))
                    server.times.append(time.monotonic())
                self.closing = server.closing
                answer(self, number, body)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    closing: threading.Event

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def judge(self, text: str | None = VERDICT, **choice: Any) -> None:
        answer = {
            "choices": [{"message": {"role": "assistant", "content": text}, **choice}],
            "usage": {"completion_tokens": 7},
        }
        self.send(200, json.dumps(answer).encode())

    def drop(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)

    def hang(self) -> None:
        self.closing.wait(20)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers: list[Server] = []

    def start(answer: Callable[[Handler, int, dict[str, Any]], None]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ask(server: Server, count: int = 1, **settings: Any) -> list[Judgement]:
    values = {"backoff_s": 0.01, "timeout_s": 5.0, "retries": 5, "concurrency": 1, **settings}
    judge = ServerJudge(JudgeSettings("name", backend="server", base_url=server.url, **values))
    return judged(judge, [messages(f"prompt {number}") for number in range(count)])


def test_a_server_is_asked_in_openais_protocol_and_its_answer_read(serve: Callable[..., Server]) -> None:
    server = serve(lambda handler, number, body: handler.judge())
    (found,) = ask(server, api_key="sk-1", max_new_tokens=9, temperature=0.5, seed=3)
    assert (found.text, found.tokens, found.error, found.soft) == (VERDICT, 7, None, None)
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["messages"] == messages("prompt 0")
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("name", 9, 0.5)
    assert request["seed"] == row_seed(3, messages("prompt 0"))
    assert server.headers[0]["Authorization"] == "Bearer sk-1"


def test_a_server_that_hangs_drops_lies_and_refuses_loses_no_row(serve: Callable[..., Server]) -> None:
    """One row meets every trouble in turn and is judged at last; the rows behind it are judged as ever."""

    def answer(handler: Handler, number: int, body: dict[str, Any]) -> None:
        if number == 0:
            handler.hang()
        elif number == 1:
            handler.drop()
        elif number == 2:
            handler.send(200, b"<html>gateway</html>")
        elif number == 3:
            handler.send(429, b"{}", Retry_After="0.3")
        elif number == 4:
            handler.send(503, b"busy")
        else:
            handler.judge(f"{body['messages'][0]['content']} {VERDICT}")

    server = serve(answer)
    found = ask(server, 3, timeout_s=0.5)
    assert [judgement.text for judgement in found] == [f"prompt {number} {VERDICT}" for number in range(3)]
    assert len(server.requests) == 5 + 3
    assert server.times[4] - server.times[3] >= 0.3  # what Retry-After asked for, not the back-off's 0.08


def half_an_answer(handler: Handler, number: int, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


def drop_by_drop(handler: Handler, number: int, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.closing.wait(0.05):
        try:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        except OSError:
            return


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda handler, number, body: handler.hang(), "no answer within 0.4 s"),
        (drop_by_drop, "no answer within 0.4 s"),
        (lambda handler, number, body: handler.drop(), "connection"),
        (half_an_answer, "connection broke"),
        (lambda handler, number, body: handler.send(200, b"garbage"), "not JSON: b'garbage'"),
        (lambda handler, number, body: handler.send(200, b"[" * 100_000), "not JSON"),
        (lambda handler, number, body: handler.send(200, b'{"error": "x"}'), "no choices"),
        (lambda handler, number, body: handler.send(200, b'{"choices": [null]}'), "no choices"),
        (lambda handler, number, body: handler.judge(None), "no content"),
        (lambda handler, number, body: handler.send(500, b'{"error": "out of  memory"}'), "500: .*out of memory"),
    ],
)
def test_a_row_that_fails_for_good_is_told_with_its_reason(
    serve: Callable[..., Server], answer: Callable[..., None], reason: str
) -> None:
    server = serve(answer)
    (found,) = ask(server, retries=1, timeout_s=0.4)
    assert found.error is not None
    assert re.search(reason, found.error), found.error
    assert "tried 2x" in found.error
    assert len(server.requests) == 2


def test_what_only_one_prompt_is_refused_for_is_not_sent_again(serve: Callable[..., Server]) -> None:
    def answer(handler: Handler, number: int, body: dict[str, Any]) -> None:
        if body["messages"][0]["content"] == "prompt 1":
            handler.send(400, b"prompt too long")
        else:
            handler.judge()

    server = serve(answer)
    found = ask(server, 3)
    assert [judgement.error is None for judgement in found] == [True, False, True]
    assert "prompt too long" in str(found[1].error)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("name", "status", "refusal"),
    [
        (
            "max_tokens",
            400,
            "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
        ),
        ("temperature", 400, "Unsupported value: 'temperature' does not support 0. Only the default (1) is supported."),
        ("temperature", 400, "Unsupported parameter: 'temperature' is not supported with this model."),
        ("seed", 422, '{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}'),
        ("top_logprobs", 422, "top_logprobs must be less than or equal to 5"),
        ("logprobs", 500, "logprobs is not supported"),
    ],
)
def test_a_parameter_that_a_server_refuses_is_left_out_from_then_on(
    serve: Callable[..., Server], caplog: pytest.LogCaptureFixture, name: str, status: int, refusal: str
) -> None:
    """Without a retry of its own, and with a word in the log, once."""

    def answer(handler: Handler, number: int, body: dict[str, Any]) -> None:
        if name in body:
            handler.send(status, refusal.encode())
        else:
            handler.judge()

    server = serve(answer)
    assert [found.error for found in ask(server, 3, retries=0, max_new_tokens=9)] == [None] * 3
    assert [name in request for request in server.requests] == [True, False, False, False]
    assert server.requests[-1].get("max_completion_tokens", server.requests[-1].get("max_tokens")) == 9
    assert caplog.text.count("the server refuses") == 1


def test_several_parameters_are_left_out_and_a_size_that_is_refused_is_not_a_parameter(
    serve: Callable[..., Server],
) -> None:
    def answer(handler: Handler, number: int, body: dict[str, Any]) -> None:
        for name in ("max_tokens", "temperature", "logprobs"):
            if name in body:
                handler.send(400, f"Unsupported: '{name}'; max_completion_tokens is.".encode())
                return
        handler.judge()

    server = serve(answer)
    assert ask(server, retries=0)[0].error is None
    assert len(server.requests) == 4
    too_large = b"'max_tokens' or 'max_completion_tokens' is too large: 512. The model's context is 300 tokens."
    server = serve(lambda handler, number, body: handler.send(400, too_large))
    assert "is too large" in str(ask(server, retries=3)[0].error)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_carries_the_key_nowhere(serve: Callable[..., Server], status: int) -> None:
    """It ends the run and names the address, which the user can give."""
    elsewhere = serve(lambda handler, number, body: handler.judge())
    server = serve(lambda handler, number, body: handler.send(status, b"", Location=elsewhere.url + "/v1"))
    with pytest.raises(ValueError, match=re.escape(elsewhere.url)):
        ask(server, api_key="sk-1")
    assert (len(server.requests), elsewhere.requests) == (1, [])


def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:1")
    with pytest.raises(ValueError, match="ALL_PROXY.*gopher"):
        ServerJudge(JudgeSettings("name", backend="server", base_url="http://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("tail", "path", "header"),
    [
        ("", "/v1/chat/completions", ("Authorization", "Bearer sk-1")),
        ("/v1/", "/v1/chat/completions", ("Authorization", "Bearer sk-1")),
        ("/api/v1/chat/completions", "/api/v1/chat/completions", ("Authorization", "Bearer sk-1")),
        (
            "/openai/deployments/x?api-version=1",
            "/openai/deployments/x/chat/completions?api-version=1",
            ("api-key", "sk-1"),
        ),
    ],
)
def test_forms_of_an_address(serve: Callable[..., Server], tail: str, path: str, header: tuple[str, str]) -> None:
    """Azure's has a query, and a header of its own for the key."""
    server = serve(lambda handler, number, body: handler.judge())
    server.url += tail
    assert ask(server, api_key="sk-1")[0].text == VERDICT
    assert server.requests[0]["path"] == path
    names = {name.lower(): value for name, value in server.headers[0].items()}
    assert {key: names[key] for key in ("authorization", "api-key") if key in names} == {header[0].lower(): header[1]}


def test_cut_judgements_are_kept_and_counted_aloud(
    serve: Callable[..., Server], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the thoughts are cut: rows without a verdict, which the next run does not ask for again."""

    def answer(handler: Handler, number: int, body: dict[str, Any]) -> None:
        if number % 2:
            handler.judge(message={"content": None, "reasoning": "Let me think"}, finish_reason="length")
        else:
            handler.judge()

    server = serve(answer)
    settings = JudgeSettings("name", backend="server", base_url=server.url, retries=0, concurrency=1)
    tasks = [JudgeTask(str(row), messages(f"prompt {row}")) for row in range(4)]
    for _ in range(2):
        collected = collect_judgements(tasks, tmp_path, {"command": "x"}, lambda: ServerJudge(settings))
    assert len(server.requests) == 4
    assert not collected.failed
    assert [record["cut"] for record in collected.records.values()] == [False, True, False, True]
    assert "2 of 4 judgements were cut" in caplog.text
    assert "--max-new-tokens" in caplog.text


def test_an_address_that_is_refused_ends_the_run_at_once(serve: Callable[..., Server]) -> None:
    server = serve(lambda handler, number, body: handler.send(404, b"no such model"))
    with pytest.raises(ValueError, match="404 for model 'name': no such model"):
        ask(server, 4, concurrency=2)


def test_a_dead_server_is_given_up_and_rows_that_were_not_tried_say_so(serve: Callable[..., Server]) -> None:
    server = serve(lambda handler, number, body: handler.drop())
    found = ask(server, 30, retries=0)
    assert all(judgement.error for judgement in found)
    assert sum("not tried" in str(judgement.error) for judgement in found) == 20
    assert len(server.requests) == 10


def test_requests_run_side_by_side(serve: Callable[..., Server]) -> None:
    together = threading.Barrier(4, timeout=5)

    def answer(handler: Handler, number: int, body: dict[str, Any]) -> None:
        together.wait()
        handler.judge(body["messages"][0]["content"])

    server = serve(answer)
    judge = ServerJudge(JudgeSettings("name", backend="server", base_url=server.url + "/v1", concurrency=4, retries=0))
    asked = [f"prompt {number}" for number in range(4)]
    assert [one.text for one in judged(judge, [messages(prompt) for prompt in asked])] == asked


def told(token: str, alternatives: Mapping[str, float]) -> dict[str, Any]:
    options = [
        {"token": text, "bytes": list(text.encode()), "logprob": math.log(p)} for text, p in alternatives.items()
    ]
    return {"token": token, "bytes": list(token.encode()), "logprob": options[0]["logprob"], "top_logprobs": options}


def test_expected_scores_come_from_top_logprobs(serve: Callable[..., Server]) -> None:
    content = [
        told("<scores>\\boxed{", {"<scores>\\boxed{": 1.0}),
        told("8", {"8": 0.5, "4": 0.25, "x": 0.25}),
        told(", ", {", ": 1.0}),
        told("6", {"6": 1.0}),
        told("}</scores>", {"}</scores>": 1.0}),
    ]
    server = serve(lambda handler, number, body: handler.judge(logprobs={"content": content}))
    (found,) = ask(server)
    assert found.soft == pytest.approx(((0.5 * 8 + 0.25 * 4) / 0.75, 6.0))


@pytest.mark.parametrize(
    "logprobs",
    [{}, {"content": None}, {"content": [{"token": 3}]}, {"content": [told("\\boxed{1, 2}", {"x": 1.0})]}, "x"],
)
def test_log_probabilities_that_do_not_fit_the_text_give_no_expected_scores(
    serve: Callable[..., Server], logprobs: Any
) -> None:
    server = serve(lambda handler, number, body: handler.judge(logprobs=logprobs))
    (found,) = ask(server)
    assert (found.error, found.soft) == (None, None)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert _retry_after("2.5") == 2.5
    assert _retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0.0
    assert _retry_after("soon") is None
    assert _retry_after(None) is None
