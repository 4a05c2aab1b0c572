"""The peers of the group engine: the same Jacobians by the schedules of other tools, and their cost."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from cepo.counterfactual.permute import permutations
from cepo.jacobian.group.cost import CostModel
from cepo.jacobian.links import Link, parse_link
from cepo.jacobian.model import eager_attention
from cepo.jacobian.reading.reasoner import ReasonerLayout
from cepo.jacobian.records import Rollout

LAYOUT = ReasonerLayout()
# Name of the link and token ids of the rollout of a Jacobian (S, D); the same for all schedules.
Key = tuple[str, tuple[int, ...]]
Jacobians = dict[Key, Tensor]

ALL_LINKS = ("Z->X", "X->Y", "Z->Y:total")  # plain autograd has no direct effect
ONLY_XY = ("X->Y",)
BOTH = ("rationale", "answer")


@dataclass(frozen=True)
class Version:
    """The rollouts as sampled, or with one span permuted, and the links to compute for them."""

    rollouts: tuple[Rollout, ...]
    links: tuple[str, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the spans whose score is differentiated."""
        return tuple(dict.fromkeys(parsed(link).target for link in self.links))


@dataclass(frozen=True)
class Workload:
    """The rollouts that every schedule gets, and their number of counterfactuals.

    Attributes:
        rollouts: rollouts of one prompt or several.
        counterfactuals: K, the largest number of distinct permutations of each rollout's prompt and of its rationale.
        seed: seed of the permutations.
    """

    rollouts: tuple[Rollout, ...]
    counterfactuals: int
    seed: int

    def versions(self, links: Sequence[str]) -> list[Version]:
        """Return the base and, for each source span of the links, the permutations of it."""
        found = [Version(self.rollouts, tuple(links))]
        for source in sorted({parsed(link).source for link in links}):
            from_source = tuple(link for link in links if parsed(link).source == source)
            orders = [permutations(each, source, self.counterfactuals, seed=self.seed) for each in self.rollouts]
            for of_k in zip_longest(*orders):
                found.append(Version(tuple(rollout for rollout in of_k if rollout is not None), from_source))
        return found


@dataclass(frozen=True)
class Counts:
    """The cost of one schedule.

    Attributes:
        forward: token rows of forward passes; a row is one token in one pass.
        backward: token rows of backward passes.
        head: rows through the head.
        flops: operations of the matrix products.
        peak_bytes: estimated peak memory; None without an estimate.
        vjps: vector-Jacobian products that its Jacobians need: one per rollout or counterfactual and target function
            (a blocked one counts apart), whatever a schedule runs beside them; None where it has no Jacobians.
    """

    forward: int
    backward: int
    head: int
    flops: float
    peak_bytes: float | None = None
    vjps: int | None = None

    @property
    def rows(self) -> int:
        """Forward and backward rows."""
        return self.forward + self.backward


def parsed(link: str) -> Link:
    """Parse the name of a link."""
    return parse_link(link, names=LAYOUT.names, roles=LAYOUT.roles)


def reference_jacobians(model: Any, workload: Workload) -> Jacobians:
    """Return the Jacobians by the schedule of CE-PO's reference implementation.

    For every rollout and each of its counterfactuals separately: one forward pass, log-softmax over the whole
    vocabulary at every position, and one backward pass each for the scores of rationale and answer, whatever the link.

    Args:
        model: a frozen causal LM in eval mode.
        workload: what to differentiate.
    """

    def gradients(rollouts: Sequence[Rollout], _: Sequence[str]) -> dict[str, Tensor]:
        (rollout,) = rollouts
        embeddings_BTD = embedded(model, torch.tensor([rollout.token_ids], device=model.device))
        return backward(reference_scores(model, rollout, embeddings_BTD), embeddings_BTD)

    return _differentiate(workload, ALL_LINKS, 1, gradients)


def reference_scores(
    model: Any, rollout: Rollout, embeddings_BTD: Tensor, targets: Sequence[str] = BOTH
) -> dict[str, Tensor]:
    """Return the scores of a rollout's targets from the embeddings (1, T, D) of a sequence.

    Runs one forward pass, with log-softmax over the whole vocabulary at every position.
    """
    ids_T = torch.tensor(rollout.token_ids, device=model.device)
    logits_TV = model(inputs_embeds=embeddings_BTD, use_cache=False).logits[0]
    log_p_T = log_likelihood(logits_TV, torch.cat([ids_T[1:], ids_T[:1]]))
    return {target: log_p_T[rows_before(rollout, [target])].sum(dtype=torch.float64) for target in targets}


