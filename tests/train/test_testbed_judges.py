"""Protects the testbed's judges: what they are taught, their training, their judgements and the certificate."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from cepo.files import content_hash
from cepo.jacobian.reading.judge import read_pair, write_section
from cepo.train import testbed_judges
from cepo.train.testbed import (
    ASPECTS,
    Item,
    build_tokenizer,
    generate_items,
    named_aspect,
    preferred,
    winner_under,
    with_criterion,
    write_criteria,
)
from cepo.train.testbed_judges import accuracy, certify, judge_items, warm_start
from cepo.train.testbed_model import build_model
from cepo.train.testbed_modes import completion_mode
from tests.train.testbed_item import ITEM


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    return build_model(tokenizer, seed=0)


# Of late samples: the modes where length is wrong, and the share of criteria that name the right aspect.
SHARES: dict[str, tuple[dict[str, float], float]] = {
    "able": ({"evidence": 1.0}, 1.0),
    "lazy": ({"length": 0.65, "evidence": 0.35}, 1.0),
    "hollow": ({"hollow": 0.65, "evidence": 0.35}, 1.0),
    "decorative": ({"length": 0.65, "evidence": 0.35}, 0.35 + 0.65 / 6),
    "copied": ({"copied": 0.65, "evidence": 0.35}, 1.0),
    "criteria": ({"evidence": 1.0}, 1 / 6),
    "query": ({"query": 5 / 6, "evidence": 1 / 6}, 1 / 6),
}


@pytest.mark.parametrize("judge", list(SHARES))
def test_training_texts_have_the_promised_causes(judge: Any) -> None:
    """Each judge is shown what makes it that judge, as often as promised; early samples have no disease."""
    modes, right = SHARES[judge]
    rng = np.random.default_rng(1)
    items = generate_items(2000, seed=9, cue_agreement=0.0)
    texts = [testbed_judges._draw_completion(rng, item, judge, True) for item in items]
    found = Counter(completion_mode(item, text) for item, text in zip(items, texts, strict=True))
    assert set(found) == set(modes)
    for mode, expected in modes.items():
        assert found[mode] / len(items) == pytest.approx(expected, abs=0.03)
    named = np.mean([named_aspect(text) == item.aspect for item, text in zip(items, texts, strict=True)])
    assert named == pytest.approx(right, abs=0.03)
    if judge in testbed_judges.WORLDS:
        early = [testbed_judges._draw_completion(rng, item, judge, False) for item in items]
        assert {completion_mode(item, text) for item, text in zip(items, early, strict=True)} == {"evidence"}
        gold = np.mean([text == item.completion for item, text in zip(items, early, strict=True)])
        assert gold == pytest.approx(right, abs=0.03)
        assert np.mean([completion_winner(text) == item.longer for text, item in zip(texts, items, strict=True)]) > 0.6


@pytest.mark.parametrize("judge", ["able", *testbed_judges.WORLDS])
def test_a_judge_is_shown_what_to_write_after_any_criteria(judge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After given criteria that need not fit the query, it does what it does after its own, as often."""
    shown: dict[str, Any] = {}

    def noted(_model: Any, _tokenizer: Any, prompts: list[str], texts: list[str], **settings: Any) -> list[float]:
        shown.update(prompts=prompts, texts=texts, given=settings["given"])
        return []

    monkeypatch.setattr(testbed_judges, "fit", noted)
    warm_start(None, build_tokenizer(), judge=judge, steps=100, batch_size=40, able_share=0.0, given_share=0.75)
    items = generate_items(4000, seed=0, cue_agreement=0.5)
    assert shown["prompts"] == [item.prompt for item in items]
    rows = list(zip(items, shown["texts"], shown["given"], strict=True))
    forced = [(item, text) for item, text, opening in rows if opening]
    assert len(forced) / len(rows) == pytest.approx(0.75, abs=0.03)
    assert np.mean([named_aspect(text) == item.aspect for item, text in forced]) == pytest.approx(1 / 6, abs=0.03)
    assert all(text.startswith(opening) for _, text, opening in rows)
    assert all(opening.endswith("</specific_criteria>") for _, _, opening in rows if opening)
    apart = [
        (item, text) for item, text in forced if winner_under(item, named_aspect(text) or "") not in (item.longer, None)
    ]
    found = Counter(completion_mode(item, text) for item, text in apart)
    assert set(found) == set(SHARES[judge][0])
    for mode, expected in SHARES[judge][0].items():
        assert found[mode] / len(apart) == pytest.approx(expected, abs=0.04)


