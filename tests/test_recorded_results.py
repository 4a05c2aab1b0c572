"""Protects the tables of docs/results.md and the README's figures: they are what the recorded rows say."""

import json
import math
import re
from statistics import mean, stdev
from typing import Any

import pytest
from scipy.stats import t

from cepo.benchmarks.reward_model.command import read_plan, verdicts
from tests.paths import ROOT

README = ROOT / "README.md"


def recorded_runs() -> dict[str, dict[int, dict[str, float]]]:
    """The recorded training runs by arm and seed."""
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for name in ("testbed-training.jsonl", "testbed-training-fresh-seeds.jsonl"):
        for line in (ROOT / "benchmarks" / "results" / name).read_text().splitlines():
            row = json.loads(line)
            assert row["seed"] not in runs.setdefault(row["arm"], {}), "a run was recorded twice"
            runs[row["arm"]][row["seed"]] = row
    return runs


def difference(ours: list[float], theirs: list[float]) -> str:
    """Mean difference with its 95% t interval, paired."""
    gains = [one - other for one, other in zip(ours, theirs, strict=True)]
    half = t.ppf(0.975, len(gains) - 1) * stdev(gains) / math.sqrt(len(gains))
    return f"{mean(gains):+.2f} [{mean(gains) - half:+.2f}, {mean(gains) + half:+.2f}]".replace("-0.00", "+0.00")


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table after a heading, without its head."""
    lines = text.split(heading, 1)[1].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| ---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("*", "") for cell in line.strip("|").split("|")])
    return rows


def near(text: str, values: list[float]) -> bool:
    """Whether a cell's numbers are these, to the two decimals that it shows."""
    shown = [float(number) for number in re.findall(r"[-+]?\d+\.\d\d", text)]
    return len(shown) == len(values) and all(
        abs(one - other) < 0.00501 for one, other in zip(shown, values, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "heading"),
    [
        ("testbed-worlds", "## Which reward or loss"),
        ("testbed-words", "## The same in words"),
        ("testbed-words-whole-h200", "### SmolLM2 whole"),
        ("testbed-reasoner", "## The same for reasoners"),
        ("testbed-controller", "## A weight set by a controller"),
    ],
)
def test_a_table_of_worlds_is_what_the_rows_say(name: str, heading: str) -> None:
    """Every recorded run is counted, in its world and arm."""
    runs: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in rows_of(f"{name}.jsonl"):
        assert row["seed"] not in runs.setdefault((row["world"], row["arm"]), {}), "a run was recorded twice"
        runs[row["world"], row["arm"]][row["seed"]] = row
    rows = table((ROOT / "docs" / "results.md").read_text(), heading)
    shown = {(row[0], re.findall(r"\(`([^`]+)`\)", row[1])[-1]): row for row in rows}
    assert set(shown) == set(runs)
    for (world, arm), row in shown.items():
        of_arm, task = runs[world, arm], runs[world, "task"]
        assert row[2] == str(len(of_arm))
        for measure, summary, gain in (("flipped", row[3], row[4]), ("turned", row[5], row[6])):
            values = [of_arm[seed][measure] for seed in of_arm]
            assert near(summary, [mean(values), min(values), max(values)]), (world, arm, measure)
            if arm not in ("untrained", "task"):
                assert gain == difference(values, [task[seed][measure] for seed in of_arm]), (world, arm, measure)
        assert near(row[7], [mean(of_arm[seed]["in_distribution"] for seed in of_arm)])


@pytest.mark.parametrize(("name", "world"), [("testbed-worlds", "lazy"), ("testbed-words", "words-lazy")])
def test_the_winner_is_compared_with_its_shuffle(name: str, world: str) -> None:
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows_of(f"{name}.jsonl"):
        if row["world"] == world:
            runs.setdefault(row["arm"], {})[row["seed"]] = row
    effect, shuffled = runs["effect chain"], runs["effect chain shuffled"]
    prose = " ".join((ROOT / "docs" / "results.md").read_text().split())
    for measure in ("flipped", "turned"):
        found = difference([effect[s][measure] for s in effect], [shuffled[s][measure] for s in effect])
        assert found in prose, measure


def test_the_first_training_table_is_what_the_rows_say() -> None:
    runs, seeds = recorded_runs(), range(1, 6)
    rows = table((ROOT / "docs" / "results.md").read_text(), "### Seeds 1 to 5")
    named = [re.findall(r"`([^`]+)`", row[0])[-1] for row in rows]
    assert set(named) == set(runs)
    for arm, row in zip(named, rows, strict=True):
        for measure, summary, gain in (("flipped", row[1], row[2]), ("turned", row[3], row[4])):
            values = [runs[arm][seed][measure] for seed in seeds]
            assert near(summary, [mean(values), min(values), max(values)]), (arm, measure, summary)
            if arm not in ("untrained", "task"):
                assert gain == difference(values, [runs["task"][seed][measure] for seed in seeds]), (arm, measure)


