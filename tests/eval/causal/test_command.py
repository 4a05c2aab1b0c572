"""Protects `cepo eval causal`: its tables follow from the rows, it goes on where it stopped, and it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, spearmanr
from typer.testing import CliRunner

from cepo.cli.app import app
from cepo.eval.causal import command as causal_module
from cepo.eval.causal.command import CausalJob, run_causal
from cepo.eval.causal.controls import PAIRS
from cepo.eval.causal.evidence import (
    ANALYSIS_DEFINITION,
    BASELINES,
    DEFAULT_LINK,
    PAPER_DEFINITION,
    REWARD_DEFINITION,
    SWEPT,
    definition,
)
from cepo.eval.causal.interventions import INTERVENTIONS
from cepo.eval.causal.report import console_tables, text_tables, write_causal_report
from cepo.eval.causal.summary import PRIMARY, JudgeResults, effect_of, summarise_causal
from cepo.eval.statistics import aucs, estimate, estimates, rank_correlations, spearman
from tests.eval.causal.judges import ITEMS, TOKENIZER, tiny_judge

FOLLOWS = {"follows_swap": 1.0, "flips": 1.0}
IGNORES = {"follows_swap": 0.0, "flips": 0.0}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    tiny_judge().model.float().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three judgements, one of them malformed, and a broken line."""
    rows = [{"prompt": item.prompt, "completion": item.completion} for item in ITEMS[:2]]
    rows.insert(1, {"prompt": ITEMS[2].prompt, "completion": "no tags at all"})
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return path


