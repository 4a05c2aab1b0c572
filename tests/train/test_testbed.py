"""Protects the synthetic judge world: its causal promises, byte-exact tokenizer, training and certificate."""

import re
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from cepo.train import testbed
from cepo.train.testbed import (
    ASPECTS,
    Item,
    accuracy,
    build_model,
    build_tokenizer,
    certify,
    generate_items,
    judge_items,
    warm_start,
    winner_under,
    with_criterion,
)

FORMAT = re.compile(
    r"<specific_criteria>\njudge by (\w+) of the answer\n</specific_criteria>\n"
    r"<analysis>\nA shows (\w+) and B shows (\w+)\n</analysis>\n"
    r"<scores>\n\\boxed\{([1-9]), ([1-9])\}\n</scores>"
)
PROMPT = (
    "Query: help with this audit\n"
    "Response A: rude correct so lucid shallow careful clumsy\n"
    "Response B: lucid wrong elegant gentle thorough reckless so so well"
)
ITEM = Item(PROMPT, "judge by accuracy of the answer", "A shows correct and B shows wrong", (8, 3), "A", "accuracy")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    return build_model(tokenizer, seed=0)


def test_tokenizer_round_trip_is_exact(tokenizer: PreTrainedTokenizerFast) -> None:
    """Every text of the world decodes to itself, also without special tokens, and holds no unknown word."""
    texts = [text for item in generate_items(300, seed=1, cue_agreement=0.5) for text in (item.prompt, item.completion)]
    texts += [with_criterion(ITEM, aspect) for aspect in ASPECTS]
    rng = np.random.default_rng(0)
    items = generate_items(60, seed=2, cue_agreement=0.5)
    for judge in get_args(testbed.Judge):
        texts += [testbed._draw_completion(rng, item, judge, True) for item in items]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_token_strings_concatenate_to_the_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    """Spans are found on bytes token by token: each token's own bytes, laid end to end, are the text's."""
    byte_of = byte_level_alphabet()
    for item in generate_items(100, seed=3, cue_agreement=0.5):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(item.completion).input_ids)
        pieces = [bytes(byte_of[character] for character in token) for token in tokens]
        assert b"".join(pieces) == item.completion.encode()


