"""Protects the contract with TRL: a GRPO step with the causal loss, whole or accumulated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel
from trl import GRPOConfig

from cepo import CausalReward, format_reward
from cepo.jacobian.reading.judge import write_judgement
from cepo.train import testbed, testbed_model
from cepo.train.causal_loss import CausalLoss, divergence
from cepo.train.causal_trainer import CausalTrainer
from cepo.train.policy import items_dataset

ITEMS = testbed.generate_items(4, seed=5, cue_agreement=0.5)
RATE = 0.5  # of plain gradient descent: weights before and after tell the gradient


def make_trainer(
    folder: Path,
    loss: CausalLoss,
    *,
    completions: Any = None,
    rewards: Any = (format_reward,),
    lora: bool = False,
    dtype: Any = None,
    **settings: Any,
) -> CausalTrainer:
    """A trainer that generates the gold completion of each prompt, so that TRL's own loss is 0 by equal rewards."""
    tokenizer = testbed.build_tokenizer()
    model = testbed_model.build_model(tokenizer, seed=0).to(dtype or torch.float64)
    arguments = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        **{
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": [],
            "per_device_train_batch_size": 8,
            "num_generations": 2,
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "optim": "sgd",
            "learning_rate": RATE,
            "max_grad_norm": 0.0,
            **settings,
        },
    )
    trainer = CausalTrainer(
        model=model,
        reward_funcs=list(rewards),
        args=arguments,
        train_dataset=items_dataset(ITEMS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear") if lora else None,
        causal_loss=loss,
        task_rewards=[],
    )
    gold = {item.prompt: [*tokenizer(item.completion)["input_ids"], tokenizer.eos_token_id] for item in ITEMS}

    def generate(prompt_ids: Any, *_: Any) -> Any:
        prompts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompt_ids]
        return (completions or (lambda ids: ids))([gold[prompt] for prompt in prompts]), None

    trainer._generate_single_turn = generate
    return trainer


