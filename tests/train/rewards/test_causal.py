"""Protects the contract with TRL: what CausalReward takes from a trainer, gives back, and leaves alone."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from cepo import CausalReward, RewardConfig, argmax_reward, format_reward
from cepo.train import testbed, testbed_model
from cepo.train.policy import items_dataset
from cepo.train.rewards.peers import CausalImportance

ITEMS = testbed.generate_items(8, seed=5, cue_agreement=0.5)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return testbed.build_tokenizer()


def make_trainer(kind: str, tokenizer: Any, rewards: list[Any], folder: Path, **settings: Any) -> Any:
    trainer, config = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    arguments = config(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        beta=0.0,  # no reference model
        **settings,
    )
    model = testbed_model.build_model(tokenizer, seed=0)
    return trainer(
        model=model,
        reward_funcs=rewards,
        args=arguments,
        train_dataset=items_dataset(ITEMS),
        eval_dataset=items_dataset(ITEMS[:2]) if "eval_strategy" in settings else None,
        processing_class=tokenizer,
    )


def rows(tokenizer: Any, items: list[testbed.Item]) -> dict[str, Any]:
    """What TRL would hand a reward function for gold completions."""
    return {
        "prompts": [[{"role": "user", "content": item.prompt}] for item in items],
        "completions": [[{"role": "assistant", "content": item.completion}] for item in items],
        "completion_ids": [[*tokenizer(item.completion)["input_ids"], tokenizer.eos_token_id] for item in items],
        "label": [item.label for item in items],
    }


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_real_step_scores_the_prompts_that_were_generated_from(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    reward = CausalReward(links={"X->Y": 1.0}, counterfactuals=1)
    trainer = make_trainer(kind, tokenizer, [format_reward, argmax_reward, reward], tmp_path)
    assert reward.bind(trainer) is reward
    generated, scored = [], []
    generate, read = trainer.model.generate, reward._reader.read

    def record_generation(*args: Any, **kwargs: Any) -> Any:
        for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            generated.append(ids[mask.bool()].tolist())
        return generate(*args, **kwargs)

    def record_reading(prompt_ids: Any, completion_ids: Any, messages: Any) -> Any:
        scored.append(list(prompt_ids))
        return read(prompt_ids, completion_ids, messages)

    trainer.model.generate, reward._reader.read = record_generation, record_reading
    trainer.train()
    assert scored == generated
    assert len(scored) == 4
    logs = {key: value for log in trainer.state.log_history for key, value in log.items()}
    assert logs["causal/malformed"] == 1.0  # four random tokens are no judgement, and that is counted, not raised
    assert logs["rewards/causal/mean"] == 0.0


@pytest.mark.parametrize("opened", [False, True])
def test_every_reward_is_told_what_the_chat_template_opens(tokenizer: Any, tmp_path: Path, opened: bool) -> None:
    """TRL's messages do not show it; rewards that read text alone get it as a column, and so does a fused task."""
    told: list[Any] = []

    def task(completions: Any, **columns: Any) -> list[float]:
        told.append(columns.get("thought_opened"))
        return [1.0] * len(completions)

    thinking = testbed.build_tokenizer()
    thinking.add_tokens(["<think>"])
    thinking.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    reward = CausalReward(score="influence", task=task)
    trainer = make_trainer("grpo", thinking if opened else tokenizer, [task, reward], tmp_path)
    reward.bind(trainer).bind(trainer)
    trainer.train()
    assert told == ([[True] * 4] * 2 if opened else [None, [False] * 4])


