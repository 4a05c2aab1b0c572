"""Protects `cepo ablate`: numbers are score_rollouts', each Jacobian is computed once, a killed sweep goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from cepo.benchmarks.ablation import command as ablate_module
from cepo.benchmarks.ablation.command import AblateJob, run_ablation
from cepo.benchmarks.ablation.sweep import plan_sweep
from cepo.benchmarks.ablation.tables import write_group
from cepo.benchmarks.ablation.testbed_rollouts import write_testbed_rollouts
from cepo.cli.app import main
from cepo.eval.score.rows import read_rollout
from cepo.fusion.config import RewardConfig
from cepo.fusion.names import GRADIENT_SCORES
from cepo.fusion.score import score_rollouts
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.loading import load_model, resolve_model
from cepo.jacobian.protocol import Answer, Request
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout
from cepo.train import testbed, testbed_model
from cepo.train.prompts import JUDGE
from tests.models import randomise

ITEMS = testbed.generate_items(2, seed=9, cue_agreement=0.5)
LINKS = {"Z->X": 0.2, "X->Y": 0.5, "Z->Y": 0.3}
WIDTH = 16
BAD_ROWS = 2
FILES = ("ablation.parquet", "rewards.parquet", "summary.jsonl", "malformed.jsonl")
GRID: dict[str, Any] = {
    "counterfactuals": (0, 1, 3),
    "ranks": ("1", "tau=0.7"),
    "powers": (-2.0, 0.2, float("inf")),
    "scores": ("phi", "influence_retained"),
}
PLOTS = ("s_against_k.png", "s_against_rank.png", "reward_against_p.png")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a two-layer judge, 16 wide, far from linear."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = testbed.build_tokenizer()
    config = testbed_model.build_model(tokenizer, seed=0).config
    config.update({"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 6})
    config.layer_types = config.layer_types[:2]
    model = type(testbed_model.build_model(tokenizer, seed=0))(config)
    randomise(model, 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two prompts with three and two completions, interleaved, some with a task reward, and two bad rows."""
    first, second = ITEMS
    aspects = [aspect for aspect in testbed.ASPECTS if aspect != first.aspect]
    rows: list[dict[str, Any]] = [
        {"prompt": first.prompt, "completion": first.completion, "task_reward": 1.0},
        {"prompt": second.prompt, "completion": second.completion},
        {"prompt": first.prompt, "completion": "no tags at all"},
        {"prompt": first.prompt, "completion": first.completion.replace(first.aspect, aspects[0])},
        {"prompt": second.prompt, "completion": second.completion.replace("judge by", "judge"), "task_reward": 0.25},
        {"prompt": first.prompt, "completion": first.completion.replace(first.aspect, aspects[1])},
    ]
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return path


@pytest.fixture
def job(judge: Path, rollouts: Path, tmp_path: Path) -> AblateJob:
    config = RewardConfig(links=LINKS, score="phi")
    return AblateJob(str(judge), rollouts, tmp_path / "sweep", plan_sweep(config, **GRID), config, dtype="float64")


def changed(job: AblateJob, **changes: Any) -> AblateJob:
    """Return the job with other values of the grid, other settings of the reward, or other fields."""
    grid = GRID | {name: changes.pop(name) for name in GRID if name in changes}
    own = {name: changes.pop(name) for name in [*changes] if hasattr(job, name)}
    config = replace(job.config, **changes)
    return replace(job, config=config, sweep=plan_sweep(config, **grid), **own)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def well_formed(job: AblateJob) -> tuple[GroupEngine, dict[int, Rollout], dict[int, float | None]]:
    """Return an engine on the job's model, and its rollouts and task rewards by row."""
    model, tokenizer = load_model(resolve_model(job.model), dtype=job.dtype)
    reader = SpanReader(tokenizer, JUDGE)
    found, tasks = {}, {}
    for number, line in enumerate(job.input.read_text().splitlines()):
        if line.startswith("{broken"):
            continue
        rollout = read_rollout(json.loads(line), reader)
        if rollout.malformed is None:
            found[number], tasks[number] = rollout, json.loads(line).get("task_reward")
    return GroupEngine(model), found, tasks


