"""TRL's GRPOTrainer with the causal term in its loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer

from cepo.jacobian.positions import position_limit
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.records import Rollout
from cepo.train.causal_loss import CausalLoss
from cepo.train.causal_values import causal_values, forward_arguments
from cepo.train.prompts import JUDGE
from cepo.train.readings import donor_pool, merge_pools, pack_readings, read_with_donors
from cepo.train.rewards.bound import require_donors
from cepo.train.trainer import ENV_MASK, PROMPT_IDS, read_rollouts, span_reader, tokenizer

_PREFIX = "causal_"  # of our tensors in TRL's batch, which TRL shuffles and splits with its own
_EARNED = 0.5  # least task reward of a completion whose verdict may be interchanged; on ties, equal scores earn 1


class CausalTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with the causal loss added to its own.

    The loss is TRL's minus weight times the divergence (or csr), or plus weight times the interchange's negative
    log-likelihood. The term is the mean over all completions, where those without a donor (malformed, or no other
    prompt in the batch) count as 0, so that gradient accumulation and data parallelism do not change it. Donors are
    gathered over all ranks. Logits have temperature 1. In evaluation no term is added.

    Logs, for each optimiser step, `causal_loss/value` (mean of the term over completions with a donor),
    `causal_loss/weight` and `causal_loss/rows` (the share of completions with a donor).

    Args:
        *args: as for GRPOTrainer.
        causal_loss: settings of the term.
        layout: format of the completions.
        task_rewards: names of the reward functions that say whether a completion is right, as TRL logs them. The task
            that a `CausalReward` fuses says so too. Without any, every completion counts as right.
        **options: as for GRPOTrainer.

    Attributes:
        causal_weight: weight of the term; the controller changes it during training.

    Raises:
        ValueError: for links that the layout does not have, for batches of one prompt, whose completions would have no
            donor, and as `span_reader`.
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
        require_donors(self.args.generation_batch_size // self.num_generations, "causal_loss to null")
        self.causal_weight = causal_loss.first_weight
        self._causal_reader = span_reader(self, layout)
        self._causal_tasks = [index for index, name in enumerate(self.reward_func_names) if name in task_rewards]
        policy = self.accelerator.unwrap_model(self.model)
        self._causal_takes = forward_arguments(policy)
        self._causal_most = position_limit(policy.config) or math.inf
        self._causal_totals: Tensor | float = 0.0  # of the optimiser step: sum of the term, rows with a donor, all rows

    def _calculate_rewards(self, inputs: Any, *args: Any, **options: Any) -> Tensor:
        rewards_BN: Tensor = super()._calculate_rewards(inputs, *args, **options)
        start = self.accelerator.process_index * len(inputs)
        tasks_BN = rewards_BN[start : start + len(inputs), self._causal_tasks]
        earned_B = (tasks_BN >= _EARNED).all(-1)  # all of no task rewards is True
        for function in self.reward_funcs:
            fused = getattr(function, "task_rewards", None)  # of this rank; the column holds what they are fused to
            if fused is not None:
                earned_B &= earned_B.new_tensor([task is not None and task >= _EARNED for task in fused])
        self._causal_earned = earned_B.tolist()
        return rewards_BN

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.model.training:
            output |= self._causal_tensors(inputs, output)
        return output

    def _causal_tensors(self, inputs: Sequence[dict[str, Any]], output: dict[str, Any]) -> dict[str, Tensor]:
        """Return the readings of each completion as tensors whose first axis is TRL's batch axis."""
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
        readings = read_with_donors(rollout, link, pool, self._causal_loss, most=self._causal_most)
        return [*readings, *[None] * (wanted - len(readings))]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = super()._compute_loss(model, inputs)
        if not self.model.training:
            return loss
        value_B, has_donor_B = self._causal_values(model, inputs)
        sign = -1.0 if self._causal_loss.compares else 1.0
        term = value_B.mean() / self.current_gradient_accumulation_steps
        self._causal_totals += torch.stack(
            [value_B.detach().sum(), has_donor_B.sum(), has_donor_B.new_tensor(len(value_B))]
        )
        if self.accelerator.sync_gradients:  # not per batch: batches with few donors would count like the others
            self._log_causal_totals()
        return loss + sign * self.causal_weight * term

    def _log_causal_totals(self) -> None:
        assert isinstance(self._causal_totals, Tensor)
        value, rows, count = self.accelerator.gather(self._causal_totals.unsqueeze(0)).sum(0).tolist()
        self._causal_totals = 0.0
        metrics = self._metrics["train"]
        if rows:
            metrics["causal_loss/value"].append(value / rows)
        metrics["causal_loss/rows"].append(rows / count)
        metrics["causal_loss/weight"].append(self.causal_weight)

    def _causal_values(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        packed = {name.removeprefix(_PREFIX): tensor for name, tensor in inputs.items() if name.startswith(_PREFIX)}
        return causal_values(
            model,
            packed,
            self._causal_loss,
            links=len(self._causal_links),
            takes=self._causal_takes,
            autocast=self.accelerator.autocast,
        )
