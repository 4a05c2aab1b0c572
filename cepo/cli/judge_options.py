"""The options of a judge or a writer, declared once for all commands."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from cepo.cli import checks
from cepo.cli.shared import Device, Dtype, Raw, TrustRemoteCode
from cepo.eval.judges.reward import RewardSettings
from cepo.eval.judges.settings import JudgeSettings, check_judge

_OF_VERDICTS = ("force_format", "verdicts")
_OF_REWARDS = {name for name in RewardSettings.__dataclass_fields__ if name != "model"}
"""Options that also apply to a reward model; the others apply only to generative judges."""
_OF_SERVERS = ("concurrency", "timeout", "retries", "api_key_file")
_OF_WEIGHTS = ("batch_size", "dtype", "device", "trust_remote_code")
"""Options without effect if a server runs the model and no reward model filters its texts."""


def with_judge(command: Callable[..., None]) -> Callable[..., None]:
    """Add a judge's options to a command, which gets them as its parameter `judge`.

    The parameter is a JudgeSettings for a generative judge, and a RewardSettings for a reward model.
    """
    return _with_options(command, "judge", _judge_settings, {**_parameters(_judge_settings), **_WRITING})


def with_writer(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a model that writes texts other than judgements, except those about verdicts, to a command.

    The command gets them as its parameter `writer`, a JudgeSettings whose model is empty without --writer.
    """
    own = _parameters(_writer_settings)
    options = {**own, **{name: option for name, option in _WRITING.items() if name not in _OF_VERDICTS}, **own}
    return _with_options(command, "writer", _writer_settings, options)


