"""From a Jacobian and its residual to the link record and its named scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from cepo.counterfactual.nuisance import angles_between, nuisance_bases
from cepo.jacobian.records import LinkJacobian
from cepo.kernels.spectral import frobenius_energy, spectral_shares

Score = Literal["phi", "phi_retained", "influence", "phi_influence", "influence_retained"]
INFLUENCE_SCORES: tuple[Score, ...] = ("influence", "phi_influence", "influence_retained")


@dataclass(frozen=True)
class LinkScore:
    """What is known of one link of one rollout.

    Attributes:
        link: the link's name.
        target: the target function that was differentiated.
        phi: sigma_1^2 / ||.||_F^2 of the residual Jacobian, in (0, 1]; 0 for a zero matrix. A shape, not a size.
        phi_lower: certified lower bound of phi.
        phi_upper: certified upper bound of phi.
        phi_base: the same share of the base Jacobian.
        retained: ||J_res||_F^2 / ||J||_F^2, in [0, 1].
        influence: ||J||_F^2 over the energy of the target's gradient at all rows of the context, in [0, 1];
            None where it was not asked for.
        norm: ||J||_F.
        tokens: L, rows of the Jacobian.
        counterfactuals: how many of the K permutations there were (fewer where no order of the tokens differs).
        rank: size of the nuisance basis that was removed.
        nuisance_angles: principal angles in degrees between the nuisance subspace and the Jacobian's own.
        value: S, the named score that was asked for, in [0, 1].
    """

    link: str
    target: str
    phi: float
    phi_lower: float
    phi_upper: float
    phi_base: float
    retained: float
    influence: float | None
    norm: float
    tokens: int
    counterfactuals: int
    rank: int
    nuisance_angles: tuple[float, ...]
    value: float


def score_link(
    jacobian: LinkJacobian, residual_SD: Tensor, basis_RD: Tensor, *, counterfactuals: int, score: Score
) -> LinkScore:
    """Return the link's record.

    Args:
        jacobian: the base Jacobian.
        residual_SD: (S, D), what hardening left of it.
        basis_RD: the nuisance basis, R >= 0.
        counterfactuals: how many counterfactual Jacobians made the basis.
        score: the named score that becomes `value`.

    Raises:
        ValueError: for an unknown score, one that needs a context energy where there is none, or a matrix with a NaN
            or an infinity.
    """
    return score_links([(jacobian, residual_SD, basis_RD, counterfactuals)], score=score)[0]


def score_links(links: Sequence[tuple[LinkJacobian, Tensor, Tensor, int]], *, score: Score) -> list[LinkScore]:
    """Return the records of many links, their spectra in one batch.

    Args:
        links: (base Jacobian, residual, nuisance basis, counterfactuals) of each, see `score_link`.
        score: the named score that becomes `value`.

    Raises:
        ValueError: see `score_link`.
    """
    check_score(score)
    residuals, bases = [link[1] for link in links], [link[0].jac_SD for link in links]
    shares = spectral_shares([*residuals, *bases])
    ranks = {len(link[2]) for link in links if len(link[2])}
    own: dict[int, Tensor] = {}  # the Jacobian's own subspace, as large as the nuisance subspace
    for rank in ranks:
        members = [index for index, link in enumerate(links) if len(link[2]) == rank]
        own.update(zip(members, nuisance_bases([[bases[index]] for index in members], rank=rank), strict=True))
    records = []
    for index, (jacobian, residual_SD, basis_RD, counterfactuals) in enumerate(links):
        share, share_of_base = shares[index], shares[len(links) + index]
        energy = frobenius_energy(jacobian.jac_SD)
        retained = _share(frobenius_energy(residual_SD), energy)
        influence = None if jacobian.context_energy is None else _share(energy, jacobian.context_energy)
        if influence is None and score in INFLUENCE_SCORES:
            raise ValueError(f"score is {score!r}, but the Jacobian of {jacobian.link.name} carries no context_energy")
        records.append(
            LinkScore(
                link=jacobian.link.name,
                target=jacobian.link.function,
                phi=share.value,
                phi_lower=share.lower,
                phi_upper=share.upper,
                phi_base=share_of_base.value,
                retained=retained,
                influence=influence,
                norm=math.sqrt(energy),
                tokens=len(jacobian.source_positions),
                counterfactuals=counterfactuals,
                rank=len(basis_RD),
                nuisance_angles=tuple(angles_between(basis_RD, own[index])) if index in own else (),
                value=named_scores(share.value, retained, influence)[score],
            )
        )
    return records


def named_scores(phi: float, retained: float, influence: float | None) -> dict[Score, float]:
    """Return every named score S of a link, each in [0, 1]; those that need the influence only where it is known."""
    named: dict[Score, float] = {"phi": phi, "phi_retained": math.sqrt(phi * retained)}
    if influence is not None:
        named["influence"] = influence
        named["phi_influence"] = math.sqrt(phi * influence)
        named["influence_retained"] = influence * retained
    return named


def check_score(score: str) -> None:
    """Raise ValueError unless `score` is a named score."""
    if score not in get_args(Score):
        raise ValueError(f"score is {score!r}; expected one of {', '.join(get_args(Score))}")


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole > 0.0 else 0.0
