"""The settings of the causal reward: what to compute and how to fuse it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from cepo.counterfactual.donors import Candidate
from cepo.counterfactual.permute import Permutation
from cepo.counterfactual.rank import check_rank
from cepo.fusion.names import EFFECT_SCORES, INFLUENCE_SCORES, PHI_SCORES, Measure, Score
from cepo.fusion.power_mean import check_power, check_weights
from cepo.fusion.requests import EffectRequests, GroupRequests, NoDonor, effect_requests, reward_requests
from cepo.fusion.settings import check_settings
from cepo.jacobian.links import NUMERIC_FUNCTIONS, Chain, Link, parse_chain
from cepo.jacobian.protocol import Nodes, check_nodes
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.records import Rollout

Nuisance = Literal["svd", "mean"]
_HARDENED_SCORES: tuple[Score, ...] = (*PHI_SCORES, "influence_retained")
PAPER_LINKS: Mapping[str, float] = {"Z->X": 0.1, "X->Y": 0.1, "Z->Y": 0.1}
PAPER: Mapping[str, Any] = {
    "links": PAPER_LINKS,
    "task_weight": 0.7,
    "p": 0.2,
    "counterfactuals": 4,
    "rank": 2,
    "score": "phi",
}
"""The preset `paper`: CE-PO's values (arXiv 2509.23095). The paper does not give a rank; 2 is our choice."""


