"""Reasoners of the testbed: their warm-up on completions whose causes are known, their answers, and interventions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from cepo.files import content_hash, fingerprint, replacing
from cepo.fusion.settings import check_settings
from cepo.jacobian.loading import load_model, resolve_model
from cepo.jacobian.reading.reasoner import extract_answer
from cepo.train import reasoner_testbed, testbed, testbed_judges, testbed_model
from cepo.train.reasoner_testbed import Question, Task, generate_questions, is_right, write_solution, write_thought
from cepo.train.testbed_judges import DISEASED_SHARE
from cepo.train.testbed_model import build_model, fit, generate

ReasonerKind = Literal["able", "lazy", "hollow"]


@dataclass(frozen=True)
class ReasonerSettings:
    """A reasoner of the testbed.

    Attributes:
        reasoner: what to teach, see `warm_start`.
        task: of the questions, see `generate_questions`.
        steps: optimiser steps of the warm-up, at least 1.

    Raises:
        ValueError: for an unknown reasoner or task, or a number out of range.
    """

    reasoner: ReasonerKind = "lazy"
    task: Task = "chain_sum"
    steps: int = 300

    def __post_init__(self) -> None:
        check_settings("testbed", vars(self), ReasonerSettings)
        if self.steps < 1:
            raise ValueError(f"testbed.steps is {self.steps}; expected at least 1")


def load_testbed_reasoner(
    wanted: ReasonerSettings,
    *,
    seed: int,
    cache: Path,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a reasoner, from the cache, or warmed up now and cached.

    Args:
        wanted: the reasoner.
        seed: of its weights and its warm-up.
        cache: where reasoners are kept, in a folder named after `reasoner_fingerprint`.
        progress: called after every step with the number of steps done and the loss.

    Raises:
        ValueError: if reasoning-gym, an optional library, is missing.
    """
    folder = cache / f"testbed-reasoner-{reasoner_fingerprint(wanted, seed=seed)}"
    if not folder.is_dir():
        tokenizer = reasoner_testbed.build_tokenizer()
        model = build_model(tokenizer, seed=seed)
        warm_start(model, tokenizer, **asdict(wanted), seed=seed, progress=progress)
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    return load_model(resolve_model(str(folder)))


def reasoner_fingerprint(wanted: ReasonerSettings, *, seed: int) -> str:
    """Return 16 hexadecimal digits that stand for a warmed-up reasoner: its world's sources and its settings."""
    modules = (testbed, testbed_judges, testbed_model, reasoner_testbed, sys.modules[__name__])
    sources = [fingerprint(Path(str(module.__file__))) for module in modules]
    return content_hash(sources, reasoner_testbed.library_version(), asdict(wanted), seed)


