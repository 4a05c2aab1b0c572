"""Score prompts and responses with a reward model, for every command that uses one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cepo.jacobian.loading import ModelSource, check_device, resolve_model
from cepo.jacobian.positions import position_limit
from cepo.jacobian.reward_model import is_classifier, load_reward_model, read_last_token, rewards
from cepo.train.pair_encoding import SHOWN_FILE, PairEncoder, Shown, read_shown

Conversation = Sequence[Mapping[str, str]]
"""Messages with role and content, see `Shown.messages`."""
BATCH_SIZE = 16


@dataclass(frozen=True)
class Scores:
    """Numbers of N texts or pairs.

    Attributes:
        values_N: float64; NaN if there is no number.
        left_out: by index, why there is no number: a text is too long, or the model's number is not finite.
    """

    values_N: np.ndarray
    left_out: Mapping[int, str]


class RewardModel:
    """A reward model with the encoder of its texts.

    Texts are never truncated: a text over the encoder's `max_length` has no number, and the reason is reported.

    Args:
        model: from `read_last_token`, in eval mode.
        encoder: makes texts of the form that the model was trained on.
        batch_size: texts per forward pass, at least 1; it changes numbers by rounding only.
    """

    def __init__(self, model: Any, encoder: PairEncoder, *, batch_size: int = BATCH_SIZE) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self.model, self.encoder, self.batch_size = model, encoder, batch_size

    @classmethod
    def open(
        cls,
        name: str,
        *,
        max_length: int | None = None,
        batch_size: int = BATCH_SIZE,
        dtype: str = "float32",
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> RewardModel:
        """Return the model that `cepo reward-model` wrote into a folder, or a sequence classifier with one output.

        Args:
            name: folder, adapter folder, or hub id.
            max_length: most tokens of a text; None for `max_position_embeddings` of the model's config.
            batch_size: see the class.
            dtype: see `load_model`.
            device: see `load_model`.
            trust_remote_code: see `load_model`.

        Raises:
            ValueError: for a model that cannot be loaded, or that is not a reward model.
        """
        check_device(device)
        source, shown = find_reward_model(name)
        model, tokenizer = load_reward_model(
            source, shown.form, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        length = max_length or position_limit(model.config)
        encoder = PairEncoder(tokenizer, shown, max_length=length)
        return cls(read_last_token(model, encoder.verdict_ids), encoder, batch_size=batch_size)

    def rewards(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        """Return the reward of each response.

        Args:
            prompts: N prompts.
            responses: one response per prompt.

        Raises:
            ValueError: for a pairwise model, which cannot score a single response.
        """
        messages = self.encoder.shown.messages
        return self.numbers([messages(*texts) for texts in zip(prompts, responses, strict=True)])

    def differences(self, prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]) -> Scores:
        """Return D of each pair, chosen minus rejected; for a pairwise model, the mean of both orders.

        Args:
            prompts: N prompts.
            chosen: one response per prompt.
            rejected: one response per prompt.
        """
        shown = self.encoder.shown
        texts = [text for pair in zip(prompts, chosen, rejected, strict=True) for text in shown.pair_messages(*pair)]
        found = self.numbers(texts)
        left_out = {place // 2: reason for place, reason in found.left_out.items()}
        return Scores(np.array(shown.differences(found.values_N.tolist())), left_out)

    def numbers(self, conversations: Sequence[Conversation]) -> Scores:
        """Return the model's number for each conversation from `Shown.messages`."""
        texts: dict[int, list[int]] = {}
        left_out: dict[int, str] = {}
        for place, conversation in enumerate(conversations):
            try:
                texts[place] = self.encoder.ids(conversation)
            except ValueError as reason:
                left_out[place] = str(reason)
        values_N = np.full(len(conversations), np.nan)
        values_N[list(texts)] = rewards(self.model, list(texts.values()), batch_size=self.batch_size)
        for place in texts:
            if not math.isfinite(values_N[place]):
                left_out[place], values_N[place] = f"not finite: the model gives {values_N[place]}", math.nan
        return Scores(values_N, left_out)


def find_reward_model(name: str) -> tuple[ModelSource, Shown]:
    """Return where a reward model comes from and what it is shown, without loading it.

    Args:
        name: folder, adapter folder, or hub id.

    Raises:
        ValueError: for a model that does not exist, or that is not a reward model.
    """
    source = resolve_model(name)
    shown = read_shown(Path(source.location))
    if shown.form == "bradley-terry" and not is_classifier(source):
        raise ValueError(
            f"reward model is {name!r}, a causal language model without {SHOWN_FILE}; expected a folder that cepo "
            "reward-model wrote, or a sequence classifier with one output"
        )
    return source, shown