def test_every_number_is_the_one_of_score_rollouts(job: AblateJob) -> None:
    """K below the largest, ranks and energies, all scores: as if that setting were run alone."""
    job = changed(job, scores=GRADIENT_SCORES)
    run_ablation(job)
    engine, found, tasks = well_formed(job)
    links = pq.read_table(job.output / "ablation.parquet").to_pylist()
    rewards = pq.read_table(job.output / "rewards.parquet").to_pylist()
    hardenings = 2 * 2 + 1 + 1  # the grid, K = 0, where there is no rank, and the reference
    assert len(links) == len(found) * len(LINKS) * hardenings * len(job.sweep.scores)
    assert len(rewards) == len(found) * hardenings * len(job.sweep.scores) * 7 * len(job.sweep.powers)
    by_setting = {
        tuple(row[name] for name in ("row", "link", "counterfactuals", "rank", "tau", "score")): row for row in links
    }
    by_reward = {
        tuple(row[name] for name in ("row", "links", "counterfactuals", "rank", "tau", "score", "p")): row
        for row in rewards
    }
    assert len(by_setting) == len(links)
    assert len(by_reward) == len(rewards)
    cases: list[tuple[int, int | None, float | None, str, float, str]] = [
        (4, 2, None, "phi", 0.2, "all"),
        (1, 1, None, "phi_retained", -2.0, "only X->Y"),
        (0, None, None, "influence", float("inf"), "all"),
        (3, None, 0.7, "phi_influence", 0.2, "without Z->X"),
        (3, 1, None, "influence_retained", -2.0, "all"),
        (1, None, 0.7, "phi", 0.2, "without Z->Y"),
    ]
    for counterfactuals, rank, tau, score, p, chosen in cases:
        kept = {"all": list(LINKS), "only X->Y": ["X->Y"]}.get(chosen)
        kept = kept or [name for name in LINKS if chosen != f"without {name}"]
        config = RewardConfig(
            links={name: LINKS[name] for name in kept},
            counterfactuals=counterfactuals,
            rank=rank if counterfactuals else 2,  # which plays no part without counterfactuals
            energy=tau,
            p=p,
            score=score,  # type: ignore[arg-type]
            also=("phi", "influence", "angles"),
        )
        wanted = score_rollouts(
            list(found.values()), engine, config, JUDGE, task_rewards=list(tasks.values()), keep_jacobians=True
        )
        for row, of_rollout in zip(found, wanted, strict=True):
            setting = (counterfactuals, rank, tau, score)
            assert by_reward[row, chosen, *setting, p]["reward"] == pytest.approx(of_rollout.reward, rel=1e-6)
            for name, record in of_rollout.links.items():
                ours = by_setting[row, name, *setting]
                assert ours["S"] == pytest.approx(record.value, rel=1e-6)
                for field in ("phi", "retained", "influence", "norm", "tokens"):
                    assert ours[field] == pytest.approx(getattr(record, field), rel=1e-6), field
                assert ours["removed_rank"] == record.rank
                if record.nuisance_angles:
                    assert ours["nuisance_angle"] == pytest.approx(np.mean(record.nuisance_angles), rel=1e-6)
                else:
                    assert ours["nuisance_angle"] is None


def test_the_summary_is_of_the_tables(job: AblateJob) -> None:
    """Means, and rank correlations with the same score and with phi at K = 4, rank 2."""
    summary = run_ablation(job)
    links = pq.read_table(job.output / "ablation.parquet").to_pylist()
    rewards = pq.read_table(job.output / "rewards.parquet").to_pylist()

    def values(link: str, counterfactuals: int, rank: int, score: str) -> list[float]:
        setting = (link, counterfactuals, rank, score)
        names = ("link", "counterfactuals", "rank", "score")
        return [row["S"] for row in links if tuple(row[name] for name in names) == setting]

    for link, score in (("X->Y", "influence_retained"), ("Z->Y", "phi")):
        (row,) = [
            row
            for row in summary.rows
            if row["kind"] == "link"
            and (row["link"], row["counterfactuals"], row["rank"], row["score"]) == (link, 3, 1, score)
        ]
        ours = values(link, 3, 1, score)
        assert row["S"] == pytest.approx(np.mean(ours))
        for name, other in (("reference", score), ("paper", "phi")):
            wanted = spearmanr(ours, values(link, 4, 2, other)).statistic
            assert row[f"spearman_{name}"] == pytest.approx(wanted)
            assert row[f"spearman_{name}_low"] <= row[f"spearman_{name}_high"]
    (reward,) = [
        row for row in summary.rows if (row.get("links"), row["score"], row.get("p")) == ("only X->Y", "phi", 0.2)
    ]
    at_paper = [
        row["reward"]
        for row in rewards
        if (row["links"], row["score"], row["p"], row["counterfactuals"], row["rank"])
        == ("only X->Y", "phi", 0.2, 4, 2)
    ]
    assert len(at_paper) == summary.rollouts
    assert reward["reward"] == pytest.approx(np.mean(at_paper))


