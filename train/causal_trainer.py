"""TRL's GRPOTrainer with the causal term in its loss."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer

from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.records import Rollout
from cepo.train.causal_loss import CausalLoss, interchange
from cepo.train.prompts import JUDGE
from cepo.train.readings import donor_pool, merge_pools, pack_readings, read_with_donors
from cepo.train.trainer import ENV_MASK, PROMPT_IDS, read_rollouts, span_reader, tokenizer

_PREFIX = "causal_"  # of the tensors that travel with TRL's own through its shuffling and splitting
_EARNED = 0.5  # the least task reward of a completion whose verdict is a lesson; of a tie, only equal scores earn it


class CausalTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with the causal loss added to its own.

    The loss is TRL's less weight times the divergence (or csr), or plus weight times the interchange's negative
    log-likelihood: the mean over completions, of which those without a donor (malformed, or no other prompt in the
    batch) count as 0,
    so that gradient accumulation and data parallelism change nothing. Donors are gathered over all ranks. Logits are
    untempered. Evaluation adds no term.

    Logs `causal_loss/value` (mean of the term over completions with a donor), `causal_loss/weight` and
    `causal_loss/rows` (the share of completions with a donor).

    Args:
        *args: as for GRPOTrainer.
        causal_loss: its settings.
        layout: what a completion looks like.
        task_rewards: names of the reward functions that say whether a completion is right, as TRL logs them.
        **options: as for GRPOTrainer.

    Attributes:
        causal_weight: the weight of the term from now on.

    Raises:
        ValueError: for links that the layout does not have, and as `span_reader`.
    """

    def __init__(
        self,
        *args: Any,
        causal_loss: CausalLoss,
        layout: Layout = JUDGE,
        task_rewards: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self._causal_loss = causal_loss
        self._causal_links = causal_loss.parsed_links(layout)
        super().__init__(*args, **options)
        self.causal_weight = causal_loss.first_weight
        self._causal_reader = span_reader(self, layout)
        self._causal_tasks = [index for index, name in enumerate(self.reward_func_names) if name in task_rewards]
        model = self.accelerator.unwrap_model(self.model)
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._causal_takes = frozenset(inspect.signature(type(bare).forward).parameters)

    def _calculate_rewards(self, inputs: Any, *args: Any, **options: Any) -> Tensor:
        rewards_BN: Tensor = super()._calculate_rewards(inputs, *args, **options)
        start = self.accelerator.process_index * len(inputs)
        tasks_BN = rewards_BN[start : start + len(inputs), self._causal_tasks]
        self._causal_earned = (tasks_BN >= _EARNED).all(-1).tolist()  # all of no task rewards is True
        return rewards_BN

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.model.training:
            output |= self._causal_tensors(inputs, output)
        return output

    def _causal_tensors(self, inputs: Sequence[dict[str, Any]], output: dict[str, Any]) -> dict[str, Tensor]:
        """Return the readings of each completion as tensors whose first axis is that of TRL's batch."""
        completions = zip(output["completion_ids"], output["completion_mask"], strict=True)
        rollouts = read_rollouts(
            self,
            self._causal_reader,
            [row["prompt"] for row in inputs],
            [ids[mask.bool()].tolist() for ids, mask in completions],
            {name: [row[name] for row in inputs] for name in (PROMPT_IDS, ENV_MASK) if name in inputs[0]},
        )
        readings_BR: list[list[Any]] = [[] for _ in rollouts]
        for link in self._causal_links:
            pool = merge_pools(gather_object(donor_pool(rollouts, link, self._causal_loss, self._causal_earned)))
            for row, rollout in zip(readings_BR, rollouts, strict=True):
                row += self._of_one_link(rollout, link, pool)
        packed = pack_readings(readings_BR, tokenizer(self).pad_token_id)
        return {_PREFIX + name: tensor.to(self.accelerator.device) for name, tensor in packed.items()}

    def _of_one_link(self, rollout: Rollout, link: Any, pool: Any) -> list[Any]:
        wanted = self._causal_loss.donors + self._causal_loss.compares
        readings = [] if rollout.malformed else read_with_donors(rollout, link, pool, self._causal_loss)
        return [*readings, *[None] * (wanted - len(readings))]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = super()._compute_loss(model, inputs)
        if not self.model.training:
            return loss
        value_B, has_donor_B = self._causal_values(model, inputs)
        sign = -1.0 if self._causal_loss.compares else 1.0
        term = value_B.mean() / self.current_gradient_accumulation_steps
        totals = torch.stack([value_B.detach().sum(), has_donor_B.sum(), has_donor_B.new_tensor(len(value_B))])
        value, rows, count = self.accelerator.gather(totals.unsqueeze(0)).sum(0).tolist()
        metrics = self._metrics["train"]
        if rows:
            metrics["causal_loss/value"].append(value / rows)
        metrics["causal_loss/rows"].append(rows / count)
        metrics["causal_loss/weight"].append(self.causal_weight)
        return loss + sign * self.causal_weight * term

    def _causal_values(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the term of each completion (0 without a donor), and whether it has one (1.0 or 0.0)."""
        ids_BRT, tokens_BRT, targets_BRT = (inputs[f"{_PREFIX}{name}_BRT"] for name in ("ids", "tokens", "targets"))
        read_BR = targets_BRT.any(-1)
        if not read_BR.any():  # one forward all the same: ranks of sharded parameters run in step
            tokens_BRT = tokens_BRT.clone()
            tokens_BRT[0, 0] = True
            read_BR[0, 0] = True
        first = int(tokens_BRT.flatten(0, 1).any(0).to(torch.int8).argmax())  # columns of padding alone are left out
        ids_BRT, tokens_BRT, targets_BRT = ids_BRT[..., first:], tokens_BRT[..., first:], targets_BRT[..., first:]
        columns = targets_BRT.flatten(0, 1).any(0)
        kept = len(columns) - int(columns.to(torch.int8).argmax()) if columns.any() else 1
        logits_NPV = self._causal_logits(model, ids_BRT[read_BR], tokens_BRT[read_BR], kept)
        ids_BRP, targets_BRP = ids_BRT[..., -kept:], targets_BRT[..., -kept:]
        logits_BRPV = logits_NPV.new_zeros((*read_BR.shape, *logits_NPV.shape[1:]))
        logits_BRPV = logits_BRPV.index_put(read_BR.nonzero(as_tuple=True), logits_NPV)
        links = len(self._causal_links)

        def by_link(tensor: Tensor) -> Tensor:
            return tensor.unflatten(1, (links, -1))

        if self._causal_loss.compares:
            logits, targets = by_link(logits_BRPV), by_link(targets_BRP)[:, :, 1:]
            values = self._causal_loss.distance(
                logits[:, :, :1].expand_as(logits[:, :, 1:]), logits[:, :, 1:], targets
            ).flatten(1)
        else:
            targets = targets_BRP
            values = interchange(logits_BRPV, ids_BRP, targets)
        valid = targets.any(-1).flatten(1)
        count_B = valid.sum(-1)
        return (values * valid).sum(-1) / count_B.clamp(min=1), (count_B > 0).to(values.dtype)

    def _causal_logits(self, model: Any, ids_NT: Tensor, tokens_NT: Tensor, kept: int) -> Tensor:
        """Return the logits that predict the last `kept` tokens of each text."""
        options: dict[str, Any] = {"use_cache": False}
        if "position_ids" in self._causal_takes:
            options["position_ids"] = (tokens_NT.long().cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in self._causal_takes:
            options["logits_to_keep"] = kept + 1
        with self.accelerator.autocast():
            logits_NTV: Tensor = model(input_ids=ids_NT, attention_mask=tokens_NT.long(), **options).logits
        return logits_NTV[:, -kept - 1 : -1]
