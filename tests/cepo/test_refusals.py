"""Protects users from waiting for a refusal: bad arguments are told by their options before torch is imported."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from cepo.cli.app import app as cepo
from cepo.cli.checks import JUDGES, PEERS, REASONERS, SIZES, WORLDS, OptionNames, option_of
from cepo.files import means_path
from cepo.train.file_kinds import FILES, SOURCES
from tests.paths import ROOT

SCORE = "score --model smollm2 --input rows.jsonl --output s.jsonl"
TRAIN = "train run.yaml"
REWARD = "reward-model run.yaml --data rows.jsonl --output out"
EVAL = "--data rows.jsonl --output out"
REFUSED = {
    "score --model smollm2 --input none.jsonl --output s.jsonl": "--input none.jsonl is not a file; expected JSONL",
    f"{SCORE} --batch-size 0": "--batch-size is 0",
    f"{SCORE} --memory-gib 0": "--memory-gib is 0; expected a number above 0",
    f"{SCORE} --engine autograd --memory-gib 2": "--memory-gib needs --engine group",
    f"{SCORE} --device gpu": "--device is 'gpu'; expected cpu, cuda",
    f"{SCORE} --seed -1": "--seed is -1",
    f"{SCORE} --ray 0": "--ray is 0",
    f"{SCORE} --ray 2 --save-jacobians m": "--save-jacobians cannot be used with --ray",
    f"{SCORE} --guard all": "--guard is 'all'",
    f"{SCORE} --verdicts any": "--verdicts is 'any'",
    f"{SCORE} --nodes many": "--nodes is 'many'; expected an integer >= 1, or 'auto'",
    f"{SCORE} --nodes 0": "--nodes is 0; expected an integer >= 1, or 'auto'",
    f"{SCORE} --nodes 2": "--nodes is read only by the score path",
    f"{SCORE} -K 2": "--counterfactuals is read only by the scores phi",
    f"{SCORE} --rank 3": "--rank is read only by the scores phi",
    f"{SCORE} --score phi --rank 3": "--rank is read only where counterfactuals (K) is at least 1",
    f"{SCORE} --score influence --donors rows.jsonl": "--donors is read only by the scores effect",
    f"{SCORE} --score influence --link X->Y --no-donor permute": "--no-donor is read only by the scores effect",
    f"{SCORE} --score influence --seed 1": "--seed is read only where donors or permutations are drawn",
    f"{SCORE} --permutation block": "--permutation is read only by",
    f"{SCORE} --link X->Y --join 0": "--join is read only by chains",
    f"{SCORE} --score influence --link X->Y@margin --target log_odds": "--target is read only by links",
    "score --model smollm2 --input rows.jsonl --output rows.jsonl": "--output is 'rows.jsonl', which would overwrite",
    "score --output rows.jsonl --input ./rows.jsonl --model smollm2": "--output is 'rows.jsonl', which would overwrite",
    f"{SCORE} --html s.jsonl": "--output is 's.jsonl', which would overwrite --html",
    f"{SCORE} --html donors.jsonl --donors donors.jsonl": "--html is 'donors.jsonl', which would overwrite --donors",
    "score --model model --input rows.jsonl --output model/config.json --html model": "--html is 'model', which is a f",
    f"{SCORE} --score good": "--score is 'good'",
    f"{SCORE} --counterfactuals -1": "--counterfactuals (K) is -1",
    f"{SCORE} --link X=>Y": "--link is 'X=>Y'",
    f"{SCORE} --link Q->Y": "'Q->Y'",
    f"{SCORE} --join nan": "--join is NaN",
    f"{SCORE} --donor-count 0": "--donor-count is 0",
    f"{SCORE} --task-weight -1": "--task-weight is -1",
    f"{SCORE} --link X->Y=nan": "--link, by weight, is [nan]",
    f"{SCORE} --answer-tag foo": "--answer-tag needs --kind reasoning",
    f"{SCORE} --kind reasoning --answer-tag /sol": "--answer-tag is '/sol'; expected the tag's name",
    f"{SCORE} --kind reasoning --guard off": "--guard cannot be used with --kind reasoning",
    f"{SCORE} --dtype int": "--dtype is 'int'",
    f"{SCORE} --engine fast": "--engine is 'fast'",
    f"{SCORE} --html rows.jsonl/page.html": "--html is",
    "score --model ./none --input rows.jsonl --output s.jsonl": "--model is './none', which does not exist",
    "score --model rows/none --input rows.jsonl --output s.jsonl": "--model is 'rows/none', which does not exist",
    "train none.yaml": "config 'none.yaml' cannot be read",
    TRAIN: "config 'run.yaml' lacks data, rewards, output",
    f"{TRAIN} --set sedd=1": "config 'run.yaml' holds the unknown key sedd; expected some of model, data",
    f"{TRAIN} --data rows.jsonl --output out --set rewards=[1]": "rewards holds 1; expected a mapping with a name of",
    f"{TRAIN} --data rows.jsonl --output out --set rewards=[1] --set lora=2": "lora is 2; expected a mapping",
    f"{TRAIN} --data data/none.csv": "--data data/none.csv does not exist; expected a file",
    f"{TRAIN} --output rows.jsonl": "--output is 'rows.jsonl', but",
    f"{TRAIN} --output out --data rows.jsonl --set rewards=[]": "rewards is empty; expected a list of mappings",
    f"{TRAIN} --data rows.jsonl --set rewards=[1] --set 'output=\"\"'": "output is empty; expected text",
    f"{TRAIN} --max-steps 1 --set grpo.max_steps=-1": "--set grpo.max_steps=-1 and --max-steps both set grpo.max_steps",
    f"{TRAIN} --seed 5 --set seed=3": "--set seed=3 and --seed both set seed; leave one out",
    f"{TRAIN} --data rows.jsonl --set 'data={{source: testbed}}'": "and --data both set data.source; leave one out",
    "reward-model run.yaml --output out --set output=other": "--set output=other and --output both set output",
    f"{TRAIN} --trust-remote-code --set trust_remote_code=false": "and --trust-remote-code both set trust_remote_code",
    f"{TRAIN} --set seed=1 --set seed=2": "--set seed=2 and --set seed=1 both set seed; leave one out",
    f"{TRAIN} --output ''": "--output is followed by an empty value",
    f"{TRAIN} --output=": "--output is followed by an empty value",
    "train ''": "train is followed by an empty value",
    "eval rewardbench --model smollm2 --output out --data ''": "--data is followed by an empty value",
    "score --model smollm2 --output s.jsonl --input ''": "--input is followed by an empty value",
    f"{SCORE} --html /proc/page.html": "--html is '/proc/page.html', but /proc cannot be written to (",
    f"{TRAIN} --output /proc/out": "--output is '/proc/out', but /proc cannot be written to (",
    f"{TRAIN} --data ./{'x' * 300}": "which cannot be read: File name too long; expected another path",
    f"{TRAIN} --model ./{'x' * 300}": "which cannot be read: File name too long; expected another path",
    f"{TRAIN} --engine ppo": "--engine is 'ppo'",
    f"{TRAIN} --set steps": "--set is 'steps'",
    "reward-model run.yaml --model a/b/c": "--model is 'a/b/c'",
    f"{TRAIN} --seed -1": "--seed is -1",
    f"{TRAIN} --model model/final --output model": "--output is 'model', which would overwrite --model ('model/final')",
    "reward-model run.yaml --data model/left_out.jsonl --output model": "would overwrite --data ('model/left_out.jsonl",
    f"{REWARD} --set sedd=1": "config 'run.yaml' holds the unknown key sedd; expected some of model, data",
    f"{REWARD} --set data.tiez=1": "data holds the unknown key tiez; expected some of source, test",
    f"{REWARD} --data testbed --set data.split=a": "data holds the unknown key split; expected some of source, te",
    f"{REWARD} --set form=poem": "form is 'poem'; expected bradley-terry or pairwise",
    f"{REWARD} --set tie_weight=-1": "tie_weight is -1; expected a number >= 0",
    "warm-start --data none.jsonl --output out": "--data none.jsonl",
    "warm-start --data rows.jsonl --model model --output model": "--output is 'model', which would overwrite --model",
    "warm-start --data rows.jsonl --output out --learning-rate 0": "--learning-rate is 0; expected a number above 0",
    "warm-start --data rows.jsonl --output out --max-characters 0": "--max-characters is 0",
    "demo --seed -1": "--seed is -1",
    "augment --data pairs/pairs.jsonl --output pairs --kinds original": "--output is 'pairs', which would overwrite --",
    f"augment {EVAL} --kinds original --test-fraction 2": "--test-fraction is 2.0; expected at least 0 and at most 1",
    f"augment {EVAL} --kinds good --threads 1 --seed 1": "--kinds holds 'good'",
    f"augment {EVAL} --kinds original --split test": "--split cannot be used with --data rows.jsonl",
    f"augment {EVAL} --kinds original --temperature 1": "--temperature needs --writer",
    f"augment {EVAL} --kinds original --device cuda": "--device needs --writer or --filter-model",
    f"augment {EVAL} --kinds good": "--kinds holds 'good'",
    f"augment {EVAL} --kinds degrade": "--writer",
    f"augment {EVAL} --kinds degrade --writer ./none": "--writer is './none'",
    f"augment {EVAL} --kinds original --filter-model ./none": "--filter-model is './none'",
    "demo --output rows.jsonl": "--output is 'rows.jsonl'",
    f"eval rewardbench {EVAL}": "Give either --model or --reward-model",
    f"eval rewardbench {EVAL} --model smollm2 --device gpu": "--device is 'gpu'",
    f"eval rewardbench {EVAL} --model smollm2 --seed -1": "--seed is -1",
    f"eval rewardbench {EVAL} --model smollm2 --temperature -1": "--temperature is -1",
    f"eval rewardbench {EVAL} --model smollm2 --split test": "--split cannot be used with --data rows.jsonl",
    f"eval rewardbench {EVAL} --reward-model org/model --threads 1 --split test": "--split cannot be used with --data",
    f"eval rewardbench {EVAL} --model any --base-url http://h/v1 --timeout 0": "--timeout is 0",
    f"eval rewardbench {EVAL} --model any --base-url http://h/v1 --retries -1": "--retries is -1",
    f"eval rewardbench {EVAL} --model any --base-url h": "--base-url is 'h'",
    f"eval rewardbench {EVAL} --model smollm2 --backend fast": "--backend is 'fast'",
    f"eval rewardbench {EVAL} --reward-model ./none": "--reward-model is './none'",
    f"eval rewardbench {EVAL} --model smollm2 --timeout 5": "--timeout needs --base-url",
    f"eval rewardbench {EVAL} --model any --base-url http://h/v1 --dtype float64": "--dtype cannot be used with --base",
    f"eval rewardbench {EVAL} --model smollm2 --batch-size 0": "--batch-size is 0",
    f"eval rewardbench {EVAL} --model smollm2 --max-new-tokens 0": "--max-new-tokens is 0",
    f"eval robustness {EVAL} --model smollm2 --threads 1 --transformation good": "--transformation is 'good'",
    f"eval best-of-n {EVAL} --model smollm2 --n 1,x": "--n is '1,x'",
    f"eval best-of-n {EVAL} --model smollm2 --threads 1 --n 0,1": "--n is '0,1'; expected different numbers of at leas",
    f"eval best-of-n {EVAL} --model smollm2 --n 1 --verify eye": "--verify is 'eye'",
    f"eval best-of-n {EVAL} --reward-model org/model --n 1 --draws 2": "--draws cannot be used with --reward-model",
    "eval sensitivity --reward-model org/model --data rows.jsonl --output out --seed 1": "--seed needs --data testbed",
    "eval sensitivity --reward-model org/model --data testbed --output out --split a": "--split cannot be used with --",
    "eval sensitivity --reward-model org/model --data testbed --output out --device gpu": "--device is 'gpu'",
    "eval sensitivity --reward-model ./none --data testbed --output out": "--reward-model is './none'",
    "eval cue-flips --judge good --output out": "--judge is 'good'",
    "eval cue-flips --judge lazy --output out --seed -1": "--seed is -1",
    "eval causal --output out": "--testbed alone",
    "eval causal --output out --testbed --layers 2": "--layers needs a world in words",
    "eval causal --output out --testbed --seed -1": "--seed is -1",
    "eval causal --output out --testbed --most-nodes 3": "--most-nodes is 3",
    "eval causal --output out --testbed --items 3": "--items is 3",
    "eval causal --output out --model smollm2 --input rows.jsonl --world lazy": "--world needs --testbed",
    "eval causal --output out --testbed --world good": "--world is 'good'",
    "ablate --model smollm2 --input owner/name --output out": "--input owner/name is not a file; expected JSONL",
    "ablate --model smollm2 --input rows.jsonl --output out --score good": "--score is 'good'",
    "ablate --output out --testbed 12": "--testbed is 12; expected a multiple of 8",
    "ablate --output out --testbed 8 --raw": "--raw cannot be used with --testbed",
    "ablate --output out": "or --testbed N alone",
    "ablate --model smollm2 --input rows.jsonl --output out -K 1.5": "--counterfactuals is '1.5'; expected whole numbe",
    "ablate --model smollm2 --input rows.jsonl --output out -K inf": "--counterfactuals is 'inf'; expected whole numbe",
    "ablate --model smollm2 --input pairs/rows.jsonl --output pairs": "--output is 'pairs', which would overwrite --in",
    "bench --size good": "--size is 'good'",
    "bench --device gpu": "--device is 'gpu'; expected one of cpu, cuda",
    "bench --peer good": "--peer is 'good'",
    "bench --kernels --size tiny": "--size cannot be used with --kernels",
    "bench --minutes 1": "--minutes needs --kernels",
    "bench --kernels --minutes 0": "--minutes is 0",
    "experiment --worlds lazy,words-lazy": "--worlds is 'lazy,words-lazy'; expected worlds of one testbed",
    "experiment --worlds lazy --layers 2": "--layers needs worlds in words",
    "experiment --device gpu": "--device is 'gpu'",
    "reward-experiment --data none": "--data is 'none', which is not a folder",
    "reward-experiment --seed -1": "--seed is -1",
    "words-judge lazy --learning-rate 0": "--learning-rate is 0",
    "words-judge lazy --device gpu": "--device is 'gpu'",
    "experiment --worlds good": "--worlds is 'good'",
    "experiment --recipe none.yaml": "--recipe is 'none.yaml'",
    "reward-experiment --recipe none.yaml": "--recipe is 'none.yaml'",
    "experiment --recipe run.yaml": "--recipe 'run.yaml' holds the unknown key model; expected some of worlds, ste",
    "reward-experiment --recipe run.yaml": "--recipe 'run.yaml' holds the unknown key model; expected some of arms",
    "experiment --recipe rows.jsonl/run.yaml": "--recipe is 'rows.jsonl/run.yaml', which is not a file",
    "reward-experiment --recipe list.yaml": "--recipe 'list.yaml' holds a list; expected a mapping",
    "words-judge good": "judge is 'good'",
}
RUN_ALL = """
import io, shlex, sys
from contextlib import redirect_stderr, redirect_stdout
from cepo.cli.app import main
from cepo.cli.shared import errors
for line in sys.stdin.read().splitlines():
    sys.argv = ["cepo", *shlex.split(line)]
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as told:
            main()
        code = 0
    except SystemExit as end:
        code = end.code
    heavy = [name for name in ("torch", "transformers") if name in sys.modules]
    print(code, heavy, " ".join(told.getvalue().split()))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command line says, in one process, so that the first that imports torch shows in the next ones too."""
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "rows.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    (folder / "run.yaml").write_text("model: smollm2\n")
    (folder / "list.yaml").write_text("- plain\n")
    (folder / "donors.jsonl").write_text("{}\n")
    for name in ("rows", "pairs", "model/final"):
        (folder / name).mkdir(parents=True)
    for name in ("pairs.jsonl", "rows.jsonl"):
        (folder / "pairs" / name).write_text("{}\n")
    for name in ("config.json", "final/config.json", "left_out.jsonl"):
        (folder / "model" / name).write_text("{}\n")
    before = sorted(folder.rglob("*"))
    lines = ["--version", *(f"{name} --help".strip() for name in ("", "eval", *_commands())), *REFUSED]
    run = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input="\n".join(lines), capture_output=True, text=True, cwd=folder, check=True
    )
    assert sorted(folder.rglob("*")) == before
    return dict(zip(lines, run.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("line", REFUSED)
def test_a_refusal_names_the_option_and_waits_for_no_import(line: str, told: dict[str, str]) -> None:
    assert told[line].startswith("2 [] "), told[line]
    assert REFUSED[line] in told[line]


def test_help_waits_for_no_import(told: dict[str, str]) -> None:
    shown = {line: said for line, said in told.items() if line not in REFUSED}
    assert len(shown) > 15
    assert set(shown.values()) == {"0 [] "}, shown


def _commands(command: Any = None, name: str = "") -> dict[str, Any]:
    """The commands by the words that call them."""
    command = command or get_command(cepo)
    inner = getattr(command, "commands", {}).items()
    return {key: one for word, each in inner for key, one in _commands(each, f"{name} {word}".strip()).items()} or {
        name: command
    }


REQUIRED = [(name, option_of(one)) for name, command in _commands().items() for one in command.params if one.required]


@pytest.mark.parametrize(("name", "option"), REQUIRED)
def test_what_is_missing_is_told_with_an_example(
    name: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what it is, a command that would run, and the row of a file that it reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "run.yaml").write_text("{}\n")
    values = {"data": "rows.jsonl", "input": "rows.jsonl", "n": "1", "kinds": "original", "judge": "lazy"}
    values |= {"output": "out", "model": "smollm2", "reward_model": "org/model", "config": "run.yaml"}
    given = [
        word
        for one in _commands()[name].params
        if one.required and option_of(one) != option
        for word in ([] if one.param_type_name == "argument" else [option_of(one)]) + [values[one.name]]
    ]
    with pytest.raises(ValueError, match=f"^{option} is missing") as raised:
        cepo([*name.split(), *given], standalone_mode=False)
    told = str(raised.value)
    (missing,) = (one for one in _commands()[name].params if option_of(one) == option)
    assert missing.help in told
    assert f"    cepo {name} " in told
    reads_rows = {"data", "input"} & {one.name for one in _commands()[name].params}
    assert ('    {"' in told) == bool(reads_rows)


@pytest.mark.parametrize("name", _commands())
def test_help_tells_a_default_once_and_says_what_each_option_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    shown = CliRunner().invoke(cepo, [*name.split(), "--help"]).output
    for told in re.split(r"^│ (?:[* ]  )?(?=-)", shown, flags=re.MULTILINE)[1:]:
        text = " ".join(told.replace("│", " ").split())
        assert text.lower().count("default: ") <= 1, text
    for one in _commands()[name].params:
        assert one.help[0].isupper(), f"{option_of(one)} of {name}: {one.help}"
        assert one.help.endswith("."), f"{option_of(one)} of {name}: {one.help}"


def test_every_option_that_reads_rows_says_in_the_same_words_which_files() -> None:
    """Three wordings made people think that a command reads fewer kinds of files than it does."""
    assert FILES in (ROOT / "docs" / "formats.md").read_text()
    assert FILES in SOURCES
    reading = [
        (name, one)
        for name, command in _commands().items()
        for one in command.params
        if one.name in ("data", "input", "donors_file") and name != "reward-experiment"  # which reads a folder
    ]
    assert len(reading) == 12
    for name, one in reading:
        told = SOURCES if one.name == "data" else FILES
        assert told in one.help, f"{option_of(one)} of {name}: {one.help}"


def test_errors_name_the_option_and_leave_what_is_none() -> None:
    """A recipe's entry is no option; a setting that differs and the plural of a repeated option are."""

    def told(error: str) -> str:
        app = typer.Typer(cls=OptionNames)

        @app.callback()
        def root() -> None:
            pass

        @app.command()
        def run(
            data: str = "",
            seed: int = 0,
            arm: list[str] = [],  # noqa: B006
            donors: Annotated[int, typer.Option("--donor-count")] = 3,
            donors_file: Annotated[str, typer.Option("--donors")] = "",
        ) -> None:
            raise ValueError(error)

        with pytest.raises(ValueError, match=".") as raised:
            app(["run"], standalone_mode=False)
        return str(raised.value)

    assert told("data.source is missing") == "data.source is missing"
    assert told("data rows.jsonl holds no usable row") == "--data rows.jsonl holds no usable row"
    assert told("data holds the unknown key sorce") == "data holds the unknown key sorce"
    assert told("arms names foo") == "--arm names foo"
    assert told("donors is 0") == "--donor-count is 0"
    assert told("donors_file is none") == "--donors is none"
    differ = "output 'o' holds o, made with other settings: config.seed was 0 and is 1, donors_file has other content"
    assert told(differ).endswith(": --seed was 0 and is 1, --donors has other content")


