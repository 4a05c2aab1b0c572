"""The testbed of reward models: pairs of the judge world, one cause per query, and a model that starts from nothing.

A query names a situation, in which one aspect of a response decides; every response shows all six aspects, and length
agrees with the better response as often as it is told to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cepo.counterfactual.text.mechanical import Source
from cepo.files import content_hash, fingerprint
from cepo.jacobian.reward_model import Form, new_head
from cepo.train import testbed, testbed_model

WORDS: Mapping[str, tuple[str, str]] = {name: (good, bad) for name, (good, bad, _) in testbed.ASPECTS.items()}
"""By aspect, the word that shows it and the word that shows its lack."""
TEMPLATE = "{prompt}\nA\n{first}\nB\n{second}"
"""Of a pairwise model's message: all of it are words of the world."""
_LONG, _SHORT = 4, 0  # fillers of a response whose length alone is changed
_FILLER = "indeed"


def generate_sources(count: int, *, seed: int, cue_agreement: float) -> list[Source]:
    """Draw preferences; the longer response is the better one in a fixed fraction.

    Args:
        count: at least 1.
        seed: the same seed gives the same preferences.
        cue_agreement: in [0, 1], exact up to rounding to whole preferences.
    """
    found = []
    for number, item in enumerate(testbed.generate_items(count, seed=seed, cue_agreement=cue_agreement)):
        query, *lines = item.prompt.split("\n")
        first, second = (f"Response:{line.partition(':')[2]}" for line in lines)
        chosen, rejected = (first, second) if item.label == "A" else (second, first)
        found.append(Source(f"testbed-{seed}-{number}", query, chosen, rejected, item.aspect))
    return found


def with_length(response: str, *, long: bool, seed: int) -> str:
    """Return the response with the same aspects in the same order, and the most filler words or none.

    Args:
        response: of `generate_sources`.
        long: whether it has fillers.
        seed: of their places.
    """
    shown = {word for pair in WORDS.values() for word in pair}
    opening, *words = response.split()
    kept = [word for word in words if word in shown]
    rng = np.random.default_rng(seed)
    for _ in range(_LONG if long else _SHORT):
        kept.insert(int(rng.integers(len(kept) + 1)), _FILLER)
    return " ".join([opening, *kept])


def build_reward_model(form: Form, *, seed: int) -> tuple[Any, Any]:
    """Return (untrained model of about half a million float32 parameters, tokenizer)."""
    tokenizer = testbed.build_tokenizer()
    model = testbed_model.build_model(tokenizer, seed=seed)
    return (new_head(model, seed=seed) if form == "bradley-terry" else model), tokenizer


def reward_model_fingerprint(form: Form, *, seed: int) -> str:
    """Return 16 hexadecimal digits that stand for `build_reward_model`'s weights: the world's source, form and seed."""
    sources = [fingerprint(Path(str(module.__file__))) for module in (testbed, testbed_model)]
    return content_hash(sources, form, seed)
