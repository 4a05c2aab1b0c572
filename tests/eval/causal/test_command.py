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
from typer.testing import CliRunner

from cepo.cli.app import app
from cepo.eval.causal import command as causal_module
from cepo.eval.causal.command import CausalJob, run_causal
from cepo.eval.causal.controls import PAIR
from cepo.eval.causal.measures import ESTIMATES, LINKS
from cepo.eval.causal.report import console_tables, text_tables, write_causal_report
from cepo.eval.causal.summary import EXACT, JudgeResults, summarise_causal
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
    """Write four judgements, one of them malformed, and a broken line."""
    rows = [{"prompt": item.prompt, "completion": item.completion} for item in ITEMS[:3]]
    rows.insert(1, {"prompt": ITEMS[3].prompt, "completion": "no tags at all"})
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return path


@pytest.fixture
def job(judge: Path, rollouts: Path, tmp_path: Path) -> CausalJob:
    return CausalJob(output=tmp_path / "causal", model=str(judge), input=rollouts, most_nodes=2, controlled=1, seed=3)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def invented(name: str, modes: Sequence[str | None], prompts: Sequence[int]) -> JudgeResults:
    """Return a judge's results whose exact effects are known: evidence has the larger one; "right" is that effect.

    "wrong" is its negative, "constant" tells nothing apart, and the estimates are off by their number.
    """
    rng = np.random.default_rng(0)
    rows = []
    for row, (mode, prompt) in enumerate(zip(modes, prompts, strict=True)):
        effect = float(rng.random() + 3.0 * (mode == "evidence"))
        places = ("chain", *LINKS)
        values = {"right": effect, "wrong": -effect, "constant": 1.0}
        record = {
            "judge": name,
            "row": row,
            "prompt": prompt,
            "mode": mode,
            "problem": None,
            "values": {
                **{score: dict.fromkeys(places, value) for score, value in values.items()},
                "log_cir": {"both->scores": effect},
            },
            "nats": {
                estimate: dict.fromkeys(LINKS, effect + 0.5 * (len(ESTIMATES) - 1 - place))
                for place, estimate in enumerate(ESTIMATES)
            },
            "exact": dict.fromkeys(places, effect),
            "attributions": {key: [0.5] for key in LINKS},
            "tokens": ["a", "b", "c"],
            "prompt_tokens": 1,
            "positions": {"criteria": [0], "analysis": [1], "scores": [2]},
        }
        rows.append(record)
    rows.append({"judge": name, "row": len(rows), "prompt": -1, "mode": "other", "problem": "missing <scores>"})
    return JudgeResults(name, tuple(rows), {"costs": {"effect": 1.0, "path 1": 1.5}, "masked": {"norm": 0.0}})


def world(prompts: int = 12) -> JudgeResults:
    """Two completions with evidence and one without for each prompt."""
    return invented("lazy", ["evidence", "evidence", "length"] * prompts, np.repeat(np.arange(prompts), 3).tolist())


def test_figures_are_the_rows_own(tmp_path: Path) -> None:
    """Perfect and reversed scores, a constant, known errors and costs; every table and the page hold them."""
    results = [world()]
    summary = summarise_causal(results, seed=0)
    areas, kept = summary.found("auc", "lazy"), summary.found("rank correlation", "lazy")
    assert [areas[name, "chain"].value for name in ("right", "wrong", "constant", EXACT)] == [1.0, 0.0, 0.5, 1.0]
    assert areas["log_cir", "both->scores"].value == 1.0
    assert areas["right", "chain"].count == 24
    assert (kept["right", "chain"].value, kept["wrong", "chain"].value) == pytest.approx((1.0, -1.0))
    assert (EXACT, "chain") not in kept
    chance = summary.found("auc, modes shuffled within prompts", "lazy")["right", "chain"]
    assert chance.value == pytest.approx(0.5, abs=0.05)
    assert chance.high < 1.0
    errors = summary.found("error", "lazy")
    assert errors["effect", "chain"].value == 0.0
    assert errors[ESTIMATES[0], "analysis->scores"].value == pytest.approx(0.5 * (len(ESTIMATES) - 1))
    counts = {one["figure"]: one["value"] for one in summary.records if one["what"] == "count"}
    assert counts == {"judgements": 37, "prompts": 12, "malformed": 1, "mode evidence": 24, "mode length": 12}
    assert not summary.warnings
    tables = text_tables(summary)
    header, rows = tables["What each approximation is worth: chain"]
    assert header[-2:] == ["mean error, nats", "cost"]
    assert [row[0] for row in rows] == [*ESTIMATES, EXACT]
    assert dict(zip(ESTIMATES, (row[-1] for row in rows), strict=False))["path 1"] == "1.500"
    assert len(console_tables(summary)) == len(tables)
    write_causal_report(tmp_path / "report.html", results, summary, {"seed": "0"})
    page = (tmp_path / "report.html").read_text()
    assert all(caption.replace(">", "&gt;") in page for caption in tables)
    assert "Attribution of criteria-&gt;analysis" in page


