"""Protects `cepo reward-model`: the loss of ties, what is read where, what is left out, and runs that go on."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from trl import RewardConfig, RewardTrainer

from cepo.cli.app import main
from cepo.jacobian.loading import load_model, resolve_model
from cepo.jacobian.reward_model import load_reward_model, new_head, read_last_token, rewards
from cepo.train import run as train_run
from cepo.train.pair_encoding import PairEncoder, Shown, read_shown
from cepo.train.pair_trainer import PairTrainer, collate, composite_loss
from cepo.train.recipe import read_recipe, trainer_arguments
from cepo.train.reward_config import RewardModelConfig
from cepo.train.reward_data import encode_pairs, load_pairs
from cepo.train.reward_model import train_reward_model
from cepo.train.reward_scores import RewardModel
from cepo.train.reward_testbed import TEMPLATE, build_reward_model
from tests.paths import ROOT

RECIPES = sorted((ROOT / "train" / "recipes").glob("reward-model-*.yaml"))
KINDS = ["original", "degrade", "upgrade", "irrelevant"]
TINY = {"max_steps": 3, "per_device_train_batch_size": 4, "save_steps": 1, "report_to": "none", "learning_rate": 1e-2}


def config(output: Path, **changes: Any) -> RewardModelConfig:
    settings: dict[str, Any] = {
        "model": "testbed",
        "data": {"source": "testbed", "count": 24, "kinds": KINDS, "test_fraction": 0.3},
        "output": str(output),
        "threads": 1,
        "reward": TINY,
        "template": TEMPLATE,
    }
    return RewardModelConfig(**(settings | changes))


# The loss


def test_a_ties_loss_is_that_of_both_orders_halved() -> None:
    """TRL's own loss, on the same logits, once as they are and once with the pairs turned round."""
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64)
    both = [trl_loss(torch.cat(order)) for order in ((chosen, rejected), (rejected, chosen))]
    tie = torch.ones(6, dtype=torch.bool)
    assert float(composite_loss(chosen - rejected, tie).mean()) == pytest.approx(sum(both) / 2, abs=1e-15)
    assert float(composite_loss(chosen - rejected, ~tie).mean()) == pytest.approx(both[0], abs=1e-15)
    assert torch.equal(composite_loss(chosen - rejected, tie, 3.0), 3.0 * composite_loss(chosen - rejected, tie))
    assert torch.equal(composite_loss(chosen - rejected, ~tie, 3.0), composite_loss(chosen - rejected, ~tie))


