"""What to compute and how to fuse it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from cepo.counterfactual.nuisance import check_rank
from cepo.counterfactual.permute import Permutation, check_permutation
from cepo.fusion.power_mean import check_power, check_weights
from cepo.fusion.records import INFLUENCE_SCORES, Measure, Score
from cepo.fusion.requests import GroupRequests, reward_requests
from cepo.jacobian.links import NUMERIC_FUNCTIONS, Link, parse_link
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.records import Rollout

Nuisance = Literal["svd", "mean"]
PAPER_LINKS: Mapping[str, float] = {"Z->X": 0.1, "X->Y": 0.1, "Z->Y": 0.1}
PAPER: Mapping[str, Any] = {
    "links": PAPER_LINKS,
    "task_weight": 0.7,
    "p": 0.2,
    "counterfactuals": 4,
    "rank": 2,
    "score": "phi",
}
"""The preset `paper`: CE-PO's own values (arXiv 2509.23095). The paper names no rank; 2 is ours."""


@dataclass(frozen=True)
class RewardConfig:
    """What to compute and how to fuse it. The defaults are what we recommend.

    Attributes:
        links: weight of each link, >= 0; a link of weight 0 is not computed. See `parse_link`.
        task_weight: w_0, weight of the task reward where there is one, >= 0.
        p: exponent of the power mean; any real number, inf or -inf.
        counterfactuals: K >= 0 permutations of each source span. None are computed where neither the score nor `also`
            reads what hardening leaves.
        permutation: "uniform", "sentence" or "block", see `permute_rollout`.
        rank: nuisance rank r >= 0; None where energy is given.
        energy: tau in (0, 1], instead of rank: the smallest rank that holds this share of the energy.
        nuisance: "svd" projects the nuisance subspace out, "mean" only the mean counterfactual (as the reference
            implementation of CE-PO does).
        score: the named score S of a link, see `cepo.fusion.records`. `influence` separates a judge whose criteria
            cause its verdict from one whose criteria are decoration; the paper's `phi` does not (see the README).
        target: default target function of the links.
        seed: seed of the permutations.
        also: measures to record beside what the score reads: "phi" (phi, its bounds, and phi of the base Jacobian),
            "influence" (costs one backward pass through the prompt per rollout and target) and "angles".
    """

    links: Mapping[str, float] = field(default_factory=lambda: {"X->Y": 1.0})
    task_weight: float = 0.7
    p: float = 0.2
    counterfactuals: int = 0
    permutation: Permutation = "uniform"
    rank: int | None = 2
    energy: float | None = None
    nuisance: Nuisance = "svd"
    score: Score = "influence"
    target: str = "log_likelihood"
    seed: int = 0
    also: Sequence[Measure] = ()

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
        for name, value, known in (("nuisance", self.nuisance, Nuisance), ("score", self.score, Score)):
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(get_args(known))}")
        if self.score in ("phi_retained", "influence_retained") and not self.counterfactuals:
            raise ValueError(
                f"score is {self.score!r}, the share that hardening retains, with counterfactuals (K) 0, which harden "
                "nothing; expected K >= 1"
            )
        if isinstance(self.also, str) or any(measure not in get_args(Measure) for measure in self.also):
            raise ValueError(f"also is {self.also!r}; expected a sequence of some of {', '.join(get_args(Measure))}")

    @classmethod
    def paper(cls, **changes: Any) -> RewardConfig:
        """Return the preset `paper`, with changes by name."""
        return cls(**{**PAPER, **changes})

    @property
    def reads_hardening(self) -> bool:
        """Whether anything that is recorded depends on what hardening leaves of a Jacobian."""
        return self.score != "influence" or "phi" in self.also or "angles" in self.also

    @property
    def reads_influence(self) -> bool:
        """Whether anything that is recorded depends on the context energy."""
        return self.score in INFLUENCE_SCORES or "influence" in self.also

    def parsed_links(self, layout: Layout) -> list[Link]:
        """Return the links of positive weight, parsed; ValueError for one that the layout does not have."""
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
        """Return what to ask an engine for, see `reward_requests`."""
        return reward_requests(
            rollouts,
            links,
            counterfactuals=self.counterfactuals if self.reads_hardening else 0,
            permutation=self.permutation,
            seed=self.seed,
            context_energy=self.reads_influence,
        )

    def check_width(self, width: int) -> None:
        """Raise ValueError if the nuisance rank exceeds the model's embedding size."""
        if self.rank is not None and self.rank > width:
            raise ValueError(f"rank is {self.rank}, but the model's embeddings have d = {width}; expected rank <= d")