def test_judgements_without_modes_or_company_are_told_as_what_they_are() -> None:
    """A model's own: no AUC; with one judgement per prompt the correlations are over all rows, and it is said."""
    summary = summarise_causal([invented("judgements", [None] * 6, list(range(6)))], seed=0)
    assert not summary.found("auc", "judgements")
    assert summary.found("rank correlation", "judgements")["right", "chain"].value == pytest.approx(1.0)
    assert "There is no AUC" in summary.warnings[0]
    assert "the testbed's judges alone" in summary.warnings[0]
    assert "over all rows" in summary.warnings[1]
    header, rows = text_tables(summary)["What each approximation is worth: chain"]
    assert header == ["estimate of the effect", "mean error, nats", "cost"]
    assert {len(row) for row in rows} == {3}
    alike = summarise_causal([invented("lazy", ["length"] * 6, [0, 0, 0, 1, 1, 1])], seed=0)
    assert "came to it by length (6x)" in alike.warnings[0]
    nothing = JudgeResults("judgements", ({"row": 0, "prompt": 0, "mode": None, "problem": "empty"},), {})
    assert summarise_causal([nothing], seed=0).refused == {"judgements": "no judgement could be measured"}


def test_the_certified_pair_is_told_apart_or_refused() -> None:
    follows = replace(invented(PAIR[0], ["evidence"] * 8, list(range(8))), certificate=FOLLOWS)
    ignores = replace(invented(PAIR[1], ["query"] * 8, list(range(8))), certificate=IGNORES)
    summary = summarise_causal([world(), follows, ignores], seed=0)
    separated = summary.found("pair", " against ".join(PAIR))
    assert (separated["right", "chain"].value, separated["wrong", "chain"].value) == (1.0, 0.0)
    refused = summarise_causal([world(), follows, replace(ignores, certificate=FOLLOWS)], seed=0)
    assert "flip 1.00 of the second judge's verdicts" in refused.refused["the certified pair"]
    assert not refused.found("pair", " against ".join(PAIR))