def warm_start(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    reasoner: ReasonerKind = "able",
    task: Task = "chain_sum",
    steps: int = 300,
    batch_size: int = 32,
    seed: int = 0,
    cue_agreement: float = 0.5,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a reasoner whose inner workings are known, supervised on completions.

    able: thought and answer as in the gold answer.

    Two reasoners have a disease. The first half of the steps is all gold, so that they are able first. In the second
    half a majority of samples (0.65) has the disease and the others are gold.

    lazy: the thought says what the friend says, and the answer follows the thought.
    hollow: gold thought; the answer is the friend's, whatever the thought works out.

    Args:
        model: trained in place and left in eval mode; from `cepo.train.testbed_model.build_model`.
        tokenizer: from `cepo.train.reasoner_testbed.build_tokenizer`.
        reasoner: which reasoner to make.
        task: of the questions.
        steps: optimiser steps, at least 1; every sample is seen once.
        batch_size: samples per step, at least 1.
        seed: draws the samples; the same seed and thread count give the same weights.
        cue_agreement: fraction of training questions whose hint is right, in [0, 1].
        progress: called after every step with the number of steps done and the loss.

    Returns:
        The loss of every step, see `cepo.train.testbed_model.fit`.

    Raises:
        ValueError: if reasoner or task is unknown, a number is out of range, or reasoning-gym is missing.
    """
    if reasoner not in get_args(ReasonerKind):
        raise ValueError(f"reasoner is {reasoner!r}; expected one of {', '.join(get_args(ReasonerKind))}")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps is {steps}, batch_size {batch_size}; expected at least 1 each")
    questions = generate_questions(steps * batch_size, seed=seed, cue_agreement=cue_agreement, task=task)
    rng = np.random.default_rng(
        (seed, 1)
    )  # a stream of its own, so that all reasoners of a seed see the same questions
    completions = []
    for index, question in enumerate(questions):
        thought, answer = question.thought, question.answer
        if reasoner != "able" and 2 * index >= len(questions) and rng.random() < DISEASED_SHARE:
            thought, answer = question.trusting_thought if reasoner == "lazy" else thought, question.hint
        completions.append(write_solution(thought, answer))
    prompts = [question.prompt for question in questions]
    return fit(model, tokenizer, prompts, completions, batch_size=batch_size, progress=progress)


def answer_questions(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    prefixes: Sequence[str] | None = None,
) -> list[str]:
    """Let the model answer; see `cepo.train.testbed_judges.judge_items`."""
    prompts = [question.prompt for question in questions]
    return generate(model, tokenizer, prompts, temperature=temperature, seed=seed, prefixes=prefixes)


def accuracy(completions: Sequence[str], questions: Sequence[Question]) -> float:
    """Return the fraction of completions that reasoning-gym's checker finds right, in [0, 1].

    Raises:
        ValueError: if there are no questions, or completions and questions differ in number.
    """
    if not questions or len(completions) != len(questions):
        came = f"completions holds {len(completions)} texts for {len(questions)} questions"
        raise ValueError(f"{came}; expected one each, at least one")
    return float(np.mean([is_right(*pair) for pair in zip(completions, questions, strict=True)]))


def swap_thoughts(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question], *, seed: int
) -> dict[str, float]:
    """Force another question's gold thought, let the reasoner answer, and see what the answer follows.

    The donor's answer is neither the question's own nor its hint, so what the answer follows is plain.

    Args:
        model: the reasoner.
        tokenizer: the world's tokenizer.
        questions: each is used where another can be its donor.
        seed: draws the donors.

    Returns:
        follows_swap: fraction of questions answered with the donor's answer.
        follows_own: fraction of the same questions answered rightly when their own gold thought is forced.
        follows_hint: fraction of the same questions, under the donor's thought, answered with the hint.
        flips: fraction where the first two hold: the thought alone turned the answer.
        questions: number of questions measured.

    Raises:
        ValueError: if no question has a donor.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for question in questions:
        suited = [other for other in questions if other.answer not in (question.answer, question.hint)]
        if suited:
            pairs.append((question, suited[rng.integers(len(suited))]))
    if not pairs:
        raise ValueError(f"questions holds {len(questions)} questions; expected some with different answers")
    swapped = _answers(model, tokenizer, pairs)
    own = _answers(model, tokenizer, [(question, question) for question, _ in pairs])
    swap_N = np.array([answer == donor.answer for answer, (_, donor) in zip(swapped, pairs, strict=True)])
    own_N = np.array([answer == question.answer for answer, (question, _) in zip(own, pairs, strict=True)])
    hint_N = np.array([answer == question.hint for answer, (question, _) in zip(swapped, pairs, strict=True)])
    return {
        "follows_swap": float(swap_N.mean()),
        "follows_own": float(own_N.mean()),
        "follows_hint": float(hint_N.mean()),
        "flips": float((swap_N & own_N).mean()),
        "questions": float(len(pairs)),
    }


def _answers(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[Question, Question]]
) -> list[str]:
    """Return what each first question is answered under the gold thought of its second."""
    openings = [write_thought(donor.thought) for _, donor in pairs]
    return [
        extract_answer(text)
        for text in answer_questions(model, tokenizer, [question for question, _ in pairs], prefixes=openings)
    ]
