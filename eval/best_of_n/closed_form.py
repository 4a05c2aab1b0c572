"""Best of N by a score of each solution: the exact chance that the pick is right, over all ways to draw N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cepo.eval.best_of_n.candidates import Question
from cepo.eval.judges.journal import Record
from cepo.eval.judges.reward import RewardSettings, collect_rewards
from cepo.eval.judges.settings import Progress
from cepo.files import content_hash


def best_of(scores: Sequence[float], correct: Sequence[bool], size: int) -> float:
    """Return the probability that the best-scored of N solutions drawn without replacement is right, in [0, 1].

    Of n solutions, let m(v) score at most v and l(v) less than v. The best score is v in C(m(v), N) - C(l(v), N) of the
    C(n, N) draws, and then each solution with score v is equally likely to be picked, since ties are broken evenly:

        sum over v of (C(m(v), N) - C(l(v), N)) / C(n, N) * share of right solutions among those with score v.

    Args:
        scores: finite scores of n solutions.
        correct: whether each solution is right.
        size: N, from 1 to n.
    """
    total, found, below = math.comb(len(scores), size), 0.0, 0
    for value in sorted(set(scores)):
        level = [grade for score, grade in zip(scores, correct, strict=True) if score == value]
        draws = math.comb(below + len(level), size) - math.comb(below, size)
        found += draws / total * (sum(level) / len(level))
        below += len(level)
    return found


def pick_by_reward(
    questions: Sequence[Question],
    sizes: Sequence[int],
    settings: RewardSettings,
    output: Path,
    command: str,
    *,
    progress: Progress | None = None,
) -> tuple[dict[str, dict[int, list[float]]], list[Record]]:
    """Score every solution once, and compare the best of N by reward with other ways of picking, exactly.

    judge: the highest reward. longest, shortest: by the number of characters. random: a random pick. oracle: right if
    any of the N is. A question with a solution that has no reward is left out of all of them.

    Args:
        questions: each with at least max(sizes) candidates.
        sizes: the values of N, at least 1 each.
        settings: the reward model.
        output: see `collect_rewards`.
        command: see `collect_rewards`.
        progress: see `collect_rewards`.

    Returns:
        By way of picking and N, for every question the probability that the pick is right; and the records of all
        solutions.

    Raises:
        ValueError: for a pairwise model, which cannot score a single solution, and as `collect_rewards`.
    """
    shown = settings.require_rewards("best-of-n")
    texts = [[shown.messages(question.text, text) for text in question.candidates] for question in questions]
    facts = [{"question": question.text, "correct": grade} for question in questions for grade in question.correct]
    flat = [text for of_question in texts for text in of_question]
    rewards = collect_rewards(settings, zip(facts, flat, strict=True), output, command, progress=progress)
    ways: dict[str, dict[int, list[float]]] = {
        way: {size: [] for size in sizes} for way in ("judge", "longest", "shortest", "random", "oracle")
    }
    for question, of_question in zip(questions, texts, strict=True):
        found = [rewards.number(text) for text in of_question]
        if np.isnan(found).any():
            continue
        lengths, correct = [float(len(text)) for text in question.candidates], question.correct
        scores = {
            "judge": found,
            "longest": lengths,
            "shortest": [-length for length in lengths],
            "random": [0.0] * len(lengths),
            "oracle": [float(grade) for grade in correct],
        }
        for way, of_way in scores.items():
            for size in sizes:
                ways[way][size].append(best_of(of_way, correct, size))
    return ways, [rewards.collected.records[content_hash(text)] for text in flat]
