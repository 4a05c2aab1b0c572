"""Protects `cepo train`: settings are checked early, and a killed run ends with an uninterrupted run's weights."""

import contextlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, GPT2Config

from cepo.cli.app import main
from cepo.jacobian.loading import load_model, load_tokenizer, resolve_model
from cepo.jacobian.reading.guard import Guard
from cepo.jacobian.reading.judge import write_judgement
from cepo.train import testbed, testbed_judges, testbed_model
from cepo.train.config import TrainConfig
from cepo.train.grpo import build_causal_loss, build_rewards, grpo_arguments, load_config, train
from cepo.train.policy import load_testbed_judge
from cepo.train.prompt_length import prompt_check
from cepo.train.prompts import JUDGE
from cepo.train.run import last_complete_checkpoint
from tests.paths import ROOT

RECIPES = [path for path in sorted((ROOT / "train" / "recipes").rglob("*.yaml")) if "reward-model" not in path.stem]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge warmed up just enough to write partly right forms, so that rewards differ and gradients flow."""
    folder = tmp_path_factory.mktemp("judge")
    torch.set_num_threads(1)
    tokenizer = testbed.build_tokenizer()
    model = testbed_model.build_model(tokenizer, seed=0)
    testbed_judges.warm_start(model, tokenizer, judge="lazy", steps=40, batch_size=16, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_config(path: Path, judge: Path, **changes: Any) -> Path:
    config = {
        "model": str(judge),
        "output": str(path.parent / "run"),
        "threads": 1,
        "data": {"source": "testbed", "count": 16, "test_count": 4},
        "rewards": [{"name": "format"}, {"name": "argmax"}, {"name": "causal", "counterfactuals": 1}],
        "grpo": {
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 40,
            "learning_rate": 1e-3,
            "save_steps": 1,
            "report_to": [],
        },
        **changes,
    }
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cepo", "train", str(config), "--output", str(output)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_killed_and_started_again_ends_with_the_same_weights(
    judge: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "config.yaml", judge)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    victim = start(config, broken)
    deadline = time.monotonic() + 300
    while last_complete_checkpoint(broken) is None and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    reached = last_complete_checkpoint(broken)
    assert reached is not None
    assert int(reached.name.split("-")[1]) < 4, "the run was over before it could be killed"
    for output in (broken, whole):
        capfd.readouterr()
        train(load_config(config, {"output": str(output)}))
        told = capfd.readouterr().err
        assert f"goes to {output / 'log.txt'}" in told  # before the first step, which may take minutes
        assert "causal reward" in told  # the progress bar
        assert "'rewards/causal/mean'" not in told
        assert "'rewards/causal/mean'" in (output / "log.txt").read_text()
    trained = load_file(whole / "final" / "model.safetensors")
    resumed = load_file(broken / "final" / "model.safetensors")
    untrained = load_file(judge / "model.safetensors")
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)
    assert any(not torch.equal(trained[name], untrained[name]) for name in trained)
    logs = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in logs] == [1, 2, 3, 4]  # each step once, none lost, none doubled
    for log in (log for log in logs if "time/step" in log):  # where the seconds of a step go
        parts = [log[f"time/{part}"] for part in ("generation", "rewards", "policy_update")]
        assert all(part > 0.0 for part in parts)
        assert sum(parts) <= log["time/step"]
        spent = [log[f"causal/seconds/{part}"] for part in ("links", "counterfactuals", "spectral")]
        assert sum(spent) <= log["causal/seconds"] <= log["time/rewards"]
    assert "causal/criteria->analysis/value" in logs[0] or logs[0]["causal/malformed"] == 1.0
    assert all(0.0 <= log["argmax/ties_on_preferences"] <= 1.0 for log in logs[:4])


def test_lora_saves_an_adapter_that_loads_again(judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's folder may hold a README.md of the user's. TRL and peft write cards, the latter a blank template."""
    settings = {"lora": {"r": 4, "lora_alpha": 8}}
    config = write_config(tmp_path / "config.yaml", judge, **settings)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["cepo", "train", str(config), "--max-steps", "2"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    final = tmp_path / "run" / "final"
    assert (tmp_path / "run" / "README.md").read_text() == "mine"
    assert not (final / "README.md").exists()
    model, tokenizer = load_model(resolve_model(str(final)))
    assert model.peft_config["default"].r == 4
    assert any(bool(value.abs().sum() > 0) for name, value in model.named_parameters() if "lora_B" in name)
    text = "judge by clarity of the answer"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_finished_run_is_not_trained_on_and_another_run_is_not_mixed_in(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config(tmp_path / "config.yaml", judge), {"grpo.max_steps": 1})
    final = train(config)
    weights = (final / "model.safetensors").read_bytes()
    monkeypatch.setattr("cepo.train.grpo.load_policy", lambda *_, **__: pytest.fail("nothing is left to train"))
    assert train(config) == final
    assert (final / "model.safetensors").read_bytes() == weights
    for file in final.iterdir():
        file.unlink()
    final.rmdir()  # as a kill between the last checkpoint and final/ leaves it
    assert (train(config) / "model.safetensors").read_bytes() == weights
    assert not (final / "optimizer.pt").exists()
    with pytest.raises(ValueError, match="seed was 0 and is 5"):
        train(replace(config, seed=5))
    with pytest.raises(ValueError, match="rewards.3.name was causal and is not set"):
        train(replace(config, rewards=[{"name": "format"}, {"name": "argmax"}]))
    with pytest.raises(ValueError, match="causal_loss.weight was"):
        train(replace(config, causal_loss={"weight": 0.5}))
    with pytest.raises(ValueError, match="already holds checkpoints"):
        train(config, fresh=True)


def test_final_is_of_the_last_step_that_was_asked_for(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects against the older final/ of a run that was lengthened and died just before it wrote the new one."""
    config = load_config(write_config(tmp_path / "config.yaml", judge), {"grpo.max_steps": 1})
    longer = replace(config, grpo={**config.grpo, "max_steps": 2})
    final = train(config)
    with monkeypatch.context() as patched:
        patched.setattr("cepo.train.run.write_final", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(longer)
    assert not final.exists()
    with monkeypatch.context() as patched:
        patched.setattr("cepo.train.grpo.load_policy", lambda *_, **__: pytest.fail("nothing is left to train"))
        assert train(longer) == final
    reached = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    written = load_file(final / "model.safetensors")
    assert all(torch.equal(written[name], reached[name]) for name in reached)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] > 0.0 for row in logged if row["step"] == 2 and "learning_rate" in row] == [True]
    with pytest.raises(ValueError, match="max_steps is 1, but the run in .* has taken 2 steps"):
        train(config)


def test_other_rows_and_other_weights_under_the_same_names_are_refused(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects against going on from a checkpoint after the data file or the model folder was overwritten."""
    source, model = tmp_path / "pairs.jsonl", tmp_path / "judge"
    rows = [{"prompt": f"about my poem {n}", "chosen": "lucid", "rejected": "rude"} for n in range(8)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(judge, model)
    settings = {"data": {"source": str(source), "test_fraction": 0.0}, "rewards": [{"name": "format"}]}
    config = load_config(write_config(tmp_path / "c.yaml", model, **settings), {"grpo.max_steps": 1})
    train(config)
    kept = source.read_text()
    source.write_text(kept.replace("poem 3", "novel"))
    with pytest.raises(ValueError, match="data has other content"):
        train(config)
    source.write_text(kept)
    policy, _ = load_model(resolve_model(str(model)))
    with torch.no_grad():
        next(policy.parameters()).mul_(1.5)
    policy.save_pretrained(model)
    with pytest.raises(ValueError, match="weights has other content"):
        train(config)
    shutil.copy(judge / "model.safetensors", model / "model.safetensors")
    monkeypatch.setattr("cepo.train.grpo.load_policy", lambda *_, **__: pytest.fail("nothing is left to train"))
    assert train(config) == tmp_path / "run" / "final"  # the same content again


def test_rows_that_the_model_has_no_positions_for_are_left_out_before_it_is_loaded(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One such prompt stalls the first step that samples it. Learned positions must hold the completion too."""
    source = tmp_path / "pairs.jsonl"
    positions = AutoConfig.from_pretrained(judge).max_position_embeddings
    row = {"prompt": "about my poem", "chosen": "lucid", "rejected": "rude"}
    source.write_text(f"{json.dumps(row)}\n{json.dumps({**row, 'prompt': 'poem ' * positions})}\n{json.dumps(row)}\n")
    monkeypatch.setattr("cepo.train.grpo.load_policy", lambda *_, **__: pytest.fail("as far as it should come"))
    data = {"source": str(source), "test_fraction": 0.0}
    config = load_config(write_config(tmp_path / "c.yaml", judge, data=data), {})
    with pytest.raises(pytest.fail.Exception):
        train(config)
    told = rf"row 2: the prompt has \d+ tokens; with 1 to generate, that exceeds the model's {positions} positions"
    assert re.search(told, caplog.text)
    assert "row 1" not in caplog.text
    learned = tmp_path / "learned"
    load_tokenizer(resolve_model(str(judge))).save_pretrained(learned)
    GPT2Config(n_positions=8).save_pretrained(learned)
    for room in (0, 8):
        check = prompt_check(resolve_model(str(learned)), room)
        assert check is not None
        with pytest.raises(ValueError, match="with 8 to") if room else contextlib.nullcontext():
            check([{"role": "user", "content": "about"}])


def test_broken_rows_of_the_data_are_named_and_an_empty_side_is_refused(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "pairs.jsonl"
    good = json.dumps({"prompt": "about my poem", "chosen": "lucid", "rejected": "rude"})
    source.write_text(f"{good}\n{{broken\n{good}\n")
    monkeypatch.setattr("cepo.train.grpo.load_policy", lambda *_, **__: pytest.fail("as far as it should come"))
    config = load_config(write_config(tmp_path / "c.yaml", judge, data={"source": str(source)}), {})
    with pytest.raises(pytest.fail.Exception):
        train(replace(config, data={"source": str(source), "test_fraction": 0.0}))
    assert "skipped 1 row of" in caplog.text
    assert "row 2" in caplog.text
    with pytest.raises(ValueError, match=r"leaves 0 rows to train on"):
        train(replace(config, data={"source": str(source), "test_fraction": 1.0}))


def test_a_run_is_not_resumed_between_two_steps_on_the_same_completions(judge: Path, tmp_path: Path) -> None:
    """A checkpoint there would sample them anew. The one of step 3 waits for step 4, and leads to the same weights."""
    path = write_config(tmp_path / "config.yaml", judge, rewards=[{"name": "format"}])
    config = load_config(path, {"grpo.num_iterations": 2, "grpo.save_steps": 3, "grpo.max_steps": 6})
    run = train(config).parent
    assert sorted(folder.name for folder in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    trained = load_file(run / "final" / "model.safetensors")
    for gone in ("final", "checkpoint-6"):
        shutil.rmtree(run / gone)
    train(config)
    earlier, resumed = (load_file(run / of / "model.safetensors") for of in ("checkpoint-4", "final"))
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)
    assert any(not torch.equal(earlier[name], resumed[name]) for name in trained)


def test_a_partial_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    for step, complete in ((2, True), (10, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "cepo_complete").touch()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_run(recipe: Path) -> None:
    config = load_config(recipe, {})
    if "deepspeed" in config.grpo:
        pytest.importorskip("deepspeed", reason="deepspeed is an extra: pip install 'cepo[deepspeed]'")
    grpo_arguments(config)
    build_causal_loss(config)
    functions, weights = build_rewards(config)
    assert len(functions) == len(weights) > 0


def test_no_evaluation_needs_no_quotation_marks(tmp_path: Path) -> None:
    """YAML reads an unquoted no as false, in a recipe and after --set."""
    for value in (False, "no"):
        run = TrainConfig(
            "testbed", {"source": "testbed"}, [{"name": "format"}], str(tmp_path), grpo={"eval_strategy": value}
        )
        assert grpo_arguments(run).eval_strategy == "no"


def test_a_recipe_chooses_the_guard() -> None:
    """Protects `guard` of a causal reward: it reaches the layout that completions are read with."""
    base: dict[str, Any] = {"model": "testbed", "data": {"source": "testbed"}, "output": "runs/none"}
    choices: list[tuple[dict[str, str], Guard]] = [({}, "standard"), ({"guard": "criteria"}, "criteria")]
    for settings, level in choices:
        (reward,), _ = build_rewards(TrainConfig(**base, rewards=[{"name": "causal", **settings}]))
        assert reward.layout == replace(JUDGE, guard=level)
    with pytest.raises(ValueError, match="guard is 'off', but kind is reasoning"):
        build_rewards(TrainConfig(**base, kind="reasoning", rewards=[{"name": "causal", "guard": "off"}]))


def test_a_recipe_chooses_which_written_forms_of_a_verdict_every_reward_reads() -> None:
    """Protects `verdicts`: rewards that read text and those that read spans agree, and keep the names that TRL logs."""
    base: dict[str, Any] = {"model": "testbed", "data": {"source": "testbed"}, "output": "runs/none"}
    base["rewards"] = [{"name": "format"}, {"name": "argmax"}, {"name": "causal", "task": "argmax"}]
    judgement = write_judgement("Right.", "A is right.", (8, 6)).replace("{8, 6}", "{{8, 6}}")
    for verdicts, paid in (("strict", (0.15, 0.0)), ("lenient", (0.2, 1.0))):
        (by_format, by_argmax, causal), _ = build_rewards(TrainConfig(**base, verdicts=verdicts))
        assert [reward.__name__ for reward in (by_format, by_argmax)] == ["format_reward", "argmax_reward"]
        assert by_format([judgement])[0] == pytest.approx(paid[0])
        assert by_argmax([judgement], label=["A"])[0] == causal.task([judgement], label=["A"])[0] == paid[1]
        assert causal.layout == replace(JUDGE, verdicts=verdicts)
    base["rewards"] = [{"name": "causal"}]
    with pytest.raises(ValueError, match="verdicts is 'lenient', but kind is reasoning"):
        build_rewards(TrainConfig(**base, kind="reasoning", verdicts="lenient"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"verdicts": "loose"}, "verdicts is 'loose'; expected strict or lenient"),
        ({"optimiser": 1}, "unknown key optimiser"),
        ({"model": None}, "lacks model"),
        ({"kind": "poet"}, "kind is 'poet'"),
        ({"rewards": [{"name": "beauty"}]}, "rewards holds"),
        ({"rewards": [{"name": "causal", "links": {"X->Q": 1.0}}]}, "unknown span 'Q'"),
        ({"rewards": [{"name": "causal", "counterfactuals": -1}]}, "counterfactuals"),
        ({"rewards": [{"name": "causal", "guard": "all"}]}, "guard is 'all'"),
        ({"rewards": [{"name": "causal", "p": float("nan")}]}, "p is NaN"),
        ({"rewards": [{"name": "causal", "rank": 100000}]}, "rank is 100000"),
        ({"rewards": [{"name": "causal", "colour": "red"}]}, "colour"),
        ({"rewards": [{"name": "format", "weight": -1.0}]}, "weight of format"),
        ({"rewards": [{"name": "format", "links": {}}]}, "no settings"),
        ({"causal_loss": {"weight": -1.0}}, "causal_loss cannot be used: weight is -1.0"),
        ({"causal_loss": {"colour": "red"}}, "colour"),
        ({"causal_loss": 0.5}, "causal_loss is 0.5"),
        ({"grpo": {"warp": 9}}, "warp"),
        ({"grpo": {"learning_rate": "fast"}}, "grpo.learning_rate is 'fast'"),
        ({"lora": {"rank": 4}}, "lora holds the unknown key rank; expected some of"),
        ({"lora": {"r": "abc"}}, "lora.r is 'abc'; expected an integer >= 1"),
        ({"lora": {"r": 0}}, "lora.r is 0; expected an integer >= 1"),
        ({"lora": {"lora_dropout": 2}}, "lora.lora_dropout is 2; expected a number in [0, 1]"),
        ({"model": "./nowhere"}, "which does not exist"),
        ({"rewards": [{"name": "exact_match"}]}, "reward exact_match needs kind: reasoning, but kind is judge"),
        ({"rewards": [{"name": "causal", "task": "bertscore"}]}, "reward bertscore needs kind: reasoning"),
        ({"rewards": [{"name": "causal", "p": "nan"}]}, "rewards: causal.p is 'nan'; expected a number; YAML"),
        ({"rewards": [{"name": "causal", "linkz": {}}]}, "key linkz; expected some of weight, guard, task, preset"),
        ({"rewards": [{"name": "causal", "p": "inf"}]}, "cepo: rewards: causal.p is 'inf'; expected"),
        ({"rewards": [{"name": "causal", "layout": "x"}]}, "rewards: causal holds the unknown key layout; expected"),
        ({"rewards": [{"name": "csr", "layout": "x"}]}, "rewards: csr holds the unknown key layout; expected"),
        ({"rewards": [{"name": "format", "weight": math.inf}]}, "weight of format is inf; expected a finite number"),
        ({"rewards": [{"name": "format", "weight": True}]}, "weight of format is True; expected a finite number"),
        ({"rewards": [{"name": "causal"}, {"name": "causal", "score": "phi"}]}, "rewards holds causal 2 times"),
        ({"rewards": [{"name": "cir", "linkz": {}}]}, "unknown key linkz; expected some of weight, guard"),
        ({"seed": "abc"}, "seed is 'abc'; expected an integer"),
        ({"threads": 1.5}, "threads is 1.5; expected an integer or null"),
        ({"lora": "all"}, "lora is 'all'; expected a mapping or null"),
        ({"grpo": {"learning_rate": float("nan")}}, "grpo.learning_rate is nan; expected a number"),
        ({"grpo": {"learning_rate": -1e-5}}, "grpo.learning_rate is -1e-05; expected a number >= 0"),
        ({"data": {"source": "testbed", "count": "many"}}, "data.count is 'many'; expected an integer"),
        ({"model": "testbed", "testbed": {"steps": "many"}}, "testbed.steps is 'many'; expected an integer"),
        ({"data": {"limit": 1}}, "data.source is missing"),
        ({"data": "rows.jsonl"}, "data.source is not there: data is 'rows.jsonl'"),
        ({"data": {"source": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"data": {"source": "testbed", "colour": 1}}, "data holds the unknown key colour"),
    ],
)
def test_bad_settings_end_in_one_paragraph_and_exit_code_2(
    changes: dict[str, Any],
    complaint: str,
    judge: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path / "config.yaml", judge, **changes)
    monkeypatch.setattr(sys, "argv", ["cepo", "train", str(config)])
    monkeypatch.setattr("cepo.train.grpo.load_policy", lambda *_, **__: pytest.fail("a model was loaded first"))
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert complaint in message
    assert message.startswith("cepo: ")
    assert "Traceback" not in message


def test_the_testbed_judge_is_cached_and_served_unchanged(tmp_path: Path) -> None:
    first, _ = load_testbed_judge("able", steps=2, seed=3, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    second, _ = load_testbed_judge("able", steps=2, seed=3, cache=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