def trl_loss(rewards_2N: Tensor) -> float:
    """The loss that TRL's RewardTrainer computes of given rewards."""
    trainer = object.__new__(RewardTrainer)

    class Answers(nn.Module):
        def forward(self, **_: Any) -> Any:
            return type("Output", (), {"logits": rewards_2N.unsqueeze(-1)})

    trainer.model = Answers()
    trainer.args = RewardConfig("unused", report_to=[], use_cpu=True, bf16=False)
    trainer.accelerator = type("Alone", (), {"gather": lambda _, it: it, "gather_for_metrics": lambda _, it: it})()
    trainer._metrics = {"train": __import__("collections").defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    return float(trainer.compute_loss(trainer.model, {"attention_mask": torch.ones(1)}))


def test_a_ties_gradient_is_half_the_hyperbolic_tangent_and_the_printed_sign_fails() -> None:
    """The least is log 2, at no difference. With the sign as printed, the gradient would push ties apart."""
    difference = torch.linspace(-9, 9, 37, dtype=torch.float64, requires_grad=True)
    loss = composite_loss(difference, torch.tensor(True))
    (gradient,) = torch.autograd.grad(loss.sum(), [difference])
    assert torch.allclose(gradient, torch.tanh(difference / 2) / 2, rtol=0, atol=1e-15)
    assert float(loss.detach().min()) == pytest.approx(math.log(2), abs=1e-15)
    assert int(loss.argmin()) == 18
    assert torch.autograd.gradcheck(lambda it: composite_loss(it, torch.tensor(True)), [difference])

    def printed(difference: Tensor) -> Tensor:
        return (nn.functional.logsigmoid(difference) + nn.functional.logsigmoid(-difference)) / 2

    (wrong,) = torch.autograd.grad(printed(difference).sum(), [difference])
    assert torch.allclose(wrong, -gradient, atol=1e-15)
    assert float(printed(difference).argmax()) == 18, "no difference would be its worst case"


# The contract with TRL


def test_trls_trainer_still_is_what_ours_extends() -> None:
    """Each name that `PairTrainer` overrides or reads; a new TRL that renames one is noticed here."""
    for name in ("compute_loss", "_set_signature_columns_if_needed", "_prepare_dataset", "_save", "log"):
        assert callable(getattr(RewardTrainer, name))
    known = RewardConfig.__dataclass_fields__
    assert {"max_length", "center_rewards_coefficient", "eos_token", "pad_token", "chat_template_path"} <= set(known)


@pytest.mark.parametrize("form", ["bradley-terry", "pairwise"])
def test_the_trainers_loss_and_measures_are_those_of_the_pairs(form: Any, tmp_path: Path) -> None:
    """Accuracy and margin over preferences alone, ties apart; a pairwise pair counts in both orders."""
    trainer, encoder, rows = pair_trainer(form, tmp_path, center_rewards_coefficient=0.0)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, collate(rows))
    numbers = rewards(trainer.model, [row[name] for row in rows for name in ("chosen_ids", "rejected_ids")])
    first, second = torch.tensor(numbers[::2]), torch.tensor(numbers[1::2])
    ties = torch.tensor([row["tie"] for row in rows])
    assert 0 < ties.sum() < len(ties)
    orders = [(first - second)] if form == "bradley-terry" else [first, -second]
    expected = torch.stack([composite_loss(order, ties) for order in orders]).mean()
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-6)
    logged = {name: sum(values) / len(values) for name, values in trainer._metrics["eval"].items()}
    preferred = torch.cat([order[~ties] for order in orders])
    assert logged["accuracy"] == pytest.approx(float((preferred > 0).float().mean()))
    assert logged["margin"] == pytest.approx(float(preferred.mean()), abs=1e-6)
    tied = torch.cat([order[ties].abs() for order in orders])
    assert logged["tie_difference"] == pytest.approx(float(tied.mean()), abs=1e-6)
    assert logged["tie_share"] == pytest.approx(float(ties.float().mean()))
    mean_of_orders = encoder.shown.differences(numbers)
    assert torch.allclose(torch.tensor(mean_of_orders), torch.stack(orders).mean(0), atol=1e-6)