def test_names_that_are_known_without_torch_are_those_of_the_library() -> None:
    from cepo.benchmarks.engine import cases, sizes
    from cepo.benchmarks.experiment.recipe import REASONS
    from cepo.cli.interventions import _NODES
    from cepo.eval.causal.measures import NODES
    from cepo.train.reasoner_testbed_models import ReasonerKind
    from cepo.train.testbed_judges import JudgeKind

    assert get_args(JudgeKind) == JUDGES
    assert WORLDS[: len(JUDGES)] == JUDGES
    assert tuple(REASONS + kind for kind in get_args(ReasonerKind)) == REASONERS
    assert tuple(sizes.SIZES) == SIZES
    assert cases.PEERS == PEERS
    assert _NODES == NODES


def test_the_recipes_of_experiments_hold_only_keys_that_are_known() -> None:
    for recipe in sorted((ROOT / "benchmarks" / "recipes").glob("*.yaml")):
        if recipe.name != "smollm2-pairs.yaml":  # of cepo train
            command = _commands()["reward-experiment" if "reward-models" in recipe.name else "experiment"]
            (option,) = (one for one in command.params if one.name == "recipe")
            assert option.process_value(typer.Context(command), str(recipe)) == recipe


def test_what_looks_like_a_path_is_none_of_the_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert all(map(means_path, ("runs/none", "./none", "/none", "~/none", "a/b/c", "../none")))
    assert not any(map(means_path, ("owner/name", "smollm2", "gpt2")))
