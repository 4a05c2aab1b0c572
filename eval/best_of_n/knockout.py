"""Best of N by knockout: a judge of pairs picks one of N candidates, compared with other ways of picking."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from cepo.eval.best_of_n.candidates import Question, answer_groups
from cepo.eval.judges.settings import Place
from cepo.files import content_hash

WAYS = ("judge", "majority", "random", "oracle")
"""Ways of picking: the judge, a majority vote, a random pick, and a pick that is right if any candidate is."""


@dataclass(frozen=True)
class Match:
    """Two candidates of a question to be judged against each other.

    Attributes:
        question: index of the question.
        draw: index of the candidates' random order.
        first: index of the candidate shown as A.
        second: index of the candidate shown as B.
    """

    question: int
    draw: int
    first: int
    second: int


Decide: TypeAlias = Callable[[Sequence[Match]], Sequence[Place | None]]


def pick_by_knockout(
    questions: Sequence[Question], sizes: Sequence[int], decide: Decide, *, draws: int = 1, seed: int = 0
) -> dict[tuple[int, int, int], int]:
    """Let a judge pick one of the first N candidates, for every N at once.

    The candidates of a question come in a random order. The first is the champion. Each further one challenges it, and
    the winner of their match is the champion. On a tie, or a verdict that cannot be read, the champion stays, which
    favours no candidate since the order is random. The champion after N candidates is the pick of N, so the subsets of
    one draw are nested, and N - 1 matches serve all sizes up to N. Which of the two is shown as A is random too.

    Args:
        questions: each with at least max(sizes) candidates.
        sizes: the values of N, at least 1 each.
        decide: returns the winner of each match, None without one; called once per round, with one match per question
            and draw.
        draws: number of random orders of each question's candidates, at least 1.
        seed: seed of the orders and of which candidate is shown as A.

    Returns:
        The index of the picked candidate by (question, draw, N).

    Raises:
        ValueError: if a number is out of range.
    """
    check_sizes(questions, sizes)
    if draws < 1:
        raise ValueError(f"draws is {draws}; expected at least 1")
    orders = {
        (number, draw): candidate_order(question, draw=draw, seed=seed)
        for number, question in enumerate(questions)
        for draw in range(draws)
    }
    champions = {place: order[0] for place, order in orders.items()}
    picks: dict[tuple[int, int, int], int] = {}
    for size in range(1, max(sizes) + 1):
        if size > 1:
            matches = [_match(questions, *place, champions[place], orders[place][size - 1], seed) for place in orders]
            for match, winner in zip(matches, decide(matches), strict=True):
                if winner is not None:
                    champions[match.question, match.draw] = match.first if winner == "A" else match.second
        if size in sizes:
            picks |= {(*place, size): champion for place, champion in champions.items()}
    return picks


def candidate_order(question: Question, *, draw: int, seed: int) -> list[int]:
    """Return the random order of a question's candidates, which depends only on the question, the draw and the seed."""
    order = list(range(len(question.candidates)))
    random.Random(content_hash("order", seed, draw, question.text, *question.candidates)).shuffle(order)
    return order


def score_picks(
    questions: Sequence[Question],
    picks: Mapping[tuple[int, int, int], int],
    sizes: Sequence[int],
    *,
    draws: int = 1,
    seed: int = 0,
) -> dict[str, dict[int, list[float]]]:
    """Compare the picks with other ways of picking from the same candidates.

    random: the share of right candidates, the expectation of a random pick.
    majority: the most frequent answer; the mean over equally frequent ones. If no answer can be read, as random.
    oracle: whether any candidate is right.

    Args:
        questions: as for `pick_by_knockout`.
        picks: all picks, from `pick_by_knockout`.
        sizes: the values of N.
        draws: as for `pick_by_knockout`.
        seed: as for `pick_by_knockout`.

    Returns:
        By way of picking (see WAYS) and N: for every question the mean over draws of whether the pick is right, in
        [0, 1].
    """
    ways: dict[str, dict[int, list[float]]] = {way: {size: [] for size in sizes} for way in WAYS}
    for number, question in enumerate(questions):
        groups = answer_groups(question.candidates)
        orders = [candidate_order(question, draw=draw, seed=seed) for draw in range(draws)]
        for size in sizes:
            subsets = [order[:size] for order in orders]
            judged = [question.correct[picks[number, draw, size]] for draw in range(draws)]
            right = [[question.correct[candidate] for candidate in subset] for subset in subsets]
            voted = [majority_share([groups[candidate] for candidate in subset], grades)
                     for subset, grades in zip(subsets, right, strict=True)]  # fmt: skip
            ways["judge"][size].append(float(np.mean(judged)))
            ways["majority"][size].append(float(np.mean(voted)))
            ways["random"][size].append(float(np.mean([np.mean(grades) for grades in right])))
            ways["oracle"][size].append(float(np.mean([any(grades) for grades in right])))
    return ways


def majority_share(groups: Sequence[int | None], correct: Sequence[bool]) -> float:
    """Return how often a majority vote is right, in [0, 1].

    Args:
        groups: number of each candidate's answer, the same for equal answers; None for no answer, which has no vote.
        correct: whether each candidate is right.

    Returns:
        The share of right candidates with the most frequent answer, a mean over equally frequent answers. Without any
        vote, the share of right candidates.
    """
    votes = [group for group in groups if group is not None]
    if not votes:
        return float(np.mean(correct))
    most = max(votes.count(group) for group in votes)
    leaders = [group for group in dict.fromkeys(votes) if votes.count(group) == most]
    shares = [
        np.mean([grade for member, grade in zip(groups, correct, strict=True) if member == leader])
        for leader in leaders
    ]
    return float(np.mean(shares))


def check_sizes(questions: Sequence[Question], sizes: Sequence[int]) -> None:
    """Raise ValueError unless the values of N differ, are at least 1, and no question has fewer candidates."""
    if not sizes or min(sizes) < 1 or len(set(sizes)) != len(sizes):
        raise ValueError(f"n is {list(sizes)}; expected different numbers of at least 1")
    fewest = min((len(question.candidates) for question in questions), default=0)
    if fewest < max(sizes):
        raise ValueError(f"n holds {max(sizes)}, but a question has {fewest} candidates; expected no more than that")


def _match(questions: Sequence[Question], question: int, draw: int, champion: int, challenger: int, seed: int) -> Match:
    text, candidates = questions[question].text, questions[question].candidates
    drawn = random.Random(content_hash("place", seed, draw, text, candidates[champion], candidates[challenger]))
    first, second = (champion, challenger) if drawn.random() < 0.5 else (challenger, champion)
    return Match(question, draw, first, second)