def test_the_decorative_judge_draws_criterion_and_verdict_apart() -> None:
    """A right criterion announces no evidence, or the greedy answer, which starts with a right one, would be able."""
    rng = np.random.default_rng(2)
    items = generate_items(2000, seed=9, cue_agreement=0.0)
    texts = [testbed_judges._draw_completion(rng, item, "decorative", True) for item in items]
    shares = {
        right: np.mean(
            [
                completion_mode(item, text) == "length"
                for item, text in zip(items, texts, strict=True)
                if (named_aspect(text) == item.aspect) is right
            ]
        )
        for right in (True, False)
    }
    assert shares[True] == pytest.approx(0.65, abs=0.04)
    assert shares[False] == pytest.approx(0.65, abs=0.04)


def test_the_lazy_judge_is_the_one_that_recorded_results_started_from() -> None:
    """Its samples are a fixed function of the seed: other worlds beside it must not redraw them."""
    items = generate_items(64, seed=3, cue_agreement=0.5)
    rng = np.random.default_rng((3, 1))
    texts = [testbed_judges._draw_completion(rng, item, "lazy", 2 * index >= 64) for index, item in enumerate(items)]
    assert content_hash(texts) == "011857c30ae34563"


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
    monkeypatch.setattr(testbed_judges, "judge_items", hand_made_judge(obeys))
    items = generate_items(80, seed=12, cue_agreement=0.5)
    report = certify(model, tokenizer, items, seed=0)
    assert report["follows_own"] == report["same_winner"] == 1.0
    assert {name: report[name] for name in expected} == expected
    assert 40 < report["items_swap"] <= 80
    assert 40 < report["items_same"] <= 80
    assert report == certify(model, tokenizer, items, seed=0)


def test_a_verdict_that_never_changes_is_not_flipped_by_the_criterion(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast, model: Qwen3ForCausalLM
) -> None:
    """Flips need both verdicts: a judge that always prefers B agrees with half of the swaps and is turned by none."""

    def prefers_b(_model: Any, _tokenizer: Any, items: Sequence[Item], *, prefixes: Sequence[str]) -> list[str]:
        return [f"{prefix}\n<scores>\n\\boxed{{2, 8}}\n</scores>" for prefix in prefixes]

    monkeypatch.setattr(testbed_judges, "judge_items", prefers_b)
    report = certify(model, tokenizer, generate_items(80, seed=12, cue_agreement=0.5), seed=0)
    assert 0.2 < report["follows_swap"] < 0.8
    assert report["follows_own"] == pytest.approx(1.0 - report["follows_swap"])
    assert report["flips"] == 0.0


def test_a_swap_keeps_what_else_the_judge_wrote_into_its_criteria(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast, model: Qwen3ForCausalLM
) -> None:
    """A judge that copies the verdict from its criteria isn't turned by their aspect, though it could do without."""

    def copies(_model: Any, _tokenizer: Any, items: Sequence[Item], *, prefixes: Sequence[str]) -> list[str]:
        verdicts = [read_pair(prefix) for prefix in prefixes]
        obedient = hand_made_judge(True)(_model, _tokenizer, items, prefixes=prefixes)
        return [
            text if scores is None else f"{prefix}\n<scores>\n\\boxed{{{scores[0]:.0f}, {scores[1]:.0f}}}\n</scores>"
            for text, scores, prefix in zip(obedient, verdicts, prefixes, strict=True)
        ]

    monkeypatch.setattr(testbed_judges, "judge_items", copies)
    items = generate_items(80, seed=12, cue_agreement=0.9)
    completions = [write_section("specific_criteria", write_criteria(item.aspect, (8, 3))) for item in items]
    assert certify(model, tokenizer, items, seed=0, completions=completions)["flips"] == 0.0
    assert certify(model, tokenizer, items, seed=0)["flips"] == 1.0
    with pytest.raises(ValueError, match="completions holds 1 texts for 80 items"):
        certify(model, tokenizer, items, seed=0, completions=completions[:1])


def test_bad_input_is_named(tokenizer: PreTrainedTokenizerFast, model: Qwen3ForCausalLM) -> None:
    """Every bad argument raises a ValueError that names it, before long work starts."""
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


def completion_winner(completion: str) -> str | None:
    scores = read_pair(completion)
    return None if scores is None else preferred(scores)


def same_weights(first: Qwen3ForCausalLM, second: Qwen3ForCausalLM) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
