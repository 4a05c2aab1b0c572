"""What to compute and how to fuse it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cepo.counterfactual.nuisance import check_rank
from cepo.counterfactual.permute import Permutation, check_permutation
from cepo.fusion.power_mean import check_power, check_weights
from cepo.fusion.records import INFLUENCE_SCORES, Score, check_score
from cepo.fusion.requests import GroupRequests, reward_requests
from cepo.jacobian.links import NUMERIC_FUNCTIONS, Link, parse_link
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.records import Rollout

PAPER_LINKS: Mapping[str, float] = {"Z->X": 0.1, "X->Y": 0.1, "Z->Y": 0.1}
PAPER: Mapping[str, Any] = {
    "links": PAPER_LINKS,
    "task_weight": 0.7,
    "p": 0.2,
    "counterfactuals": 4,
    "rank": 2,
    "score": "phi",
}
"""The preset `paper`, CE-PO's own values (arXiv 2509.23095). The paper names no rank; 2 is ours."""


@dataclass(frozen=True)
class RewardConfig:
    """What to compute and how to fuse it. Weights, p and K are CE-PO's; the score is the one that interventions chose.

    Attributes:
        links: weight of each link, >= 0; a link of weight 0 is not computed. See `parse_link`.
        task_weight: w_0, weight of the task reward where there is one, >= 0.
        p: exponent of the power mean; any real, inf or -inf.
        counterfactuals: K >= 0; 0 leaves the Jacobians as they are.
        permutation: "uniform", "sentence" or "block".
        rank: nuisance rank r >= 0.
        energy: tau in (0, 1], instead of rank: the smallest rank that holds this share of the energy.
        nuisance: "svd" projects the subspace out, "mean" only the mean counterfactual (the reference implementation).
        score: the named score S of a link, see `cepo.fusion.records`. `influence` tells a judge whose criteria cause
            its verdict from one whose criteria are decoration; the paper's `phi` does not (see the README).
        target: default target function of the links.
        seed: seed of the permutations.
        influence: whether to compute `influence` where the score does not need it; it costs one backward pass through
            the whole prompt for each rollout and target.
    """

    links: Mapping[str, float] = field(default_factory=lambda: dict(PAPER_LINKS))
    task_weight: float = 0.7
    p: float = 0.2
    counterfactuals: int = 4
    permutation: Permutation = "uniform"
    rank: int | None = 2
    energy: float | None = None
    nuisance: str = "svd"
    score: Score = "influence"
    target: str = "log_likelihood"
    seed: int = 0
    influence: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.links, Mapping):
            raise ValueError(f"links is {self.links!r}; expected weights by link, such as {{'X->Y': 1.0}}")
        if not self.links:
            raise ValueError("links is empty; expected at least one, such as {'X->Y': 1.0}")
        for weight in self.links.values():
            if not isinstance(weight, int | float):
                raise ValueError(f"links holds the weight {weight!r}; expected a number >= 0")
        check_weights(list(self.links.values()))
        check_weights([self.task_weight, 1.0])
        check_power(self.p)
        if not isinstance(self.counterfactuals, int) or self.counterfactuals < 0:
            raise ValueError(f"counterfactuals (K) is {self.counterfactuals!r}; expected an integer >= 0")
        check_permutation(self.permutation)
        check_rank(self.rank, self.energy)
        if self.nuisance not in ("svd", "mean"):
            raise ValueError(f"nuisance is {self.nuisance!r}; expected svd or mean")
        check_score(self.score)

    @classmethod
    def paper(cls, **changes: Any) -> RewardConfig:
        """Return the preset `paper`, with changes by name."""
        return cls(**{**PAPER, **changes})

    def parsed_links(self, layout: Layout) -> list[Link]:
        """Return the links of positive weight against a layout's spans; ValueError for one that it does not have."""
        links = [
            parse_link(text, names=layout.names, roles=layout.roles, default_function=self.target)
            for text in self.links
        ]
        for index, link in enumerate(links):
            for other in links[:index]:
                if replace(link, name="") == replace(other, name=""):
                    raise ValueError(f"links names one link twice, as {other.name!r} and {link.name!r}; expected once")
        if self.target in NUMERIC_FUNCTIONS and not any(link.function == self.target for link in links):
            raise ValueError(f"target is {self.target!r}, but no link ends in the scores; expected one such as 'X->Y'")
        return [link for link in links if self.links[link.name] > 0.0]

    def requests(self, rollouts: Mapping[int, Rollout], links: Sequence[Link]) -> list[GroupRequests]:
        """Return what to ask an engine for, see `cepo.fusion.requests.reward_requests`."""
        return reward_requests(
            rollouts,
            links,
            counterfactuals=self.counterfactuals,
            permutation=self.permutation,
            seed=self.seed,
            context_energy=self.influence or self.score in INFLUENCE_SCORES,
        )

    def check_width(self, width: int) -> None:
        """Raise ValueError if the nuisance rank exceeds the model's embedding size."""
        if self.rank is not None and self.rank > width:
            raise ValueError(f"rank is {self.rank}, but the model's embeddings have d = {width}; expected rank <= d")
