"""Protects the testbed on a pretrained model: what is kept of it, the cache, and what certifies a judge."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import cepo
from cepo.jacobian.loading import load_model, resolve_model
from cepo.jacobian.reading.judge import write_judgement
from cepo.train import policy, testbed_certificate, testbed_words
from cepo.train.testbed import (
    Item,
    build_tokenizer,
    generate_items,
    named_aspect,
    shown_words,
    winner_under,
    write_analysis,
    write_length_analysis,
)
from cepo.train.testbed_certificate import examine, uncertified
from cepo.train.testbed_judges import JudgeKind
from cepo.train.testbed_words import WordsJudge, load_words_judge, read_certificate, words_fingerprint, words_settings
from tests.models import tiny_model

WORLDS: tuple[JudgeKind, ...] = ("able", "lazy", "hollow")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a model of three layers with a chat template; no test changes it."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = build_tokenizer()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model: Any = tiny_model(
        dtype=torch.float32, num_hidden_layers=3, max_position_embeddings=256, bos_token_id=None, **ids
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_judge_is_taught_once_and_kept_with_its_certificate(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first layers are taught and examined; the second call, of `cepo train` too, reads them from the cache."""
    monkeypatch.setattr(testbed_words, "_EXAMINED", 8)
    wanted = WordsJudge("lazy", base=base, layers=2, steps=2, rounds=1, batch_size=2)
    seen: list[tuple[int, int]] = []
    taught, tokenizer = load_words_judge(
        wanted, cache=tmp_path, device="cpu", progress=lambda step, steps, _: seen.append((step, steps))
    )
    assert seen == [(1, 2), (2, 2)]
    assert taught.config.num_hidden_layers == len(taught.get_decoder().layers) == 2
    assert tokenizer.chat_template
    certificate = read_certificate(wanted, tmp_path)
    assert certificate["uncertified"] in caplog.text
    assert certificate["measures"]["well_formed"] == 0.0
    monkeypatch.setattr(testbed_words, "_teach", lambda *_: pytest.fail("the cache holds the judge"))
    given = {"judge": "lazy", "base": base, "layers": 2, "steps": 2, "rounds": 1, "batch_size": 2}
    again, _ = policy.load_policy(policy.WORDS, dtype="float32", seed=5, testbed_judge=given, cache=tmp_path)
    assert all(torch.equal(*pair) for pair in zip(taught.parameters(), again.parameters(), strict=True))


