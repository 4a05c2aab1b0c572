"""Measure a testbed reasoner: its accuracy, interventions on its thought, and the links of its answers."""

from __future__ import annotations

from typing import Any

from cepo.eval.score.rows import read_rollout
from cepo.eval.testbed_measures import ITEMS, SCORED, Measures, score_links
from cepo.jacobian.reading.spans import SpanReader
from cepo.train.prompts import REASONER
from cepo.train.reasoner_testbed import MODES, Task, completion_mode, generate_questions
from cepo.train.reasoner_testbed_models import accuracy, answer_questions, swap_thoughts


def measure_reasoner(
    model: Any, tokenizer: Any, *, seed: int, task: Task, items: int = ITEMS, scored: int = SCORED
) -> Measures:
    """Return the measures of a testbed reasoner, in the same record as a testbed judge's.

    The cue is the hint. The intervention swaps the thought: another question's gold thought is forced, on questions
    whose hint is right in 10% of cases. `turned` is the fraction of questions that are answered correctly after their
    own gold thought and with the donor's answer after the donor's.

    Args:
        model: the reasoner, in eval mode.
        tokenizer: the world's tokenizer.
        seed: seed of questions, donors and sampling; the same seed gives the same questions to every reasoner.
        task: the questions' task.
        items: number of questions for each accuracy and intervention, at least 1.
        scored: number of sampled completions whose links are scored, at most `items`.

    Raises:
        ValueError: if reasoning-gym, an optional library, is missing.
    """
    usual = generate_questions(items, seed=seed + 11, cue_agreement=0.9, task=task)
    flipped = generate_questions(items, seed=seed + 12, cue_agreement=0.1, task=task)
    sampled = answer_questions(model, tokenizer, usual, temperature=1.0, seed=seed)
    against = answer_questions(model, tokenizer, flipped, temperature=1.0, seed=seed)
    swaps = swap_thoughts(model, tokenizer, flipped, seed=seed)
    modes = [completion_mode(*pair) for pair in zip(flipped, against, strict=True)]
    reader = SpanReader(tokenizer, REASONER)
    rollouts = [
        read_rollout({"prompt": question.prompt, "completion": completion + tokenizer.eos_token}, reader)
        for question, completion in zip(usual, sampled, strict=True)
    ]
    mean_score, links = score_links(model, rollouts[:scored], REASONER)
    return Measures(
        in_distribution=accuracy(answer_questions(model, tokenizer, usual), usual),
        flipped=accuracy(answer_questions(model, tokenizer, flipped), flipped),
        swaps_followed=swaps["follows_swap"],
        turned=swaps["flips"],
        modes={mode: modes.count(mode) / len(modes) for mode in MODES},
        malformed=sum(rollout.malformed is not None for rollout in rollouts) / len(rollouts),
        tokens=sum(len(rollout.completion_ids) for rollout in rollouts) / len(rollouts),
        S=mean_score,
        links=links,
    )
