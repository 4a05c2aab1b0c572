"""The record of a link and its named scores, measured on its Jacobian and on what hardening left of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cepo.counterfactual.nuisance import angles_between, nuisance_bases
from cepo.jacobian.records import LinkJacobian
from cepo.kernels.spectral import frobenius_energy, spectral_shares

Score = Literal["phi", "phi_retained", "influence", "phi_influence", "influence_retained"]
Measure = Literal["phi", "influence", "angles"]
PHI_SCORES: tuple[Score, ...] = ("phi", "phi_retained", "phi_influence")
INFLUENCE_SCORES: tuple[Score, ...] = ("influence", "phi_influence", "influence_retained")


@dataclass(frozen=True)
class HardenedLink:
    """The Jacobian of one link of one rollout, and what hardening left of it.

    Attributes:
        rollout: index of the rollout.
        base: the Jacobian J of the rollout as sampled.
        counterfactuals: number of counterfactual Jacobians (fewer than K where no order of the tokens differs).
        basis_RD: orthonormal rows, the nuisance subspace that was removed; R = 0 where there is none.
        residual_SD: J_res; J itself where nothing was removed.
    """

    rollout: int
    base: LinkJacobian
    counterfactuals: int
    basis_RD: Tensor
    residual_SD: Tensor


@dataclass(frozen=True)
class LinkScore:
    """What is known of one link of one rollout; None for a measure that neither the score nor `also` reads.

    Attributes:
        link: the link's name.
        function: the target function that was differentiated.
        phi: sigma_1^2 / ||.||_F^2 of the residual Jacobian, in (0, 1]; 0 for a zero matrix. A shape, not a size.
        phi_lower: certified lower bound of phi.
        phi_upper: certified upper bound of phi.
        phi_base: phi of the base Jacobian.
        retained: ||J_res||_F^2 / ||J||_F^2, in [0, 1].
        influence: ||J||_F^2 over the energy of the target's gradient at all rows of the context, in [0, 1].
        norm: ||J||_F.
        tokens: L, the rows of the Jacobian.
        counterfactuals: number of counterfactual Jacobians (fewer than K where no order of the tokens differs).
        rank: dimension of the nuisance subspace that was removed.
        nuisance_angles: principal angles in degrees, ascending, between the nuisance subspace and the Jacobian's own
            top subspace of equal rank. All near 0: hardening removes the signal itself; near 90: they share nothing.
        value: S, the named score that was asked for, in [0, 1].
    """

    link: str
    function: str
    phi: float | None
    phi_lower: float | None
    phi_upper: float | None
    phi_base: float | None
    retained: float
    influence: float | None
    norm: float
    tokens: int
    counterfactuals: int
    rank: int
    nuisance_angles: tuple[float, ...]
    value: float


def score_links(links: Sequence[HardenedLink], *, score: Score, also: Sequence[Measure] = ()) -> list[LinkScore]:
    """Return the record of each link, with only what the score or `also` reads; spectra are taken in one batch.

    Args:
        links: what hardening left.
        score: the named score that becomes `value`.
        also: measures to record beside what the score reads.

    Raises:
        ValueError: for a score that reads the influence of a Jacobian without context energy, or a matrix with a NaN or
            an infinity whose spectrum is taken.
    """
    reads_phi = score in PHI_SCORES or "phi" in also
    shares = dict(enumerate(spectral_shares([link.residual_SD for link in links]))) if reads_phi else {}
    # Without counterfactuals the residual is the base.
    of_base = {place: share for place, share in shares.items() if not links[place].counterfactuals}
    if "phi" in also:
        hardened = [place for place, link in enumerate(links) if link.counterfactuals]
        of_base |= zip(hardened, spectral_shares([links[place].base.jac_SD for place in hardened]), strict=True)
    records = []
    for place, link in enumerate(links):
        share, share_of_base, base = shares.get(place), of_base.get(place), link.base
        energy = frobenius_energy(base.jac_SD)
        retained = _share(frobenius_energy(link.residual_SD) if link.counterfactuals else energy, energy)
        influence = None if base.context_energy is None else _share(energy, base.context_energy)
        phi = None if share is None else share.value
        named = named_scores(phi, retained, influence)
        if score not in named:
            raise ValueError(f"score is {score!r}, but the Jacobian of {base.link.name} carries no context_energy")
        records.append(
            LinkScore(
                link=base.link.name,
                function=base.link.function,
                phi=phi,
                phi_lower=None if share is None else share.lower,
                phi_upper=None if share is None else share.upper,
                phi_base=None if share_of_base is None else share_of_base.value,
                retained=retained,
                influence=influence,
                norm=math.sqrt(energy),
                tokens=len(base.source_positions),
                counterfactuals=link.counterfactuals,
                rank=len(link.basis_RD),
                nuisance_angles=_nuisance_angles(link) if "angles" in also else (),
                value=named[score],
            )
        )
    return records


def named_scores(phi: float | None, retained: float, influence: float | None) -> dict[Score, float]:
    """Return each named score S of a link whose measures are known, in [0, 1]."""
    named: dict[Score, float] = {}
    if phi is not None:
        named |= {"phi": phi, "phi_retained": math.sqrt(phi * retained)}
    if influence is not None:
        named |= {"influence": influence, "influence_retained": influence * retained}
    if phi is not None and influence is not None:
        named["phi_influence"] = math.sqrt(phi * influence)
    return named


def _nuisance_angles(link: HardenedLink) -> tuple[float, ...]:
    (own_RD,) = nuisance_bases([[link.base.jac_SD]], rank=len(link.basis_RD))
    return tuple(angles_between(link.basis_RD, own_RD))


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole > 0.0 else 0.0