def test_a_run_writes_every_judgement_and_goes_on_where_it_stopped(
    job: CausalJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A malformed row and a broken line are kept with their reasons; nothing is computed twice; same files."""
    monkeypatch.setattr(causal_module, "randomisation", lambda *_, **__: [])
    summary = run_causal(job)
    rows = read_lines(job.output / "rows.jsonl")
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["problem"] is None for row in rows] == [True, False, True, True, False]
    assert "line 5 is broken" in rows[4]["problem"]
    assert {one["value"] for one in summary.records if one["what"] == "masked"} == {0.0}
    files = {name: (job.output / name).read_bytes() for name in ("rows.jsonl", "summary.jsonl")}
    for name in ("measure", "relative_costs", "masked_scores"):
        monkeypatch.setattr(causal_module, name, lambda *_, **__: pytest.fail("computed twice"))
    run_causal(replace(job, memory_gib=2.0))  # changes no result
    assert files == {name: (job.output / name).read_bytes() for name in files}
    with pytest.raises(ValueError, match="made with other settings: seed was 3 and is 4; name another"):
        run_causal(replace(job, seed=4))
    monkeypatch.undo()
    journal = job.output / "parts" / "rows-judgements.jsonl"
    torn = b"".join(journal.read_bytes().splitlines(keepends=True)[:3])[:-30]  # killed while it wrote the third row
    journal.write_bytes(torn)
    told: list[tuple[str, int, int]] = []
    run_causal(job, progress=lambda *where: told.append(where))
    assert [done for what, done, _ in told if what.startswith("scores")] == [2, 3, 4]
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
    copy = tmp_path / "copy"
    shutil.copytree(judge, copy)
    (job.output / "parts").mkdir(parents=True)
    with pytest.raises(ValueError, match="no room"):
        run_causal(replace(job, seed=9, model=str(copy)))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match="model has other content"):
        run_causal(replace(job, seed=9, model=str(copy)))
    assert job.input is not None
    other = tmp_path / "other.jsonl"
    other.write_bytes(job.input.read_bytes() + b"\n{}")
    with pytest.raises(ValueError, match="input has other content"):
        run_causal(replace(job, seed=9, input=other))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"items": 0}, "items is 0; expected at least 1"),
        ({"model": None, "input": None, "items": 7}, "items is 7; expected at least 8"),
        ({"completions": 1}, "completions is 1; expected at least 2"),
        ({"world": "sane"}, "world is 'sane'; expected one of able, lazy"),
        ({"model": None}, "model and input go together"),
        ({"memory_gib": 0.0}, "memory_gib is 0.0"),
        ({"device": "warp:1"}, "device is 'warp:1'"),
    ],
)
def test_what_cannot_be_run_is_named(job: CausalJob, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        run_causal(replace(job, **changes))


def test_every_row_offers_donors_and_one_prompt_is_too_few(job: CausalJob) -> None:
    """Fewer rows are measured with the donors of all; a file of one prompt has none."""
    run_causal(replace(job, items=1, most_nodes=1, estimates_only=True))
    (row,) = read_lines(job.output / "rows.jsonl")
    assert row["problem"] is None
    assert row["exact"]["chain"] is not None
    assert job.input is not None
    alone = job.output / "alone.jsonl"
    alone.write_text(job.input.read_text().splitlines()[0])
    with pytest.raises(ValueError, match="well-formed judgements of 1 prompt"):
        run_causal(replace(job, input=alone, output=job.output / "alone"))


def test_the_command_wants_the_testbed_or_a_model_with_its_judgements(tmp_path: Path) -> None:
    runner = CliRunner()
    for arguments in ([], ["--testbed", "--model", "smollm2"], ["--model", "smollm2"]):
        found = runner.invoke(app, ["eval", "causal", "--output", str(tmp_path / "out"), *arguments])
        assert isinstance(found.exception, ValueError)
        assert "--testbed alone" in str(found.exception)


def test_the_testbeds_judges_are_made_certified_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Barely warm judges write nothing that can be read: all are there, with certificates, and nothing is claimed."""
    monkeypatch.setattr(causal_module, "_JUDGE_STEPS", 1)
    load = partial(causal_module.load_testbed_judge, cache=tmp_path / "cache")
    monkeypatch.setattr(causal_module, "load_testbed_judge", load)
    output = tmp_path / "causal"
    summary = run_causal(CausalJob(output, items=8, completions=2, controlled=1))
    rows = read_lines(output / "rows.jsonl")
    assert [row["judge"] for row in rows] == ["lazy"] * 16 + [PAIR[0]] * 8 + [PAIR[1]] * 8
    # A prompt is one unit of the pair's intervals, whichever judge answered it, and however often.
    assert [row["prompt"] for row in rows] == [place // 2 for place in range(16)] + [*range(8)] * 2
    assert {one["population"] for one in summary.records if one["what"] == "certificate"} == set(PAIR)
    assert set(summary.refused) == {"lazy", *PAIR, "the certified pair"}
    assert (output / "report.html").is_file()


def test_a_judge_in_words_is_a_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--world words-lazy` examines the pretrained judge, by its own content, and not the small one."""
    wanted = []

    def load(judge: Any, **_: Any) -> tuple[Any, Any]:
        wanted.append(judge.judge)
        return tiny_judge().model.float(), TOKENIZER

    monkeypatch.setattr(causal_module, "load_words_judge", load)
    monkeypatch.setattr(
        causal_module, "words_fingerprint", lambda judge: f"{judge.judge} in words, {judge.layers} layers"
    )
    monkeypatch.setattr(causal_module, "load_testbed_judge", lambda *_, **__: pytest.fail("the small judge"))
    job = CausalJob(tmp_path, world="words-lazy", items=8, completions=2, pair=False)
    run_causal(job)
    assert wanted == ["lazy"]
    assert {row["judge"] for row in read_lines(tmp_path / "rows.jsonl")} == {"words-lazy"}
    assert "lazy in words, 8 layers" in (tmp_path / "settings.json").read_text()
    with pytest.raises(ValueError, match=r"judges"):
        run_causal(replace(job, layers=30))
    with pytest.raises(ValueError, match="layers is 30 for the world lazy; expected one in words"):
        run_causal(replace(job, world="lazy", layers=30))
