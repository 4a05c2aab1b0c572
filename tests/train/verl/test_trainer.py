"""The causal reward inside verl on two CPU ranks: verl's own trainer, worker group, FSDP2 engine and queue.

What is not run here: rollouts by vLLM, which are written by hand, and NCCL.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed; make test-verl runs these", allow_module_level=True)

HERE = Path(__file__).parent
# Before verl is imported, and for the processes that Ray starts.
os.environ |= {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "cpu_platform", "TRANSFER_QUEUE_ENABLE": "1"}
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[2])])
sys.path.insert(0, str(HERE))

import ray  # noqa: E402
import transfer_queue  # noqa: E402
import verl  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput  # noqa: E402
from verl.trainer.ppo.reward import get_custom_reward_fn  # noqa: E402
from verl.trainer.ppo.utils import need_critic, need_reference_policy  # noqa: E402
from verl.trainer.ppo.v1.trainer_base import get_trainer_cls  # noqa: E402
from verl.utils.config import validate_config  # noqa: E402
from verl.utils.tensordict_utils import list_of_dict_to_tensordict  # noqa: E402
from verl.workers.rollout.llm_server import LLMServerManager  # noqa: E402

from cepo.jacobian.loading import load_model, resolve_model  # noqa: E402
from cepo.jacobian.reading.spans import SpanReader  # noqa: E402
from cepo.train import testbed  # noqa: E402
from cepo.train.config import TrainConfig  # noqa: E402
from cepo.train.verl.config import write_verl_run  # noqa: E402
from cepo.train.verl.rewards import read_rewards  # noqa: E402
from cepo.train.verl.trainer import CausalTrainer  # noqa: E402

ITEMS = testbed.generate_items(4, seed=5, cue_agreement=0.5)
FP32 = "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
ON_A_CPU = (
    "actor_rollout_ref.rollout.calculate_log_probs=false",
    "+actor_rollout_ref.model.override_config.attn_implementation=eager",
    "actor_rollout_ref.model.use_remove_padding=false",
    "actor_rollout_ref.actor.use_torch_compile=false",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
    f"+actor_rollout_ref.actor.fsdp_config.mixed_precision={FP32}",
    "trainer.n_gpus_per_node=2",
    "data.dataloader_num_workers=0",
    "reward.num_workers=1",
    "transfer_queue.enable=true",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
)


@pytest.fixture(scope="module")
def config(judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what verl makes of the files that we write."""
    output = tmp_path_factory.mktemp("verl") / "run"
    run = TrainConfig(
        model=str(judge),
        data={"source": "testbed", "count": 16, "test_count": 2},
        output=str(output),
        rewards=[
            {"name": "format"},
            {"name": "argmax"},
            {"name": "causal", "weight": 0.5, "score": "explained", "sharded": "step"},
        ],
        grpo={
            "num_generations": 2,
            "per_device_train_batch_size": 8,
            "max_steps": 3,
            "multi_objective_aggregation": "normalize_then_sum",
            "gradient_checkpointing": False,
            "report_to": "none",
        },
    )
    write_verl_run(run)
    with initialize_config_dir(str(output), version_base=None):
        composed = compose("verl", overrides=list(ON_A_CPU))
    OmegaConf.resolve(composed)
    return composed


