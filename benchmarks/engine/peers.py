"""What the group engine is measured against: the same Jacobians by the roads that others take, and their cost."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cepo.counterfactual.permute import permute_rollout
from cepo.jacobian.group.cost import CostModel
from cepo.jacobian.links import Link, parse_link
from cepo.jacobian.reading.reasoner import ReasonerLayout
from cepo.jacobian.records import Rollout

LAYOUT = ReasonerLayout()
# What a Jacobian (S, D) is of: the link's name and the rollout's ids. So the answers of any two schedules can be
# compared.
Key = tuple[str, tuple[int, ...]]
Jacobians = dict[Key, Tensor]

ALL_LINKS = ("Z->X", "X->Y", "Z->Y:total")  # plain autograd has no direct effect
ONLY_XY = ("X->Y",)


@dataclass(frozen=True)
class Variant:
    """Rollouts that are run alike: as sampled or with one span permuted, and the links that are wanted of them."""

    rollouts: tuple[Rollout, ...]
    links: tuple[str, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the spans whose score is differentiated."""
        return tuple(dict.fromkeys(parsed(link).target for link in self.links))


@dataclass(frozen=True)
class Workload:
    """The rollouts that every contender gets, and how often they are permuted.

    Attributes:
        rollouts: of one prompt or several.
        counterfactuals: K permutations of each rollout's prompt and K of its rationale.
        seed: of the permutations.
    """

    rollouts: tuple[Rollout, ...]
    counterfactuals: int
    seed: int

    def variants(self, links: Sequence[str]) -> list[Variant]:
        """Return the base and, for each source span of the links, the K permutations of it."""
        found = [Variant(self.rollouts, tuple(links))]
        for source in sorted({parsed(link).source for link in links}):
            from_source = tuple(link for link in links if parsed(link).source == source)
            for k in range(self.counterfactuals):
                permuted = [permute_rollout(rollout, source, k, seed=self.seed) for rollout in self.rollouts]
                found.append(Variant(tuple(rollout for rollout in permuted if rollout is not None), from_source))
        return found


@dataclass(frozen=True)
class Counts:
    """What one schedule costs.

    Attributes:
        forward: token rows; a row is one token through one forward or one backward pass.
        backward: token rows.
        head: rows through the head.
        flops: operations of the matrix products.
        peak_bytes: estimated peak, where there is an estimate.
    """

    forward: int
    backward: int
    head: int
    flops: float
    peak_bytes: float | None = None

    @property
    def rows(self) -> int:
        """Forward and backward rows."""
        return self.forward + self.backward


def parsed(link: str) -> Link:
    """Return the link that a name stands for."""
    return parse_link(link, names=LAYOUT.names, roles=LAYOUT.roles)


def reference_jacobians(model: Any, workload: Workload) -> Jacobians:
    """Return the Jacobians by the schedule of CE-PO's reference implementation.

    Every rollout and each of its counterfactuals alone: one forward pass, log-softmax over the whole vocabulary at
    every position, one backward pass for the rationale's score and one for the answer's, whichever link is wanted.

    Args:
        model: a frozen causal LM in eval mode.
        workload: what to differentiate.
    """
    found: Jacobians = {}
    for variant in workload.variants(ALL_LINKS):
        for rollout in variant.rollouts:
            ids_T = torch.tensor(rollout.token_ids, device=model.device)
            embeddings_BTD = _embedded(model, ids_T[None])
            logits_TV = model(inputs_embeds=embeddings_BTD, use_cache=False).logits[0]
            log_p_T = _log_likelihood(logits_TV, torch.cat([ids_T[1:], ids_T[:1]]))
            gradients = {}
            for target, keep in (("rationale", True), ("answer", False)):
                score = log_p_T[_rows(rollout, [target])].sum()
                (gradient_BTD,) = torch.autograd.grad(score, [embeddings_BTD], retain_graph=keep)
                gradients[target] = gradient_BTD[0]
            found |= _sources(rollout, variant.links, gradients)
    return found


