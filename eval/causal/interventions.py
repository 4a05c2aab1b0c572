"""Ground truth: change the criteria of a judgement, let the judge itself go on, and see what becomes of its scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cepo.counterfactual.permute import permute_rollout
from cepo.eval.causal.judge_model import EXTRA_TOKENS, JudgeModel, Verdict, generate, read_verdicts, sample_criteria
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.jacobian.records import Rollout, Span

Mode = Literal["direct", "total"]
INTERVENTIONS: tuple[str, ...] = (
    "resample",
    "swap",
    "truncate",
    "filler",
    "shuffle",
    "delete top gradient",
    "delete top attention",
    "delete random",
    "mask",
)
DELETED = 0.2  # share of the criteria's tokens that a deletion takes
_FILLER = " so well then here also just maybe indeed"


@dataclass(frozen=True)
class Effect:
    """What an intervention did to the scores, as the mean over its draws.

    Attributes:
        tv: total variation distance of the digits' distributions, the mean of the two scores, in [0, 1].
        margin: absolute change of the expected margin.
        flip: whether the winner changed (to a tie, too), in [0, 1].
        draws: how many draws it is the mean of.
        malformed: how many more there were in which the judge did not come to two scores; they are left out.
    """

    tv: float
    margin: float
    flip: float
    draws: int
    malformed: int


@dataclass(frozen=True)
class Plan:
    """What to do to one rollout's criteria.

    Attributes:
        rollout: the judgement.
        other: ids of another item's criteria, to swap in; empty for none.
        gradient: how much each criteria token matters by the gradient.
        attention: the same by attention.
    """

    rollout: Rollout
    other: tuple[int, ...]
    gradient: tuple[float, ...]
    attention: tuple[float, ...]


def intervene(
    plans: Sequence[Plan], judge: JudgeModel, *, resamples: int, seed: int
) -> list[dict[str, dict[Mode, Effect | None]]]:
    """Return the effect of every intervention on each rollout's criteria, by intervention and mode.

    direct: the analysis and the first score stay as they were sampled (teacher-forced); only the criteria change.
    total: the judge writes analysis and scores anew after the changed criteria, greedily, and is compared with what it
    writes greedily after the original criteria. The digits' distribution is read at those greedy continuations, so it
    holds the uncertainty of the digits and not that of the analysis.

    - resample: other criteria that the judge itself samples for the same prompt, at temperature 1.
    - swap: another item's criteria.
    - truncate: the first half of the sentences; of the tokens, where there is one sentence.
    - filler: as many neutral words.
    - shuffle: the content tokens in another order.
    - delete top gradient, delete top attention, delete random: a fifth of the tokens, at least one, taken out.
    - mask: no later token attends to the criteria's positions.

    Args:
        plans: one a rollout.
        judge: the judge that wrote them.
        resamples: criteria sampled for each rollout, at least 1; shuffles and random deletions are as many, at most 4.
        seed: of sampling, shuffles and random deletions.

    Returns:
        One dict a rollout; None where an intervention cannot be done or the judge never came to two scores.

    Raises:
        ValueError: if resamples is below 1.
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; expected at least 1")
    rollouts = [plan.rollout for plan in plans]
    sampled = sample_criteria(rollouts, judge, count=resamples, seed=seed)
    filler = list(judge.reader.tokenizer(_FILLER, add_special_tokens=False)["input_ids"])
    changed: list[dict[str, list[Rollout | None]]] = []
    for number, (plan, criteria) in enumerate(zip(plans, sampled, strict=True)):
        rng = np.random.default_rng((seed, number))
        edits = _edits(plan, judge.pieces, filler, min(resamples, 4), rng, seed)
        drawn: dict[str, Sequence[tuple[int, ...] | None]] = {"resample": criteria, **edits}
        changed.append(
            {
                name: [None if ids is None else with_criteria(plan.rollout, ids) for ids in draws]
                for name, draws in drawn.items()
            }
        )
    return [
        {name: {"direct": direct[name], "total": total[name]} for name in INTERVENTIONS}
        for direct, total in zip(
            _effects(rollouts, changed, judge, _teacher_forced),
            _effects(rollouts, changed, judge, _regenerated),
            strict=True,
        )
    ]


