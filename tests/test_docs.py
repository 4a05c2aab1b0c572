"""Protects README and docs/: short, in plain English, no dead links, commands and snippets that exist."""

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

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
