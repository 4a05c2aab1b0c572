"""The record of a link and its named scores, from its effects, its Jacobian and its hardened Jacobian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cepo.counterfactual.nuisance import angles_between, nuisance_bases
from cepo.fusion.names import EFFECT_SCORES, PHI_SCORES, Measure, Score
from cepo.fusion.requests import Against, Compared
from cepo.jacobian.links import Link
from cepo.jacobian.records import LinkJacobian
from cepo.kernels.spectral import SpectralShare, frobenius_energy, spectral_shares


@dataclass(frozen=True)
class HardenedLink:
    """The Jacobian of one link of one rollout, before and after hardening.

    Attributes:
        rollout: index of the rollout.
        base: the Jacobian J of the rollout as sampled.
        wanted: K, the number of counterfactual Jacobians that were asked for.
        counterfactuals: the number that were computed; fewer than K if the tokens have fewer orders.
        basis_RD: orthonormal rows, the nuisance subspace that was removed; R = 0 if none was.
        residual_SD: J_res; J itself if nothing was removed.
    """

    rollout: int
    base: LinkJacobian
    wanted: int
    counterfactuals: int
    basis_RD: Tensor
    residual_SD: Tensor


@dataclass(frozen=True)
class LinkScore:
    """The record of one link of one rollout; None for measures that neither the score nor `also` reads.

    Attributes:
        link: the link's name.
        function: the target function.
        tokens: L, the number of tokens of the source.
        delta: the effect s_B(X) - s_B(X') in nats, mean over the donors X'; exactly 0 if all of them equal X.
        path_sum: the sum of the path attributions, in nats, mean over the donors; an estimate of delta.
        certificate: the largest error of a donor's path sum, in nats.
        nodes: nodes of the quadrature; 0 if none were asked for.
        donors: number of counterfactuals that the span was compared with.
        against: what they were, see `cepo.fusion.requests.Against`; None if no score reads them.
        phi: sigma_1^2 / ||.||_F^2 of the residual Jacobian, in (0, 1]; 0 for a zero matrix. It measures how nearly
            rank-one the matrix is, not how large.
        phi_lower: certified lower bound of phi.
        phi_upper: certified upper bound of phi.
        phi_base: phi of the base Jacobian.
        retained: ||J_res||_F^2 / ||J||_F^2, in [0, 1]; None if counterfactuals were asked for and the tokens have no
            other order, so that hardening is impossible. Scores that read it are then 0.
        influence: ||J||_F^2 over the energy of the target's gradient at all rows of the context, in [0, 1].
        norm: ||J||_F.
        counterfactuals: number of counterfactual Jacobians (fewer than K if the tokens have fewer orders).
        rank: dimension of the nuisance subspace that was removed.
        nuisance_angles: principal angles in degrees, ascending, between the nuisance subspace and the Jacobian's own
            top subspace of equal rank. If all are near 0, hardening removes the signal itself; if all are near 90, the
            two are unrelated.
        value: S, the named score that was asked for, in [0, 1]; in a `RolloutScore`, less the order leak.
    """

    link: str
    function: str
    tokens: int
    delta: float | None
    path_sum: float | None
    certificate: float | None
    nodes: int
    donors: int
    against: Against | None
    phi: float | None
    phi_lower: float | None
    phi_upper: float | None
    phi_base: float | None
    retained: float | None
    influence: float | None
    norm: float | None
    counterfactuals: int
    rank: int
    nuisance_angles: tuple[float, ...]
    value: float


@dataclass(frozen=True)
class Measured:
    """What was computed for one link of one rollout.

    Attributes:
        rollout: index of the rollout.
        link: the link.
        tokens: L, the number of tokens of its source.
        hardened: its Jacobian before and after hardening, or None if nothing reads it.
        compared: its comparison with counterfactuals, or None if nothing reads it.
    """

    rollout: int
    link: Link
    tokens: int
    hardened: HardenedLink | None = None
    compared: Compared | None = None

    @classmethod
    def by_gradient(cls, hardened: HardenedLink) -> Measured:
        """Return the measurement of a link for which only the Jacobian was computed."""
        base = hardened.base
        return cls(hardened.rollout, base.link, len(base.source_positions), hardened)


def score_links(measured: Sequence[Measured], *, score: Score, also: Sequence[Measure] = ()) -> list[LinkScore]:
    """Return the record of each link, with only what the score or `also` reads; phi is computed in one batch.

    Args:
        measured: what was computed for each link.
        score: the named score that becomes `value`.
        also: measures to record besides what the score reads.

    Raises:
        ValueError: for a score that reads what was not computed, or if phi is computed and a matrix holds a NaN or an
            infinity.
    """
    hardened = {place: one.hardened for place, one in enumerate(measured) if one.hardened is not None}
    reads_phi = score in PHI_SCORES or "phi" in also
    shares: dict[int, SpectralShare] = {}
    if reads_phi:
        shares = dict(zip(hardened, spectral_shares([one.residual_SD for one in hardened.values()]), strict=True))
    # Without counterfactuals the residual equals the base.
    of_base = {place: share for place, share in shares.items() if not hardened[place].counterfactuals}
    if "phi" in also:
        places = [place for place, one in hardened.items() if one.counterfactuals]
        of_base |= zip(places, spectral_shares([hardened[place].base.jac_SD for place in places]), strict=True)
    return [
        _record(one, score, shares.get(place), of_base.get(place), angles="angles" in also)
        for place, one in enumerate(measured)
    ]


def _record(
    one: Measured, score: Score, share: SpectralShare | None, of_base: SpectralShare | None, *, angles: bool
) -> LinkScore:
    hardened, path = one.hardened, one.compared.path if one.compared else None
    retained = influence = norm = None
    if hardened is not None:
        energy = frobenius_energy(hardened.base.jac_SD)
        norm = math.sqrt(energy)
        left = frobenius_energy(hardened.residual_SD) if hardened.counterfactuals else energy
        retained = None if hardened.wanted and not hardened.counterfactuals else _share(left, energy)
        context = hardened.base.context_energy
        influence = None if context is None else _share(energy, context)
    phi = None if share is None else share.value
    named = named_scores(phi, retained, influence) | effect_scores(one.compared)
    if score not in named:
        raise ValueError(f"score is {score!r}, but what it needs for {one.link.name} was not computed")
    delta = path.delta if path is not None else 0.0 if one.compared and one.compared.against == "same" else None
    return LinkScore(
        link=one.link.name,
        function=one.link.function,
        tokens=one.tokens,
        delta=delta,
        path_sum=path.path_sum if path is not None else None,
        certificate=path.certificate if path is not None else None,
        nodes=path.nodes if path is not None else 0,
        donors=len(path.others) if path is not None else 0,
        against=one.compared.against if one.compared else None,
        phi=phi,
        phi_lower=None if share is None else share.lower,
        phi_upper=None if share is None else share.upper,
        phi_base=None if of_base is None else of_base.value,
        retained=retained,
        influence=influence,
        norm=norm,
        counterfactuals=hardened.counterfactuals if hardened is not None else 0,
        rank=len(hardened.basis_RD) if hardened is not None else 0,
        nuisance_angles=_nuisance_angles(hardened) if angles and hardened is not None else (),
        value=named[score],
    )


def effect_scores(compared: Compared | None) -> dict[Score, float]:
    """Return the named scores of a link that was compared with counterfactuals, in [0, 1].

    - effect: max(0, tanh(delta / 2)): how surely B can be attributed to X rather than to X'.
    - path: the same for the path's sum.
    - explained: max(0, 1 - s(X) / s(X')): the part of B's surprisal that X accounts for.

    A link without counterfactuals, or whose counterfactuals all equal it, scores 0.

    Source:
        McFadden, Conditional logit analysis of qualitative choice behavior (1974), for `explained`, his pseudo R^2.
    """
    if compared is None:
        return {}
    path = compared.path
    if path is None:
        return dict.fromkeys(EFFECT_SCORES, 0.0)
    named: dict[Score, float] = {"effect": certainty(path.delta)}
    surprisal = -sum(path.others) / len(path.others)
    named["explained"] = min(1.0, max(0.0, 1.0 + path.own / surprisal)) if surprisal > 0.0 else 0.0
    if path.path_sum is not None:
        named["path"] = certainty(path.path_sum)
    return named


def certainty(nats: float) -> float:
    """Return S of an effect, or of an estimate of it, see `effect_scores`."""
    return max(0.0, math.tanh(nats / 2.0))


def named_scores(phi: float | None, retained: float | None, influence: float | None) -> dict[Score, float]:
    """Return the named scores S in [0, 1] that the given measures determine; `retained` None counts as 0."""
    named: dict[Score, float] = {}
    if phi is not None:
        named |= {"phi": phi, "phi_retained": math.sqrt(phi * (retained or 0.0))}
    if influence is not None:
        named |= {"influence": influence, "influence_retained": influence * (retained or 0.0)}
    if phi is not None and influence is not None:
        named["phi_influence"] = math.sqrt(phi * influence)
    return named


def _nuisance_angles(link: HardenedLink) -> tuple[float, ...]:
    (own_RD,) = nuisance_bases([[link.base.jac_SD]], rank=len(link.basis_RD))
    return tuple(angles_between(link.basis_RD, own_RD))


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole > 0.0 else 0.0
