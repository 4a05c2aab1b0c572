"""Measure every score, every approximation of the effect, and the exact effect of a judgement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cepo.counterfactual.donors import with_donors
from cepo.eval.causal.judge import Judge
from cepo.fusion.config import RewardConfig
from cepo.fusion.records import certainty, effect_scores
from cepo.fusion.requests import Compared
from cepo.fusion.score import Pools, RolloutScore, score_rollouts
from cepo.jacobian.curvature import expansions
from cepo.jacobian.links import Link, parse_link
from cepo.jacobian.records import Rollout
from cepo.train.rewards.peers import CausalImportance, LogCausalImportance, Necessity, PeerReward
from cepo.train.rewards.proxy import measure_sensitivity

LINKS: tuple[str, ...] = ("criteria->analysis", "analysis->scores", "criteria->scores")
CHAIN: tuple[str, str] = ("criteria->analysis", "analysis->scores")
"""The links of the place "chain", whose value is the smallest of theirs."""
PLACES: tuple[str, ...] = ("chain", *LINKS, "both->scores")
"""Where a measure is taken; "both" is criteria and analysis together, which only the published rewards use."""
NODES: tuple[int, ...] = (1, 2, 4, 8, 16)
ESTIMATES: tuple[str, ...] = ("gradient", "second order", *(f"path {count}" for count in NODES), "effect")
"""Approximations of the effect, from the cheapest expansion to the effect itself."""
DONORS = RewardConfig().donors  # donors per span for the scores, as in a reward
FRESH_DONORS = 8  # donors per span for the exact effect
_FRESH = 1 << 20  # added to the seed for the exact effect's donors
_PAPER = {"counterfactuals": 4, "rank": 2}
_PEERS: tuple[tuple[Callable[..., PeerReward], str], ...] = (
    (CausalImportance, "cir"),
    (LogCausalImportance, "log_cir"),
    (Necessity, "necessary"),
)
_READ = {"criteria->scores": ["criteria"], "analysis->scores": ["analysis"], "both->scores": ["criteria", "analysis"]}


@dataclass(frozen=True)
class Measured:
    """The measures of one judgement.

    Attributes:
        values: by definition and place, the value that a reward would be: S in [0, 1] of a named score or an
            approximation, the norm, or a published reward.
        nats: by approximation and link, its estimate in nats of the effect of the scores' donors; under "effect", that
            effect itself.
        exact: by place, the effect of fresh donors, in nats; for the chain, the smaller of its links'. None if no other
            prompt has content for the span.
        attributions: by link, what each token of the source adds to the path's estimate, in nats.
        problem: why nothing could be measured, or None.
    """

    values: Mapping[str, Mapping[str, float]]
    nats: Mapping[str, Mapping[str, float]]
    exact: Mapping[str, float | None]
    attributions: Mapping[str, Sequence[float]]
    problem: str | None = None


def scored(rollouts: Sequence[Rollout], judge: Judge, pools: Pools, **settings: Any) -> list[RolloutScore]:
    """Return the scores of the three links, with some settings of a `RewardConfig` changed."""
    config = RewardConfig(links=dict.fromkeys(LINKS, 1.0), **{"counterfactuals": 0, "donors": DONORS, **settings})
    return score_rollouts(rollouts, judge.engine, config, judge.layout, pools=pools)


def measure(
    rollouts: Sequence[Rollout],
    judge: Judge,
    pools: Pools,
    *,
    seed: int,
    most_nodes: int = NODES[-1],
    estimates_only: bool = False,
) -> list[Measured]:
    """Return every score, every approximation and the exact effect of each rollout.

    Args:
        rollouts: judgements; those that are malformed, or that the engine cannot run, get a `problem`.
        judge: the judge that wrote them.
        pools: donor candidates for each source span.
        seed: seed of the scores' donors and permutations; the exact effect's donors have another.
        most_nodes: paths with more nodes are left out.
        estimates_only: whether to leave out scores that do not estimate the effect (influence, phi, norm, published
            rewards), which cost most on a large model.
    """
    also = () if estimates_only else ("influence", "phi")
    base = scored(rollouts, judge, pools, score="effect", also=also, seed=seed)
    hardened = [] if estimates_only else scored(rollouts, judge, pools, score="phi", seed=seed, **_PAPER)
    paths = {
        f"path {count}": scored(rollouts, judge, pools, score="path", nodes=count, seed=seed)
        for count in NODES
        if count <= most_nodes
    }
    fresh = scored(rollouts, judge, pools, score="effect", donors=FRESH_DONORS, seed=seed + _FRESH)
    found = []
    for row, rollout in enumerate(rollouts):
        runs = [of_all[row] for of_all in (base, fresh, *paths.values(), *([hardened] if hardened else []))]
        problem = next((run.malformed for run in runs if run.malformed), None)
        if problem is not None:
            found.append(Measured({}, {}, {}, {}, problem))
            continue
        values = _named(base[row])
        if hardened:
            values["phi K=4 r=2"] = {name: link.value for name, link in hardened[row].links.items()}
        nats = {"effect": {name: link.delta or 0.0 for name, link in base[row].links.items()}}
        for name, of_path in paths.items():
            values[name] = {link: record.value for link, record in of_path[row].links.items()}
            nats[name] = {link: record.path_sum or 0.0 for link, record in of_path[row].links.items()}
        nats |= _expanded(rollout, judge, pools, seed)
        for name in ("gradient", "second order"):
            values[name] = {link: certainty(estimate) for link, estimate in nats[name].items()}
        for of_links in values.values():
            of_links["chain"] = min(of_links[link] for link in CHAIN)
        longest = list(paths.values())[-1][row].paths
        exact = {name: link.delta for name, link in fresh[row].links.items()}
        found.append(
            Measured(
                values=values if estimates_only else {**values, **_others(rollout, judge)},
                nats={name: nats[name] for name in ESTIMATES if name in nats},
                exact={**exact, "chain": _smallest([exact[link] for link in CHAIN])},
                attributions={
                    name: path.attribution_S.tolist()
                    for name, path in longest.items()
                    if path.attribution_S is not None
                },
            )
        )
    return found


def links_of(judge: Judge) -> list[Link]:
    """Return the three links, parsed."""
    layout = judge.layout
    return [parse_link(text, names=layout.names, roles=layout.roles) for text in LINKS]


def _named(score: RolloutScore) -> dict[str, dict[str, float]]:
    """Return the named scores of each link that follow from one computation of effect, influence and phi."""
    values: dict[str, dict[str, float]] = {}
    for name, link in score.links.items():
        compared = Compared(link.against or "nothing", score.paths.get(name))
        of_link: dict[str, float | None] = {"effect": link.value, "explained": effect_scores(compared)["explained"]}
        of_link |= {"influence": link.influence, "phi": link.phi, "norm": link.norm}
        for definition, value in of_link.items():
            if value is not None:
                values.setdefault(definition, {})[name] = value
    return values


def _expanded(rollout: Rollout, judge: Judge, pools: Pools, seed: int) -> dict[str, dict[str, float]]:
    """Return the first- and second-order estimates of each link's effect, for the scores' donors."""
    found: dict[str, dict[str, float]] = {"gradient": {}, "second order": {}}
    by_source: dict[str, list[Link]] = {}
    for link in links_of(judge):
        by_source.setdefault(link.source, []).append(link)
    for source, links in by_source.items():
        others = with_donors(rollout, source, pools[source], DONORS, seed=seed)
        expanded = expansions(judge.held, rollout, others, links) if others else {link.name: [] for link in links}
        for name, terms in expanded.items():
            found["gradient"][name] = sum(one.first for one in terms) / max(1, len(terms))
            found["second order"][name] = sum(one.total for one in terms) / max(1, len(terms))
    return found


def _others(rollout: Rollout, judge: Judge) -> dict[str, dict[str, float]]:
    """Return the published rewards, and the similarity of criteria and analysis."""
    values: dict[str, dict[str, float]] = {}
    for kind, name in _PEERS:
        for place, source in _READ.items():
            reward = kind(source=source, layout=judge.layout)
            (values.setdefault(name, {})[place],) = reward.values(judge.held, reward.variants([rollout]))
    text = "".join(judge.reader.texts(rollout.completion_ids))
    values["embedding similarity"] = {"both->scores": measure_sensitivity(text, _own_encoder(judge)).mean}
    return values


def _own_encoder(judge: Judge) -> Callable[[str], np.ndarray]:
    """Return an encoder of texts by the judge itself: the mean of its last hidden states."""

    @torch.no_grad()
    def encode(text: str) -> np.ndarray:
        ids = judge.reader.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids_BT = torch.tensor([ids], device=judge.model.device)
        keep = {"logits_to_keep": 1} if "logits_to_keep" in judge.held.forward_takes else {}
        states = judge.model(input_ids=ids_BT, output_hidden_states=True, use_cache=False, **keep).hidden_states
        hidden: np.ndarray = states[-1][0].double().mean(0).cpu().numpy()
        return hidden

    return encode


def _smallest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if len(known) == len(values) else None