def effect_between(before: Verdict, after: Verdict) -> tuple[float, float, float]:
    """Return total variation, absolute change of the margin, and flip (0 or 1) between two verdicts."""
    distances = [
        0.5 * sum(abs(one.get(token, 0.0) - other.get(token, 0.0)) for token in {**one, **other})
        for one, other in zip(before.digits, after.digits, strict=True)
    ]
    tv = min(1.0, sum(distances) / len(distances))
    return tv, abs(before.margin - after.margin), float(before.winner != after.winner)


def with_criteria(rollout: Rollout, criteria_ids: Sequence[int]) -> Rollout:
    """Return the rollout with other tokens in place of its criteria; analysis and scores stay and move along.

    Args:
        rollout: a well-formed judgement.
        criteria_ids: what to put there, any number of tokens.
    """
    span = rollout.spans["criteria"]
    first, end = span.positions[0], span.positions[-1] + 1
    shift = len(criteria_ids) - (end - first)
    placed = tuple(range(first, first + len(criteria_ids)))
    spans = {
        "criteria": Span("criteria", placed, placed, (0,) * len(placed), ""),
        **{name: _moved(rollout.spans[name], shift) for name in ("analysis", "scores")},
    }
    split = len(rollout.prompt_ids)
    completion = rollout.token_ids[split:first] + tuple(criteria_ids) + rollout.token_ids[end:]
    numbers = tuple(
        tuple(replace(digit, position=digit.position + shift) for digit in number) for number in rollout.numbers
    )
    return replace(
        rollout, completion_ids=completion, spans={"prompt": rollout.spans["prompt"], **spans}, numbers=numbers
    )


def removal(
    rollouts: Sequence[Rollout], rankings: Sequence[Sequence[float]], share: float, judge: JudgeModel
) -> list[tuple[float, float]]:
    """Return comprehensiveness and sufficiency of a ranking of each rollout's criteria tokens.

    With s the log-likelihood of the scores given all else as sampled: comprehensiveness = s - s(without the top
    tokens), sufficiency = s - s(with the top tokens alone). A faithful ranking has a high first and a low second.

    Args:
        rollouts: well-formed judgements.
        rankings: for each, how much each criteria token matters.
        share: of the tokens that are the top, in (0, 1]; at least one token.
        judge: the judge.

    Source:
        DeYoung et al., ERASER (2020), section 4.2.
    """
    changed = []
    for rollout, ranking in zip(rollouts, rankings, strict=True):
        ids = [rollout.token_ids[at] for at in rollout.spans["criteria"].positions]
        top = top_places(ranking, share)
        changed.append(with_criteria(rollout, [token for place, token in enumerate(ids) if place not in top]))
        changed.append(with_criteria(rollout, [token for place, token in enumerate(ids) if place in top]))
    whole = [verdict.log_likelihood for verdict in read_verdicts(rollouts, judge)]
    parts = [verdict.log_likelihood for verdict in read_verdicts(changed, judge)]
    return [(full - parts[2 * row], full - parts[2 * row + 1]) for row, full in enumerate(whole)]


def top_places(ranking: Sequence[float], share: float) -> set[int]:
    """Return the places of the highest values: that share of them, rounded, at least one; the earlier of equal ones."""
    count = max(1, round(share * len(ranking)))
    return set(sorted(range(len(ranking)), key=lambda place: -ranking[place])[:count])


def _edits(
    plan: Plan, pieces: TokenBytes, filler: Sequence[int], draws: int, rng: np.random.Generator, seed: int
) -> dict[str, list[tuple[int, ...]]]:
    """Return the criteria that each intervention on the text puts in place, a list of its draws."""
    rollout, span = plan.rollout, plan.rollout.spans["criteria"]
    ids = [rollout.token_ids[position] for position in span.positions]
    sentence_of = dict(zip(span.movable, span.sentences, strict=True))
    sentences = sorted(set(span.sentences))
    if len(sentences) > 1:
        last = sentences[math.ceil(len(sentences) / 2) - 1]
        end = max(place for place, at in enumerate(span.positions) if sentence_of.get(at, last + 1) <= last) + 1
    else:
        end = len(ids) // 2
    while end > 0 and not pieces.of(ids[:end])[-1].strip():  # the closing tag brings its own white space
        end -= 1
    shuffled = [permute_rollout(rollout, "criteria", index, seed=seed) for index in range(draws)]
    random = [tuple(rng.random(len(ids))) for _ in range(draws)]
    edits: dict[str, list[tuple[int, ...]]] = {
        "swap": [plan.other],
        "truncate": [tuple(ids[:end])],
        "filler": [tuple(filler[place % len(filler)] for place in range(len(ids)))],
        "shuffle": [tuple(other.token_ids[at] for at in span.positions) for other in shuffled if other is not None],
        "delete top gradient": [_without(ids, plan.gradient)],
        "delete top attention": [_without(ids, plan.attention)],
        "delete random": [_without(ids, ranking) for ranking in random],
    }
    return {name: [kept for kept in found if kept] for name, found in edits.items()}