@pytest.fixture
def job(judge: Path, rollouts: Path, tmp_path: Path) -> CausalJob:
    return CausalJob(
        output=tmp_path / "causal", model=str(judge), input=rollouts, resamples=2, controlled=2, draws=20, seed=3
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def area_under_roc(positive: Sequence[float], values: Sequence[float]) -> float:
    """Return the area by scipy's U statistic."""
    chosen, values_N = np.asarray(positive) > 0.5, np.asarray(values)
    return float(mannwhitneyu(values_N[chosen], values_N[~chosen]).statistic / (chosen.sum() * (~chosen).sum()))


def invented(name: str, follows: bool, count: int = 30) -> JudgeResults:
    """Return a judge's results whose effects are known numbers, and whose evidence is made from them."""
    rng = np.random.default_rng(8 if follows else 10)
    rows = []
    for row in range(count):
        effect = float(rng.random() * 0.4 + (0.6 if follows else 0.0))
        found = {"tv": effect, "margin": 2 * effect, "flip": float(effect > 0.5), "draws": 1, "malformed": 0}
        swept = {
            definition(score, DEFAULT_LINK, k, r): float(rng.random())
            for score in ("phi", "phi_retained", "phi_influence", "influence_retained", "norm")
            for k in (0, *SWEPT)
            for r in (0, *SWEPT)
        }
        fixed = {ANALYSIS_DEFINITION: effect**2, PAPER_DEFINITION: -effect, REWARD_DEFINITION: float(rng.random())}
        evidence = {**swept, **dict.fromkeys(BASELINES, 1.0), **fixed}
        effects: dict[str, Any] = {what: {"direct": found, "total": found} for what in INTERVENTIONS}
        effects["swap"] = {"direct": None if row == 0 else found, "total": None}
        shown = {"tokens": ["a", "b"], "prompt_tokens": 1, "positions": {"criteria": [0], "scores": [1]}}
        saliency = {"saliency": {DEFAULT_LINK: [0.5]}, "attention": [0.1]}
        record = {"judge": name, "prompt": row, "row": row, "malformed": None, "effects": effects}
        rows.append({**record, "evidence": evidence, **shown, **saliency})
    rows.append({"judge": name, "prompt": count, "row": count, "malformed": "missing <scores>"})
    return JudgeResults(name, tuple(rows), FOLLOWS if follows else IGNORES, {})


def test_correlations_and_areas_are_the_rows_own() -> None:
    """A definition that is the effect squared agrees and separates perfectly; its negative is the other way round."""
    results = [invented("criteria", True), invented("query", False)]
    summary = summarise_causal(results, pairs=PAIRS, draws=30, seed=0)
    group = PAIRS[0].name
    assert summary.correlations[group, ANALYSIS_DEFINITION, PRIMARY].value == pytest.approx(1.0)
    assert summary.correlations["criteria", PAPER_DEFINITION, PRIMARY].value == pytest.approx(-1.0)
    assert summary.aucs[group, ANALYSIS_DEFINITION].value == 1.0
    assert summary.aucs[group, PAPER_DEFINITION].value == 0.0
    assert summary.best[group] == ANALYSIS_DEFINITION
    assert np.isnan(summary.correlations[group, "span length", PRIMARY].value)
    rows = [row for one in results for row in one.sound]
    name = definition("phi", DEFAULT_LINK)
    values = [row["evidence"][name] for row in rows]
    own = spearmanr(values, [effect_of(row, "mask direct margin") for row in rows])
    assert summary.correlations[group, name, "mask direct margin"].value == pytest.approx(own.statistic)
    positive = [row["judge"] == "criteria" for row in rows]
    assert summary.aucs[group, name].value == pytest.approx(area_under_roc(positive, values))
    assert summary.correlations[group, name, "swap direct tv"].count == len(rows) - 2
    assert (group, name, "swap total tv") not in summary.correlations


def test_permuted_labels_leave_nothing() -> None:
    summary = summarise_causal(
        [invented("criteria", True, 80), invented("query", False, 80)], pairs=PAIRS, draws=50, seed=0
    )
    (found,) = [
        one for one in summary.records if one["what"] == "permuted" and one["definition"] == ANALYSIS_DEFINITION
    ]
    assert found["low"] < 0.0 < found["high"]


def test_an_uncertified_pair_gets_no_area() -> None:
    results = [invented("criteria", True), replace(invented("query", False), certificate=FOLLOWS)]
    summary = summarise_causal(results, pairs=PAIRS, draws=10, seed=0)
    assert not summary.aucs
    assert "flip 1.00 of the second judge's verdicts" in summary.refused[PAIRS[0].name]
    assert not any("ROC" in caption for caption in text_tables(summary))


def test_the_page_shows_every_definition_and_the_console_the_ones_worth_a_look(tmp_path: Path) -> None:
    results = [invented("criteria", True), invented("query", False)]
    summary = summarise_causal(results, pairs=PAIRS, draws=10, seed=0)
    write_causal_report(tmp_path / "report.html", results, summary, {"seed": "0"})
    page = (tmp_path / "report.html").read_text()
    short, long = text_tables(summary), text_tables(summary, every=True)
    caption = next(caption for caption in short if caption.startswith("Rank correlation"))
    shown = [row[0] for row in short[caption][1]]
    assert {PAPER_DEFINITION, ANALYSIS_DEFINITION, *BASELINES} <= set(shown)
    assert len(shown) < len(long[caption][1])
    assert all(name.replace(">", "&gt;") in page for name in (PAPER_DEFINITION, definition("phi", DEFAULT_LINK, 8, 8)))
    assert len(console_tables(summary)) == len(short)
    values = [float(row[1].split()[0]) for row in short[caption][1] if row[1] != "undetermined"]
    assert values == sorted(values, reverse=True)


def test_a_run_writes_every_rollout_and_goes_on_where_it_stopped(
    job: CausalJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A malformed row and a broken line are kept with their reasons; nothing is computed twice; same files."""
    monkeypatch.setattr(causal_module, "_CHUNK", 2)
    summary = run_causal(job)
    rows = read_lines(job.output / "rows.jsonl")
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert [row["malformed"] is None for row in rows] == [True, False, True, False]
    assert "line 4 is broken" in rows[3]["malformed"]
    assert rows[0]["effects"]["swap"]["direct"]["draws"] == 1
    assert rows[0]["effects"]["swap"]["total"] is None  # random weights never come to two scores
    counts = {one["figure"]: one["value"] for one in summary.records if one["what"] == "count"}
    assert (counts["rollouts"], counts["malformed"]) == (4.0, 2.0)
    masked = [one["value"] for one in summary.records if one["what"] == "masked"]
    assert masked == [0.0] * 6
    files = {name: (job.output / name).read_bytes() for name in ("rows.jsonl", "summary.jsonl")}
    for name in ("gather_evidence", "intervene", "randomisation"):
        monkeypatch.setattr(causal_module, name, lambda *_, **__: pytest.fail("computed twice"))
    run_causal(replace(job, memory_gib=2.0))  # changes no result
    assert files == {name: (job.output / name).read_bytes() for name in files}
    run_causal(replace(job, draws=7))
    assert files["rows.jsonl"] == (job.output / "rows.jsonl").read_bytes()
    assert files["summary.jsonl"] != (job.output / "summary.jsonl").read_bytes()
    with pytest.raises(ValueError, match="made with other settings: seed was 3 and is 4; name another"):
        run_causal(replace(job, seed=4))
    monkeypatch.undo()
    monkeypatch.setattr(causal_module, "_CHUNK", 2)
    (job.output / "parts" / "rows-rollouts-00002.json").unlink()
    run_causal(job)
    assert files == {name: (job.output / name).read_bytes() for name in files}


def test_parts_of_other_weights_or_data_are_refused(
    job: CausalJob, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Content counts, not the path: a copy goes on, a model or a file that changed under its name is refused."""

    def fail(*_: object) -> None:
        raise ValueError("no room for the weights")

    monkeypatch.setattr(causal_module, "_judged", fail)
    with pytest.raises(ValueError, match="no room"):
        run_causal(replace(job, seed=9))  # leaves nothing that would bind the next run's settings
    monkeypatch.setattr(causal_module, "_judged", lambda *_: iter(()))  # settings are checked before any judge is read
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(judge, model)
    shutil.copy(str(job.input), rows)
    run_causal(job)
    moved = replace(job, model=str(model), input=rows)
    run_causal(moved)
    rows.write_text(rows.read_text() + "\n")
    with pytest.raises(ValueError, match="other settings: input has other content"):
        run_causal(moved)
    (model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="other settings: model has other content"):
        run_causal(replace(moved, input=job.input))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": None}, "model and input go together"),
        ({"resamples": 0}, "resamples is 0; expected at least 1"),
        ({"model": None, "input": None, "items": 3}, "items is 3; expected at least 8"),
        ({"pairs": 3}, "pairs is 3; expected at most 2"),
        ({"memory_gib": 0.0}, "memory_gib is 0.0"),
        ({"device": "nowhere"}, "device is 'nowhere'"),
    ],
)
def test_settings_out_of_range_are_refused_before_work(job: CausalJob, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_causal(replace(job, **changes))
    assert not job.output.exists()


def test_the_command_wants_the_testbed_or_a_model_with_its_rollouts(tmp_path: Path) -> None:
    runner = CliRunner()
    for arguments in ([], ["--testbed", "--model", "smollm2"], ["--model", "smollm2"]):
        found = runner.invoke(app, ["eval", "causal", "--output", str(tmp_path / "out"), *arguments])
        assert isinstance(found.exception, ValueError)
        assert "--testbed alone" in str(found.exception)


def test_many_statistics_are_each_ones_own() -> None:
    """Batched correlations and areas against scipy, ties and constants among them; same intervals."""
    rng = np.random.default_rng(0)
    values = np.stack([rng.random(40), rng.integers(3, size=40), np.ones(40)], axis=1).astype(float)
    others = np.stack([rng.random(40), rng.integers(2, size=40)], axis=1).astype(float)
    once = np.ones((1, 40))
    found = rank_correlations(values, others, once)[0]
    for row in range(2):
        for column in range(2):
            own = spearmanr(values[:, row], others[:, column]).statistic
            assert found[row, column] == pytest.approx(own)
            assert found[row, column] == pytest.approx(spearman(values[:, row], others[:, column]))
    assert np.isnan(found[2]).all()
    positive = others[:, 1]
    for row, area in enumerate(aucs(values, positive, once)[0]):
        assert area == pytest.approx(area_under_roc(positive, values[:, row]))
        assert area == pytest.approx(aucs(values[:, row], positive, once).item())
    assert np.isnan(aucs(values, np.ones(40), once)).all()
    clusters = np.arange(40) // 4
    together = estimates(aucs, values, positive, clusters=clusters, draws=50, seed=2)
    assert together[0] == estimate(aucs, values[:, 0], positive, clusters=clusters, draws=50, seed=2)


def test_the_testbeds_judges_are_made_certified_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Barely warm judges write nothing that can be read; both are there, with certificates, and the pair is refused."""
    monkeypatch.setattr(causal_module, "_JUDGE_STEPS", 1)
    load = partial(causal_module.load_testbed_judge, cache=tmp_path / "cache")
    monkeypatch.setattr(causal_module, "load_testbed_judge", load)
    output = tmp_path / "causal"
    summary = run_causal(CausalJob(output, items=8, pairs=1, resamples=1, controlled=1, draws=5))
    pair = PAIRS[0]
    assert summary.groups == {pair.name: (pair.follows, pair.ignores)}
    rows = read_lines(output / "rows.jsonl")
    assert [row["judge"] for row in rows] == [pair.follows] * 8 + [pair.ignores] * 8
    certified = {one["population"] for one in summary.records if one["what"] == "certificate"}
    assert certified == {pair.follows, pair.ignores}
    assert pair.name in summary.refused