def padded_jacobians(model: Any, workload: Workload, *, links: Sequence[str], batch: int) -> Jacobians:
    """Return the Jacobians by plain autograd at its best: padded batches, and logits only where they are needed.

    Runs one forward pass for the base and each counterfactual, and one backward pass per score that its links need.

    Args:
        model: a frozen causal LM in eval mode.
        workload: what to differentiate.
        links: names of the links.
        batch: number of rollouts per batch.
    """

    def gradients(rollouts: Sequence[Rollout], targets: Sequence[str]) -> dict[str, Tensor]:
        padded = Padded(model, rollouts, targets)
        embeddings_BTD = embedded(model, padded.ids_BT)
        scores = {target: score_B.sum() for target, score_B in padded.scores(embeddings_BTD).items()}
        return backward(scores, embeddings_BTD)

    return _differentiate(workload, links, batch, gradients)


def functional_jacobians(model: Any, workload: Workload) -> Jacobians:
    """Return the Jacobians by `torch.func`: for each rollout the VJP of (s_X, s_Y), vmapped over both cotangents.

    Uses eager attention, which vmap can batch; fused attention kernels fall back to a loop.

    Args:
        model: a frozen causal LM in eval mode.
        workload: what to differentiate.
    """

    def gradients(rollouts: Sequence[Rollout], _: Sequence[str]) -> dict[str, Tensor]:
        padded = Padded(model, rollouts, BOTH, masked=False)

        def scores_of(embeddings_BTD: Tensor) -> Tensor:
            scores = padded.scores(embeddings_BTD)
            return torch.stack([scores[target][0] for target in BOTH])

        scores_C, vjp = torch.func.vjp(scores_of, embedded(model, padded.ids_BT).detach())[:2]
        cotangents_CC = torch.eye(len(BOTH), dtype=scores_C.dtype, device=scores_C.device)
        (gradients_CBTD,) = torch.func.vmap(vjp)(cotangents_CC)
        return dict(zip(BOTH, gradients_CBTD, strict=True))

    with eager_attention(model):
        return _differentiate(workload, ALL_LINKS, 1, gradients)


def captum_jacobians(model: Any, workload: Workload, *, batch: int) -> Jacobians:
    """Return J_XY by Captum's `Saliency` with signs kept, in padded batches of rollouts.

    Args:
        model: a frozen causal LM in eval mode.
        workload: what to differentiate.
        batch: number of rollouts per batch.

    Raises:
        ImportError: if captum is not installed.
    """
    # Imported by name, since type checkers need not find an optional package.
    saliency_of = importlib.import_module("captum.attr").Saliency

    def gradients(rollouts: Sequence[Rollout], targets: Sequence[str]) -> dict[str, Tensor]:
        padded = Padded(model, rollouts, targets)
        saliency = saliency_of(lambda embeddings_BTD: padded.scores(embeddings_BTD)["answer"])
        return {"answer": saliency.attribute(embedded(model, padded.ids_BT), abs=False)}

    return _differentiate(workload, ONLY_XY, batch, gradients)


def count_rows(
    cost: CostModel,
    workload: Workload,
    links: Sequence[str],
    *,
    whole_head: bool = False,
    always_both: bool = False,
) -> Counts:
    """Return the cost of a peer's schedule, by the formula of the group engine's plan.

    Args:
        cost: cost model of the model.
        workload: what it differentiates.
        links: names of the links.
        whole_head: whether all positions go through the head, not only those that predict a target.
        always_both: whether both scores are differentiated whatever the link.
    """
    versions = workload.versions(links)
    passes = [
        (rollout, targets, len(targets))
        for version in versions
        for targets in [BOTH if always_both else version.targets]
        for rollout in version.rollouts
    ]
    vjps = sum(len(version.rollouts) * len(version.targets) for version in versions)
    return replace(count_passes(cost, passes, whole_head=whole_head), vjps=vjps)