def padded_jacobians(model: Any, workload: Workload, *, links: Sequence[str], batch: int) -> Jacobians:
    """Return the Jacobians by plain autograd at its best: padded batches, logits only where they are needed.

    One forward pass for the base and for each counterfactual, one backward pass for each score that its links need.

    Args:
        model: a frozen causal LM in eval mode.
        workload: what to differentiate.
        links: names of the links.
        batch: rollouts at once.
    """
    found: Jacobians = {}
    for variant in workload.variants(links):
        for start in range(0, len(variant.rollouts), batch):
            rollouts = variant.rollouts[start : start + batch]
            padded = _Padded(model, rollouts, variant.targets)
            embeddings_BTD = _embedded(model, padded.ids_BT)
            scores = padded.scores(embeddings_BTD)
            gradients = {}
            for target in variant.targets:
                (gradients[target],) = torch.autograd.grad(
                    scores[target].sum(), [embeddings_BTD], retain_graph=target != variant.targets[-1]
                )
            for row, rollout in enumerate(rollouts):
                of_rollout = {target: gradient_BTD[row] for target, gradient_BTD in gradients.items()}
                found |= _sources(rollout, variant.links, of_rollout)
    return found


def functional_jacobians(model: Any, workload: Workload) -> Jacobians:
    """Return the Jacobians by `torch.func`: for each rollout the vjp of (s_X, s_Y), vmapped over both cotangents.

    Through eager attention, which vmap can batch; the fused kernels fall back to a loop.

    Args:
        model: a frozen causal LM in eval mode.
        workload: what to differentiate.
    """
    found: Jacobians = {}
    targets = ("rationale", "answer")
    with _eager_attention(model):
        for variant in workload.variants(ALL_LINKS):
            for rollout in variant.rollouts:
                padded = _Padded(model, (rollout,), targets, masked=False)

                def scores_of(embeddings_BTD: Tensor, padded: _Padded = padded) -> Tensor:
                    scores = padded.scores(embeddings_BTD)
                    return torch.stack([scores[target][0] for target in targets])

                scores_C, pull = torch.func.vjp(scores_of, _embedded(model, padded.ids_BT).detach())[:2]
                cotangents_CC = torch.eye(len(targets), dtype=scores_C.dtype, device=scores_C.device)
                (gradients_CBTD,) = torch.func.vmap(pull)(cotangents_CC)
                found |= _sources(
                    rollout, variant.links, {target: gradients_CBTD[c, 0] for c, target in enumerate(targets)}
                )
    return found


def captum_jacobians(model: Any, workload: Workload, *, batch: int) -> Jacobians:
    """Return J_XY by Captum's `Saliency` with signs kept, rollouts in padded batches.

    Args:
        model: a frozen causal LM in eval mode.
        workload: what to differentiate.
        batch: rollouts at once.

    Raises:
        ImportError: where captum is not installed.
    """
    # By name, since it is optional: type checkers need not find it.
    saliency_of = importlib.import_module("captum.attr").Saliency
    found: Jacobians = {}
    for variant in workload.variants(ONLY_XY):
        for start in range(0, len(variant.rollouts), batch):
            rollouts = variant.rollouts[start : start + batch]
            padded = _Padded(model, rollouts, ("answer",))
            saliency = saliency_of(lambda embeddings_BTD, padded=padded: padded.scores(embeddings_BTD)["answer"])
            gradient_BTD = saliency.attribute(_embedded(model, padded.ids_BT), abs=False)
            for row, rollout in enumerate(rollouts):
                found |= _sources(rollout, variant.links, {"answer": gradient_BTD[row]})
    return found


