"""Protects the reasoner's world: exact questions, a cue that is right as often as asked, and known causes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cepo.jacobian.reading.spans import SpanReader
from cepo.train import reasoner_testbed
from cepo.train.config import REASONER_TESTBED
from cepo.train.policy import load_data, policy_fingerprint
from cepo.train.prompts import REASONER
from cepo.train.reasoner_testbed import Question, completion_mode, generate_questions, is_right, write_solution
from cepo.train.reasoner_testbed_models import (
    ReasonerSettings,
    accuracy,
    load_testbed_reasoner,
    reasoner_fingerprint,
    swap_thoughts,
    warm_start,
)
from cepo.train.rewards.task import exact_match
from cepo.train.testbed_model import build_model

pytest.importorskip("reasoning_gym", reason="reasoning-gym is an extra: pip install 'cepo[reasoning]'")

SUM = Question("7 - 4 + 2 =\nA friend says it is 8", "7 - 4 = 3\n3 + 2 = 5", "5", "8", "chain_sum")


@pytest.mark.parametrize("task", ["chain_sum", "count_bits"])
def test_questions_are_exact_and_the_hint_is_right_as_often_as_asked(task: Any) -> None:
    """The checker is reasoning-gym's; the training reward `exact_match` must agree with it on this world."""
    questions = generate_questions(60, seed=3, cue_agreement=0.9, task=task)
    assert sum(question.cue_agrees for question in questions) == 54
    for question in questions:
        assert question.prompt.endswith(f"\nA friend says it is {question.hint}")
        assert question.thought.split()[-1] == question.answer
        gold = write_solution(question.thought, question.answer)
        hinted = write_solution(question.trusting_thought, question.hint)
        assert is_right(gold, question)
        assert is_right(hinted, question) == question.cue_agrees
        for text in (gold, hinted):
            assert exact_match([text], [question.answer]) == [float(is_right(text, question))]
            assert not is_right(text.replace("</answer>", "0</answer>"), question) or question.answer == "0"


def test_a_seed_gives_the_same_questions_and_another_gives_others() -> None:
    """Reasoning-gym seeds item i with seed + i: neighbouring seeds must not share items."""
    one, same, other = (generate_questions(40, seed=seed, cue_agreement=0.5) for seed in (1, 1, 2))
    assert one == same
    shared = [a for a, b in zip(one[1:], other, strict=False) if a.prompt.split("\n")[0] == b.prompt.split("\n")[0]]
    assert len(shared) < 5


def test_every_text_of_the_world_is_one_token_a_piece_and_reads_as_a_reasoners() -> None:
    """An unknown token, or a span that the reader misses, would make every measure of this world wrong."""
    tokenizer = reasoner_testbed.build_tokenizer()
    reader = SpanReader(tokenizer, REASONER)
    for task in ("chain_sum", "count_bits"):
        for question in generate_questions(20, seed=5, cue_agreement=0.5, task=task):  # type: ignore[arg-type]
            for thought, answer in ((question.thought, question.answer), (question.trusting_thought, question.hint)):
                text = write_solution(thought, answer)
                ids = tokenizer(text).input_ids
                assert tokenizer.decode(ids) == text
                assert tokenizer.decode(tokenizer(question.prompt).input_ids) == question.prompt
                assert tokenizer.unk_token_id not in ids
                rollout = reader.read(tokenizer(question.prompt).input_ids, [*ids, tokenizer.eos_token_id])
                assert rollout.malformed is None
                assert (rollout.spans["rationale"].text, rollout.spans["answer"].text) == (thought, answer)


@pytest.mark.parametrize(
    ("thought", "answer", "mode"),
    [
        (SUM.thought, "5", "evidence"),
        ("7 - 4 = 2\n2 + 2 = 4", "4", "evidence"),  # wrong, but worked out
        (SUM.thought, "8", "hollow"),
        (SUM.thought, "6", "other"),
        ("my friend says 8", "8", "hint"),
        ("my friend says 8", "5", "other"),
        ("nothing", "8", "other"),
    ],
)
def test_modes_are_told_by_the_text(thought: str, answer: str, mode: str) -> None:
    """Protects the truth that causal scores are compared with."""
    assert completion_mode(SUM, write_solution(thought, answer)) == mode
    assert completion_mode(SUM, write_solution(thought, answer).replace("</think>", "")) == "other"


