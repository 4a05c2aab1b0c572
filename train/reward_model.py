"""`cepo reward-model`: reward models by TRL's RewardTrainer, with ties beside preferences. All contact with it is here.

The loss of a pair with difference D, chosen less rejected, is -log sigma(D) for a preference and
-(log sigma(D) + log sigma(-D))/2 for a tie, the least, log 2, at D = 0, with the gradient tanh(D/2)/2. (The equation as
printed in the source has the other sign, which would push ties apart without end.)

Source: Srivastava et al., Robust Reward Modeling via Causal Rubrics (arXiv 2506.16507), Eq. 2, with the sign put right.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import RewardConfig, RewardTrainer

from cepo.files import write_jsonl
from cepo.jacobian.loading import load_tokenizer, model_fingerprint, resolve_model
from cepo.jacobian.reward_model import HEAD, Form, as_batch, load_reward_model, read_last_token
from cepo.train import reward_testbed, testbed
from cepo.train.pair_encoding import TEMPLATE, PairEncoder, Shown
from cepo.train.policy import TESTBED
from cepo.train.recipe import decisive, read_recipe, trainer_arguments
from cepo.train.reward_data import EncodedPairs, encode_pairs, load_pairs, told
from cepo.train.reward_testbed import build_reward_model, reward_model_fingerprint
from cepo.train.run import lora_config, train_to_end

logger = logging.getLogger(__name__)

LEFT_OUT = "left_out.jsonl"
# Fields of TRL's RewardConfig that would change texts, which are encoded here.
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
        tie_weight: lambda, the weight of a tie's loss beside a preference's, at least 0.
        reward: any field of TRL's RewardConfig; pairs with a text over its `max_length` are left out.
        lora: any field of peft's LoraConfig, or None to train all weights; the head is trained and saved whole.
        dtype: dtype of the weights: float32, bfloat16, float16.
        seed: of the split, the testbed's data and model, a new head, and training.
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
    dtype: str = "float32"
    seed: int = 0
    threads: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.tie_weight, int | float) or not self.tie_weight >= 0:
            raise ValueError(f"tie_weight is {self.tie_weight!r}; expected a number >= 0")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}; expected float32, bfloat16 or float16")
        taken = [name for name in _OURS if name in self.reward]
        if taken:
            raise ValueError(f"reward holds {', '.join(taken)}; texts are encoded with the model's own tokenizer alone")

    @property
    def shown(self) -> Shown:
        """What the model is shown of a pair."""
        default = reward_testbed.TEMPLATE if self.model == TESTBED else TEMPLATE
        return Shown(self.form, self.template or default, self.chat_template_kwargs)


def load_reward_config(path: str | Path, overrides: Mapping[str, Any]) -> RewardModelConfig:
    """Return the run that a YAML file describes, see `read_recipe`."""
    return read_recipe(RewardModelConfig, path, overrides, needed=("model", "data", "output"))


def train_reward_model(config: RewardModelConfig, *, fresh: bool = False) -> Path:
    """Train a reward model, starting from the last complete checkpoint in the output folder if there is one.

    Args:
        config: the run.
        fresh: start from nothing, and refuse an output that already holds checkpoints.

    Returns:
        Folder of the trained model (the adapter and the head, with LoRA).

    Raises:
        ValueError: for anything about the run that cannot work, or an output of other settings, data or weights.
    """
    arguments = trainer_arguments(RewardConfig, "reward", config.reward, output=config.output, seed=config.seed)
    lora = _lora(config)
    tokenizer = testbed.build_tokenizer() if config.model == TESTBED else _tokenizer(config)
    encoder = PairEncoder(tokenizer, config.shown, max_length=arguments.max_length)
    pairs = load_pairs(config.data, seed=config.seed)
    train, test = encode_pairs(pairs.train, encoder), encode_pairs(pairs.test, encoder)
    left_out = [*pairs.left_out, *train.left_out, *test.left_out]
    if not train.rows:
        raise ValueError(f"data leaves no pair to train on: {told(left_out)}")
    if left_out:
        logger.warning("%d pair(s) are left out: %s; %s names them", len(left_out), told(left_out), LEFT_OUT)

    def build() -> RewardTrainer:
        if arguments.process_index == 0:
            write_jsonl(Path(config.output) / LEFT_OUT, [{"id": name, "reason": reason} for name, reason in left_out])
        return _trainer(config, arguments, encoder, train, test, lora)

    return train_to_end(build, arguments, _settings(config, train, test), fresh=fresh)


def composite_loss(difference: Tensor, tie: Tensor, tie_weight: float = 1.0) -> Tensor:
    """Return the loss of each pair, in nats.

    Args:
        difference: D, reward of chosen less that of rejected, any shape.
        tie: whether a pair is a tie, broadcast to that shape.
        tie_weight: lambda, at least 0.
    """
    right, wrong = nn.functional.logsigmoid(difference), nn.functional.logsigmoid(-difference)
    return torch.where(tie, -tie_weight * (right + wrong) / 2, -right)


class PairTrainer(RewardTrainer):
    """TRL's RewardTrainer on encoded pairs, of which some are ties.

    The numbers of the first texts of all pairs come first, then those of the second. A Bradley-Terry pair has one D; a
    pairwise one has a D for each order, and its loss is their mean.

    Logged: `accuracy` and `margin` (mean D) over preferences alone, `tie_difference` (mean |D|) over ties alone,
    `tie_share`, and the least, mean and largest number of a text.

    Args:
        shown: what the model is shown.
        tie_weight: see `composite_loss`.
        options: RewardTrainer's own.
    """

    def __init__(self, *, shown: Shown, tie_weight: float, **options: Any) -> None:
        self._shown, self._tie_weight = shown, tie_weight
        super().__init__(data_collator=collate, **options)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean composite loss of a batch from `collate`, with the model's outputs where asked."""
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
        """Add what TRL logs the mean of: an entry per pair, so that the mean is over pairs and not over batches."""
        gather = self.accelerator.gather_for_metrics
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._total_train_tokens += int(gather(inputs["attention_mask"].sum()).sum())
        difference_NO, tie_N = gather(difference_NO), gather(inputs["tie"])
        logits = self.accelerator.gather(logits.float())  # two per pair, which `gather_for_metrics` would cut off
        preferred = difference_NO[~tie_N].flatten()
        metrics = self._metrics[mode]
        metrics["num_tokens"] = [self._total_train_tokens]
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
        self._shown.write(Path(output_dir or self.args.output_dir))


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return a batch: ids and mask of all first texts and then all second ones, and which pairs are ties."""
    ids_BT, mask_BT = as_batch([row[name] for name in ("chosen_ids", "rejected_ids") for row in rows])
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "tie": torch.tensor([row["tie"] for row in rows])}


def _trainer(
    config: RewardModelConfig, arguments: Any, encoder: PairEncoder, train: EncodedPairs, test: EncodedPairs, lora: Any
) -> PairTrainer:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.model == TESTBED:
        model, tokenizer = build_reward_model(config.form, seed=config.seed)
    else:
        model, tokenizer = load_reward_model(
            resolve_model(config.model),
            config.form,
            dtype=config.dtype,
            seed=config.seed,
            trust_remote_code=config.trust_remote_code,
        )
    return PairTrainer(
        shown=config.shown,
        tie_weight=config.tie_weight,
        model=read_last_token(model, encoder.verdict_ids),
        args=arguments,
        train_dataset=Dataset.from_list(list(train.rows)),
        eval_dataset=Dataset.from_list(list(test.rows)) if arguments.eval_strategy != "no" and test.rows else None,
        processing_class=tokenizer,
        peft_config=lora,
    )


def _lora(config: RewardModelConfig) -> Any:
    if config.lora is None or config.form == "pairwise":
        return lora_config(config.lora)
    return lora_config({"task_type": "SEQ_CLS", "modules_to_save": [HEAD], **config.lora})


def _tokenizer(config: RewardModelConfig) -> Any:
    return load_tokenizer(resolve_model(config.model), trust_remote_code=config.trust_remote_code)


def _settings(config: RewardModelConfig, train: EncodedPairs, test: EncodedPairs) -> dict[str, Any]:
    """Return all that decides the trained weights except the number of steps; data and weights by their content."""
    settings = asdict(config)
    for elsewhere in ("output", "model", "data", "trust_remote_code"):
        del settings[elsewhere]
    return {
        "command": "reward-model",
        **settings,
        "reward": decisive(config.reward),
        "weights": reward_model_fingerprint(config.form, seed=config.seed)
        if config.model == TESTBED
        else model_fingerprint(resolve_model(config.model)),
        "data": train.fingerprint,
        "test_data": test.fingerprint,
    }