def count_rows(
    cost: CostModel,
    workload: Workload,
    links: Sequence[str],
    *,
    whole_head: bool = False,
    always_both: bool = False,
) -> Counts:
    """Return what a peer's schedule costs, by the formula that the group engine's plan uses.

    Args:
        cost: of the model.
        workload: what it differentiates.
        links: names of the links.
        whole_head: whether all positions go through the head, not only those that predict a target.
        always_both: whether both scores are differentiated whichever link is wanted.
    """
    forward = backward = head = 0
    flops = 0.0
    for variant in workload.variants(links):
        targets = ("rationale", "answer") if always_both else variant.targets
        for rollout in variant.rollouts:
            needed = _rows(rollout, targets)
            tokens = len(rollout.token_ids) if whole_head else max(needed) + 1
            columns = tokens if whole_head else len(needed)
            forward += tokens
            backward += len(targets) * tokens
            head += columns
            flops += cost.flops(tokens, tokens / 2, backward=False) + 2.0 * cost.head * columns * (1 + len(targets))
            flops += cost.flops(len(targets) * tokens, tokens / 2, backward=True)
    return Counts(forward, backward, head, flops)


class _Padded:
    """Rollouts as one batch, padded on the right, and the columns of the logits that predict their targets."""

    def __init__(self, model: Any, rollouts: Sequence[Rollout], targets: Sequence[str], *, masked: bool = True) -> None:
        self._model = model
        needed = [_rows(rollout, targets) for rollout in rollouts]
        tokens = max(row for rows in needed for row in rows) + 1  # what comes later has no part in any score
        ids = [rollout.token_ids[:tokens] for rollout in rollouts]
        self.ids_BT = torch.tensor([[*row, *[0] * (tokens - len(row))] for row in ids], device=model.device)
        self._mask_BT = torch.tensor([[1] * len(row) + [0] * (tokens - len(row)) for row in ids], device=model.device)
        self._masked = masked
        columns = sorted({row for rows in needed for row in rows})
        self._columns_P = torch.tensor(columns, device=model.device)
        next_ids = [[(*row.token_ids, 0)[min(at + 1, len(row.token_ids))] for at in columns] for row in rollouts]
        self._next_BP = torch.tensor(next_ids, device=model.device)
        self._chosen_BP = {}
        for target in targets:
            wanted = [set(_rows(rollout, [target])) for rollout in rollouts]
            self._chosen_BP[target] = torch.tensor([[at in row for at in columns] for row in wanted]).to(model.device)

    def scores(self, embeddings_BTD: Tensor) -> dict[str, Tensor]:
        """Return the score of each target, (B,)."""
        mask = {"attention_mask": self._mask_BT} if self._masked else {}
        logits_BPV = self._model(
            inputs_embeds=embeddings_BTD, logits_to_keep=self._columns_P, use_cache=False, **mask
        ).logits
        log_p_BP = _log_likelihood(logits_BPV, self._next_BP)
        return {target: (log_p_BP * chosen_BP).sum(-1) for target, chosen_BP in self._chosen_BP.items()}


def _embedded(model: Any, ids_BT: Tensor) -> Tensor:
    embeddings_BTD: Tensor = model.get_input_embeddings()(ids_BT)
    return embeddings_BTD.detach().requires_grad_()


def _log_likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-likelihood of an id at each position, in float32 or wider."""
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return log_p.gather(-1, ids[..., None])[..., 0]


def _rows(rollout: Rollout, targets: Sequence[str]) -> list[int]:
    """Return the positions whose logits predict the targets' tokens."""
    return sorted(position - 1 for target in targets for position in rollout.spans[target].positions)


def _sources(rollout: Rollout, links: Sequence[str], gradients: Mapping[str, Tensor]) -> Jacobians:
    """Cut the links' rows out of the (T, D) gradients of each target; a copy, so that the whole can be let go."""
    found: Jacobians = {}
    for name in links:
        link = parsed(name)
        positions = list(rollout.spans[link.source].positions)
        found[name, rollout.token_ids] = gradients[link.target][positions].detach()
    return found


@contextlib.contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
