"""The record of a link and its named scores, measured on its Jacobian and on what hardening left of it."""

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
    """The Jacobian of one link of one rollout, and what hardening left of it.

    Attributes:
        rollout: index of the rollout.
        base: the Jacobian J of the rollout as sampled.
        wanted: K, the counterfactual Jacobians that were asked for.
        counterfactuals: those that there are; fewer than K where the tokens have fewer orders.
        basis_RD: orthonormal rows, the nuisance subspace that was removed; R = 0 where there is none.
        residual_SD: J_res; J itself where nothing was removed.
    """

    rollout: int
    base: LinkJacobian
    wanted: int
    counterfactuals: int
    basis_RD: Tensor
    residual_SD: Tensor


@dataclass(frozen=True)
class LinkScore:
    """What is known of one link of one rollout; None for a measure that neither the score nor `also` reads.

    Attributes:
        link: the link's name.
        function: the target function.
        tokens: L, the tokens of the source.
        delta: the effect s_B(X) - s_B(X') in nats, mean over the donors X'; exactly 0 where all of them say the same.
        path_sum: what the gradients along the paths to the donors sum to, in nats; an estimate of delta.
        certificate: the largest error of a path's sum, in nats.
        nodes: nodes of the quadrature; 0 where none were asked for.
        donors: counterfactuals that the span was compared with.
        against: what they were, see `cepo.fusion.requests.Against`; None where no score reads them.
        phi: sigma_1^2 / ||.||_F^2 of the residual Jacobian, in (0, 1]; 0 for a zero matrix. Shape, not size.
        phi_lower: certified lower bound of phi.
        phi_upper: certified upper bound of phi.
        phi_base: phi of the base Jacobian.
        retained: ||J_res||_F^2 / ||J||_F^2, in [0, 1]; None where counterfactuals were asked for and the tokens have
            no other order, so it is not known what hardening would leave. Scores that read it are 0 there.
        influence: ||J||_F^2 over the energy of the target's gradient at all rows of the context, in [0, 1].
        norm: ||J||_F.
        counterfactuals: number of counterfactual Jacobians (fewer than K where the tokens have fewer orders).
        rank: dimension of the nuisance subspace that was removed.
        nuisance_angles: principal angles in degrees, ascending, between the nuisance subspace and the Jacobian's own
            top subspace of equal rank. All near 0: hardening removes the signal itself; near 90: they share nothing.
        value: S, the named score that was asked for, in [0, 1]; in a `RolloutScore`, with the order leak taken off.
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
    """What was computed of one link of one rollout.

    Attributes:
        rollout: index of the rollout.
        link: the link.
        tokens: L, the tokens of its source.
        hardened: its Jacobian and what hardening left of it, where something reads them.
        compared: the link beside its counterfactuals, where something reads them.
    """

    rollout: int
    link: Link
    tokens: int
    hardened: HardenedLink | None = None
    compared: Compared | None = None

    @classmethod
    def by_gradient(cls, hardened: HardenedLink) -> Measured:
        """Return a link of which its Jacobian alone was computed."""
        base = hardened.base
        return cls(hardened.rollout, base.link, len(base.source_positions), hardened)


def score_links(measured: Sequence[Measured], *, score: Score, also: Sequence[Measure] = ()) -> list[LinkScore]:
    """Return the record of each link, with only what the score or `also` reads; spectra are taken in one batch.

    Args:
        measured: what was computed.
        score: the named score that becomes `value`.
        also: measures to record beside what the score reads.

    Raises:
        ValueError: for a score that reads what was not computed, or a matrix with a NaN or an infinity whose spectrum
            is taken.
    """
    hardened = {place: one.hardened for place, one in enumerate(measured) if one.hardened is not None}
    reads_phi = score in PHI_SCORES or "phi" in also
    shares: dict[int, SpectralShare] = {}
    if reads_phi:
        shares = dict(zip(hardened, spectral_shares([one.residual_SD for one in hardened.values()]), strict=True))
    # Without counterfactuals the residual is the base.
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
    """Return the named scores of a link beside its counterfactuals, in [0, 1].

    - effect: tanh(delta / 2), 0 where delta < 0: how surely B can be attributed to X rather than to X'.
    - path: the same of the path's sum.
    - explained: 1 - s(X) / s(X'), 0 where it is negative: the part of B's surprisal that X accounts for.

    A link that is compared with nothing, or with counterfactuals that all say the same, scores 0.

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
    """Return each named score S of a Jacobian whose measures are known, in [0, 1]; no `retained` counts as 0."""
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