def _with_options(
    command: Callable[..., None],
    name: str,
    settings: Callable[..., Any],
    options: Mapping[str, inspect.Parameter],
) -> Callable[..., None]:
    """Add options, in a help panel of their own, to a command, which gets `settings(**options)` as parameter `name`."""
    own = _parameters(command)

    @functools.wraps(command)
    def run(**values: Any) -> None:
        made = settings(**{option: values[option] for option in options})
        command(**{name: made}, **{option: values[option] for option in own if option != name})

    both = {option: _in_panel(parameter, name.capitalize()) for option, parameter in options.items()}
    both = {option: parameter for option, parameter in own.items() if option != name} | both
    merged = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in both.values()]
    run.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in merged}
    return run


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function by name, without **kwargs."""
    named = inspect.signature(function, eval_str=True).parameters
    return {name: option for name, option in named.items() if option.kind is not inspect.Parameter.VAR_KEYWORD}


def _judge_settings(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            help="Generative judge: hub id, folder, adapter folder, .gguf file, or smollm2; with --base-url, the "
            "model's name on the server."
        ),
    ] = None,
    reward_model: Annotated[
        str | None,
        typer.Option(
            help="Reward model as the judge instead: folder of cepo reward-model, or hub id of a sequence "
            "classifier with one output. Only --batch-size, --seed, --threads, --dtype, --device and "
            "--trust-remote-code apply to it."
        ),
    ] = None,
    **writing: Any,
) -> JudgeSettings | RewardSettings:
    if (model is None) == (reward_model is None):
        told = "Give either --model or --reward-model: expected one judge, generative or a reward model."
        raise checks.missing(context, told)
    if reward_model is not None:
        why = "cannot be used with --reward-model, which writes no judgement"
        checks.refuse_given(context, _WRITING.keys() - _OF_REWARDS, why)
        checks.refuse_given(context, ["draws"], "cannot be used with --reward-model, which is exact over all draws")
        checks.check_model(context, "--reward-model", reward_model)
        return RewardSettings(reward_model, **{name: writing[name] for name in _OF_REWARDS})
    return _writing_settings(context, "--model", str(model), **writing)


def _writer_settings(
    context: typer.Context,
    writer: Annotated[
        str,
        typer.Option(
            help="Generative model: hub id, folder, adapter folder, .gguf file, or smollm2; with --base-url, the "
            "model's name on the server."
        ),
    ] = "",
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum tokens per answer, the thought included.", callback=checks.at_least(1))
    ] = 2048,
    **writing: Any,
) -> JudgeSettings:
    if not writer:
        of_none = {*_WRITING, "max_new_tokens"} - {"seed", *_OF_WEIGHTS}
        checks.refuse_given(context, of_none, "needs --writer, a generative model")
        if context.params.get("filter_model") is None:
            checks.refuse_given(context, _OF_WEIGHTS, "needs --writer or --filter-model, a model to run")
    return _writing_settings(context, "--writer", writer, max_new_tokens=max_new_tokens, **writing)


def _writing_settings(
    context: typer.Context,
    option: str,
    model: str,
    backend: Annotated[
        str | None,
        typer.Option(
            help="What runs the model: transformers, vllm (if installed) or server. Default: server with --base-url, "
            "else transformers."
        ),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Address of an OpenAI-compatible server, e.g. http://localhost:8000/v1.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the server's key. Default: the environment variable OPENAI_API_KEY.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(help="Number of requests in flight.", callback=checks.at_least(1))
    ] = JudgeSettings.concurrency,
    timeout: Annotated[
        float, typer.Option(help="Seconds that one request may take.", callback=checks.positive)
    ] = JudgeSettings.timeout_s,
    retries: Annotated[
        int, typer.Option(help="Number of times to resend a failed request.", callback=checks.at_least(0))
    ] = JudgeSettings.retries,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            help="Maximum tokens per judgement. On a CPU, 32 to 128 keep 100 pairs within minutes.",
            callback=checks.at_least(1),
        ),
    ] = JudgeSettings.max_new_tokens,
    temperature: Annotated[
        float,
        typer.Option(help="Sampling temperature; 0 takes the likeliest token.", callback=checks.at_least(0)),
    ] = JudgeSettings.temperature,
    force_format: Annotated[
        bool,
        typer.Option(
            "--force-format", help="If a judgement has no scores, append their opening and let the judge complete it."
        ),
    ] = False,
    raw: Raw = False,
    verdicts: Annotated[
        str, typer.Option(help="Which written forms of a verdict are read: strict or lenient, see docs/formats.md.")
    ] = JudgeSettings.verdicts,
    batch_size: Annotated[
        int, typer.Option(help="Number of prompts in a batch.", callback=checks.at_least(1))
    ] = JudgeSettings.batch_size,
    seed: Annotated[
        int, typer.Option(help="Seed of sampling and all other random draws.", callback=checks.at_least(0))
    ] = 0,
    dtype: Dtype = JudgeSettings.dtype,
    device: Device = JudgeSettings.device,
    trust_remote_code: TrustRemoteCode = False,
) -> JudgeSettings:
    if base_url is None:
        checks.refuse_given(context, _OF_SERVERS, "needs --base-url, the server's address")
        if model:
            checks.check_model(context, option, model)
    elif context.params.get("filter_model") is None:
        checks.refuse_given(context, _OF_WEIGHTS, "cannot be used with --base-url: the server runs the model")
    settings = JudgeSettings(
        model=model,
        backend=backend or ("transformers" if base_url is None else "server"),  # type: ignore[arg-type]
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        force_format=force_format,
        raw=raw,
        verdicts=verdicts,  # type: ignore[arg-type]
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        base_url=base_url,
        api_key=_api_key(api_key_file) if base_url is not None else None,
        concurrency=concurrency,
        timeout_s=timeout,
        retries=retries,
    )
    if model:
        check_judge(settings)
    return settings


_WRITING = {
    name: option
    for name, option in _parameters(_writing_settings).items()
    if name not in ("context", "option", "model")
}
"""Options of every generative model."""


def _in_panel(parameter: inspect.Parameter, panel: str) -> inspect.Parameter:
    """Return the option in a panel of the help; a parameter that is not an option (typer's context) is unchanged."""
    if parameter.annotation is typer.Context:
        return parameter
    kind, option = get_args(parameter.annotation)
    option = copy(option)
    option.rich_help_panel = panel
    return parameter.replace(annotation=Annotated[kind, option])


def _api_key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("OPENAI_API_KEY")
    if not file.is_file():
        raise ValueError(f"--api-key-file is {str(file)!r}, which is not a file; expected a file that holds the key")
    return file.read_text(encoding="utf-8").strip()
