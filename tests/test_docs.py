"""Protects README and docs/: short, no dead links, commands and snippets that exist, tables that the rows bear out."""

import ast
import importlib.util
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from scipy.stats import t
from typer.main import get_command

from cepo.benchmarks.reward_model.command import read_plan, verdicts
from cepo.cli.app import app
from cepo.files import read_jsonl
from tests.paths import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = ("kernels", "jacobian", "counterfactual", "fusion", "train", "eval", "benchmarks", "cepo")
NOT_ENGLISH = (
    "one a rollout",
    "is no file",
    "told above",
    "compilers keep no hours",
    "put into its mouth",
    "roads that others take",
    "mend this",
    "So many rows",
    "so many rows",
    "parted by",
    "lies no word",
    "taken off S",
    "judge that writes",
)


def shell_lines(text: str) -> list[str]:
    """The commands of a page: lines of indented blocks, and inline code, without what starts them on several ranks."""
    text = re.sub(r"\\\n *", "", text)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [re.sub(r"^(torchrun|accelerate launch) .*(-m|--module) (?=cepo )", "", line) for line in lines]
    return [line for line in lines if line.startswith(("cepo ", "make "))]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def check_command(line: str) -> None:
    """Assert that a command and its options exist, without running it."""
    command: Any = get_command(app)
    words = shlex.split(line, comments=True)[1:]
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{line!r}: there is no {words[0]!r}"
        command = command.commands[words.pop(0)]
    options = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
    positional = 0
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            positional += 1
            continue
        name, equals, _ = word.partition("=")
        assert name in options or name == "--help", f"{line!r}: there is no option {name}"
        if name != "--help" and not options[name].is_flag and not equals:
            assert words, f"{line!r}: {name} lacks its value"
            words.pop(0)
    accepted = sum(parameter.param_type_name == "argument" for parameter in command.params)
    assert positional <= accepted, f"{line!r} has more arguments than the command"


def leaves(command: Any) -> Iterator[Any]:
    if hasattr(command, "commands"):
        for inner in command.commands.values():
            yield from leaves(inner)
    else:
        yield command


def test_the_readme_is_read_in_two_minutes() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_repository_path_exists(page: Path) -> None:
    """A moved or deleted file must not stay in the pages: in prose, in commands, or as a module that one starts."""
    text = page.read_text()
    for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(SOURCE)}|tests|docs)/[\w./-]+\.\w+", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}, which is not there"
    for module in re.findall(r"-m (cepo\.[\w.]+)", text):
        assert importlib.util.find_spec(module), f"{page.name} starts {module}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_pages_exists(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line in shell_lines(page.read_text()):
        if line.startswith("make "):
            assert line.split()[1] in targets, f"{line!r}: the Makefile has no such target"
        else:
            check_command(line)


def test_a_command_that_does_not_exist_is_noticed() -> None:
    for line in ("cepo scores", "cepo score --modell x", "cepo eval robustness x", "cepo score --model"):
        with pytest.raises(AssertionError):
            check_command(line)
    (launched,) = shell_lines("    torchrun --nproc_per_node 8 -m cepo train run.yaml \\\n        --modell x\n")
    assert launched == "cepo train run.yaml --modell x"


def test_the_readmes_rows_are_those_of_the_example_files() -> None:
    """Its figures are of these files: a row that is shown is the file's first."""
    readme = re.sub(r"\n {5}", " ", README.read_text())  # a row may be shown on two lines
    shown = [line.strip().partition(" ...")[0] for line in readme.splitlines() if line.startswith('    {"')]
    for name in ("preferences", "judged"):
        path = ROOT / "docs" / "examples" / f"{name}.jsonl"
        (_, first), *others = read_jsonl(path)[0]
        (of_file,) = [line for line in shown if path.read_text().startswith(line)]
        assert len(of_file) > 100, name
        assert len({row["prompt"] for _, row in others} | {first["prompt"]}) >= 3  # donors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile_and_import_what_exists(page: Path) -> None:
    for block in python_blocks(page.read_text()):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cepo":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_the_glossary_names_every_option_and_no_other() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", (ROOT / "docs" / "glossary.md").read_text()))
    found = {"--help", "--version"}
    for command in leaves(get_command(app)):
        for parameter in command.params:
            if parameter.param_type_name == "option":
                names = {*parameter.opts, *parameter.secondary_opts}
                assert named & names, f"docs/glossary.md lacks {names} of {command.name}"
                found |= names
    assert named <= found, f"docs/glossary.md names {named - found}, which no command has"


def test_no_page_source_or_help_speaks_in_riddles() -> None:
    files = [
        *PAGES,
        *(path for folder in SOURCE for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".html", ".yaml")),
    ]
    for path in files:
        text = " ".join(path.read_text().split())
        assert not [phrase for phrase in NOT_ENGLISH if phrase in text], path


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


def test_the_winner_is_compared_with_its_shuffle() -> None:
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows_of("testbed-worlds.jsonl"):
        if row["world"] == "lazy":
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


def test_the_readme_gives_the_numbers_of_the_results() -> None:
    readme = README.read_text()
    worlds: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in rows_of("testbed-worlds.jsonl"):
        worlds.setdefault((row["world"], row["arm"]), {})[row["seed"]] = row
    for world, arm, other, measure in (
        ("lazy", "effect chain", "task", "turned"),
        ("lazy", "effect chain", "effect chain shuffled", "turned"),
        ("hollow", "effect chain", "task", "turned"),
        ("hollow", "causal loss", "task", "turned"),
    ):
        ours, theirs = ([run[measure] for run in worlds[world, name].values()] for name in (arm, other))
        assert difference(ours, theirs) in readme, (world, arm, other)
    words = {(row["arm"], row["seed"]): row["turned"] for row in rows_of("testbed-words.jsonl")}
    for arm in ("effect chain", "causal loss"):
        ours, theirs = ([words[name, seed] for seed in (31, 32, 33)] for name in (arm, "task"))
        assert difference(ours, theirs) in readme, arm
    turned = {arm: {seed: row["turned"] for seed, row in of_arm.items()} for arm, of_arm in recorded_runs().items()}
    for arm in ("X->Y influence", "X->Y phi", "CE-PO"):
        fresh = [seed for seed in turned[arm] if seed > 5]
        found = difference([turned[arm][seed] for seed in fresh], [turned["task"][seed] for seed in fresh])
        assert found in readme, arm