def trained(trainer: CausalTrainer) -> tuple[list[torch.Tensor], dict[str, float]]:
    trainer.train()
    logs = {key: value for log in trainer.state.log_history for key, value in log.items()}
    return [weight.detach().clone() for weight in trainer.model.parameters()], logs


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", ["divergence", "interchange"])
def test_the_step_follows_the_gradient_of_the_term_alone_and_accumulates_to_it(objective: Any, tmp_path: Path) -> None:
    """One batch of 8 or two of 4: the same weights, and for divergence those of the loss computed by hand."""
    loss = CausalLoss(weight=0.02, objective=objective)
    whole = make_trainer(tmp_path, loss)
    before = [weight.detach().clone() for weight in whole.model.parameters()]
    kept = {}
    inner = whole._compute_loss

    def keeping(model: Any, inputs: Any) -> Any:
        kept.update(inputs)
        return inner(model, inputs)

    whole._compute_loss = keeping
    weights, logs = trained(whole)
    halves, half_logs = trained(
        make_trainer(tmp_path, loss, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    )
    assert_same(weights, halves)
    for of_run in (logs, half_logs):
        assert of_run["causal_loss/rows"] == 1.0
        assert of_run["causal_loss/weight"] == 0.02
    assert half_logs["causal_loss/value"] == pytest.approx(logs["causal_loss/value"], rel=1e-6)
    moved = [after - b for after, b in zip(weights, before, strict=True)]
    with torch.no_grad():
        after = float(whole._causal_values(whole.model, kept)[0].mean())
    assert (after > logs["causal_loss/value"]) == (objective == "divergence")  # a small step goes the right way
    if objective == "divergence":
        model = testbed_model.build_model(whole.processing_class, seed=0).double()
        ids, targets = kept["causal_ids_BRT"], kept["causal_targets_BRT"]
        values = []
        for (own, donor), (target, _) in zip(ids, targets, strict=True):
            start = int((own != whole.processing_class.pad_token_id).long().argmax())
            read = [model(input_ids=text[None, start:]).logits[:, :-1] for text in (own, donor)]
            values.append(divergence(*read, target[None, start + 1 :]))
        value = torch.cat(values).mean()
        assert logs["causal_loss/value"] == pytest.approx(value.item(), rel=1e-6)
        for gradient, m in zip(torch.autograd.grad(value, list(model.parameters())), moved, strict=True):
            torch.testing.assert_close(m, RATE * 0.02 * gradient, rtol=1e-4, atol=1e-11)  # up: TRL's loss less the term


def test_completions_without_a_donor_count_as_zero_and_none_at_all_is_no_error(tmp_path: Path) -> None:
    def break_half(completions: list[list[int]]) -> list[list[int]]:
        return [ids if place < 4 else ids[:5] for place, ids in enumerate(completions)]

    _, logs = trained(make_trainer(tmp_path, CausalLoss(objective="divergence"), completions=break_half))
    assert logs["causal_loss/rows"] == 0.5
    _, logs = trained(make_trainer(tmp_path, CausalLoss(), completions=lambda all_: [ids[:5] for ids in all_]))
    assert logs["causal_loss/rows"] == 0.0
    assert "causal_loss/value" not in logs


def test_the_logged_value_is_the_mean_over_completions_with_a_donor_accumulated_or_not(tmp_path: Path) -> None:
    """Batches of 2 that hold 2, 1, 1 and 1 completions with a donor: a mean of the batches' means is another number."""

    def break_some(completions: list[list[int]]) -> list[list[int]]:
        return [ids if place in (0, 2, 4, 5, 6) else ids[:5] for place, ids in enumerate(completions)]

    loss, found = CausalLoss(weight=0.0), []
    for batches in (1, 4):
        sizes = {"per_device_train_batch_size": 8 // batches, "gradient_accumulation_steps": batches}
        found.append(trained(make_trainer(tmp_path, loss, completions=break_some, **sizes))[1])
    assert found[0]["causal_loss/rows"] == found[1]["causal_loss/rows"] == 0.625
    assert found[0]["causal_loss/value"] == pytest.approx(found[1]["causal_loss/value"], rel=1e-6)


def test_only_completions_that_earned_a_fused_task_are_interchanged(tmp_path: Path) -> None:
    """The first prompt's two are right: they donate to the six others, and have no donor themselves."""
    reward = CausalReward(task=lambda completions, **_: [1.0, 1.0, 0.0, None, *[0.2] * 4])
    trainer = make_trainer(tmp_path, CausalLoss(), rewards=[reward])
    reward.bind(trainer)
    assert trained(trainer)[1]["causal_loss/rows"] == 0.75


def test_a_model_with_learned_positions_reads_no_text_beyond_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long criteria and a donor's long analysis would make a text that GPT-2 has no positions for."""
    monkeypatch.setattr(testbed_model, "build_model", tiny_gpt2)
    contents = [(" correct" * 12, " lucid"), (" correct", " lucid" * 12)]
    written = [testbed.build_tokenizer()(write_judgement(*each, (7, 3)))["input_ids"] for each in contents]
    trainer = make_trainer(tmp_path, CausalLoss(donors=9), completions=lambda _: written * 4)
    assert trained(trainer)[1]["causal_loss/rows"] == 0.5  # those with short criteria read either donor


def tiny_gpt2(tokenizer: Any, seed: int) -> Any:
    marks = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    shape = {"n_positions": 68, "n_embd": 16, "n_layer": 1, "n_head": 2}
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **marks))


def test_batches_of_one_prompt_are_refused_since_no_completion_has_a_donor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for 1 prompt at a time.* or set causal_loss to null"):
        make_trainer(tmp_path, CausalLoss(), per_device_train_batch_size=2)


def test_a_lora_step_in_bfloat16_autocast_moves_the_adapters_and_nothing_else(tmp_path: Path) -> None:
    loss = CausalLoss(weight=5.0, objective="interchange", donors=2)
    trainer = make_trainer(tmp_path, loss, lora=True, bf16=True, dtype=torch.float32, gradient_checkpointing=True)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    _, logs = trained(trainer)
    assert logs["causal_loss/value"] > 0.0
    for name, value in trainer.model.named_parameters():
        assert ("lora_B" in name) == (not torch.equal(value, before[name])), name
