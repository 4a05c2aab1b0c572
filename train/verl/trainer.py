"""The causal reward in verl's GRPO: workers score rollouts under the live policy, and the trainer adds the rewards.

verl imports this module by the entry point `verl.plugins`; `trainer.v1.trainer_mode=cepo` chooses the trainer.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import ray
import torch
import transfer_queue
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.debug import marked_timer
from verl.workers.engine_workers import ActorRolloutRefWorker

from cepo.fusion.score import RolloutScore
from cepo.jacobian.reading.spans import SpanReader
from cepo.train.verl.rewards import read_rewards

_SCORES = "cepo_scores"  # the field in which workers put a pickled RolloutScore per rollout
_NEEDED = {
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 1,
    "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": 1,
    "actor_rollout_ref.model.use_fused_kernels": False,
    "actor_rollout_ref.rollout.multi_turn.enable": False,
    "algorithm.adv_estimator": "grpo",
}


class CausalWorker(ActorRolloutRefWorker):
    """verl's worker, which also scores rollouts.

    `config.cepo_recipe` (in verl's configuration `actor_rollout_ref.cepo_recipe`) is the path of the recipe.
    """

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Build the policy, and check that it can be differentiated.

        Raises:
            ValueError: as `CausalReward.check`.
        """
        super().init_model()
        self._rewards = read_rewards(self.config.cepo_recipe)
        self._reader = SpanReader(self.actor.model_config.tokenizer, self._rewards.causal.layout)
        with self.actor.engine.eval_mode():
            self._rewards.causal.check(self.actor.engine.module)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_policy_signal(self, data: TensorDict) -> TensorDict:
        """Return the score of each rollout of this rank; donors are gathered over all ranks.

        Args:
            data: `prompts` and `responses`, nested tensors of the ids as sampled; `raw_prompt`, the messages; and
                `extra_fields`, which hold what the reward function returned.

        Returns:
            For each rollout a `RolloutScore` without its tensors, pickled, since the queue turns dataclasses into
            dicts.
        """
        causal = self._rewards.causal
        rollouts = [
            self._reader.read(prompt.tolist(), completion.tolist(), list(messages))
            for prompt, completion, messages in zip(
                data["prompts"].unbind(), data["responses"].unbind(), data["raw_prompt"], strict=True
            )
        ]
        tasks = None
        if causal.task is not None:
            tasks = [fields["reward_extra_info"][self._rewards.task] for fields in data["extra_fields"]]
        with self.actor.engine.eval_mode():
            scores = causal.score(rollouts, self._reader, self.actor.engine.module, task_rewards=tasks)
        kept = NonTensorStack(*(pickle.dumps(replace(score, paths={}, jacobians={})) for score in scores))
        return TensorDict({_SCORES: kept}, batch_size=len(scores))


@register_trainer("cepo")
class CausalTrainer(PPOTrainerSync):
    """verl's synchronous trainer with a recipe's rewards, including the causal one.

    The reward of a completion is put at its last token, in verl's field `rm_scores`.

    Raises:
        ValueError: for settings with which the policy cannot be read, or completions may hold other text than its own.
    """

    def __init__(self, config: DictConfig) -> None:
        for key, needed in _NEEDED.items():
            if (came := OmegaConf.select(config, key)) != needed:
                raise ValueError(f"{key} is {came!r}; the causal reward needs {needed!r}")
        self._rewards = read_rewards(config.actor_rollout_ref.cepo_recipe)
        config.trainer.v1.trainer_mode = "sync"  # verl chooses the buffer and the checkpoint's content by this name
        super().__init__(config)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            if str(role).startswith("actor"):
                self.role_worker_mapping[role] = ray.remote(CausalWorker)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        with marked_timer("causal", self.timing_raw, color="purple"):
            self.actor_rollout_wg.compute_policy_signal(batch)
            self._add_rewards(batch, metrics)
        return super()._compute_advantage(batch, metrics)

    def _add_rewards(self, batch: Any, metrics: dict[str, Any]) -> None:
        """Store the sum of the rewards where verl reads it, and log each reward's mean."""
        rewards = self._rewards
        data = transfer_queue.kv_batch_get(
            keys=batch.keys,
            partition_id=batch.partition_id,
            select_fields=["uid", "response_mask", "extra_fields", _SCORES],
        )
        real = [row for row, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
        scores: list[RolloutScore] = [pickle.loads(list(data[_SCORES])[row]) for row in real]
        texts = [list(data["extra_fields"])[row]["reward_extra_info"] for row in real]
        rewards_BN = torch.tensor(
            [
                [score.reward if name == rewards.causal.__name__ else text[name] for name in rewards.names]
                for score, text in zip(scores, texts, strict=True)
            ]
        )
        total_B = torch.zeros(len(batch.keys))
        total_B[real] = rewards.total(rewards_BN, [list(data["uid"])[row] for row in real])
        placed = [torch.zeros_like(mask, dtype=torch.float32) for mask in data["response_mask"].unbind()]
        for row, total in zip(placed, total_B, strict=True):
            row[-1] = total
        fields = TensorDict(
            {"rm_scores": torch.nested.as_nested_tensor(placed, layout=torch.jagged)}, batch_size=len(placed)
        )
        transfer_queue.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
        for name, mean in zip(rewards.names, rewards_BN.mean(0).tolist(), strict=True):
            metrics[f"rewards/{name}/mean"] = mean
        tasks = [text[rewards.task] for text in texts] if rewards.causal.task is not None else None
        rewards.causal.log(metrics.__setitem__, scores, tasks)
