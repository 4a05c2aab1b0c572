"""Protects the folder table of CONTRIBUTING, and that our kernels/ never stands in for Hugging Face's package."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.paths import ROOT

BELOW_FUSION = {"fusion", "counterfactual", "jacobian", "kernels"}
MAY_IMPORT = {
    "kernels": set(),
    "jacobian": {"kernels"},
    "counterfactual": {"jacobian", "kernels"},
    "fusion": {"counterfactual", "jacobian", "kernels"},
    "train": BELOW_FUSION,
    "eval": BELOW_FUSION | {"train"},
}
FOLDERS = [*MAY_IMPORT, "benchmarks"]


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it, functions included."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import; everything imports through cepo."
            modules |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("folder", list(MAY_IMPORT))
def test_folders_import_only_what_the_table_allows(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for module in imported_modules(path):
            head, _, rest = module.partition(".")
            assert head not in FOLDERS, f"{path} imports {module} bare; write cepo.{module}"
            if head == "cepo" and rest and rest.split(".")[0] != "files":
                target = rest.split(".")[0]
                assert target in MAY_IMPORT[folder] | {folder}, f"{path} imports {module}, which {folder}/ may not"
    if folder == "eval":
        for path in (ROOT / "eval").rglob("*.py"):
            assert not any(module.startswith("cepo.train.grpo") for module in imported_modules(path))


def test_no_file_is_longer_than_400_lines() -> None:
    """The rule of CONTRIBUTING: a file is one idea."""
    paths = [path for folder in (*FOLDERS, "cepo", "tests") for path in (ROOT / folder).rglob("*.py")]
    long = [str(path) for path in paths if len(path.read_text().splitlines()) > 400]
    assert len(paths) > 300
    assert not long


def test_trl_is_imported_at_the_top_of_two_files_alone() -> None:
    """It is an extra: all else imports it where it trains."""
    importing = {
        path.name
        for folder in (*FOLDERS, "cepo")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom) and "trl" in ast.unparse(node).replace(".", " ").split()
    }
    assert importing == {"causal_trainer.py", "pair_trainer.py"}


def test_files_needs_the_standard_library_alone() -> None:
    """Every folder may import it, so it may import none of them, and start-up stays quick."""
    modules = {module.split(".")[0] for module in imported_modules(ROOT / "cepo" / "files.py")}
    assert modules <= sys.stdlib_module_names


def test_the_table_in_contributing_is_the_one_enforced() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = dict(re.findall(r"^\| (\w+)/ \| .*? \| (.*?) \|$", text, flags=re.MULTILINE))
    assert set(rows) == {*FOLDERS, "tests", "cepo"}
    assert rows["kernels"] == "no other folder"
    for folder in ("jacobian", "counterfactual", "fusion"):
        assert set(rows[folder].split(", ")) == MAY_IMPORT[folder]


def test_the_folders_have_no_init_and_are_linked_under_cepo() -> None:
    for folder in FOLDERS:
        assert not list((ROOT / folder).rglob("__init__.py"))
        link = ROOT / "cepo" / folder
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == ROOT / folder


def test_a_wheel_holds_every_folder_and_every_file_that_is_read() -> None:
    """setuptools takes both by name, and an editable install would never show that one is missing."""
    from cepo import demo

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    code = {".".join(("cepo", *path.parent.relative_to(ROOT).parts)) for path in files if path.suffix == ".py"}
    assert set(settings["packages"]) == code | {"cepo", "cepo.cli"}
    packed = {
        path.resolve()
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    read = {path for path in files if path.suffix in (".yaml", ".html", ".css")}
    assert read | {(demo.RESULTS / demo._RECORDED).resolve()} <= packed


PROBE = """
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import hub_kernels
from transformers.utils.import_utils import is_kernels_available
import cepo.kernels.spectral, kernels
LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                             num_key_value_heads=2, vocab_size=8))
print(is_kernels_available(), getattr(kernels, "__file__", None))
"""

STAND_IN = """
def _decorate(*args, **kwargs):
    return lambda wrapped: wrapped

class _Anything:
    def __init__(self, *args, **kwargs): pass
    def __getattr__(self, name): return _Anything()

use_kernel_forward_from_hub = use_kernelized_func = _decorate
register_kernel_mapping = replace_kernel_forward_from_hub = kernelize = lambda *args, **kwargs: None

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything
"""


def run_probe(extra_path: Path | None) -> str:
    code = (
        f"import sys; sys.path.insert(0, '')\n{f'sys.path.append({str(extra_path)!r})' if extra_path else ''}\n{PROBE}"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_transformers_works_from_the_root_without_a_package_named_kernels() -> None:
    assert run_probe(None) == "False None"


def test_transformers_works_from_the_root_with_a_package_named_kernels(tmp_path: Path) -> None:
    """With an installed `kernels` and its metadata, transformers and users get that package, not our folder."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(STAND_IN)
    metadata = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    assert run_probe(tmp_path) == f"True {tmp_path / 'kernels' / '__init__.py'}"
