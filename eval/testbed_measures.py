"""Measure a testbed judge: its accuracy, interventions on its criteria, and the links of its judgements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cepo.eval.report.heat_maps import Attribution, HeatMap
from cepo.eval.report.numbers import digits
from cepo.eval.score.rows import read_rollout
from cepo.fusion.config import RewardConfig
from cepo.fusion.score import pools_of, score_rollouts
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout
from cepo.train import testbed, testbed_judges
from cepo.train.prompts import JUDGE
from cepo.train.testbed_modes import MODES, completion_mode

FIELDS = ("delta", "influence", "norm", "tokens")
ITEMS = 200  # for each accuracy and intervention
SCORED = 32  # sampled judgements whose links are scored
_SHOWN = 4
_NODES = 16  # nodes of the heat maps' paths
_MEMORY = 2.0**30  # bytes that scoring may use besides the model, since a GPU may be shared by several runs


@dataclass(frozen=True)
class Measures:
    """Measures of a judge at one point of its training.

    Attributes:
        in_distribution: greedy accuracy where length agrees with the label in 90% of items, in [0, 1].
        flipped: greedy accuracy where it agrees in 10% of items, in [0, 1].
        swaps_followed: of the items whose criterion was swapped, in the criteria that the judge wrote, for one with the
            other winner, the fraction whose regenerated verdict follows the swap, in [0, 1].
        turned: the fraction of the same items where swapping only the criterion changed the verdict, in [0, 1].
        modes: share of each mode among completions sampled where the cue agrees in 10% of items (where it agrees, some
            modes write the same text). See `cepo.train.testbed_modes.completion_mode`.
        malformed: fraction of sampled completions that cannot be scored, in [0, 1].
        tokens: mean length of sampled completions, in tokens.
        S: mean over sampled completions of the default score, the effect of the chain, in [0, 1]; 0 if malformed.
        links: mean of each of FIELDS, by link.
    """

    in_distribution: float
    flipped: float
    swaps_followed: float
    turned: float
    modes: Mapping[str, float]
    malformed: float
    tokens: float
    S: float
    links: Mapping[str, Mapping[str, float]]


def measure_judge(
    model: Any, tokenizer: Any, *, seed: int, items: int = ITEMS, scored: int = SCORED
) -> tuple[Measures, list[HeatMap]]:
    """Return the measures of a testbed judge, and heat maps of its first sampled judgements.

    Args:
        model: the judge, in eval mode.
        tokenizer: the world's tokenizer.
        seed: seed of items, swaps and sampling; the same seed gives the same items to every judge.
        items: number of items for each accuracy and intervention, at least 1.
        scored: number of sampled judgements whose links are scored, at most `items`.

    Raises:
        ValueError: if no item allows one of the two swaps of `cepo.train.testbed_judges.certify`.
    """
    usual = testbed.generate_items(items, seed=seed + 11, cue_agreement=0.9)
    flipped = testbed.generate_items(items, seed=seed + 12, cue_agreement=0.1)
    sampled = testbed_judges.judge_items(model, tokenizer, usual, temperature=1.0, seed=seed)
    against = testbed_judges.judge_items(model, tokenizer, flipped, temperature=1.0, seed=seed)
    greedy = testbed_judges.judge_items(model, tokenizer, usual)
    swaps = testbed_judges.certify(model, tokenizer, usual, seed=seed, completions=greedy)
    reader = SpanReader(tokenizer, JUDGE)
    rows = [
        {"prompt": item.prompt, "completion": completion + tokenizer.eos_token}
        for item, completion in zip(usual, sampled, strict=True)
    ]
    rollouts = [read_rollout(row, reader) for row in rows]
    mean_score, links = score_links(model, rollouts[:scored], JUDGE)
    measures = Measures(
        in_distribution=testbed_judges.accuracy(greedy, usual),
        flipped=testbed_judges.accuracy(testbed_judges.judge_items(model, tokenizer, flipped), flipped),
        swaps_followed=swaps["follows_swap"],
        turned=swaps["flips"],
        modes=_mode_shares(flipped, against),
        malformed=sum(rollout.malformed is not None for rollout in rollouts) / len(rollouts),
        tokens=sum(len(rollout.completion_ids) for rollout in rollouts) / len(rollouts),
        S=mean_score,
        links=links,
    )
    return measures, _heat_maps(model, reader, usual, rollouts[:scored])


def score_links(model: Any, rollouts: Sequence[Rollout], layout: Layout) -> tuple[float, dict[str, dict[str, float]]]:
    """Return the mean default score of rollouts (0 if malformed), and the mean of each of FIELDS by link.

    The links are those of the layout's chain, and X->Y; means are over well-formed rollouts whose field is known.
    """
    config = RewardConfig(links={"chain": 1.0, "X->Y": 1.0}, also=("influence",))
    scores = score_rollouts(rollouts, GroupEngine(model, memory_budget=_MEMORY), config, layout)
    sound = [score for score in scores if score.malformed is None]
    means: dict[str, dict[str, float]] = {}
    for link in config.parsed_links(layout) if sound else ():
        records = [score.links[link.name] for score in sound]
        for name in FIELDS:
            known = [value for record in records if (value := getattr(record, name)) is not None]
            means.setdefault(link.name, {})[name] = sum(known) / len(known) if known else math.nan
    return sum(score.values["chain"] for score in sound) / len(scores), means


def _heat_maps(
    model: Any, reader: SpanReader, items: Sequence[testbed.Item], rollouts: Sequence[Rollout]
) -> list[HeatMap]:
    """Return heat maps of the first rollouts, with path attributions against donors from all of them."""
    config = RewardConfig(score="path", nodes=_NODES)
    pools = pools_of(rollouts, config.parsed_links(JUDGE))
    engine = GroupEngine(model, memory_budget=_MEMORY)
    scores = score_rollouts(rollouts[:_SHOWN], engine, config, JUDGE, pools=pools)
    return [
        HeatMap(
            title=f"item {index + 1} (right answer: {item.label})",
            tokens=tuple(reader.texts(rollout.token_ids)),
            prompt_tokens=len(rollout.prompt_ids),
            attributions={
                name: Attribution(
                    dict(zip(path.source_positions, path.attribution_S.tolist(), strict=True)),
                    delta=path.delta,
                    path_sum=float(path.attribution_S.sum()),
                )
                for name, path in score.paths.items()
                if path.attribution_S is not None
            },
            targets={name: path.target_positions for name, path in score.paths.items()},
            facts={f"S {name}": digits(record.value) for name, record in score.links.items()},
            malformed=score.malformed,
        )
        for index, (item, rollout, score) in enumerate(zip(items, rollouts, scores, strict=False))
    ]


def _mode_shares(items: Sequence[testbed.Item], completions: Sequence[str]) -> dict[str, float]:
    modes = [completion_mode(item, completion) for item, completion in zip(items, completions, strict=True)]
    return {mode: modes.count(mode) / len(modes) for mode in MODES}
