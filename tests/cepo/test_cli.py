"""Protects the command line's face: the order of its help, and that a judge has the same options everywhere."""

import errno
import io
import os
import re
import subprocess
import sys
import termios
from functools import partial

import pytest
import typer
from tqdm import tqdm
from typer.testing import CliRunner

from cepo.cli import app as app_module
from cepo.cli.app import app
from cepo.cli.checks import OptionNames
from cepo.cli.shared import progress_bar, showing
from tests.paths import ROOT

JUDGE = {
    *(
        "model",
        "reward_model",
        "backend",
        "base_url",
        "api_key_file",
        "concurrency",
        "timeout",
        "retries",
        "max_new_tokens",
    ),
    *(
        "temperature",
        "force_format",
        "raw",
        "verdicts",
        "batch_size",
        "seed",
        "threads",
        "dtype",
        "device",
        "trust_remote_code",
    ),
}


def test_a_full_disk_is_told_in_a_paragraph_and_a_fault_of_ours_with_its_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(number: int) -> None:
        raise OSError(number, os.strerror(number))

    for number, told in ((errno.ENOSPC, "No space left on device"), (errno.EACCES, "Permission denied")):
        monkeypatch.setattr(app_module, "app", partial(failing, number))
        with pytest.raises(SystemExit) as ended:
            app_module.main()
        assert ended.value.code == 1
        assert f"{told}; results so far are kept" in capsys.readouterr().err
    monkeypatch.setattr(app_module, "app", partial(failing, errno.EBADF))
    with pytest.raises(OSError, match="Bad file descriptor"):
        app_module.main()


def test_ctrl_c_says_what_is_kept_and_that_the_same_command_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    group = typer.Typer(cls=OptionNames)

    @group.command()
    def work(done: int) -> None:
        with showing("scoring") as show:
            show(done, 8)
            raise KeyboardInterrupt

    @group.command()
    def rest() -> None:
        pass

    for done, told in ((3, "at 3 of 8: what is done is kept"), (0, "before the first result")):
        with pytest.raises(SystemExit) as ended:
            group(["work", str(done)])
        assert ended.value.code == 130
        assert f"cepo: stopped {told}; the same command resumes" in capsys.readouterr().err


def test_help_lists_the_users_jobs_before_research() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    panels = re.findall(r"─ (Train|Score|Evaluate|Research) ─", shown)
    assert panels == ["Train", "Score", "Evaluate", "Research"]
    commands = re.findall(r"^│ ([a-z][a-z-]*) ", shown, flags=re.MULTILINE)
    jobs = ["demo", "train", "warm-start", "augment", "reward-model", "score", "eval"]
    research = ["ablate", "bench", "experiment"]
    assert commands == [*jobs, *research, "reward-experiment", "words-judge"]


@pytest.mark.parametrize("name", ["rewardbench", "robustness", "best-of-n", "cue-flips"])
def test_a_command_has_the_judges_options_and_few_of_its_own(name: str) -> None:
    command = typer.main.get_command(app).commands["eval"].commands[name]  # type: ignore[attr-defined]
    options = {parameter.name: parameter for parameter in command.params}
    own = set(options) - JUDGE
    assert len(own) <= 12
    if name != "cue-flips":
        assert set(options) >= JUDGE
        shown = CliRunner().invoke(app, ["eval", name, "--help"]).output
        judge_panel = shown[shown.index("─ Judge ─") :]
        assert all("--" + option.replace("_", "-") in judge_panel for option in JUDGE)
        assert not any(f"--{option.replace('_', '-')} " in judge_panel for option in own)


def test_progress_shows_where_stderr_is_not_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A log of a long run says how far it is, a line every half minute, whatever the steps take."""
    now = 0.0
    with progress_bar() as bar:
        bar.get_time = lambda: now
        task = bar.add_task("scoring", total=40)
        for done in range(1, 41):
            now = 7.0 * done
            bar.update(task, completed=done)
        shown = [line.split()[-2] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["1/40", "6/40", "11/40", "16/40", "21/40", "26/40", "31/40", "36/40"]


def test_our_bar_is_the_only_one() -> None:
    """transformers draws one bar for a GGUF file's tensors and one for loading weights, each a raw line above ours."""
    drawn = io.StringIO()
    with showing("judging") as show:
        list(tqdm(range(3), desc="Loading weights", file=drawn))
        show(1, 2)
    assert drawn.getvalue() == ""
    list(tqdm(range(3), desc="Loading weights", file=drawn))
    assert "Loading weights: 100%" in drawn.getvalue()


BARS = """
from contextlib import suppress
from cepo.cli.app import main
with suppress(SystemExit):
    main()
from tqdm.auto import tqdm  # the class itself, as transformers takes it for GGUF files
list(tqdm(range(3), desc="Loading weights"))
"""


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_of_libraries_are_drawn_on_a_terminal_alone(terminal: bool) -> None:
    """Each redraw of a bar is one more copy of it in the log of a job."""
    reader, writer = os.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(writer, (24, 80))
    variables = {name: value for name, value in os.environ.items() if name not in ("TQDM_DISABLE", "FORCE_COLOR")}
    subprocess.run(
        [sys.executable, "-c", BARS, "--version"],
        cwd=ROOT,
        env=variables | {"TERM": "xterm"},
        stdout=subprocess.DEVNULL,
        stderr=writer,
        check=True,
    )
    os.write(writer, b"end")  # so that there is something to read
    told = os.read(reader, 10_000).decode()
    os.close(reader)
    os.close(writer)
    assert ("Loading weights" in told) == terminal, told