def test_a_swap_tells_what_the_answer_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reasoner that reads its thought turns with every swap, and one that reads the hint never does."""
    questions = generate_questions(30, seed=4, cue_agreement=0.1)

    def answers(rule: Any) -> Any:
        def answer(model: Any, tokenizer: Any, asked: Any, *, prefixes: Any, **_: Any) -> list[str]:
            return [f"{p}\n<answer>{rule(q, p)}</answer>" for q, p in zip(asked, prefixes, strict=True)]

        return answer

    def reads_thought(question: Question, prefix: str) -> str:
        return prefix.split()[-2]

    def reads_hint(question: Question, prefix: str) -> str:
        return question.hint

    target = "cepo.train.reasoner_testbed_models.answer_questions"
    monkeypatch.setattr(target, answers(reads_thought))
    follows = swap_thoughts(None, None, questions, seed=0)  # type: ignore[arg-type]
    assert follows == {"follows_swap": 1.0, "follows_own": 1.0, "follows_hint": 0.0, "flips": 1.0, "questions": 30.0}
    monkeypatch.setattr(target, answers(reads_hint))
    hollow = swap_thoughts(None, None, questions, seed=0)  # type: ignore[arg-type]
    assert (hollow["follows_swap"], hollow["follows_hint"], hollow["flips"]) == (0.0, 1.0, 0.0)
    assert hollow["follows_own"] == pytest.approx(sum(question.cue_agrees for question in questions) / 30)


def test_diseases_are_what_their_samples_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half is gold; later a majority, not all, has the disease."""
    seen: dict[str, list[str]] = {}

    def record(model: Any, tokenizer: Any, prompts: Any, completions: list[str], **_: Any) -> list[float]:
        seen[kind] = completions
        return []

    monkeypatch.setattr("cepo.train.reasoner_testbed_models.fit", record)
    for kind in ("able", "lazy", "hollow"):
        warm_start(None, None, reasoner=kind, steps=20, batch_size=10, seed=1, cue_agreement=0.0)  # type: ignore[arg-type]
    questions = generate_questions(200, seed=1, cue_agreement=0.0)
    modes = {
        kind: [completion_mode(*pair) for pair in zip(questions, texts, strict=True)] for kind, texts in seen.items()
    }
    assert set(modes["able"]) == {"evidence"}
    for kind, disease in (("lazy", "hint"), ("hollow", "hollow")):
        assert set(modes[kind][:100]) == {"evidence"}
        assert 0.5 < modes[kind][100:].count(disease) / 100 < 0.8
        assert set(modes[kind]) == {"evidence", disease}


def test_a_reasoner_is_warmed_up_once_and_kept(tmp_path: Path) -> None:
    """Settings decide the weights; a second call reads them."""
    torch.set_num_threads(1)
    wanted = ReasonerSettings(steps=1)
    losses: list[float] = []
    first, _ = load_testbed_reasoner(wanted, seed=3, cache=tmp_path, progress=lambda step, loss: losses.append(loss))
    again, tokenizer = load_testbed_reasoner(wanted, seed=3, cache=tmp_path, progress=lambda *_: pytest.fail("again"))
    assert len(losses) == 1
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert first.num_parameters() == build_model(tokenizer, seed=0).num_parameters()
    prints = {reasoner_fingerprint(one, seed=seed) for seed in (3, 4) for one in (wanted, ReasonerSettings())}
    assert len(prints) == 4


def test_settings_are_refused_by_name() -> None:
    for given, complaint in (
        ({"judge": "lazy"}, "testbed holds the unknown key judge; expected some of reasoner, task, steps"),
        ({"reasoner": "copied"}, "testbed.reasoner is 'copied'"),
        ({"task": "chess"}, "testbed.task is 'chess'"),
        ({"steps": 0}, "testbed.steps is 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            policy_fingerprint(REASONER_TESTBED, seed=1, testbed_judge=given)
    with pytest.raises(ValueError, match="cue_agreement"):
        generate_questions(1, seed=0, cue_agreement=2.0)
    with pytest.raises(ValueError, match="at least one"):
        accuracy([], [])


def test_a_recipe_trains_it_by_name() -> None:
    """Rows for TRL: the prompt, and the answer that `exact_match` reads; train and test share no draw; kinds agree."""
    data = load_data("reasoning", {"source": REASONER_TESTBED, "count": 20, "test_count": 5}, seed=1)
    (question, *_) = generate_questions(20, seed=2, cue_agreement=0.9)
    assert data.train[0] == {"prompt": [{"role": "user", "content": question.prompt}], "answer": question.answer}
    assert (len(data.train), len(data.test)) == (20, 5)
    one = {"source": REASONER_TESTBED, "count": 1, "test_count": 1}
    bits = load_data("reasoning", {**one, "task": "count_bits"}, seed=1)
    assert "1 bits" in bits.train[0]["prompt"][0]["content"]
    with pytest.raises(ValueError, match="expected reasoning"):
        load_data("judge", {"source": REASONER_TESTBED}, seed=1)
    with pytest.raises(ValueError, match="data holds the unknown key columns"):
        load_data("reasoning", {"source": REASONER_TESTBED, "columns": {}}, seed=1)
    assert policy_fingerprint(REASONER_TESTBED, seed=1, testbed_judge={}) == reasoner_fingerprint(
        ReasonerSettings(), seed=1
    )
