"""From a Jacobian and its residual to the link record and its named scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from cepo.counterfactual.nuisance import principal_angles
from cepo.jacobian.records import LinkJacobian
from cepo.kernels.spectral import frobenius_energy, spectral_share

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
    check_score(score)
    share = spectral_share(residual_SD)
    energy = frobenius_energy(jacobian.jac_SD)
    retained = _share(frobenius_energy(residual_SD), energy)
    influence = None if jacobian.context_energy is None else _share(energy, jacobian.context_energy)
    if influence is None and score in INFLUENCE_SCORES:
        raise ValueError(f"score is {score!r}, but the Jacobian of {jacobian.link.name} carries no context_energy")
    named: dict[Score, float] = {"phi": share.value, "phi_retained": math.sqrt(share.value * retained)}
    if influence is not None:
        named["influence"] = influence
        named["phi_influence"] = math.sqrt(share.value * influence)
        named["influence_retained"] = influence * retained
    return LinkScore(
        link=jacobian.link.name,
        target=jacobian.link.score,
        phi=share.value,
        phi_lower=share.lower,
        phi_upper=share.upper,
        phi_base=spectral_share(jacobian.jac_SD).value,
        retained=retained,
        influence=influence,
        norm=math.sqrt(energy),
        tokens=len(jacobian.source_positions),
        counterfactuals=counterfactuals,
        rank=len(basis_RD),
        nuisance_angles=tuple(principal_angles(basis_RD, jacobian.jac_SD)) if len(basis_RD) else (),
        value=named[score],
    )


def check_score(score: str) -> None:
    """Raise ValueError unless `score` is a named score."""
    if score not in get_args(Score):
        raise ValueError(f"score is {score!r}; expected one of {', '.join(get_args(Score))}")


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole > 0.0 else 0.0