def pair_trainer(form: Any, folder: Path, **settings: Any) -> tuple[PairTrainer, PairEncoder, list[dict[str, Any]]]:
    from datasets import Dataset

    model, tokenizer = build_reward_model(form, seed=0)
    encoder = PairEncoder(tokenizer, Shown(form, TEMPLATE))
    pairs = load_pairs({"source": "testbed", "count": 6, "kinds": KINDS}, seed=0).train
    rows = list(encode_pairs(pairs, encoder).rows)
    arguments = trainer_arguments(RewardConfig, "reward", {**TINY, **settings}, output=str(folder), seed=0)
    trainer = PairTrainer(
        shown=encoder.shown,
        tie_weight=1.0,
        model=read_last_token(model, encoder.verdict_ids),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return trainer, encoder, rows


# Runs


def test_killed_and_started_again_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that died after its second step ends as one that was let alone; finished, it trains nothing more."""
    broken, output = config(tmp_path / "broken"), tmp_path / "broken"
    final = tmp_path / "whole"
    train_reward_model(broken)
    (output / "final").rename(final)
    whole = logged(output)
    shutil.rmtree(output / "checkpoint-3")
    with pytest.raises(ValueError, match="tie_weight was 1.0 and is 2.0"):
        train_reward_model(replace(broken, tie_weight=2.0))
    with pytest.raises(ValueError, match="already holds checkpoints"):
        train_reward_model(broken, fresh=True)
    resumed = train_reward_model(broken)
    trained, again = load_file(final / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    assert [line["step"] for line in whole] == [1, 2, 3]
    assert logged(output) == whole, "tokens are counted from the first step on, as everything is"
    left_out = [json.loads(line) for line in (output / "left_out.jsonl").read_text().splitlines()]
    assert all("the responses differ in what the prompt asks" in row["reason"] for row in left_out)
    with monkeypatch.context() as patched:
        patched.setattr(train_run, "run_trainer", lambda *_: pytest.fail("a finished run was trained again"))
        assert train_reward_model(broken) == resumed
    assert read_shown(resumed) == broken.shown


def logged(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("form", ["bradley-terry", "pairwise"])
def test_lora_is_saved_with_its_head_and_scores_as_it_was_trained(
    form: Any, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of the live model at the end and of the one that is loaded again are equal to the last bit."""
    held: list[Any] = []
    original = PairTrainer.train
    monkeypatch.setattr(PairTrainer, "train", lambda self, **given: held.append(self) or original(self, **given))
    final = train_reward_model(config(tmp_path, form=form, model=str(judge), lora={"r": 2, "lora_alpha": 4}))
    live = held[0].model.eval()
    loaded = RewardModel.open(str(final))
    pair = ["Query: help with this exam"], ["Response: correct so"], ["Response: wrong"]
    difference = loaded.differences(*pair).values_N
    assert difference == RewardModel(live, loaded.encoder).differences(*pair).values_N
    fresh, _ = load_reward_model(resolve_model(str(judge)), form)
    fresh = read_last_token(fresh, loaded.encoder.verdict_ids)
    assert difference != RewardModel(fresh, loaded.encoder).differences(*pair).values_N
    weights = load_file(final / "adapter_model.safetensors")
    assert any("score" in name for name in weights) == (form == "bradley-terry")


def test_pairs_that_cannot_be_told_apart_are_counted_and_named(tmp_path: Path, caplog: Any, capsys: Any) -> None:
    """Nothing is lost in silence: too long, equal after encoding, not kept, unreadable, each with its id."""
    tie = {"prompt": "Query: help with this exam", "chosen": "Response: correct", "rejected": "Response: wrong"}
    rows: list[dict[str, Any]] = [
        {**tie, "id": "good"},
        {**tie, "id": "tie", "tie": "True", "weight": "a column that plays no part", "checks": 3},
        {**tie, "id": "long", "chosen": "Response:" + " correct" * 90},
        {**tie, "id": "equal", "chosen": "Response: unheard", "rejected": "Response: unseen"},
        {**tie, "id": "dropped", "kept": False, "reason": "base difference 3.2"},
        {**tie, "id": "odd", "tie": "yes"},
        {**tie, "id": "elsewhere", "split": "dev"},
        {"id": "empty", "prompt": "?"},
        {**tie, "id": "held out", "split": "test"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(path), "test_fraction": 0.0}
    evaluated = {**TINY, "max_length": 64, "max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings = config(tmp_path / "out", data=data, reward=evaluated)
    train_reward_model(settings)
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    (held_out,) = (line for line in logged if "eval_accuracy" in line)
    assert held_out["eval_tie_share"] == 0.0
    assert "eval_tie_difference" not in held_out, "one pair was held out, and it is no tie"
    left_out = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    reasons = {row["id"]: row["reason"] for row in left_out}
    assert reasons["long"] == "too long: 101 tokens, over max_length 64"
    assert reasons["equal"].startswith("equal after encoding")
    assert reasons["dropped"] == "not kept: base difference 3.2"
    assert reasons["row 6"] == "column 'tie' holds 'yes'; expected true or false"
    assert "split is 'dev'" in reasons["row 7"]
    assert "chosen" in reasons["row 8"]
    assert len(left_out) == 6
    assert "6 pairs left out" in caplog.text
    with pytest.raises(ValueError, match="leaves no pair to train on: too long"):
        train_reward_model(replace(settings, output=str(tmp_path / "none"), reward={**TINY, "max_length": 3}))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_run(recipe: Path) -> None:
    run = read_recipe(RewardModelConfig, recipe, {})
    trainer_arguments(RewardConfig, "reward", run.reward, output=run.output, seed=run.seed)
    assert run.shown.form in ("bradley-terry", "pairwise")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--set", "form=poem"], "form is 'poem'"),
        (["--set", "tie_weight=-1"], "tie_weight is -1"),
        (["--set", "reward.warp=9"], "reward holds warp, which TRL's RewardConfig does not have"),
        (["--set", "reward.pad_token=x"], "reward holds pad_token"),
        (["--set", "form=pairwise", "--set", "template=none"], "lacks {prompt}"),
        (["--set", "data.colour=1"], "data holds the unknown key colour; expected some of source, test_fraction"),
        (["--set", "data.kinds=[poem]"], "kinds holds 'poem'"),
        (["--set", "data.ties=maybe"], "ties is 'maybe'"),
        (["--set", "data.ties=true"], 'data.ties is True; expected "true", unchecked or wrong'),
        (["--set", "data.count=many"], "data.count is 'many'; expected an integer"),
        (["--set", "data.kinds=original"], "data.kinds is 'original'; expected a list"),
        (["--set", "data.cue_agreement=high"], "data.cue_agreement is 'high'; expected a number"),
        (["--set", "data.test_fraction=2"], "data.test_fraction is 2; expected a fraction"),
        (["--set", "data.source=3"], "data.source is 3; expected text"),
        (["--set", "data={source: p.jsonl, limit: all}"], "data.limit is 'all'; expected an integer or null"),
        (["--set", "data={source: p.jsonl, split: 1}"], "data.split is 1; expected text or null"),
        (
            ["--set", "data={source: p.jsonl, columns: [prompt]}"],
            "data.columns is ['prompt']; expected a mapping or null",
        ),
        (["--set", "data={source: nowhere.jsonl}"], "nowhere.jsonl"),
        (["--set", "lora={rank: 4}"], "lora holds the unknown key rank"),
        (["--set", "seed=abc"], "seed is 'abc'; expected an integer"),
    ],
)
def test_bad_settings_end_in_one_paragraph_and_exit_code_2(
    options: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    recipe = ROOT / "train" / "recipes" / "reward-model-testbed.yaml"
    monkeypatch.setattr(sys, "argv", ["cepo", "reward-model", str(recipe), "--output", str(tmp_path / "run"), *options])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


def test_texts_that_the_model_has_no_positions_for_are_left_out(tmp_path: Path) -> None:
    """Learned positions end: the step that met such a text raised an IndexError, and the run was lost."""
    _, tokenizer = build_reward_model("bradley-terry", seed=0)
    names = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 24}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **names)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pair = {"prompt": "Query: help with this exam", "chosen": "Response: correct", "rejected": "Response: wrong"}
    rows = [{**pair, "id": "short"}, {**pair, "id": "long", "chosen": "Response:" + " correct" * 24}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(tmp_path / "pairs.jsonl"), "test_fraction": 0.0}
    for asked in ({}, {"max_length": None}):
        output = tmp_path / f"out-{len(asked)}"
        train_reward_model(config(output, model=str(tmp_path / "model"), data=data, reward={**TINY, **asked}))
        (left_out,) = map(json.loads, (output / "left_out.jsonl").read_text().splitlines())
        assert left_out["id"] == "long"
        assert left_out["reason"].endswith("over max_length 24")


def test_an_encoder_decoder_is_refused(judge: Path) -> None:
    """It needs inputs for its decoder too; transformers asked for them in its own words, in the middle of a run."""
    causal, _ = load_model(resolve_model(str(judge)))
    classifier = new_head(causal, seed=0)
    classifier.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="an encoder-decoder; expected a decoder-only model"):
        read_last_token(classifier)


def test_a_classifier_with_more_outputs_is_refused(judge: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    causal, tokenizer = load_model(resolve_model(str(judge)))
    causal.config.num_labels = 2
    AutoModelForSequenceClassification.from_config(causal.config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_reward_model(resolve_model(str(tmp_path)), "bradley-terry")
    with pytest.raises(ValueError, match="with 2 outputs; expected a sequence classifier with one"):
        read_last_token(model)
    with pytest.raises(ValueError, match="expected a causal LM for form pairwise"):
        load_reward_model(resolve_model(str(tmp_path)), "pairwise")