def test_gold_completions_are_scored_and_every_component_is_logged(tokenizer: Any, tmp_path: Path) -> None:
    reward = CausalReward(
        links={"X->Y": 1.0, "Z->X": 0.5}, score="influence", counterfactuals=2, also=("phi", "order_leak")
    )
    trainer = make_trainer("grpo", tokenizer, [reward], tmp_path)
    reward.bind(trainer)
    trainer.model.train()
    metrics: dict[str, float] = {}
    extra: dict[str, list[Any]] = {}
    weights = {name: value.clone() for name, value in trainer.model.named_parameters()}
    values = reward(**rows(tokenizer, ITEMS), log_metric=metrics.__setitem__, log_extra=extra.__setitem__)
    assert len(values) == len(ITEMS)
    assert all(value is not None and 0.0 < value <= 1.0 for value in values)
    for link in ("X->Y", "Z->X"):
        for field in ("value", "phi", "retained", "influence", "norm", "tokens"):
            assert metrics[f"causal/{link}/{field}"] > 0.0
        assert len(extra[f"causal S {link}"]) == len(ITEMS)
    assert metrics["causal/malformed"] == 0.0
    assert metrics["causal/order_leak"] == pytest.approx(sum(extra["causal order leak"]) / len(ITEMS))
    assert metrics["causal/order_leak/unknown"] == 0.0
    assert trainer.model.training
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.named_parameters())