def test_verl_takes_every_setting_that_is_written(config: Any) -> None:
    """hydra would take a misspelt key without a word, so each is looked up in verl's own file."""
    validate_config(config, need_reference_policy(config), need_critic(config))
    theirs = OmegaConf.load(Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml")
    ours = OmegaConf.load(Path(config.trainer.default_local_dir) / "verl.yaml")
    added = {"actor_rollout_ref.cepo_recipe", "reward.custom_reward_function.reward_kwargs"}
    written = dotted({key: ours[key] for key in ours if key not in ("hydra", "defaults")}, theirs)
    assert set(written) - added == set()
    assert get_trainer_cls(config.trainer.v1.trainer_mode) is CausalTrainer  # by the entry point


def dotted(node: Any, theirs: Any, prefix: str = "") -> Iterator[str]:
    """Yield the keys that verl's configuration lacks."""
    for key, value in node.items():
        if key not in theirs and not OmegaConf.is_missing(theirs, key):
            yield f"{prefix}{key}"
        elif isinstance(value, dict) or OmegaConf.is_dict(value):
            yield from dotted(value, theirs[key], f"{prefix}{key}.")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("actor_rollout_ref.actor.strategy", "fsdp"),
        ("actor_rollout_ref.model.use_fused_kernels", True),
        ("actor_rollout_ref.actor.ulysses_sequence_parallel_size", 2),
        ("actor_rollout_ref.rollout.multi_turn.enable", True),
    ],
)
def test_settings_under_which_the_policy_is_not_read_are_refused(key: str, value: Any, config: Any) -> None:
    changed = OmegaConf.create(OmegaConf.to_container(config))
    OmegaConf.update(changed, key, value)
    with pytest.raises(ValueError, match=f"{key} is {value!r}"):
        CausalTrainer(changed)


@pytest.fixture(scope="module")
def step(config: Any) -> Iterator[SimpleNamespace]:
    """Return what a step of verl's trainer does with seven completions of four prompts, one of them malformed."""
    ray.init(num_cpus=16, num_gpus=2, include_dashboard=False)  # of the GPUs verl asks Ray alone
    transfer_queue.init(config.transfer_queue)
    trainer = CausalTrainer(config)
    trainer._enable_hybrid_replicas = False
    with pytest.MonkeyPatch.context() as patched:  # no server of vLLM's generates
        patched.setattr(LLMServerManager, "create_empty", lambda **_: SimpleNamespace(get_replicas=list))
        trainer._setup()
    trainer.timing_raw, trainer.global_steps = {}, 1
    rows = rollouts(trainer.tokenizer, get_custom_reward_fn(config))
    tags = [
        {
            "prompt_len": len(row["prompts"]),
            "response_len": len(row["responses"]),
            "seq_len": len(row["input_ids"]),
            "global_steps": 1,
            "min_global_steps": 1,
            "max_global_steps": 1,
        }
        for row in rows
    ]
    keys = [f"{row['uid']}_{row['session_id']}_0" for row in rows]
    transfer_queue.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(rows), tags=tags)
    batch = transfer_queue.KVBatchMeta(partition_id="train", keys=list(keys), tags=list(tags))
    metrics: dict[str, Any] = {}
    batch.extra_info["temperature"] = 1.0
    batch = trainer._balance_batch(batch, metrics)  # pads to eight, and changes the order
    batch = trainer._compute_old_log_prob(batch, metrics)
    batch = trainer._compute_advantage(batch, metrics)
    fields = ["cepo_scores", "rm_scores", "advantages"]
    found = transfer_queue.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=fields)
    trainer._update_actor(batch, metrics)
    by_key = {
        key: SimpleNamespace(score=pickle.loads(score), reward=float(reward.sum()), advantage=float(advantage[-1]))
        for key, score, reward, advantage in zip(
            batch.keys,
            list(found["cepo_scores"]),
            found["rm_scores"].unbind(),
            found["advantages"].unbind(),
            strict=True,
        )
    }
    yield SimpleNamespace(
        keys=keys, rows=rows, found=by_key, metrics=metrics, recipe=config.actor_rollout_ref.cepo_recipe
    )
    transfer_queue.close()
    ray.shutdown()


