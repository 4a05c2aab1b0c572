"""The schedules of the causal loss: its value and its gradient for an adapter, relative to a policy update."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from cepo.benchmarks.engine.cases import Case, Subject, right_answers
from cepo.benchmarks.engine.peers import (
    BOTH,
    LAYOUT,
    Counts,
    Jacobians,
    Padded,
    Workload,
    count_passes,
    embedded,
    log_likelihood,
)
from cepo.benchmarks.engine.sizes import Shapes, random_workload
from cepo.jacobian.group.cost import measured_cost
from cepo.train.causal_loss import CausalLoss
from cepo.train.causal_values import causal_values, forward_arguments
from cepo.train.readings import Reading, donor_pool, pack_readings, read_with_donors

UPDATE, LOSS = "policy update", "causal loss"
SETTINGS = CausalLoss()
_RANK = 16  # rank of the adapter, as in the recipes for one GPU


def loss_subject(subject: Subject) -> Subject:
    """Return a model with an adapter in all its linear layers, and the reference losses and gradients.

    Args:
        subject: the model.
    """
    torch.manual_seed(subject.check.seed)
    # Not the usual initialisation, at which half of the gradient is 0.
    lora = LoraConfig(r=_RANK, target_modules="all-linear", init_lora_weights=False)
    policy = get_peft_model(copy.deepcopy(subject.model), lora).eval()

    def answers_of(model: Any) -> Jacobians:
        return update(model, subject.check, len(subject.check.rollouts)) | reference_loss(model, subject.check)

    wanted, tolerance, oracle_error = right_answers(policy, answers_of, cancels=True)
    cost = measured_cost(policy, 0, 0, 0)
    return replace(subject, model=policy, cost=cost, wanted=wanted, tolerance=tolerance, oracle_error=oracle_error)


def loss_contenders(subject: Subject, peers: Sequence[str]) -> list[Case]:
    """Return a policy update as the baseline, then the causal loss as the trainer and as the reference compute it.

    Args:
        subject: from `loss_subject`.
        peers: names of the peers to include, from `cepo.benchmarks.engine.cases.PEERS`.
    """
    policy = subject.model

    def count(workload: Workload, targets: Sequence[str], *, whole_head: bool = False) -> Counts:
        return count_passes(subject.cost, [(each, targets, 1) for each in workload.rollouts], whole_head=whole_head)

    def case(
        name: str, run: Callable[[Workload, int], Jacobians], count: Callable[[Workload], Counts], **of: Any
    ) -> Case:
        return Case(name, (name.removeprefix("reference: "),), run, count, baseline=UPDATE, **of)

    found = [
        case(
            UPDATE,
            lambda workload, batch: update(policy, workload, batch),
            lambda work: count(work, BOTH),
            peer="reference",
        ),
        case(LOSS, lambda workload, batch: trainers_loss(policy, workload), lambda work: count(work, BOTH[1:])),
        case(
            f"reference: {LOSS}",
            lambda workload, batch: reference_loss(policy, workload),
            lambda work: count(work, BOTH[1:], whole_head=True),
            peer="reference",
            alone=True,
        ),
    ]
    return [each for each in found if each.peer is None or each.peer in peers]


def trainers_loss(policy: Any, workload: Workload) -> Jacobians:
    """Return the causal loss of each rollout, and the gradient of their mean, as `CausalTrainer` computes them."""
    packed = pack_readings(_readings(policy, workload), padding=0)
    on_device = {name: tensor.to(policy.device) for name, tensor in packed.items()}
    losses_B, _ = causal_values(policy, on_device, SETTINGS, links=1, takes=forward_arguments(policy))
    return _answers(LOSS, policy, workload, [losses_B])


def reference_loss(policy: Any, workload: Workload) -> Jacobians:
    """Return the same by a forward and a backward pass per reading, with all positions through the head."""

    def losses() -> Iterable[Tensor]:
        for (reading,) in _readings(policy, workload):
            ids_T, targets_P = (torch.tensor(each, device=policy.device) for each in (reading.ids, reading.targets))
            logits_TV = policy(input_ids=ids_T[None], use_cache=False).logits[0]
            log_p_T = log_likelihood(logits_TV[:-1], ids_T[1:])
            yield -log_p_T[targets_P - 1].mean()[None]

    return _answers(LOSS, policy, workload, losses())


def update(policy: Any, workload: Workload, batch: int) -> Jacobians:
    """Return a policy-gradient loss per rollout, and the gradient of their mean, as in a GRPO step.

    The loss is minus the advantage times the mean log-likelihood, which has the gradient of GRPO's loss while its ratio
    is 1. Advantages alternate between 1 and -1.

    Args:
        policy: the policy with its adapter.
        workload: the rollouts.
        batch: number of rollouts per batch.
    """
    rollouts = workload.rollouts
    advantages = [(-1.0) ** place for place in range(len(rollouts))]

    def losses() -> Iterable[Tensor]:
        for start in range(0, len(rollouts), batch):
            some = rollouts[start : start + batch]
            padded = Padded(policy, some, BOTH)
            score_B = torch.stack([*padded.scores(embedded(policy, padded.ids_BT).detach()).values()]).sum(0)
            weights = [advantages[start + place] / len(each.completion_ids) for place, each in enumerate(some)]
            yield -score_B * torch.tensor(weights, device=policy.device)

    return _answers(UPDATE, policy, workload, losses())


def _answers(name: str, policy: Any, workload: Workload, losses: Iterable[Tensor]) -> Jacobians:
    """Return the loss of each rollout and the gradient of their mean, with a backward pass per tensor of losses."""
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    gradient_N = torch.zeros(0)
    of_rollouts: list[Tensor] = []
    for part_B in losses:
        gradients = torch.autograd.grad(part_B.sum() / len(workload.rollouts), weights)
        of_part_N = torch.cat([each.flatten() for each in gradients])
        gradient_N = of_part_N if not of_rollouts else gradient_N + of_part_N
        of_rollouts += part_B.detach().split(1)
    ids = [rollout.token_ids for rollout in workload.rollouts]
    every = tuple(token for each in ids for token in each)
    return {(name, each): loss for each, loss in zip(ids, of_rollouts, strict=True)} | {
        (f"gradient of {name}", every): gradient_N
    }


def _readings(policy: Any, workload: Workload) -> list[list[Reading]]:
    """Return the reading of each rollout: its own prompt, followed by spans of a rollout of another prompt."""
    (link,) = SETTINGS.parsed_links(LAYOUT)
    prompt, rationale, answer = (len(span.positions) for span in workload.rollouts[0].spans.values())
    shapes = Shapes(G=1, Lz=prompt, Lx=rationale, Ly=answer, K=0)
    (donor,) = random_workload(policy.config.vocab_size, shapes, workload.seed + 1).rollouts
    pool = donor_pool([donor], link, SETTINGS, [True])
    return [read_with_donors(rollout, link, pool, SETTINGS) for rollout in workload.rollouts]
