"""The configuration of `cepo reward-model`: its keys and values, checked without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cepo.fusion.settings import check_settings
from cepo.jacobian.reward_form import Form
from cepo.train.config import TESTBED
from cepo.train.pair_encoding import TEMPLATE, Shown
from cepo.train.recipe import Dtype
from cepo.train.reward_data import check_pairs

# Fields of TRL's RewardConfig that may not be set, since texts are encoded here and not by TRL.
_OURS = ("eos_token", "pad_token", "chat_template_path", "model_init_kwargs")


@dataclass(frozen=True)
class RewardModelConfig:
    """A training run of a reward model.

    Attributes:
        model: hub id, folder, .gguf file, "smollm2" or "testbed": a causal language model, or a sequence classifier
            with one output.
        data: `source` and its options, see `cepo.train.reward_data.load_pairs`.
        output: folder of the run: checkpoints, metrics.jsonl, left_out.jsonl, log.txt, settings.json, final/.
        form: see `Shown`.
        template: see `Shown`; None for its default, or the testbed's.
        chat_template_kwargs: see `Shown`.
        tie_weight: lambda, the weight of a tie's loss relative to a preference's, at least 0.
        reward: any field of TRL's RewardConfig; pairs with a text over its `max_length`, or over the model's
            positions, are left out.
        lora: any field of peft's LoraConfig, or None to train all weights; a classifier's head is always trained whole.
        dtype: dtype of the weights: float32, bfloat16, float16.
        seed: seed of the split, the testbed's data and model, a new head, and training.
        threads: CPU threads, or None for torch's choice.
        trust_remote_code: whether a hub repository's own code may run.
    """

    model: str
    data: Mapping[str, Any]
    output: str
    form: Form = "bradley-terry"
    template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tie_weight: float = 1.0
    reward: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None
    dtype: Dtype = "float32"
    seed: int = 0
    threads: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_settings("", vars(self), RewardModelConfig)
        check_pairs(self.data)
        if not self.tie_weight >= 0:
            raise ValueError(f"tie_weight is {self.tie_weight!r}; expected a number >= 0")
        taken = [name for name in _OURS if name in self.reward]
        if taken:
            raise ValueError(f"reward holds {', '.join(taken)}; the model's own tokenizer is always used")

    @property
    def shown(self) -> Shown:
        """What the model is shown of a pair."""
        default = TEMPLATE
        if self.model == TESTBED:
            from cepo.train import reward_testbed  # imports torch, which the checks do not wait for

            default = reward_testbed.TEMPLATE
        return Shown(self.form, self.template or default, self.chat_template_kwargs)
