"""TRL's RewardTrainer for pairs, with ties as well as preferences.

The loss of a pair with difference D, chosen minus rejected, is -log sigma(D) for a preference. For a tie it is
-(log sigma(D) + log sigma(-D))/2, with gradient tanh(D/2)/2 and minimum log 2 at D = 0. (The equation as printed in the
source has the opposite sign, which would push ties apart without bound.)

Source: Srivastava et al., Robust Reward Modeling via Causal Rubrics (arXiv 2506.16507), Eq. 2, with the sign corrected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl import RewardTrainer

from cepo.jacobian.reward_model import as_batch
from cepo.train.pair_encoding import Shown


class PairTrainer(RewardTrainer):
    """TRL's RewardTrainer for encoded pairs, some of which may be ties.

    A batch holds the first texts of all pairs, then the second ones. A Bradley-Terry pair has one D. A pairwise pair
    has one D per order, and its loss is the mean of both.

    Logged: `accuracy` and `margin` (mean D) over preferences, `tie_difference` (mean |D|) over ties, `tie_share`, the
    smallest, mean and largest number of a text (mean over batches), and `num_tokens` since the first step.

    Args:
        shown: what the model is shown.
        tie_weight: see `composite_loss`.
        options: options of RewardTrainer.
    """

    def __init__(self, *, shown: Shown, tie_weight: float, **options: Any) -> None:
        self._shown, self._tie_weight = shown, tie_weight
        super().__init__(data_collator=collate, **options)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean composite loss of a batch from `collate`, with the model's outputs if asked for."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        first_N, second_N = outputs.logits.squeeze(-1).float().chunk(2)
        if self._shown.form == "bradley-terry":
            difference_NO = (first_N - second_N).unsqueeze(-1)
        else:
            difference_NO = torch.stack([first_N, -second_N], dim=-1)
        loss = composite_loss(difference_NO, inputs["tie"].unsqueeze(-1), self._tie_weight).mean()
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * ((first_N + second_N) ** 2).mean()
        self._record(outputs.logits.detach(), difference_NO.detach(), inputs)
        return (loss, outputs) if return_outputs else loss

    def _record(self, logits: Tensor, difference_NO: Tensor, inputs: dict[str, Any]) -> None:
        """Add one entry per pair to the metrics that TRL averages, so that the mean is over pairs, not over batches."""
        gather = self.accelerator.gather_for_metrics
        mode = "train" if self.model.training else "eval"
        # The state is a checkpoint's, so a resumed run goes on counting; TRL's own count begins at 0 again.
        if mode == "train" and self.args.include_num_input_tokens_seen == "no":
            self.state.num_input_tokens_seen += int(gather(inputs["attention_mask"].sum()).sum())
        difference_NO, tie_N = gather(difference_NO), gather(inputs["tie"])
        logits = self.accelerator.gather(logits.float())  # two per pair, which `gather_for_metrics` would cut off
        preferred = difference_NO[~tie_N].flatten()
        metrics = self._metrics[mode]
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        for name, values in {
            "accuracy": (preferred > 0).float(),
            "margin": preferred,
            "tie_difference": difference_NO[tie_N].flatten().abs(),
            "tie_share": tie_N.float(),
            "min_reward": logits.min(),
            "mean_reward": logits.mean(),
            "max_reward": logits.max(),
        }.items():
            if values.numel():  # a batch without ties says nothing about them
                metrics[name] += values.reshape(-1).tolist()

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen_ids", "rejected_ids", "tie"]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # on the first rank only
            self._shown.write(Path(output_dir or self.args.output_dir))


def composite_loss(difference: Tensor, tie: Tensor, tie_weight: float = 1.0) -> Tensor:
    """Return the loss of each pair, in nats.

    Args:
        difference: D, reward of chosen minus that of rejected, any shape.
        tie: whether a pair is a tie, broadcast to that shape.
        tie_weight: lambda, at least 0.
    """
    right, wrong = nn.functional.logsigmoid(difference), nn.functional.logsigmoid(-difference)
    return torch.where(tie, -tie_weight * (right + wrong) / 2, -right)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return a batch: ids and mask (2 N, T) of all first texts, then all second texts; and which pairs are ties."""
    ids_BT, mask_BT = as_batch([row[name] for name in ("chosen_ids", "rejected_ids") for row in rows])
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "tie": torch.tensor([row["tie"] for row in rows])}