def count_passes(
    cost: CostModel, passes: Sequence[tuple[Rollout, Sequence[str], int]], *, whole_head: bool = False
) -> Counts:
    """Return the cost of forward passes over whole rollouts.

    Args:
        cost: cost model of the model.
        passes: for each pass its rollout, the targets that are scored and the number of backward passes.
        whole_head: whether all positions go through the head, not only those that predict a target.
    """
    forward = backward = head = 0
    flops = 0.0
    for rollout, targets, backwards in passes:
        needed = rows_before(rollout, targets)
        tokens = len(rollout.token_ids) if whole_head else max(needed) + 1
        columns = tokens if whole_head else len(needed)
        forward += tokens
        backward += backwards * tokens
        head += columns
        flops += cost.flops(tokens, tokens / 2, backward=False) + 2.0 * cost.head * columns * (1 + backwards)
        flops += cost.flops(backwards * tokens, tokens / 2, backward=True)
    return Counts(forward, backward, head, flops)


class Padded:
    """Rollouts as one batch, padded on the right, and the positions whose logits predict their targets."""

    def __init__(self, model: Any, rollouts: Sequence[Rollout], targets: Sequence[str], *, masked: bool = True) -> None:
        self._model = model
        needed = [rows_before(rollout, targets) for rollout in rollouts]
        tokens = max(row for rows in needed for row in rows) + 1  # later tokens affect no score
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
            wanted = [set(rows_before(rollout, [target])) for rollout in rollouts]
            self._chosen_BP[target] = torch.tensor([[at in row for at in columns] for row in wanted]).to(model.device)

    def scores(self, embeddings_BTD: Tensor) -> dict[str, Tensor]:
        """Return the score of each target, (B,)."""
        mask = {"attention_mask": self._mask_BT} if self._masked else {}
        logits_BPV = self._model(
            inputs_embeds=embeddings_BTD, logits_to_keep=self._columns_P, use_cache=False, **mask
        ).logits
        log_p_BP = log_likelihood(logits_BPV, self._next_BP)
        return {target: (log_p_BP * chosen_BP).sum(-1) for target, chosen_BP in self._chosen_BP.items()}


def embedded(model: Any, ids_BT: Tensor) -> Tensor:
    """Return the embeddings of ids as a leaf of the autograd graph."""
    embeddings_BTD: Tensor = model.get_input_embeddings()(ids_BT)
    return embeddings_BTD.detach().requires_grad_()


def log_likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-likelihood of the given id at each position, in float32 or wider."""
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return log_p.gather(-1, ids[..., None])[..., 0]


def rows_before(rollout: Rollout, targets: Sequence[str]) -> list[int]:
    """Return the positions whose logits predict the targets' tokens."""
    return sorted(position - 1 for target in targets for position in rollout.spans[target].positions)


def backward(scores: Mapping[str, Tensor], embeddings_BTD: Tensor) -> dict[str, Tensor]:
    """Return the gradient (B, T, D) of each score, one backward pass each."""
    last = list(scores)[-1]
    return {
        target: torch.autograd.grad(score, [embeddings_BTD], retain_graph=target != last)[0]
        for target, score in scores.items()
    }


def _differentiate(
    workload: Workload,
    links: Sequence[str],
    batch: int,
    gradients_of: Callable[[Sequence[Rollout], Sequence[str]], Mapping[str, Tensor]],
) -> Jacobians:
    """Return the links' rows of the gradients of every version, in batches of rollouts.

    Args:
        workload: what to differentiate.
        links: names of the links.
        batch: number of rollouts per batch.
        gradients_of: (rollouts, names of target spans) -> gradient (B, T, D) of each target's score.
    """
    found: Jacobians = {}
    for version in workload.versions(links):
        for start in range(0, len(version.rollouts), batch):
            rollouts = version.rollouts[start : start + batch]
            gradients = gradients_of(rollouts, version.targets)
            for row, rollout in enumerate(rollouts):
                for name in version.links:
                    link = parsed(name)
                    positions = list(rollout.spans[link.source].positions)
                    # Indexing by a list copies, so that the whole gradient can be freed.
                    found[name, rollout.token_ids] = gradients[link.target][row][positions].detach()
    return found
