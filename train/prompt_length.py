"""How many positions a model has, and which prompts of a run's data fit into them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from cepo.jacobian.loading import ModelSource, gguf_read_once, load_tokenizer, loading
from cepo.jacobian.positions import position_limit

CheckPrompt: TypeAlias = Callable[[Sequence[Mapping[str, str]]], None]
"""Takes a prompt's messages; raises ValueError, with the reason, for one that is too long."""


def prompt_check(
    source: ModelSource, room: int, *, template: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> CheckPrompt | None:
    """Return the check that a prompt fits into the model's positions, without weights.

    A prompt far beyond them would stall training in its first long step. Learned positions must also hold a completion
    of `room` tokens, since generation fails beyond them; rotary ones go on, so there one token must fit.

    Args:
        source: the model to train.
        room: most tokens of a completion, at least 0.
        template: further arguments of the chat template.
        trust_remote_code: whether a hub repository's own code may run.

    Returns:
        The check, or None for a model whose config names no limit or whose tokenizer has no chat template.

    Raises:
        ValueError: if the tokenizer or the config cannot be read.
    """
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    config = text_config(source, trust_remote_code=trust_remote_code)
    positions = position_limit(config)
    if positions is None or not getattr(tokenizer, "chat_template", None):
        return None
    least = 1 if getattr(config, "rope_parameters", None) else room

    def check(messages: Sequence[Mapping[str, str]]) -> None:
        options = {"add_generation_prompt": True, "return_dict": True, **(template or {})}
        tokens = len(tokenizer.apply_chat_template(list(messages), **options)["input_ids"])
        if reason := why_too_long(tokens, least, positions):
            raise ValueError(reason)

    return check


def why_too_long(tokens: int, room: int, positions: int | None) -> str | None:
    """Return the reason why a prompt of `tokens` and `room` more exceed a model's positions; None if they fit."""
    if positions is None or tokens + room <= positions:
        return None
    return f"the prompt has {tokens} tokens; with {room} to generate, that exceeds the model's {positions} positions"


def text_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Return the config of a model's text part, without weights; raise ValueError if it cannot be read."""
    from transformers import AutoConfig

    if source.base is not None:
        return text_config(source.base, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    with loading("the config of model", source), gguf_read_once() if options else contextlib.nullcontext():
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=trust_remote_code, **options)
    return config.get_text_config()