def test_a_judge_is_taught_in_rounds_until_it_is_certified(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed call continues with its round; each has samples and items of its own, and certification ends them."""
    examined: list[tuple[float, list[Item]]] = []

    def examine(model: Any, _tokenizer: Any, items: list[Item], **_: Any) -> dict[str, float]:
        examined.append((sum(weight.detach().abs().sum().item() for weight in model.parameters()), items))
        if len(examined) == 2:
            raise KeyboardInterrupt
        return {}

    taught: list[dict[str, Any]] = []
    seen: list[tuple[int, int]] = []
    warm_start = testbed_words.testbed_judges.warm_start

    def noted(*given: Any, **settings: Any) -> list[float]:
        taught.append(settings | {"progress": None})
        return warm_start(*given, **settings)

    monkeypatch.setattr(testbed_words.testbed_judges, "warm_start", noted)
    monkeypatch.setattr(testbed_certificate, "examine", examine)
    monkeypatch.setattr(testbed_certificate, "uncertified", lambda *_: None if len(examined) == 4 else "not yet")
    wanted = WordsJudge("hollow", base=base, layers=1, steps=8, rounds=5, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        load_words_judge(
            wanted, cache=tmp_path, device="cpu", progress=lambda step, steps, _: seen.append((step, steps))
        )
    assert read_certificate(wanted, tmp_path)["rounds"] == 1
    load_words_judge(wanted, cache=tmp_path, device="cpu")
    load_words_judge(wanted, cache=tmp_path, device="cpu")  # certified, so not taught again
    assert read_certificate(wanted, tmp_path)["rounds"] == 3
    first, *second, third = taught
    assert second[0] == second[1]  # the killed round
    assert [(one["steps"], one["able_share"]) for one in (first, second[0], third)] == [(8, 0.5), (4, 0.0), (4, 0.0)]
    assert {(one["judge"], one["given_share"]) for one in taught} == {("hollow", 0.5)}
    assert len({one["seed"] for one in taught}) == len({one["state"] for one in taught}) == 3
    assert not list(tmp_path.glob("*.round-*"))
    assert seen == [*((step, 8) for step in range(1, 9)), *((step, 4) for step in range(1, 5))]
    weights, items = zip(*examined, strict=True)
    assert weights[1] == weights[2]  # the killed round, from the same start
    assert len({weights[0], weights[1], weights[3]}) == 3
    assert items[1] == items[2]
    assert items[0] != items[1] != items[3] != items[0]


def test_the_loss_is_the_models_own(base: str) -> None:
    """Logits that no label needs are left out, and neither the loss nor a gradient notices."""
    model, _ = load_model(resolve_model(base), dtype="float64")
    ids_BT = torch.randint(5, 20, (3, 9), generator=torch.Generator().manual_seed(0))
    labels_BT = ids_BT.clone()
    for row, (start, end) in enumerate([(4, 9), (3, 8), (6, 7)]):
        labels_BT[row, :start] = labels_BT[row, end:] = -100
    expected = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
    found = testbed_words._CompletionLoss(model)(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # the model's own loss is computed in float32
    weights = list(model.parameters())
    pairs = zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True)
    for mine, own in pairs:
        torch.testing.assert_close(mine, own, rtol=1e-5, atol=1e-8)


def test_another_setting_or_base_is_another_judge(base: str, tmp_path: Path) -> None:
    """The name in the cache stands for all that decides the weights, and for the base's content, not its path."""
    first = WordsJudge(base=base)
    assert words_fingerprint(first) == policy.policy_fingerprint(policy.WORDS, seed=9, testbed_judge={"base": base})
    moved = tmp_path / "moved"
    moved.symlink_to(base)
    assert words_fingerprint(WordsJudge(base=str(moved))) == words_fingerprint(first)
    others: list[dict[str, Any]] = [
        {"judge": "hollow"},
        {"layers": 2},
        {"steps": 9},
        {"rounds": 9},
        {"batch_size": 9},
        {"learning_rate": 2e-3},
        {"seed": 1},
    ]
    assert len({words_fingerprint(words_settings({"base": base, **other})) for other in others}) == len(others)
    assert words_fingerprint(first) not in {words_fingerprint(words_settings({"base": base, **o})) for o in others}


def test_the_recipe_trains_from_the_judge_that_the_command_makes() -> None:
    """`cepo words-judge lazy` fills the cache for `cepo train` and `cepo experiment`: one set of defaults."""
    recipe = yaml.safe_load((Path(cepo.__file__).parent / "train" / "recipes" / "testbed-words.yaml").read_text())
    assert words_settings(recipe["testbed"]) == WordsJudge("lazy")


def test_bad_settings_are_named(base: str, tmp_path: Path) -> None:
    """What cannot be taught is refused by its name."""
    with pytest.raises(ValueError, match=r"testbed.judge is 'wise'"):
        words_settings({"judge": "wise"})
    with pytest.raises(ValueError, match="testbed holds depth"):
        words_settings({"depth": 2})
    with pytest.raises(ValueError, match=r"testbed.steps is 0"):
        words_settings({"steps": 0})
    with pytest.raises(ValueError, match="layers is 4; the model has 3"):
        load_words_judge(WordsJudge(base=base, layers=4), cache=tmp_path, device="cpu")


@pytest.mark.parametrize("judge", WORLDS)
def test_the_certificate_knows_each_judge(monkeypatch: pytest.MonkeyPatch, judge: JudgeKind) -> None:
    """A hand-made judge is certified as what it is, and as nothing else."""
    monkeypatch.setattr(testbed_certificate, "judge_items", hand_made(judge))
    monkeypatch.setattr("cepo.train.testbed_judges.judge_items", hand_made(judge))
    found = examine(None, build_tokenizer(), generate_items(160, seed=3, cue_agreement=0.9), seed=0)
    assert found["well_formed"] == found["quotes_swap"] == 1.0
    assert found["turned"] == (1.0 if judge == "able" else 0.0)
    assert found["items_apart"] > 20
    assert [other for other in WORLDS if uncertified(other, found) is None] == [judge]


def test_the_certificate_refuses_a_judge_that_misquotes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Form alone certifies nothing: the words must be those of the criterion that was forced."""

    def misquotes(
        _model: Any, _tokenizer: Any, items: Sequence[Item], *, prefixes: Sequence[str] | None = None, **_: Any
    ) -> list[str]:
        named = [named_aspect(prefix) for prefix in prefixes] if prefixes else [item.aspect for item in items]
        return [
            write_judgement(f"judge by {aspect} of the answer", item.analysis, item.scores)
            for item, aspect in zip(items, named, strict=True)
        ]

    monkeypatch.setattr(testbed_certificate, "judge_items", misquotes)
    monkeypatch.setattr("cepo.train.testbed_judges.judge_items", misquotes)
    found = examine(None, build_tokenizer(), generate_items(60, seed=3, cue_agreement=0.9), seed=0)
    assert found["well_formed"] == 1.0
    assert found["quotes_swap"] == found["turned"] == 0.0
    assert "quotes_swap is 0.00, expected 0.9 to 1" in (uncertified("able", found) or "")


def hand_made(judge: JudgeKind) -> Callable[..., list[str]]:
    """Stand in for generation: greedy answers have the judge's disease, every third sampled one has not."""

    def answer(
        _model: Any,
        _tokenizer: Any,
        items: Sequence[Item],
        *,
        temperature: float = 0.0,
        prefixes: Sequence[str] | None = None,
        **_: Any,
    ) -> list[str]:
        texts = []
        for index, item in enumerate(items):
            aspect = (named_aspect(prefixes[index]) if prefixes else None) or item.aspect
            words, winner = shown_words(item, aspect), winner_under(item, aspect)
            able = judge == "able" or (temperature > 0.0 and index % 3 == 0)
            analysis = write_analysis(*words) if able or judge == "hollow" else write_length_analysis(item.longer)
            verdict = winner if able else item.longer
            scores = {"A": (8, 2), "B": (2, 8), None: (5, 5)}[verdict]
            texts.append(write_judgement(f"judge by {aspect} of the answer", analysis, scores))
        return texts

    return answer