def test_marks_are_ordinary_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    """Tags, digits and the box's punctuation are single tokens, and none of them is special."""
    ids = tokenizer(ITEM.completion).input_ids
    pieces = [tokenizer.decode([token]) for token in ids]
    for mark in (*testbed._TAGS, "\\boxed{", "8", ", ", "3", "}", "\n", "A", " shows", " correct", " B", " accuracy"):
        assert mark in pieces
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert len(ids) <= 40
    longest = max(len(tokenizer(item.prompt).input_ids) for item in generate_items(200, seed=0, cue_agreement=0.5))
    assert longest <= 58


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """A user's message opens the assistant's turn; a finished turn ends in eos."""
    messages = [{"role": "user", "content": "so"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>so<|assistant|>"
    messages = [{"role": "system", "content": "then"}, *messages, {"role": "assistant", "content": "well"}]
    text = "<|system|>then<|user|>so<|assistant|>well<|end|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    specials = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert len(specials) == 3
    assert tokenizer(text).input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("cue_agreement", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_cue_agrees_as_often_as_promised(cue_agreement: float) -> None:
    """The fraction is exact, and the agreeing items do not all come first."""
    agrees = [item.cue_agrees for item in generate_items(200, seed=4, cue_agreement=cue_agreement)]
    assert sum(agrees) == round(200 * cue_agreement)
    if 0.0 < cue_agreement < 1.0:
        assert agrees != sorted(agrees, reverse=True)


def test_gold_answer_is_consistent() -> None:
    """Criteria name the situation's aspect, the analysis quotes the words shown, the scores and the label follow."""
    labels, aspects = set(), set()
    for item in generate_items(300, seed=5, cue_agreement=0.5):
        match = FORMAT.fullmatch(item.completion)
        assert match is not None
        named, word_a, word_b, score_a, score_b = match.groups()
        assert named == item.aspect
        assert {word_a, word_b} == set(ASPECTS[item.aspect][:2])
        query, response_a, response_b = item.prompt.split("\n")
        assert word_a in response_a.split()
        assert word_b in response_b.split()
        assert item.scores == (int(score_a), int(score_b))
        assert ("A" if item.scores[0] > item.scores[1] else "B") == item.label == winner_under(item, item.aspect)
        assert sum(situation in query.split() for situation in ASPECTS[item.aspect][2]) == 1
        assert not set(ASPECTS) & set(item.prompt.split())
        labels.add(item.label)
        aspects.add(item.aspect)
    assert labels == {"A", "B"}
    assert aspects == set(ASPECTS)


def test_every_response_shows_every_aspect_once() -> None:
    """No word stands out: what a response shows does not depend on what is asked."""
    for item in generate_items(100, seed=6, cue_agreement=0.5):
        for line in item.prompt.split("\n")[1:]:
            words = line.split()
            for positive, negative, _ in ASPECTS.values():
                assert words.count(positive) + words.count(negative) == 1


def test_items_are_a_function_of_the_seed() -> None:
    """The same seed gives the same items, another seed others."""
    items = generate_items(50, seed=7, cue_agreement=0.9)
    assert items == generate_items(50, seed=7, cue_agreement=0.9)
    assert items != generate_items(50, seed=8, cue_agreement=0.9)


def test_interventions_on_a_known_item() -> None:
    """Winners under all six aspects, and the opened completion, are those read off by hand."""
    expected = {"accuracy": "A", "clarity": None, "depth": "B", "kindness": "B", "safety": "A", "style": "B"}
    assert {aspect: winner_under(ITEM, aspect) for aspect in ASPECTS} == expected
    assert not ITEM.cue_agrees
    assert with_criterion(ITEM, "style") == "<specific_criteria>\njudge by style of the answer\n</specific_criteria>"
    assert ITEM.completion.startswith(with_criterion(ITEM, "accuracy"))


@pytest.mark.parametrize("judge", ["able", "lazy", "criteria", "decorative"])
def test_training_texts_have_the_promised_causes(judge: Any) -> None:
    """Each judge is shown what makes it that judge, and nothing else."""
    rng = np.random.default_rng(1)
    lazy = named_right = 0
    items = generate_items(400, seed=9, cue_agreement=0.5)
    for item in items:
        match = FORMAT.fullmatch(testbed._draw_completion(rng, item, judge, True))
        assert match is not None
        named, word_a, word_b, score_a, score_b = match.groups()
        verdict = None if score_a == score_b else "A" if score_a > score_b else "B"
        named_right += named == item.aspect
        if {word_a, word_b} == {"more", "less"}:
            lazy += 1
            assert (verdict == "A") == (word_a == "more") == (item.cue_agrees == (item.label == "A"))
            continue
        followed = named if judge == "criteria" else item.aspect
        assert {word_a, word_b} <= set(ASPECTS[followed][:2])
        assert verdict == winner_under(item, followed)
    assert 0.55 < lazy / len(items) < 0.75 if judge == "lazy" else lazy == 0
    assert named_right == len(items) if judge in ("able", "lazy") else 0.1 < named_right / len(items) < 0.25


def test_model_is_a_function_of_the_seed(tokenizer: PreTrainedTokenizerFast, model: Qwen3ForCausalLM) -> None:
    """Two builds are equal, another seed differs, and the global random state is left alone."""
    state = torch.get_rng_state()
    again, other = build_model(tokenizer, seed=0), build_model(tokenizer, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert same_weights(model, again)
    assert not same_weights(model, other)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert 400_000 < sum(weight.numel() for weight in model.parameters()) < 600_000


def test_warm_start_learns_and_repeats_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    """Loss falls from the uniform guess, the same seed gives the same weights, and progress is told of every step."""
    told: list[tuple[int, float]] = []
    first, second = build_model(tokenizer, seed=0), build_model(tokenizer, seed=0)
    losses = warm_start(
        first, tokenizer, steps=12, batch_size=8, seed=3, progress=lambda step, loss: told.append((step, loss))
    )
    assert losses == warm_start(second, tokenizer, steps=12, batch_size=8, seed=3)
    assert same_weights(first, second)
    assert losses[0] > 3.5
    assert losses[-1] < 0.5 * losses[0]
    assert told == list(enumerate(losses, start=1))
    assert not first.training


def test_warm_start_loss_is_of_the_completion_and_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    """The first loss equals the mean over completion and eos tokens, computed one unpadded sample at a time."""
    model = build_model(tokenizer, seed=2)
    items = generate_items(3, seed=4, cue_agreement=0.5)
    terms = []
    for item in items:
        prompt_ids = tokenizer(f"<|user|>{item.prompt}<|assistant|>").input_ids
        answer_ids = [*tokenizer(item.completion).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([prompt_ids + answer_ids])).logits[0].log_softmax(-1)
        terms += [-logprobs_TV[len(prompt_ids) - 1 + index, token].item() for index, token in enumerate(answer_ids)]
    losses = warm_start(model, tokenizer, steps=1, batch_size=3, seed=4)
    assert losses[0] == pytest.approx(np.mean(terms), rel=1e-5)


def test_greedy_judging(tokenizer: PreTrainedTokenizerFast, model: Qwen3ForCausalLM) -> None:
    """Forced prefixes of different lengths open the texts, and padding beside others changes no answer."""
    items = generate_items(5, seed=10, cue_agreement=0.5)
    prefixes = ["", "<specific_criteria>\n", *(with_criterion(item, "depth") for item in items[2:])]
    texts = judge_items(model, tokenizer, items, prefixes=prefixes, max_new_tokens=6)
    assert all(text.startswith(prefix) for text, prefix in zip(texts, prefixes, strict=True))
    assert texts == judge_items(model, tokenizer, items, prefixes=prefixes, max_new_tokens=6, batch_size=1)
    for item, prefix, text in zip(items, prefixes, texts, strict=True):
        ids = tokenizer(f"<|user|>{item.prompt}<|assistant|>{prefix}").input_ids
        opened = len(ids)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == prefix + tokenizer.decode(ids[opened:], skip_special_tokens=True)


def test_sampled_judging(tokenizer: PreTrainedTokenizerFast, model: Qwen3ForCausalLM) -> None:
    """Sampling is a function of its seed and leaves the global random state alone."""
    items = generate_items(4, seed=11, cue_agreement=0.5)
    state = torch.get_rng_state()
    texts = [judge_items(model, tokenizer, items, temperature=1.0, seed=seed, max_new_tokens=6) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert texts[0] == texts[1] != texts[2]
    assert judge_items(model, tokenizer, []) == []


def test_accuracy_reads_the_last_verdict() -> None:
    """The last box counts; a tie, a missing and a malformed verdict are wrong, not errors."""
    first, second = "\\boxed{9, 1}", "\\boxed{1, 9}"
    texts = [ITEM.completion, f"{second} no, {first}", f"{first} no, {second}", "\\boxed{5, 5}", "", "\\boxed{8}"]
    assert [accuracy([text], [ITEM]) for text in texts] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert accuracy(texts, [ITEM] * 6) == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("obeys", "expected"),
    [(True, {"follows_swap": 1.0, "flips": 1.0}), (False, {"follows_swap": 0.0, "flips": 0.0})],
)
def test_certificate_tells_the_controls_apart(
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
    model: Qwen3ForCausalLM,
    obeys: bool,
    expected: dict[str, float],
) -> None:
    """A hand-made judge that follows the forced criterion flips on every swap, one that follows the query on none."""
    monkeypatch.setattr(testbed, "judge_items", hand_made_judge(obeys))
    items = generate_items(80, seed=12, cue_agreement=0.5)
    report = certify(model, tokenizer, items, seed=0)
    assert report["follows_own"] == report["same_winner"] == 1.0
    assert {name: report[name] for name in expected} == expected
    assert 40 < report["items_swap"] <= 80
    assert 40 < report["items_same"] <= 80
    assert report == certify(model, tokenizer, items, seed=0)


def test_bad_input_is_named(tokenizer: PreTrainedTokenizerFast, model: Qwen3ForCausalLM) -> None:
    """Every bad argument raises a ValueError that names it, before long work starts."""
    with pytest.raises(ValueError, match="count"):
        generate_items(0, seed=0, cue_agreement=0.5)
    with pytest.raises(ValueError, match="cue_agreement"):
        generate_items(1, seed=0, cue_agreement=1.5)
    with pytest.raises(ValueError, match="aspect is 'wit'"):
        winner_under(ITEM, "wit")
    with pytest.raises(ValueError, match="aspect is 'wit'"):
        with_criterion(ITEM, "wit")
    with pytest.raises(ValueError, match="judge is 'wise'"):
        warm_start(model, tokenizer, judge="wise", steps=1, batch_size=1, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps is 0"):
        warm_start(model, tokenizer, steps=0, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="temperature is -1"):
        judge_items(model, tokenizer, [ITEM], temperature=-1.0)
    with pytest.raises(ValueError, match="prefixes"):
        judge_items(model, tokenizer, [ITEM], prefixes=[])
    with pytest.raises(ValueError, match="completions"):
        accuracy([], [ITEM])
    with pytest.raises(ValueError, match="items"):
        certify(model, tokenizer, [], seed=0)


def hand_made_judge(obeys: bool) -> Callable[..., list[str]]:
    """Stand in for generation: the verdict follows the forced criterion or else, whatever is forced, the query."""

    def judge(_model: Any, _tokenizer: Any, items: Sequence[Item], *, prefixes: Sequence[str]) -> list[str]:
        texts = []
        for item, prefix in zip(items, prefixes, strict=True):
            named = next(aspect for aspect in ASPECTS if f"judge by {aspect} of" in prefix)
            winner = winner_under(item, named if obeys else item.aspect)
            texts.append(f"{prefix}\n<scores>\n\\boxed{{{'8, 2' if winner == 'A' else '2, 8'}}}\n</scores>")
        return texts

    return judge


def same_weights(first: Qwen3ForCausalLM, second: Qwen3ForCausalLM) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def byte_level_alphabet() -> dict[str, int]:
    """Map each character of GPT-2's byte alphabet to its byte, written anew so as not to trust the decoder."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