@dataclass(frozen=True)
class RewardConfig:
    """What to compute and how to fuse it. The defaults are what we recommend.

    Attributes:
        links: weight of each link or chain of links, >= 0; those of weight 0 are not computed. "chain" stands for the
            layout's own: criteria->analysis->scores for a judge, prompt->rationale->answer for a reasoner. See
            `cepo.jacobian.links.parse_chain`.
        task_weight: w_0, the weight of the task reward if there is one, >= 0.
        p: exponent of the power mean; any real number, inf or -inf.
        join: exponent of the power mean that joins the scores of a chain's links; -inf takes the smallest, so that
            no link can compensate for another.
        counterfactuals: K >= 0 permutations of each source span, fewer if it has fewer orders. They are computed only
            if the score or `also` reads the hardened Jacobian.
        permutation: "uniform", "sentence" or "block", see `permutations`.
        rank: nuisance rank r >= 0; None if energy is given.
        energy: tau in (0, 1], instead of rank: the smallest rank that holds this share of the energy.
        nuisance: "svd" projects out the nuisance subspace, "mean" only the mean counterfactual (as the reference
            implementation of CE-PO does).
        score: the named score S of a link, see `cepo.fusion.records`. "effect", "explained" and "path" compare the
            span with donors, and tell completions of one prompt apart; the paper's "phi" does not (docs/results.md).
        donors: K >= 1 donors for each source span: the content of that span in rollouts of other prompts.
        no_donor: for a span for which no other prompt has content: "zero" scores it 0 and counts it; "permute"
            compares it with its own tokens in another order.
        nodes: nodes of the quadrature along the path to each donor, at least 1, or "auto": doubled until the path's
            sum agrees with the effect. Only "path" reads them.
        target: default target function of the links.
        seed: seed of donors and permutations.
        also: measures to record besides what the score reads: "phi" (phi, its bounds, and phi of the base Jacobian),
            "influence" (costs one backward pass through the prompt per rollout and target), "angles", "effect" (delta),
            "path" (delta, the path's sum, its certificate, and what each token adds to it) and "order_leak".
        leak_weight: weight of the order leak, >= 0. Every link's S becomes max(0, S - leak_weight * tanh(leak / 2)),
            where the leak is how much less likely the judge's criteria are, in nats, with the two responses exchanged
            in the prompt; negative leaks count as 0. It costs one more forward pass through prompt and criteria.

    Raises:
        ValueError: for a value of the wrong type or out of range, by name.
    """

    links: Mapping[str, float] = field(default_factory=lambda: {"chain": 1.0})
    task_weight: float = 0.7
    p: float = 0.2
    join: float = -math.inf
    counterfactuals: int = 0
    permutation: Permutation = "uniform"
    rank: int | None = 2
    energy: float | None = None
    nuisance: Nuisance = "svd"
    score: Score = "effect"
    donors: int = 3
    no_donor: NoDonor = "zero"
    nodes: Nodes = "auto"
    target: str = "log_likelihood"
    seed: int = 0
    also: Sequence[Measure] = ()
    leak_weight: float = 0.0

    def __post_init__(self) -> None:
        check_nodes(self.nodes, least=1)
        check_settings("", vars(self), RewardConfig)
        if not self.links:
            raise ValueError("links is empty; expected at least one, such as {'X->Y': 1.0}")
        for weight in self.links.values():
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise ValueError(f"links holds the weight {weight!r}; expected a number >= 0")
        check_weights(list(self.links.values()), "links, by weight,")
        if not 0.0 <= self.task_weight < math.inf:
            raise ValueError(f"task_weight is {self.task_weight}; expected a finite number >= 0")
        check_power(self.p)
        if self.counterfactuals < 0:
            raise ValueError(f"counterfactuals (K) is {self.counterfactuals}; expected an integer >= 0")
        check_power(self.join, "join")
        if self.donors < 1:
            raise ValueError(f"donors is {self.donors}; expected an integer >= 1")
        check_rank(self.rank, self.energy)
        if self.score in ("phi_retained", "influence_retained") and not self.counterfactuals:
            raise ValueError(
                f"score is {self.score!r}, the share that hardening retains, but counterfactuals (K) is 0, so nothing "
                "is hardened; expected K >= 1"
            )
        if not 0.0 <= self.leak_weight < math.inf:
            raise ValueError(f"leak_weight is {self.leak_weight}; expected a finite number >= 0")
        if any(measure not in get_args(Measure) for measure in self.also):
            raise ValueError(f"also is {self.also!r}; expected a list of some of {', '.join(get_args(Measure))}")

    @classmethod
    def paper(cls, **changes: Any) -> RewardConfig:
        """Return the preset `paper` with some settings changed."""
        return cls(**{**PAPER, **changes})

    @property
    def reads_hardening(self) -> bool:
        """Whether anything that is recorded depends on the hardened Jacobian."""
        return self.score in _HARDENED_SCORES or bool({"phi", "angles"} & {*self.also})

    @property
    def reads_jacobians(self) -> bool:
        """Whether anything that is recorded depends on the Jacobian at the rollout itself."""
        return self.score not in EFFECT_SCORES or bool({"phi", "influence", "angles"} & {*self.also})

    @property
    def reads_effects(self) -> bool:
        """Whether anything that is recorded compares the rollout with donors."""
        return self.score in EFFECT_SCORES or bool({"effect", "path"} & {*self.also})

    @property
    def reads_paths(self) -> bool:
        """Whether anything that is recorded depends on gradients along the path to a donor."""
        return self.score == "path" or "path" in self.also

    @property
    def reads_influence(self) -> bool:
        """Whether anything that is recorded depends on the context energy."""
        return self.score in INFLUENCE_SCORES or "influence" in self.also

    @property
    def reads_leak(self) -> bool:
        """Whether anything that is recorded depends on the prompt with its responses exchanged."""
        return self.leak_weight > 0.0 or "order_leak" in self.also

    def unread(self, layout: Layout) -> dict[str, str]:
        """Return the fields that affect nothing that is recorded, each with a phrase that says what would read it."""
        chains = self.chains(layout)
        hardened, compared = ", ".join(_HARDENED_SCORES), ", ".join(EFFECT_SCORES)
        hardening = "" if self.reads_hardening else f"by the scores {hardened}, and by phi and angles in also"
        permuted = hardening or ("" if self.counterfactuals else "where counterfactuals (K) is at least 1")
        donors = "" if self.reads_effects else f"by the scores {compared}, and by effect and path in also"
        readers = {
            "counterfactuals": hardening,
            "rank": permuted,
            "energy": permuted,
            "nuisance": permuted,
            "permutation": "" if self.reads_effects and self.no_donor == "permute" else permuted,
            "donors": donors,
            "no_donor": donors,
            "nodes": "" if self.reads_paths else "by the score path, and by path in also",
            "seed": "where donors or permutations are drawn" if permuted and donors else "",
            "join": "" if any(len(chain.links) > 1 for chain in chains) else "by chains of several links",
            "p": "" if len(chains) > 1 or self.task_weight else "where several scores are fused",
            "target": ""
            if any(link.function == self.target for chain in chains for link in chain.links)
            else "by links that name no target of their own",
        }
        return {name: f"is read only {by}" for name, by in readers.items() if by}

    def chains(self, layout: Layout) -> list[Chain]:
        """Return the parsed links and chains of positive weight.

        Raises:
            ValueError: for links that the layout does not have, that are named twice, or that the score cannot take.
        """
        chains = [
            parse_chain(text, names=layout.names, roles=layout.roles, chain=layout.chain, default_function=self.target)
            for text in self.links
        ]
        alike: dict[tuple[Link, ...], str] = {}
        for chain in chains:
            content = tuple(replace(link, name="") for link in chain.links)
            if content in alike:
                raise ValueError(f"links names one link twice, as {alike[content]!r} and {chain.name!r}; expected once")
            alike[content] = chain.name
        links = [link for chain in chains for link in chain.links]
        if self.target in NUMERIC_FUNCTIONS and not any(link.function == self.target for link in links):
            raise ValueError(f"target is {self.target!r}, but no link ends in the scores; expected one such as 'X->Y'")
        for link in links if self.reads_effects else ():
            _check_effect(link, self.score)
        if self.reads_leak and not layout.responses:
            raise ValueError(
                "the order leak (also='order_leak', or leak_weight) exchanges the two responses that a judge compares; "
                "the prompt of a reasoner has none"
            )
        return [chain for chain in chains if self.links[chain.name] > 0.0]

    def parsed_links(self, layout: Layout) -> list[Link]:
        """Return the distinct links of `chains`, in order."""
        return list({link.name: link for chain in self.chains(layout) for link in chain.links}.values())

    def requests(self, rollouts: Mapping[int, Rollout], links: Sequence[Link]) -> list[GroupRequests]:
        """Return the requests for Jacobians, see `reward_requests`."""
        return reward_requests(
            rollouts,
            links,
            counterfactuals=self.counterfactuals if self.reads_hardening else 0,
            permutation=self.permutation,
            seed=self.seed,
            context_energy=self.reads_influence,
        )

    def effects(
        self, rollouts: Mapping[int, Rollout], links: Sequence[Link], pools: Mapping[str, Sequence[Candidate]]
    ) -> list[EffectRequests]:
        """Return the requests that compare spans with donors, see `effect_requests`."""
        return effect_requests(
            rollouts,
            links,
            pools,
            donors=self.donors,
            no_donor=self.no_donor,
            permutation=self.permutation,
            seed=self.seed,
            nodes=self.nodes if self.reads_paths else 0,
        )

    def check_width(self, width: int) -> None:
        """Raise ValueError if the nuisance rank exceeds the model's embedding size."""
        if self.rank is not None and self.rank > width:
            raise ValueError(f"rank is {self.rank}, but the model's embeddings have d = {width}; expected rank <= d")


def _check_effect(link: Link, score: Score) -> None:
    if link.effect != "total":
        raise ValueError(
            f"link {link.name!r} is a {link.effect} effect, and comparing with donors measures total effects; "
            f"expected '{link.source}->{link.target}:total', or another score than {score!r}"
        )
    if score in EFFECT_SCORES and link.function in NUMERIC_FUNCTIONS:
        raise ValueError(
            f"link {link.name!r} ends in {link.function}, which has no likelihood to explain; expected log_likelihood "
            f"or log_odds with the score {score!r}"
        )
    if score == "explained" and link.function != "log_likelihood":
        raise ValueError(f"link {link.name!r} ends in {link.function}; the score 'explained' expects log_likelihood")