def test_the_live_policy_is_scored_and_the_frozen_scorer_is_not_moved_by_it(tokenizer: Any, tmp_path: Path) -> None:
    frozen = testbed_model.build_model(tokenizer, seed=1)
    live, fixed = CausalReward(), CausalReward(scorer=frozen, name="fixed")
    trainer = make_trainer("grpo", tokenizer, [live, fixed], tmp_path)
    batch = rows(tokenizer, ITEMS[:2])
    before = live.bind(trainer)(**batch), fixed.bind(trainer)(**batch)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.3)
    after = live(**batch), fixed(**batch)
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_the_task_gets_all_that_trl_passes_and_logs_what_it_logs_alone(tokenizer: Any, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []

    def task(completions: Any, **given: Any) -> Any:
        told.append(given)
        return argmax_reward(completions, **given)

    reward = CausalReward(RewardConfig.paper(links={"X->Y": 1.0}, score="influence_retained"), task=task)
    reward.bind(make_trainer("grpo", tokenizer, [reward], tmp_path))
    metrics: dict[str, float] = {}
    one_word = replace(ITEMS[1], criteria=ITEMS[1].criteria.split()[0])
    batch, state = rows(tokenizer, [ITEMS[0], one_word]), object()
    reward(**batch, trainer_state=state, log_metric=metrics.__setitem__, log_extra=lambda name, values: None)
    assert told[0].keys() == {*batch, "trainer_state", "log_metric", "log_extra", "thought_opened"} - {"completions"}
    assert (told[0]["completion_ids"], told[0]["trainer_state"]) == (batch["completion_ids"], state)
    assert metrics["argmax/ties_on_preferences"] == 0.0
    assert metrics["causal/X->Y/without_permutation"] == 0.5


def test_ce_po_form_fuses_the_task_reward_and_passes_its_none_on(tokenizer: Any, tmp_path: Path) -> None:
    reward = CausalReward(RewardConfig.paper(counterfactuals=1, p=1.0, score="influence"), task=argmax_reward)
    trainer = make_trainer("grpo", tokenizer, [reward], tmp_path)
    batch = rows(tokenizer, ITEMS[:2])
    right = reward.bind(trainer)(**batch)
    wrong = reward(**{**batch, "label": ["B" if label == "A" else "A" for label in batch["label"]]})
    for with_task, without in zip(right, wrong, strict=True):
        assert with_task is not None
        assert without is not None
        assert with_task - without == pytest.approx(0.7)  # weights sum to 1, p = 1
    reward.task = lambda **_: [None, 1.0]
    assert reward(**batch)[0] is None


def test_donors_come_from_the_step_and_are_logged(tokenizer: Any, tmp_path: Path) -> None:
    """The default compares with other prompts of the step, whatever its order; how many had none is logged."""
    reward = CausalReward(score="explained")
    trainer = make_trainer("grpo", tokenizer, [reward], tmp_path)
    metrics: dict[str, float] = {}
    together = reward.bind(trainer)(**rows(tokenizer, ITEMS), log_metric=metrics.__setitem__)
    assert together == pytest.approx(reward(**rows(tokenizer, ITEMS[::-1]))[::-1])
    assert max(map(float, together)) > 0.0
    for link in ("criteria->analysis", "analysis->scores"):
        assert metrics[f"causal/{link}/without_donor"] == metrics[f"causal/{link}/immovable"] == 0.0
        assert metrics[f"causal/{link}/delta"] != 0.0
        assert metrics[f"causal/{link}/same_verdict"] < 1.0
    assert metrics["causal/chain/value"] == pytest.approx(sum(map(float, together)) / len(together))
    assert reward(**rows(tokenizer, ITEMS[:1])) == [0.0]
    assert reward(**rows(tokenizer, []), log_metric=metrics.__setitem__) == []
    alike = [item for item in ITEMS if item.label == "A"]
    reward(**rows(tokenizer, alike), log_metric=metrics.__setitem__)
    assert metrics["causal/analysis->scores/same_verdict"] == 1.0  # no donor can reveal what caused the verdict


def test_one_prompt_at_a_time_has_no_donors_and_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    reward = CausalReward()
    trainer = make_trainer("grpo", tokenizer, [reward], tmp_path)
    trainer.args.generation_batch_size = trainer.num_generations
    with pytest.raises(ValueError, match="generates for 1 prompt at a time.*no_donor='permute'"):
        reward.bind(trainer)
    CausalReward(no_donor="permute").bind(trainer)


def test_evaluation_of_one_prompt_at_a_time_is_refused_too(tokenizer: Any, tmp_path: Path) -> None:
    """Its causal reward would be 0 at every evaluation, whatever the policy has learned."""
    reward = CausalReward()
    sizes = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    trainer = make_trainer("grpo", tokenizer, [reward], tmp_path, **sizes)
    with pytest.raises(ValueError, match="generates for 1 prompt at a time.*per_device_eval_batch_size"):
        reward.bind(trainer)
    trainer.args.per_device_eval_batch_size = 4
    reward.bind(trainer)
    trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_causal/malformed"] == 1.0


def test_rewards_do_not_depend_on_batch_or_order(tokenizer: Any, tmp_path: Path) -> None:
    """To 1e-6: prompts that run as one batch are padded to one length, and sums are rounded in another order."""
    reward = CausalReward(RewardConfig.paper(counterfactuals=2))
    reward.bind(make_trainer("grpo", tokenizer, [reward], tmp_path))
    together = reward(**rows(tokenizer, ITEMS))
    backwards = reward(**rows(tokenizer, ITEMS[::-1]))
    alone = [reward(**rows(tokenizer, [item]))[0] for item in ITEMS]
    assert together == pytest.approx(alone, abs=1e-6)
    assert backwards[::-1] == pytest.approx(alone, abs=1e-6)


def test_the_shuffled_control_logs_how_many_had_no_other_completion(tokenizer: Any, tmp_path: Path) -> None:
    """Two prompts of two completions and one of one: four rewards change places, and one of five is its own."""
    batch = rows(tokenizer, ITEMS[:6])
    batch["prompts"] = [batch["prompts"][place] for place in (0, 0, 2, 2, 4, 4)]
    batch["completion_ids"][5] = batch["completion_ids"][5][:3]  # malformed: it keeps its 0
    settings: dict[str, Any] = {"links": {"X->Y": 1.0}, "score": "influence"}  # rewards that differ
    plain, control = CausalReward(**settings), CausalReward(**settings, shuffle=True, name="control")
    trainer = make_trainer("grpo", tokenizer, [plain, control], tmp_path)
    metrics: dict[str, float] = {}
    honest, found = plain.bind(trainer)(**batch), control.bind(trainer)(**batch, log_metric=metrics.__setitem__)
    assert len(set(honest)) == 6
    assert found == [honest[place] for place in (1, 0, 3, 2, 4, 5)]
    assert metrics["control/shuffle/alone"] == pytest.approx(1 / 5)


def test_two_rewards_of_one_name_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    """TRL files metrics by the function's name, so that the means would be of both."""
    first, second = CausalReward(), CausalReward(score="influence")
    trainer = make_trainer("grpo", tokenizer, [first, second], tmp_path)
    with pytest.raises(ValueError, match="2 reward functions are named 'causal'.*give one another name"):
        first.bind(trainer)


def test_it_pickles_and_a_copy_must_be_bound_anew(tokenizer: Any, tmp_path: Path) -> None:
    reward = CausalReward(counterfactuals=1)
    trainer = make_trainer("grpo", tokenizer, [reward], tmp_path)
    batch = rows(tokenizer, ITEMS[:2])
    values = reward.bind(trainer)(**batch)
    copy = pickle.loads(pickle.dumps(reward))
    with pytest.raises(ValueError, match="not bound"):
        copy(**batch)
    assert copy.bind(trainer)(**batch) == values


def test_fsdp1_is_refused_with_the_way_out(tokenizer: Any, tmp_path: Path) -> None:
    reward = CausalReward()
    trainer = make_trainer("grpo", tokenizer, [reward], tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"FSDP1.*fsdp_version: 2.*scorer"):
        reward.bind(trainer)


def test_what_the_policy_did_not_write_and_images_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    """Tools and environments put their results into completion_ids, and rewards get no mask."""
    for reward in (CausalReward(), CausalImportance()):
        for attribute, given in (("tools", [print]), ("environment_factories", {None: print})):
            trainer = make_trainer("grpo", tokenizer, [reward], tmp_path)
            setattr(trainer, attribute, given)
            with pytest.raises(ValueError, match=f"trainer has {attribute[:11]}.*no mask"):
                reward.bind(trainer)
        trainer = make_trainer("grpo", tokenizer, [reward], tmp_path)
        trainer.train_dataset = trainer.train_dataset.add_column("images", [[]] * len(trainer.train_dataset))
        with pytest.raises(ValueError, match="train_dataset has the column 'images'"):
            reward.bind(trainer)


def test_a_rollout_functions_own_prompt_ids_are_read_and_what_it_masks_is_malformed(
    tokenizer: Any, tmp_path: Path
) -> None:
    """It renders prompts as it likes: rendered anew by the trainer, each completion would be scored after another."""
    gold = dict(zip((item.prompt for item in ITEMS), rows(tokenizer, ITEMS)["completion_ids"], strict=True))
    own, seen = list(tokenizer("clarity ?")["input_ids"]), []

    def rollout(prompts: Any, trainer: Any) -> dict[str, Any]:
        ids = [[*tokenizer.apply_chat_template(prompt)["input_ids"], *own] for prompt in prompts]
        completions = [gold[prompt[-1]["content"]] for prompt in prompts]
        masks = [[1] * len(completion) for completion in completions]
        masks[0][2] = 0  # a tool's
        logprobs = [[0.0] * len(completion) for completion in completions]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": logprobs, "env_mask": masks}

    reward, other = CausalReward(score="explained"), CausalImportance()

    def watched(**columns: Any) -> Any:
        scored = reward(**columns)
        seen.append((columns["rollout_prompt_ids"], scored, columns))
        return scored

    trainer = make_trainer("grpo", tokenizer, [watched, other], tmp_path)
    trainer.rollout_func = rollout
    for each in (reward, other, reward):
        each.bind(trainer)
    trainer.train()
    ((ids, scored, columns),) = seen
    assert all(each[-len(own) :] == own for each in ids)
    assert scored[0] == 0.0
    assert any(value > 0.0 for value in scored)
    assert trainer.state.log_history[0]["cir/malformed"] == 0.25
    rendered = {name: column for name, column in columns.items() if name != "rollout_prompt_ids"}
    assert reward(**rendered)[1:] != scored[1:]


def test_the_policy_is_looked_up_at_each_call(tokenizer: Any, tmp_path: Path) -> None:
    """A trainer may wrap its model after the reward was bound."""
    reward = CausalReward(score="explained")
    trainer = make_trainer("grpo", tokenizer, [reward], tmp_path)
    batch = rows(tokenizer, ITEMS)
    before = reward.bind(trainer)(**batch)
    trainer.model = testbed_model.build_model(tokenizer, seed=1)
    assert reward(**batch) != before


def test_settings_are_refused_before_any_model() -> None:
    for settings, complaint in (
        ({"links": {"X->Q": 1.0}}, "unknown span 'Q'"),
        ({"counterfactuals": -1}, r"counterfactuals \(K\)"),
        ({"p": float("nan")}, "p is NaN"),
        ({"links": {"X->Y": -1.0}}, "links, by weight"),
        ({"score": "size"}, "score is 'size'"),
        ({"rank": -1}, "rank is -1"),
    ):
        with pytest.raises(ValueError, match=complaint):
            CausalReward(**settings)  # type: ignore[arg-type]