def test_the_fresh_training_table_is_what_the_rows_say() -> None:
    """Every recorded fresh run is counted: a run that is left out changes the seeds of its arm."""
    runs = recorded_runs()
    arms = {
        "influence of X->Y": "X->Y influence",
        "the same, shuffled": "X->Y influence shuffled",
        "embedding similarity": "proxy",
        "phi of X->Y, hardened": "X->Y phi",
        "CE-PO": "CE-PO",
    }
    text = (ROOT / "docs" / "results.md").read_text()
    rows = table(text, "### Fresh seeds")
    assert [row[0] for row in rows] == list(arms)
    for name, shown_seeds, *cells in rows:
        seeds = sorted(seed for seed in runs[arms[name]] if seed > 5)
        assert shown_seeds == f"{seeds[0]} to {seeds[-1]}"
        assert len(seeds) == seeds[-1] - seeds[0] + 1
        for measure, summary, gain in (("flipped", cells[0], cells[1]), ("turned", cells[2], cells[3])):
            ours = [runs[arms[name]][seed][measure] for seed in seeds]
            task = [runs["task"][seed][measure] for seed in seeds]
            assert near(summary, [mean(ours), mean(task)]), (name, measure, summary)
            assert gain == difference(ours, task), (name, measure)
    prose = " ".join(text.split())
    for seeds in (range(6, 16), range(1, 16)):
        for measure in ("flipped", "turned"):
            ours, shuffled, task = (
                [runs[arm][seed][measure] for seed in seeds]
                for arm in ("X->Y influence", "X->Y influence shuffled", "task")
            )
            assert difference(ours, shuffled) in prose
            assert difference(ours, task) in prose


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / "benchmarks" / "results" / name).read_text().splitlines()]


def test_the_table_of_pairs_is_what_the_rows_say() -> None:
    """Every recorded run is counted, in its arm; the gates that the recipe set are told as they came out."""
    rows = rows_of("testbed-reward-models.jsonl")
    assert len({(row["arm"], row["seed"]) for row in rows}) == len(rows), "a run was recorded twice"
    text = (ROOT / "docs" / "reward-models.md").read_text()
    shown = {row[0]: row for row in table(text, "## Which pairs help")}
    assert list(shown) == list(dict.fromkeys(row["arm"] for row in rows))
    for arm, (_, seeds, *cells) in shown.items():
        of_arm = [row for row in rows if row["arm"] == arm]
        assert seeds == str(len(of_arm))
        for cell, measure in zip(cells, ("flipped", "in_distribution", "length_share", "cause_effect"), strict=True):
            values = [float(row[measure]) for row in of_arm]
            assert near(cell, [mean(values), min(values), max(values)]), (arm, measure)
    for line in verdicts(rows, read_plan().gates):
        assert line in text


def test_the_tables_of_real_text_are_what_the_rows_say() -> None:
    rows = rows_of("text-reward-models.jsonl")
    assert len({(row["arm"], row["seed"]) for row in rows}) == len(rows), "a run was recorded twice"
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in dict.fromkeys(row["arm"] for row in rows)}
    text = (ROOT / "docs" / "reward-models.md").read_text()

    def agrees(cell: str, arm: str, measure: str) -> bool:
        values = [float(row[measure]) for row in arms[arm]]
        return near(cell, [mean(values), min(values), max(values)])

    shown = table(text, "### On real text")
    assert [row[:2] for row in shown] == [[arm, str(len(of_arm))] for arm, of_arm in arms.items()]
    for arm, _, *cells in shown:
        for cell, measure in zip(cells, ("right_cue", "flipped", "no_cue", "cue_effect", "relevance"), strict=True):
            assert agrees(cell, arm, measure), (arm, measure)
    for name, arm, *cells, longest, shortest in table(text, "### Preferences as they are"):
        for cell, part in zip(cells, ("accuracy", "where_longer", "where_shorter"), strict=True):
            assert agrees(cell, arm, f"{name}/{part}"), (name, arm, part)
        assert near(longest, [arms[arm][0][f"{name}/longest"]])
        assert near(shortest, [1 - arms[arm][0][f"{name}/longest"]])
    for line in verdicts(rows, read_plan(ROOT / "benchmarks" / "recipes" / "text-reward-models.yaml").gates):
        assert line in text


