"""Ground truth: change the criteria of a judgement, let the judge go on from there, and see how its scores change."""

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
class ScoreChange:
    """How an intervention changed the scores, as the mean over its draws.

    Attributes:
        tv: total variation distance of the digits' distributions, the mean of the two scores, in [0, 1].
        margin: absolute change of the expected margin.
        flip: whether the winner changed (to a tie, too), in [0, 1].
        draws: number of draws behind the means.
        malformed: number of further draws, left out, in which the judge did not write two scores.
    """

    tv: float
    margin: float
    flip: float
    draws: int
    malformed: int


@dataclass(frozen=True)
class InterventionInput:
    """What the interventions on one rollout's criteria need.

    Attributes:
        rollout: the judgement.
        other: ids of another item's criteria, to swap in; empty for none.
        gradient: weight of each criteria token by the gradient.
        attention: weight of each criteria token by attention.
    """

    rollout: Rollout
    other: tuple[int, ...]
    gradient: tuple[float, ...]
    attention: tuple[float, ...]


def intervene(
    inputs: Sequence[InterventionInput], judge: JudgeModel, *, resamples: int, seed: int
) -> list[dict[str, dict[Mode, ScoreChange | None]]]:
    """Return the effect of every intervention on each rollout's criteria, by intervention and mode.

    direct: the analysis and the first score stay as they were sampled (teacher-forced); only the criteria change.
    total: the judge writes analysis and scores anew after the changed criteria, greedily, and is compared with its own
    greedy text after the original criteria. The digits' distribution is read at those greedy continuations, so it
    holds the uncertainty of the digits but not that of the analysis.

    - resample: other criteria that the judge itself samples for the same prompt, at temperature 1.
    - swap: another item's criteria.
    - truncate: the first half of the sentences; of the tokens, where there is one sentence.
    - filler: the same number of neutral words.
    - shuffle: the content tokens in another order.
    - delete top gradient, delete top attention, delete random: without a fifth of the tokens, at least one.
    - mask: no later token attends to the criteria's positions.

    Args:
        inputs: one per rollout.
        judge: the judge that wrote them.
        resamples: number of criteria sampled per rollout, at least 1; also of shuffles and random deletions, at most 4.
        seed: of sampling, shuffles and random deletions.

    Returns:
        One dict per rollout; None where an intervention is impossible or the judge never wrote two scores.

    Raises:
        ValueError: if resamples is below 1.
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; expected at least 1")
    rollouts = [one.rollout for one in inputs]
    sampled = sample_criteria(rollouts, judge, count=resamples, seed=seed)
    filler = list(judge.reader.tokenizer(_FILLER, add_special_tokens=False)["input_ids"])
    draws: list[tuple[int, str, Rollout | None]] = []
    for row, (given, criteria) in enumerate(zip(inputs, sampled, strict=True)):
        edits = _edits(given, judge.pieces, filler, min(resamples, 4), np.random.default_rng((seed, row)), seed)
        new: dict[str, Sequence[tuple[int, ...] | None]] = {"resample": criteria, **edits}
        for name, of_name in new.items():
            draws += [(row, name, None if ids is None else with_criteria(given.rollout, ids)) for ids in of_name]
    wanted = {one.token_ids: one for one in (*rollouts, *(one for *_, one in draws if one is not None))}
    found: list[dict[str, dict[Mode, ScoreChange | None]]] = [{name: {} for name in INTERVENTIONS} for _ in inputs]
    judged: Mapping[Mode, Callable[..., Sequence[Verdict | None]]] = {"direct": read_verdicts, "total": _regenerated}
    for mode, judge_again in judged.items():
        verdicts = dict(zip(wanted, judge_again(list(wanted.values()), judge), strict=True))
        after: dict[tuple[int, str], list[Verdict | None]] = {
            (row, "mask"): [verdict] for row, verdict in enumerate(judge_again(rollouts, judge, masked=True))
        }
        for row, name, changed in draws:
            after.setdefault((row, name), []).append(None if changed is None else verdicts[changed.token_ids])
        for row, rollout in enumerate(rollouts):
            for name in INTERVENTIONS:
                found[row][name][mode] = _mean_change(verdicts[rollout.token_ids], after.get((row, name), []))
    return found


def effect_between(before: Verdict, after: Verdict) -> tuple[float, float, float]:
    """Return total variation, absolute change of the margin, and flip (0 or 1) between two verdicts."""
    distances = [
        0.5 * sum(abs(one.get(token, 0.0) - other.get(token, 0.0)) for token in {**one, **other})
        for one, other in zip(before.digits, after.digits, strict=True)
    ]
    tv = min(1.0, sum(distances) / len(distances))
    return tv, abs(before.margin - after.margin), float(before.winner != after.winner)


def with_criteria(rollout: Rollout, criteria_ids: Sequence[int]) -> Rollout:
    """Return the rollout with other tokens as its criteria; analysis and scores stay and move along.

    Args:
        rollout: a well-formed judgement.
        criteria_ids: the new criteria, any number of tokens.
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

    With s the log-likelihood of the scores given everything else as sampled: comprehensiveness = s - s(without the top
    tokens), sufficiency = s - s(with the top tokens alone). A faithful ranking has high comprehensiveness and low
    sufficiency.

    Args:
        rollouts: well-formed judgements.
        rankings: for each, the weight of each criteria token.
        share: share of the tokens that counts as top, in (0, 1]; at least one token.
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
    """Return the places of the highest values, a share of them (rounded, at least one); of equal ones the earlier."""
    count = max(1, round(share * len(ranking)))
    return set(sorted(range(len(ranking)), key=lambda place: -ranking[place])[:count])


