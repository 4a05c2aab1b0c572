"""`cepo reward-model`: train reward models with TRL's RewardTrainer, on ties as well as preferences."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from cepo.files import counted
from cepo.jacobian.loading import load_tokenizer, model_fingerprint, resolve_model
from cepo.jacobian.positions import position_limit
from cepo.jacobian.reward_model import HEAD, load_reward_model, read_last_token
from cepo.train import testbed
from cepo.train.config import TESTBED
from cepo.train.left_out import LEFT_OUT, write_left_out
from cepo.train.pair_encoding import PairEncoder
from cepo.train.prompt_length import text_config
from cepo.train.ranks import failing_together
from cepo.train.recipe import decisive, trainer_arguments
from cepo.train.repeats import warn_of_repeats
from cepo.train.reward_config import RewardModelConfig
from cepo.train.reward_data import EncodedPairs, encode_pairs, load_pairs, told
from cepo.train.reward_testbed import build_reward_model, reward_model_fingerprint
from cepo.train.run import lora_config, require_trl, train_to_end

logger = logging.getLogger(__name__)


def train_reward_model(config: RewardModelConfig, *, fresh: bool = False) -> Path:
    """Train a reward model, starting from the last complete checkpoint in the output folder if there is one.

    Args:
        config: the run.
        fresh: start from scratch, and refuse an output that already holds checkpoints.

    Returns:
        Folder of the trained model (with LoRA, of the adapter and the head).

    Raises:
        ValueError: for settings, data or a model that cannot work, or an output with other settings, data or weights.
    """
    require_trl()
    from trl import RewardConfig

    arguments = trainer_arguments(RewardConfig, "reward", config.reward, output=config.output, seed=config.seed)
    if arguments.fsdp or arguments.deepspeed_plugin is not None:
        raise ValueError("reward shards the model (fsdp, deepspeed); expected a model that is whole on each rank")
    lora = _lora(config)
    with failing_together():
        tokenizer = testbed.build_tokenizer() if config.model == TESTBED else _tokenizer(config)
        encoder = PairEncoder(tokenizer, config.shown, max_length=_max_length(config, arguments.max_length))
        pairs = load_pairs(config.data, seed=config.seed)
        train, test = encode_pairs(pairs.train, encoder), encode_pairs(pairs.test, encoder)
        settings = _settings(config, train, test)
    left_out = [*pairs.left_out, *train.left_out, *test.left_out]
    if not train.rows:
        raise ValueError(f"data leaves no pair to train on: {told(left_out)}")
    if left_out and arguments.process_index == 0:
        logger.warning("%s left out: %s; see %s", counted(len(left_out), "pair"), told(left_out), LEFT_OUT)
    if arguments.process_index == 0:
        warn_of_repeats((one.prompt, one.chosen, one.rejected) for one in (*pairs.train, *pairs.test) if not one.tie)

    def build() -> Any:
        if arguments.process_index == 0:
            write_left_out(Path(config.output), left_out)
        return _trainer(config, arguments, encoder, train, test, lora)

    return train_to_end(build, arguments, settings, fresh=fresh)


def _trainer(
    config: RewardModelConfig, arguments: Any, encoder: PairEncoder, train: EncodedPairs, test: EncodedPairs, lora: Any
) -> Any:
    from cepo.train.pair_trainer import PairTrainer

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


def _max_length(config: RewardModelConfig, asked: int | None) -> int | None:
    """Return the most tokens of a text: as asked, and no more than the model has positions for, as when it is used."""
    if config.model == TESTBED:
        return asked
    own = text_config(resolve_model(config.model), trust_remote_code=config.trust_remote_code)
    limits = (asked, position_limit(own))
    return min((limit for limit in limits if limit is not None), default=None)


def _tokenizer(config: RewardModelConfig) -> Any:
    return load_tokenizer(resolve_model(config.model), trust_remote_code=config.trust_remote_code)


def _settings(config: RewardModelConfig, train: EncodedPairs, test: EncodedPairs) -> dict[str, Any]:
    """Return what determines the trained weights, except the number of steps; data and weights by their content."""
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