def test_the_table_of_judges_is_what_the_rows_say() -> None:
    definitions = {
        "phi of X->Y, K = 4, r = 2 (the paper's)": "phi criteria->scores@log_likelihood K=4 r=2",
        "influence of X->Y": "influence criteria->scores@log_likelihood",
        "influence of criteria->analysis": "influence criteria->analysis@log_likelihood",
        "influence of criteria->analysis times analysis->scores": "influence chain@log_likelihood",
        "attention mass": "attention mass",
        "embedding similarity": "embedding similarity",
    }
    rows = table((ROOT / "docs" / "results.md").read_text(), "## Does S measure")
    assert [row[0] for row in rows] == list(definitions)
    for seed in (0, 1):
        recorded = {
            row["definition"]: row
            for row in rows_of(f"causal-testbed-seed{seed}.jsonl")
            if row["what"] == "auc" and row["population"] == "criteria against query"
        }
        for name, *cells in rows:
            row = recorded[definitions[name]]
            assert near(cells[seed], [row["value"], row["low"], row["high"]]), (name, seed)


def test_the_tables_of_agreement_within_prompts_are_what_the_rows_say() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    recorded = [
        {
            (row["what"], row.get("definition"), row.get("place")): row
            for row in rows_of(f"causal-lazy-seed{seed}.jsonl")
        }
        for seed in (51, 52)
    ]
    estimates = ["gradient", "second order", *(f"path {count}" for count in (1, 2, 4, 8, 16)), "effect", "exact effect"]
    rows = table(text, "## Which score tells completions of one prompt apart")
    for (_, *cells, cost), name in zip(rows, estimates, strict=True):
        columns = [(what, of_seed) for what in ("auc", "rank correlation", "error") for of_seed in recorded]
        for cell, (what, of_seed) in zip(cells, columns, strict=True):
            row = of_seed.get((what, name, "chain"))
            values = [row["value"], row["low"], row["high"]] if row else []
            assert near(cell, [value for value in values if value is not None]), (name, what)
        row = recorded[0].get(("cost", name, "chain"))
        assert cost == (f"{row['value']:.2f}" if row else ""), name
    scores = [
        "effect",
        "explained",
        "path 1",
        "norm",
        "influence",
        "phi K=4 r=2",
        "gradient",
        "log_cir",
        "cir",
        "necessary",
    ]
    for (_, *cells), name in zip(table(text, "AUC within a prompt, by link"), scores, strict=True):
        places = ("criteria->analysis", "analysis->scores", "criteria->scores")
        for cell, (place, of_seed) in zip(cells, [(place, one) for place in places for one in recorded], strict=True):
            row = of_seed.get(("auc", name, place))
            assert near(cell, [row["value"], row["low"], row["high"]] if row else []), (name, place)


def test_the_table_of_agreement_in_words_is_what_the_rows_say() -> None:
    recorded = [
        {
            (row["what"], row.get("definition"), row.get("place")): row
            for row in rows_of(f"causal-words-lazy-seed{seed}.jsonl")
        }
        for seed in (51, 52)
    ]
    columns = [(what, of_seed) for what in ("auc", "rank correlation", "error") for of_seed in recorded]
    rows = table((ROOT / "docs" / "results.md").read_text(), "### The same in words")
    estimates = ["gradient", "second order", "path 1", "path 2", "path 4", "effect", "exact effect"]
    for (_, *cells), name in zip(rows, estimates, strict=True):
        for cell, (what, of_seed) in zip(cells, columns, strict=True):
            row = of_seed.get((what, name, "chain"))
            values = [row["value"], row["low"], row["high"]] if row else []
            assert near(cell, [value for value in values if value is not None]), (name, what)


def test_the_table_of_the_ablation_is_what_the_rows_say() -> None:
    settings = [(0, 2), (1, 2), (2, 2), (8, 2), (4, 1), (4, 4), (4, 8), (4, "tau 0.5"), (4, "tau 0.9")]
    recorded = {
        (row["link"], row["counterfactuals"], f"tau {row['tau']}" if "tau" in row else row["rank"]): row
        for row in rows_of("ablate-testbed.jsonl")
        if row["kind"] == "link" and row["score"] == "phi"
    }
    for link, *cells in table((ROOT / "docs" / "results.md").read_text(), "## What K, r, links and p change"):
        for cell, (counterfactuals, rank) in zip(cells, settings, strict=True):
            assert near(cell, [recorded[link, counterfactuals, rank]["spearman_paper"]]), (link, counterfactuals, rank)


def test_the_table_of_the_real_run_is_what_the_rows_say() -> None:
    names = {"LLMBar": "llmbar", "RMB": "rmb_helpful_dev"}
    recorded = {(row.get("data"), row["when"], row.get("metric")): row for row in rows_of("smollm2-pairs.jsonl")}
    for data, *cells in table((ROOT / "docs" / "results.md").read_text(), "## A small real run"):
        columns = [("before", "average"), ("after", "average"), ("before", "consistent"), ("after", "consistent")]
        for cell, (when, metric) in zip(cells, columns, strict=True):
            row = recorded[names[data], when, metric]
            assert near(cell, [row["value"], row["low"], row["high"]]), (data, when, metric)