def _edits(
    given: InterventionInput, pieces: TokenBytes, filler: Sequence[int], draws: int, rng: np.random.Generator, seed: int
) -> dict[str, list[tuple[int, ...]]]:
    """Return the new criteria of each intervention on the text, one per draw."""
    rollout, span = given.rollout, given.rollout.spans["criteria"]
    ids = [rollout.token_ids[position] for position in span.positions]
    sentence_of = dict(zip(span.movable, span.sentences, strict=True))
    sentences = sorted(set(span.sentences))
    if len(sentences) > 1:
        last = sentences[math.ceil(len(sentences) / 2) - 1]
        end = max(place for place, at in enumerate(span.positions) if sentence_of.get(at, last + 1) <= last) + 1
    else:
        end = len(ids) // 2
    while end > 0 and not pieces.of(ids[:end])[-1].strip():  # the closing tag brings its own whitespace
        end -= 1
    shuffled = [permute_rollout(rollout, "criteria", index, seed=seed) for index in range(draws)]
    random = [tuple(rng.random(len(ids))) for _ in range(draws)]
    edits: dict[str, list[tuple[int, ...]]] = {
        "swap": [given.other],
        "truncate": [tuple(ids[:end])],
        "filler": [tuple(filler[place % len(filler)] for place in range(len(ids)))],
        "shuffle": [tuple(other.token_ids[at] for at in span.positions) for other in shuffled if other is not None],
        "delete top gradient": [_without(ids, given.gradient)],
        "delete top attention": [_without(ids, given.attention)],
        "delete random": [_without(ids, ranking) for ranking in random],
    }
    return {name: [kept for kept in found if kept] for name, found in edits.items()}


def _without(ids: Sequence[int], ranking: Sequence[float]) -> tuple[int, ...]:
    top = top_places(ranking, DELETED)
    return tuple(token for place, token in enumerate(ids) if place not in top)


def _mean_change(before: Verdict | None, draws: Sequence[Verdict | None]) -> ScoreChange | None:
    sound = [effect_between(before, after) for after in draws if before is not None and after is not None]
    if not sound:
        return None
    tv, margin, flip = (float(value) for value in np.mean(sound, axis=0))
    return ScoreChange(tv, margin, flip, len(sound), len(draws) - len(sound))


def _regenerated(rollouts: Sequence[Rollout], judge: JudgeModel, *, masked: bool = False) -> list[Verdict | None]:
    """Let the judge write analysis and scores anew after each rollout's criteria; None where they cannot be read."""
    contexts = [rollout.token_ids[: rollout.spans["analysis"].positions[0]] for rollout in rollouts]
    distinct: dict[tuple[int, ...], Rollout] = {}
    for context, rollout in zip(contexts, rollouts, strict=True):
        distinct.setdefault(context, rollout)  # equal contexts are continued once
    tails = generate(
        list(distinct),
        judge,
        limits=[2 * (len(one.token_ids) - len(context)) + EXTRA_TOKENS for context, one in distinct.items()],
        stop=f"</{judge.layout.scores_tag}>".encode(),
        temperature=0.0,
        seed=0,
        hidden=[one.spans["criteria"].positions if masked else () for one in distinct.values()],
    )
    read = {
        context: judge.reader.read(one.prompt_ids, context[len(one.prompt_ids) :] + tail)
        for (context, one), tail in zip(distinct.items(), tails, strict=True)
    }
    sound = {context: rollout for context, rollout in read.items() if rollout.malformed is None}
    verdicts = dict(zip(sound, read_verdicts(list(sound.values()), judge, masked=masked), strict=True))
    return [verdicts.get(context) for context in contexts]


def _moved(span: Span, shift: int) -> Span:
    positions, movable = (tuple(at + shift for at in where) for where in (span.positions, span.movable))
    return replace(span, positions=positions, movable=movable)