def _without(ids: Sequence[int], ranking: Sequence[float]) -> tuple[int, ...]:
    top = top_places(ranking, DELETED)
    return tuple(token for place, token in enumerate(ids) if place not in top)


_Verdicts = list[Verdict | None]


def _effects(
    rollouts: Sequence[Rollout],
    changed: Sequence[Mapping[str, Sequence[Rollout | None]]],
    judge: JudgeModel,
    judged: Callable[[Sequence[Rollout], JudgeModel, bool], _Verdicts],
) -> list[dict[str, Effect | None]]:
    """Return each intervention's effect on each rollout, all draws of all rollouts read in one go, equal ones once."""
    wanted: dict[tuple[int, ...], Rollout] = {}
    for rollout, drawn in zip(rollouts, changed, strict=True):
        for one in (rollout, *(one for draws in drawn.values() for one in draws if one is not None)):
            wanted.setdefault(one.token_ids, one)
    verdicts = dict(zip(wanted, judged(list(wanted.values()), judge, False), strict=True))
    masked: _Verdicts = judged(list(rollouts), judge, True)
    found = []
    for rollout, drawn, hidden in zip(rollouts, changed, masked, strict=True):
        before = verdicts[rollout.token_ids]
        after = {
            name: [None if one is None else verdicts[one.token_ids] for one in draws] for name, draws in drawn.items()
        }
        found.append({name: _effect(before, draws) for name, draws in {**after, "mask": [hidden]}.items()})
    return found


def _effect(before: Verdict | None, draws: _Verdicts) -> Effect | None:
    sound = [effect_between(before, after) for after in draws if before is not None and after is not None]
    if not sound:
        return None
    tv, margin, flip = (float(value) for value in np.mean(sound, axis=0))
    return Effect(tv, margin, flip, len(sound), len(draws) - len(sound))


def _teacher_forced(rollouts: Sequence[Rollout], judge: JudgeModel, masked: bool) -> _Verdicts:
    return list(read_verdicts(rollouts, judge, masked=masked))


def _regenerated(rollouts: Sequence[Rollout], judge: JudgeModel, masked: bool) -> _Verdicts:
    """Let the judge write analysis and scores anew behind each rollout's criteria; None where they can't be read."""
    stop = f"</{judge.layout.scores_tag}>".encode()
    contexts: dict[tuple[int, ...], Rollout] = {}
    for rollout in rollouts:
        contexts.setdefault(rollout.token_ids[: rollout.spans["analysis"].positions[0]], rollout)
    limits = [
        2 * (len(rollout.token_ids) - rollout.spans["analysis"].positions[0]) + EXTRA_TOKENS
        for rollout in contexts.values()
    ]
    hidden = [rollout.spans["criteria"].positions if masked else () for rollout in contexts.values()]
    tails = generate(list(contexts), judge, limits=limits, stop=stop, temperature=0.0, seed=0, hidden=hidden)
    read = {}
    for (context, rollout), tail in zip(contexts.items(), tails, strict=True):
        split = len(rollout.prompt_ids)
        read[context] = judge.reader.read(rollout.prompt_ids, context[split:] + tail)
    sound = {context: rollout for context, rollout in read.items() if rollout.malformed is None}
    verdicts = dict(zip(sound, read_verdicts(list(sound.values()), judge, masked=masked), strict=True))
    return [verdicts.get(rollout.token_ids[: rollout.spans["analysis"].positions[0]]) for rollout in rollouts]


def _moved(span: Span, shift: int) -> Span:
    positions, movable = (tuple(at + shift for at in where) for where in (span.positions, span.movable))
    return replace(span, positions=positions, movable=movable)
