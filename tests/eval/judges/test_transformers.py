"""Protects judging with transformers: verdicts, batches, forced verdicts, draws, prompts and memory."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from cepo.eval.judges import transformers as local
from cepo.eval.judges.encoding import PromptEncoder
from cepo.eval.judges.expected import expected_scores
from cepo.eval.judges.settings import JudgeSettings
from cepo.eval.judges.transformers import TransformersJudge
from cepo.jacobian.reading.judge import read_scores
from cepo.train import testbed, testbed_model
from tests.eval.judges.fake_judge import VERDICT, judged, messages

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
