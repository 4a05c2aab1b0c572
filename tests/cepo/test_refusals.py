"""Protects users from waiting for a refusal: bad arguments are told by their options before torch is imported."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, get_args

import pytest
import typer

from cepo.cli.checks import JUDGES, REASONERS, SIZES, WORLDS, OptionNames
from cepo.files import means_path

SCORE = "score --model smollm2 --input rows.jsonl --output s.jsonl"
TRAIN = "train run.yaml"
EVAL = "--data rows.jsonl --output out"
REFUSED = {
    "score --model smollm2 --input none.jsonl --output s.jsonl": "--input none.jsonl is not a file",
    f"{SCORE} --batch-size 0": "--batch-size is 0",
    f"{SCORE} --score good": "--score is 'good'",
    f"{SCORE} --counterfactuals -1": "--counterfactuals (K) is -1",
    f"{SCORE} --link X=>Y": "--link is 'X=>Y'",
    f"{SCORE} --link Q->Y": "'Q->Y'",
    f"{SCORE} --join nan": "--join is NaN",
    f"{SCORE} --donor-count 0": "--donor-count is 0",
    f"{SCORE} --task-weight -1": "--task-weight is -1",
    f"{SCORE} --link X->Y=nan": "--link, by weight, is [nan]",
    f"{SCORE} --answer-tag foo": "--answer-tag needs --kind reasoning",
    f"{SCORE} --kind reasoning --guard off": "--guard cannot be used with --kind reasoning",
    f"{SCORE} --dtype int": "--dtype is 'int'",
    f"{SCORE} --engine fast": "--engine is 'fast'",
    f"{SCORE} --html rows.jsonl/page.html": "--html is",
    "score --model ./none --input rows.jsonl --output s.jsonl": "--model is './none', which is not there",
    "score --model rows/none --input rows.jsonl --output s.jsonl": "--model is 'rows/none', which is not there",
    "train none.yaml": "config 'none.yaml' cannot be read",
    f"{TRAIN} --data data/none.csv": "--data data/none.csv is not a file",
    f"{TRAIN} --output rows.jsonl": "--output is 'rows.jsonl', but",
    f"{TRAIN} --engine ppo": "--engine is 'ppo'",
    f"{TRAIN} --set steps": "--set is 'steps'",
    "reward-model run.yaml --model a/b/c": "--model is 'a/b/c'",
    "warm-start --data none.jsonl --output out": "--data none.jsonl",
    f"augment {EVAL} --kinds good": "--kinds holds 'good'",
    f"augment {EVAL} --kinds degrade": "--writer",
    f"augment {EVAL} --kinds degrade --writer ./none": "--writer is './none'",
    f"augment {EVAL} --kinds original --filter-model ./none": "--filter-model is './none'",
    "demo --output rows.jsonl": "--output is 'rows.jsonl'",
    f"eval rewardbench {EVAL}": "give either --model or --reward-model",
    f"eval rewardbench {EVAL} --reward-model ./none": "--reward-model is './none'",
    f"eval rewardbench {EVAL} --model smollm2 --timeout 5": "--timeout needs --base-url",
    f"eval rewardbench {EVAL} --model any --base-url http://h/v1 --dtype float64": "--dtype cannot be used with --base",
    f"eval rewardbench {EVAL} --model smollm2 --batch-size 0": "--batch-size is 0",
    f"eval rewardbench {EVAL} --model smollm2 --max-new-tokens 0": "--max-new-tokens is 0",
    f"eval robustness {EVAL} --model smollm2 --transformation good": "--transformation is 'good'",
    f"eval best-of-n {EVAL} --model smollm2 --n 1,x": "--n is '1,x'",
    f"eval best-of-n {EVAL} --model smollm2 --n 1 --verify eye": "--verify is 'eye'",
    "eval sensitivity --reward-model ./none --data testbed --output out": "--reward-model is './none'",
    "eval cue-flips --judge good --output out": "--judge is 'good'",
    "eval causal --output out": "--testbed alone",
    "eval causal --output out --testbed --most-nodes 3": "--most-nodes is 3",
    "eval causal --output out --testbed --items 3": "--items is 3",
    "eval causal --output out --model smollm2 --input rows.jsonl --world lazy": "--world needs --testbed",
    "eval causal --output out --testbed --world good": "--world is 'good'",
    "ablate --model smollm2 --input none.jsonl --output out": "--input none.jsonl",
    "ablate --model smollm2 --input rows.jsonl --output out --score good": "--score is 'good'",
    "bench --size good": "--size is 'good'",
    "experiment --worlds good": "--worlds is 'good'",
    "experiment --recipe none.yaml": "--recipe is 'none.yaml'",
    "reward-experiment --recipe none.yaml": "--recipe is 'none.yaml'",
    "words-judge good": "judge is 'good'",
}
RUN_ALL = """
import io, sys
from contextlib import redirect_stderr
from cepo.cli.app import main
from cepo.cli.shared import errors
for line in sys.stdin.read().splitlines():
    sys.argv = ["cepo", *line.split()]
    try:
        with redirect_stderr(io.StringIO()) as told:
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
    (folder / "rows").mkdir()
    lines = "\n".join(REFUSED)
    run = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=lines, capture_output=True, text=True, cwd=folder, check=True
    )
    assert sorted(path.name for path in folder.iterdir()) == ["rows", "rows.jsonl", "run.yaml"]
    return dict(zip(REFUSED, run.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("line", REFUSED)
def test_a_refusal_names_the_option_and_waits_for_no_import(line: str, told: dict[str, str]) -> None:
    assert told[line].startswith("2 [] "), told[line]
    assert REFUSED[line] in told[line]


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
    assert told("arms names foo") == "--arm names foo"
    assert told("donors is 0") == "--donor-count is 0"
    assert told("donors_file is none") == "--donors is none"
    differ = "output 'o' holds o, made with other settings: config.seed was 0 and is 1, donors_file has other content"
    assert told(differ).endswith(": --seed was 0 and is 1, --donors has other content")


def test_names_that_are_known_without_torch_are_those_of_the_library() -> None:
    from cepo.benchmarks.engine import sizes
    from cepo.benchmarks.experiment.recipe import REASONS
    from cepo.cli.evaluate import _NODES
    from cepo.eval.causal.measures import NODES
    from cepo.train.reasoner_testbed_models import ReasonerKind
    from cepo.train.testbed_judges import JudgeKind

    assert get_args(JudgeKind) == JUDGES
    assert WORLDS[: len(JUDGES)] == JUDGES
    assert tuple(REASONS + kind for kind in get_args(ReasonerKind)) == REASONERS
    assert tuple(sizes.SIZES) == SIZES
    assert _NODES == NODES


def test_what_looks_like_a_path_is_none_of_the_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert all(map(means_path, ("runs/none", "./none", "/none", "~/none", "a/b/c", "../none")))
    assert not any(map(means_path, ("owner/name", "smollm2", "gpt2")))