def rollouts(tokenizer: Any, compute_score: Any) -> list[dict[str, Any]]:
    """Return completions as verl's agent loop writes them: the gold one of each prompt, and that of another."""
    rows = []
    for place, item in enumerate(ITEMS):
        messages = [{"role": "user", "content": item.prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        for session in range(2 if place else 1):
            text = "" if (place, session) == (1, 1) else ITEMS[(place + session) % len(ITEMS)].completion
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            scored = compute_score(
                data_source="cepo",
                solution_str=tokenizer.decode(ids, skip_special_tokens=True),
                ground_truth=item.label,
                extra_info={"thought_opened": False},
            )
            row = AgentLoopOutput(
                prompt_ids=list(prompt),
                response_ids=ids,
                response_mask=[1] * len(ids),
                reward_score=scored["score"],
                num_turns=2,
                metrics=AgentLoopMetrics(),
                extra_fields={"reward_extra_info": scored},
            ).as_dict()
            input_ids = torch.cat([row["prompts"], row["responses"]])
            rows.append(
                {
                    **row,
                    "uid": f"prompt{place}",
                    "session_id": session,
                    "raw_prompt": messages,
                    "input_ids": input_ids,
                    "position_ids": torch.arange(len(input_ids)),
                    "loss_mask": row["response_mask"],
                    "multi_modal_inputs": {},
                }
            )
    return rows


def test_two_ranks_find_the_scores_of_one_process(step: SimpleNamespace, judge: Path) -> None:
    """Donors not gathered over ranks, or a shard taken for the whole, would give other values."""
    model, tokenizer = load_model(resolve_model(str(judge)))
    causal = read_rewards(step.recipe).causal
    reader = SpanReader(tokenizer, causal.layout)
    read = [reader.read(row["prompts"].tolist(), row["responses"].tolist(), row["raw_prompt"]) for row in step.rows]
    alone = causal.score(read, reader, model)
    assert len({score.reward for score in alone}) > 3
    for key, score in zip(step.keys, alone, strict=True):
        assert step.found[key].score.reward == pytest.approx(score.reward, abs=1e-6)
        assert step.found[key].score.malformed == score.malformed
        for link, record in score.links.items():
            assert step.found[key].score.links[link].delta == pytest.approx(record.delta, abs=1e-5)


def test_all_rewards_are_added_where_verl_reads_them(step: SimpleNamespace) -> None:
    rewards = read_rewards(step.recipe)
    texts = [row["extra_fields"]["reward_extra_info"] for row in step.rows]
    rewards_BN = torch.tensor(
        [
            [text["format_reward"], text["argmax_reward"], step.found[key].score.reward]
            for key, text in zip(step.keys, texts, strict=True)
        ]
    )
    total_B = rewards.total(rewards_BN, [row["uid"] for row in step.rows])
    found_B = torch.tensor([step.found[key].reward for key in step.keys])
    torch.testing.assert_close(found_B, total_B, rtol=1e-5, atol=1e-5)
    advantages_B = torch.tensor([step.found[key].advantage for key in step.keys])
    assert advantages_B[1:].abs().max() > 0.1
    # The sum is standardised; verl takes the mean of a prompt's completions off, which is 0, and a lone one stands.
    torch.testing.assert_close(advantages_B[1:], total_B[1:], rtol=1e-4, atol=1e-4)


def test_metrics_count_what_is_malformed_and_leave_padding_out(step: SimpleNamespace) -> None:
    (padded,) = (found for key, found in step.found.items() if key not in step.keys)
    assert padded.reward == 0.0
    assert step.metrics["causal/malformed"] == pytest.approx(1 / 7)
    rewards = [step.found[key].score.reward for key in step.keys]
    assert step.metrics["rewards/causal/mean"] == pytest.approx(sum(rewards) / 7)
    assert step.metrics["rewards/argmax_reward/mean"] > 0.0
    assert "causal/criteria->analysis/delta" in step.metrics


def test_the_policy_is_updated_afterwards(step: SimpleNamespace) -> None:
    """Reading the policy leaves it sharded, trainable and as verl's engine expects it."""
    assert 0.0 < step.metrics["actor/grad_norm"] < float("inf")