def test_each_jacobian_is_computed_once(job: AblateJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """One base and max(K) counterfactuals of each source for each rollout, whatever is swept over them."""
    asked: list[tuple[tuple[int, ...], str]] = []
    calls = []
    compute = GroupEngine.compute

    def counted(self: GroupEngine, requests: Sequence[Request]) -> Iterator[Answer]:
        calls.append(len(requests))
        for request in requests:
            asked.extend((one.token_ids, link.name) for one in request.group.rollouts for link in request.links)
        return compute(self, requests)

    monkeypatch.setattr(GroupEngine, "compute", counted)
    summary = run_ablation(job)
    assert len(calls) == summary.groups == 2
    # K = 4 of the reference; Z's permutations carry two links, X's one.
    assert len(asked) == summary.rollouts * (3 + 4 * 2 + 4 * 1)


def test_a_killed_sweep_goes_on_to_identical_files(job: AblateJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = changed(job, counterfactuals=(1,), ranks=("1",), powers=(0.2,))
    whole = replace(job, output=job.output.with_name("whole"))
    run_ablation(whole)
    swept: list[str] = []

    def killed(folder: Path, *content: Any) -> None:
        swept.append(folder.name)
        if len(swept) == 2:
            folder.with_name(folder.name + ".123.tmp").mkdir()  # what a kill in the middle leaves
            raise KeyboardInterrupt
        write_group(folder, *content)

    monkeypatch.setattr(ablate_module, "write_group", killed)
    with pytest.raises(KeyboardInterrupt):
        run_ablation(job)
    assert not (job.output / "ablation.parquet").exists()
    summary = run_ablation(job)
    assert swept == ["000000", "000001", "000001"]
    assert (summary.resumed, summary.groups) == (1, 2)
    for name in (*FILES, *PLOTS):
        assert (job.output / name).read_bytes() == (whole.output / name).read_bytes(), name
    assert not list(job.output.rglob("*.tmp"))
    monkeypatch.setattr(ablate_module, "load_weights", lambda *_, **__: pytest.fail("nothing is left to compute"))
    assert run_ablation(job).resumed == 2


def test_other_arguments_and_other_files_are_refused(
    job: AblateJob, rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = changed(job, counterfactuals=(1,), ranks=("1",), scores=("phi",))
    summary = run_ablation(job)
    assert len(summary.malformed) == BAD_ROWS
    assert [row["row"] for row in read_lines(job.output / "malformed.jsonl")] == [2, 6]
    assert len(summary.table().rows) == 3 * 2  # the reference beside the one setting
    monkeypatch.setattr(ablate_module, "load_weights", lambda *_, **__: pytest.fail("the model is not needed"))
    with pytest.raises(ValueError, match="made with other settings: config.seed was 0 and is 1"):
        run_ablation(replace(job, config=replace(job.config, seed=1)))
    other = tmp_path / "other.jsonl"
    other.write_text("".join(rollouts.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match="made with other settings: input has other content"):
        run_ablation(replace(job, input=other))
    with pytest.raises(ValueError, match="no earlier run of this command wrote"):
        run_ablation(replace(job, output=tmp_path))
    with pytest.raises(ValueError, match="which cannot be created: File exists; expected a folder"):
        run_ablation(replace(job, output=other))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"counterfactuals": ()}, r"counterfactuals is \(\); expected a sequence of at least one"),
        ({"counterfactuals": (1, 1)}, "counterfactuals is 1, 1; expected each value once"),
        ({"counterfactuals": (-1,)}, r"counterfactuals \(K\) is -1"),
        ({"ranks": ("two",)}, "ranks holds 'two'"),
        ({"ranks": ("tau=high",)}, "ranks holds 'tau=high'"),
        ({"ranks": ("1", "01")}, "ranks is 1, 01; expected each value once"),
        ({"ranks": ("tau=1.5",)}, "energy is 1.5"),
        ({"ranks": ("-1",)}, "rank is -1"),
        ({"ranks": ("100",)}, "rank is 100, but"),
        ({"powers": (float("nan"),)}, "p is NaN"),
        ({"scores": ("size",)}, "score is 'size'"),
        ({"scores": "phi"}, "scores is 'phi'; expected a sequence"),
        ({"links": {"Y->X": 1.0}}, "by causality"),
        ({"links": {}}, "links is empty"),
        ({"permutation": "shuffle"}, "permutation is 'shuffle'"),
        ({"task_weight": -1.0}, "task_weight is -1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"device": "warp:1"}, "device is 'warp:1'"),
        ({"model": "./nowhere"}, "does not exist"),
        ({"input": Path("nowhere.jsonl")}, "nowhere.jsonl is not a file"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_before_anything_is_loaded(
    job: AblateJob, options: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate_module, "load_weights", lambda *_, **__: pytest.fail("loaded a model"))
    with pytest.raises(ValueError, match=complaint):
        run_ablation(changed(job, **options))
    assert not job.output.exists()


def test_rollouts_without_jacobians_are_left_out_with_their_reason(
    job: AblateJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too long for the model (its prompt's group is then empty), or a gradient that is not finite."""
    job = changed(job, counterfactuals=(1,), ranks=("1",), powers=(0.2,), scores=("phi",), input=tmp_path / "in.jsonl")
    tokenizer = testbed.build_tokenizer()
    ids = tokenizer(ITEMS[0].completion)["input_ids"]
    prompts = [[3, *[27] * 600, 4], *[[3, 27, 13, 38, 39, 4, word] for word in (28, 28, 46)]]
    completions = [ids, ids, [*ids, tokenizer.eos_token_id], ids]
    rows = [{"prompt_ids": one, "completion_ids": other} for one, other in zip(prompts, completions, strict=True)]
    job.input.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compute = GroupEngine.compute

    def broken(self: GroupEngine, requests: Sequence[Request]) -> Iterator[Answer]:
        for request, answer in zip(requests, compute(self, requests), strict=True):
            for rollout, records in zip(request.group.rollouts, answer, strict=True):
                if rollout.completion_ids[-1] == tokenizer.eos_token_id and "X->Y" in records:
                    records["X->Y"].jac_SD[0, 0] = float("nan")
            yield answer

    monkeypatch.setattr(GroupEngine, "compute", broken)
    summary = run_ablation(job)
    assert (summary.rollouts, summary.groups) == (2, 3)
    assert summary.malformed[0].startswith("too long")
    assert summary.malformed[2] == "non-finite gradient on X->Y"
    assert set(pq.read_table(job.output / "rewards.parquet")["row"].to_pylist()) == {1, 3}


def test_rollouts_that_are_all_malformed_end_in_their_reason(job: AblateJob, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "x", "completion": "no tags"}) + "\n")
    with pytest.raises(ValueError, match="no rollout that can be scored; the first is malformed: "):
        run_ablation(replace(job, input=path))


def test_testbed_rollouts_are_ids_that_a_sweep_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = testbed.build_tokenizer()
    untrained = testbed_model.build_model(tokenizer, seed=0)
    monkeypatch.setattr(
        "cepo.benchmarks.ablation.testbed_rollouts.load_testbed_judge", lambda *_, **__: (untrained, tokenizer)
    )
    folder, path = write_testbed_rollouts(tmp_path, prompts=2, completions=3, max_new_tokens=6)
    rows = read_lines(path)
    assert [row["id"] for row in rows] == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    assert len({tuple(row["prompt_ids"]) for row in rows}) == 2
    assert all(0 < len(row["completion_ids"]) <= 6 and row["task_reward"] in (0.0, 1.0) for row in rows)
    assert all(row["completion_ids"].count(tokenizer.eos_token_id) <= 1 for row in rows)
    model, saved = load_model(resolve_model(str(folder)))
    assert model.config.vocab_size == len(saved) == len(tokenizer)
    with pytest.raises(ValueError, match="completions is 0"):
        write_testbed_rollouts(tmp_path, completions=0)


@pytest.mark.parametrize("arguments", [["--score", "foo"], ["-K", "-1"], ["-p", "nan"], ["--rank", "x"]])
def test_a_sweep_that_cannot_work_leaves_nothing_behind(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The testbed's judge is made and written only once every option has been read."""
    output = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["cepo", "ablate", "--testbed", "16", "--output", str(output), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert arguments[1].lower() in capsys.readouterr().err.lower()
    assert not output.exists()