def test_the_table_of_costs_is_what_the_rows_say() -> None:
    cases = {
        "reference schedule, all links": "reference schedule",
        "padded autograd, all links (the strongest plain baseline)": "padded autograd",
        "`torch.func` (vmap of vjp), all links": "torch.func vmap of vjp",
        "group engine, all links": "group: all links, exact",
        "padded autograd, X->Y only": "padded autograd: X->Y",
        "Captum, X->Y only": "captum: X->Y",
        "group engine, X->Y only, with influence": "group: X->Y, with influence",
        "group engine, X->Y only": "group: X->Y",
        "group engine, all links, K = 0": "group: all links, base only",
    }
    rows = table((ROOT / "docs" / "engine.md").read_text(), "## Cost")
    recorded = {row["case"]: row for row in rows_of("bench-small-cpu.jsonl") if row["section"] == "peers"}
    assert {cases[row[0]] for row in rows} == set(recorded)
    for name, *cells in rows:
        row = recorded[cases[name]]
        expected = (row["seconds"], row["speedup"], row["speedup_by_flops"], row["peak_bytes"] / 2**20)
        for cell, value, digits in zip(cells, expected, (1, 1, 1, 0), strict=True):
            assert float(cell.replace(",", "")) == round(value, digits), (name, cell, value)


def test_the_table_of_costs_on_a_gpu_is_what_the_rows_say() -> None:
    cases = {
        "reference schedule, all links": "reference schedule",
        "padded autograd, all links": "padded autograd",
        "group engine in plain PyTorch, all links": "group: all links, exact",
        "group engine on the kernels, all links": "group: all links, exact, kernels",
        "padded autograd, X->Y only": "padded autograd: X->Y",
        "group engine in plain PyTorch, X->Y only": "group: X->Y",
        "group engine on the kernels, X->Y only": "group: X->Y, kernels",
        "as many Jacobians as the default reward has effects, each alone": "reference schedule: chain's effect",
        "the default reward's effects, each alone": "reference: chain's effect",
        "the default reward's effects, group engine in plain PyTorch": "group: chain's effect",
        "the default reward's effects, group engine on the kernels": "group: chain's effect, kernels",
        "path of X->Y with 4 nodes, each alone": "reference: path, 4 nodes",
        "path of X->Y with 4 nodes, group engine in plain PyTorch": "group: path, 4 nodes",
        "path of X->Y with 4 nodes, group engine on the kernels": "group: path, 4 nodes, kernels",
    }
    rows = table((ROOT / "docs" / "engine.md").read_text(), "## On a GPU")
    engine = [row for row in rows_of("first-hour-h200.jsonl") if row["part"] == "engine" and "case" in row]
    recorded = {(row["case"], row["shapes"]["G"]): row for row in engine}
    assert [row[0] for row in rows] == list(cases)
    for name, *cells in rows:
        few, many = (recorded.get((cases[name], count), {}) for count in (8, 16))
        expected = (few["seconds"], many.get("seconds"), many.get("vjps_per_s"), few["peak_bytes"] / 2**30)
        for cell, value, digits in zip(cells, expected, (2, 2, 0, 1), strict=True):
            assert cell == ("" if value is None else f"{value:.{digits}f}"), (name, cell, value)


def test_the_readme_gives_the_numbers_of_the_results() -> None:
    readme = README.read_text()
    worlds: dict[tuple[str, str], dict[int, float]] = {}
    for row in [*rows_of("testbed-worlds.jsonl"), *rows_of("testbed-words.jsonl")]:
        worlds.setdefault((row["world"], row["arm"]), {})[row["seed"]] = row["turned"]
    for lazy, hollow in (("lazy", "hollow"), ("words-lazy", "words-hollow")):
        for world, arm, other in (
            (lazy, "effect chain", "task"),
            (lazy, "effect chain", "effect chain shuffled"),
            (hollow, "effect chain", "task"),
            (hollow, "causal loss", "task"),
        ):
            ours, theirs = worlds[world, arm], worlds[world, other]
            assert difference(list(ours.values()), [theirs[seed] for seed in ours]) in readme, (world, arm, other)
    turned = {arm: {seed: row["turned"] for seed, row in of_arm.items()} for arm, of_arm in recorded_runs().items()}
    for arm in ("X->Y influence", "X->Y phi", "CE-PO"):
        fresh = [seed for seed in turned[arm] if seed > 5]
        found = difference([turned[arm][seed] for seed in fresh], [turned["task"][seed] for seed in fresh])
        assert found in readme, arm
