"""Read recipes, which are YAML files that describe runs, with dotted overrides and settings of TRL's trainers."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

import cepo
from cepo.files import kind_of
from cepo.fusion.settings import check_names

_RECIPES = Path(cepo.__file__).parent / "train" / "recipes"
# Fields of a trainer's settings that may change when a run resumes: its length, and what it writes and where.
_FREE = ("max_steps", "save_steps", "save_total_limit", "logging_steps", "report_to", "log_completions", "disable_tqdm")
Config = TypeVar("Config")
Dtype = Literal["float32", "bfloat16", "float16"]
"""Dtype of the weights that a recipe trains."""


def read_recipe(kind: type[Config], path: str | Path, overrides: Mapping[str, Any]) -> Config:
    """Return the run that a YAML file describes, with dotted overrides such as {"grpo.max_steps": 2} applied.

    Args:
        kind: the dataclass of the run; its fields are the file's keys, and those without a default are required.
        path: path of the file.
        overrides: values by key; a dot separates keys of nested mappings.

    Raises:
        ValueError: if the file cannot be read, lacks a key, or holds one that does not exist.
    """
    loaded = load_recipe(path)
    for key, value in overrides.items():
        place, *rest = key.split(".")
        if rest:
            if not isinstance(loaded.get(place) or {}, Mapping):
                came = kind_of(loaded[place])
                raise ValueError(
                    f"{key} cannot be set: {place} is {came}; expected a mapping, or {place} set as a whole"
                )
            inner = dict(loaded.get(place) or {})
            inner[".".join(rest)] = value
            loaded[place] = inner
        else:
            loaded[place] = value
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    check_names(f"config {str(path)!r}", loaded, [item.name for item in fields])
    needed = [item.name for item in fields if item.default is item.default_factory]  # both are missing
    missing = [name for name in needed if loaded.get(name) is None]
    if missing:
        raise ValueError(f"config {str(path)!r} lacks {', '.join(missing)}")
    for name in needed:
        if loaded[name] == "":
            raise ValueError(f"{name} is empty; expected text")
    return kind(**loaded)


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raise ValueError for any other file. Does not import torch."""
    try:
        loaded = read_yaml(Path(path).read_text())
    except OSError as error:
        names = sorted(name.relative_to(_RECIPES) for name in _RECIPES.rglob("*.yaml"))
        recipes = ", ".join(f"train/recipes/{name}" for name in names)
        raise ValueError(f"config {str(path)!r} cannot be read: {error.strerror}; recipes: {recipes}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config {str(path)!r} cannot be read as YAML: {reason_of(error)}") from error
    if not isinstance(loaded, dict):
        held = "is empty" if loaded is None else f"holds {kind_of(loaded)}"
        raise ValueError(f"config {str(path)!r} {held}; expected a mapping with keys such as model, data and output")
    return loaded


def read_yaml(text: str) -> Any:
    """Return the value of a YAML text; raise yaml.YAMLError if it is not YAML, or a mapping has a key twice."""
    return yaml.load(text, Loader=_OnceLoader)


class _OnceLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that it refuses duplicate keys, of which PyYAML would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                problem = f"the key {key.value!r} is already on line {lines[key.value]}; expected once"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = key.start_mark.line + 1
        return node


def source_and_options(settings: Any) -> tuple[str, dict[str, Any]]:
    """Return the source that a recipe's `data` names, and its other keys.

    Raises:
        ValueError: for anything but a mapping with a source.
    """
    if not isinstance(settings, Mapping) or not settings.get("source"):
        came = "missing" if isinstance(settings, Mapping) else f"not there: data is {settings!r}"
        raise ValueError(f"data.source is {came}; expected a file, a hub data set id, or testbed")
    if not isinstance(settings["source"], str | Path):
        raise ValueError(f"data.source is {settings['source']!r}; expected text: a file, a hub data set id, or testbed")
    options = dict(settings)
    return options.pop("source"), options


def trainer_arguments(kind: type[Any], key: str, given: Mapping[str, Any], *, output: str, seed: int) -> Any:
    """Return the settings of a TRL trainer: our defaults, overridden by those of a recipe.

    Args:
        kind: TRL's class of settings, such as GRPOConfig.
        key: the recipe's key for these settings.
        given: fields of that class.
        output: folder of the run.
        seed: seed of the run.

    Raises:
        ValueError: for a field that the class does not have or refuses.
    """
    from cepo.train.run import trainer_defaults  # here, since it imports transformers, which reading recipes avoids

    known = {item.name: item for item in dataclasses.fields(kind)}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{key} holds {', '.join(unknown)}, which TRL's {kind.__name__} does not have")
    # YAML reads an unquoted no as false.
    given = {name: "no" if value is False and name.endswith("_strategy") else value for name, value in given.items()}
    for name, value in given.items():
        default = known[name].default
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        if is_number and value is not None and not number:
            raise ValueError(f"{key}.{name} is {value!r}; expected a number")
        if name == "learning_rate" and value < 0:  # torch would refuse it only after loading the model
            raise ValueError(f"{key}.{name} is {value!r}; expected a number >= 0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a field that TRL itself sets by its older name
            arguments = kind(output_dir=output, **{**trainer_defaults(seed), **given})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key} is not a valid {kind.__name__}: {error}") from error
    zero = None if arguments.deepspeed_plugin is None else arguments.deepspeed_plugin.hf_ds_config
    whole = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if zero is not None and zero.is_zero3() and not zero.get_value(whole):
        raise ValueError(f"{key}.deepspeed lacks {whole}: true, without which the trained model is written in shards")
    if arguments.save_total_limit is not None and arguments.save_total_limit < 2:
        raise ValueError(f"{key}.save_total_limit is 1; expected at least 2, or a kill during a save loses both")
    return arguments


def decisive(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a TRL trainer that determine the trained weights, except the number of steps."""
    return {name: value for name, value in given.items() if name not in _FREE}


def reason_of(error: Exception) -> str:
    """Return what is wrong with a recipe, for an error message; for a YAML error, its problem and its line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} (line {error.problem_mark.line + 1})"
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)
