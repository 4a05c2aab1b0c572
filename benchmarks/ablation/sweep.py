"""The grid of an ablation: hardenings, sets of links to fuse, named scores and exponents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cepo.fusion.config import PAPER, RewardConfig
from cepo.fusion.names import GRADIENT_SCORES, Score
from cepo.train.prompts import JUDGE


@dataclass(frozen=True)
class Hardening:
    """What is removed from a Jacobian: the nuisance subspace of K counterfactuals, by rank or by energy tau.

    At K = 0 nothing is removed, and both are None.
    """

    counterfactuals: int
    rank: int | None
    tau: float | None

    @property
    def order(self) -> tuple[int, bool, float]:
        """Sort key: by K, then ranks before energies."""
        return self.counterfactuals, self.rank is None, float(self.tau or 0.0 if self.rank is None else self.rank)

    def applied_to(self, config: RewardConfig) -> RewardConfig:
        """Return the settings with this hardening."""
        if not self.counterfactuals:
            return replace(config, counterfactuals=0)
        return replace(config, counterfactuals=self.counterfactuals, rank=self.rank, energy=self.tau)


PAPER_HARDENING = Hardening(PAPER["counterfactuals"], PAPER["rank"], None)


@dataclass(frozen=True)
class LinkSet:
    """Links whose scores are fused into one reward."""

    name: str
    links: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """The values that are swept, in the order of the tables' rows.

    Attributes:
        hardenings: sorted by `Hardening.order`; the paper's is always among them.
        asked: those that the user named, which the plots show.
        links: names of the links.
        scores: named scores.
        link_sets: sets of links to fuse; the first is all links.
        powers: exponents of the power mean.
    """

    hardenings: tuple[Hardening, ...]
    asked: tuple[Hardening, ...]
    links: tuple[str, ...]
    scores: tuple[Score, ...]
    link_sets: tuple[LinkSet, ...]
    powers: tuple[float, ...]


def plan_sweep(
    config: RewardConfig,
    *,
    counterfactuals: Sequence[int],
    ranks: Sequence[str],
    powers: Sequence[float],
    scores: Sequence[Score],
) -> Sweep:
    """Return the grid of all values, and the paper's hardening.

    Rewards are those of all links, of each link alone, and of all but one. K = 0 removes nothing, so it is one setting
    whatever the ranks.

    Args:
        config: links, weights, permutation, target and seed, which stay the same.
        counterfactuals: values of K, each >= 0.
        ranks: nuisance ranks, as "2", or energies in (0, 1], as "tau=0.5".
        powers: exponents p; any real number, inf or -inf.
        scores: named scores.

    Raises:
        ValueError: for the first argument that cannot be used.
    """
    for name, values in {
        "counterfactuals": counterfactuals,
        "ranks": ranks,
        "powers": powers,
        "scores": scores,
    }.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"{name} is {values!r}; expected a sequence of at least one value")
        if len(set(values)) < len(values):
            raise ValueError(f"{name} is {', '.join(map(str, values))}; expected each value once")
    if not isinstance(config.seed, int) or config.seed < 0:
        raise ValueError(f"seed is {config.seed!r}; expected an integer >= 0")
    sizes = {_read_rank(text) for text in ranks}
    if len(sizes) < len(ranks):
        raise ValueError(f"ranks is {', '.join(ranks)}; expected each value once")
    hardenings = {Hardening(k, *(size if k else (None, None))) for size in sizes for k in counterfactuals}
    for hardening in hardenings | {Hardening(PAPER_HARDENING.counterfactuals, *size) for size in sizes}:
        hardening.applied_to(config)
    hardened = PAPER_HARDENING.applied_to(config)
    for score in scores:
        replace(hardened, score=score)
    swept = [score for score in scores if score not in GRADIENT_SCORES]
    if swept:
        raise ValueError(
            f"scores holds {swept[0]!r}; expected some of {', '.join(GRADIENT_SCORES)}, which hardening changes"
        )
    for p in powers:
        replace(hardened, p=p)
    links = tuple(link.name for link in config.parsed_links(JUDGE))
    sets = [LinkSet("all", links)]
    if len(links) > 1:
        sets += [LinkSet(f"only {name}", (name,)) for name in links]
    if len(links) > 2:  # with two links, all but one is the other alone
        sets += [LinkSet(f"without {name}", tuple(other for other in links if other != name)) for name in links]
    ordered = sorted({*hardenings, PAPER_HARDENING}, key=lambda hardening: hardening.order)
    asked = tuple(hardening for hardening in ordered if hardening in hardenings)
    return Sweep(tuple(ordered), asked, links, tuple(scores), tuple(sets), tuple(powers))


def rank_label(row: Mapping[str, Any]) -> str:
    """Return the rank or the energy of a row as the user wrote it; "-" at K = 0, which has neither."""
    if row["rank"] is None and row["tau"] is None:
        return "-"
    return f"tau={row['tau']:g}" if row["rank"] is None else str(row["rank"])


def _read_rank(text: str) -> tuple[int | None, float | None]:
    name, equals, value = str(text).partition("=")
    try:
        if equals and name.strip() == "tau":
            return None, float(value)
        return int(text), None
    except ValueError:
        raise ValueError(f"ranks holds {text!r}; expected integers such as 2, or energies such as tau=0.5") from None
