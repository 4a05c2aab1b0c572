"""The embedding-similarity reward of j1-nano-causal, a baseline for the causal reward.

It reads only text: criteria that the analysis repeats score high whether or not they affect the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from transformers import AutoModel, AutoTokenizer

from cepo.jacobian.positions import position_limit
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.layout import as_bytes, as_text
from cepo.jacobian.reading.verdict import STRICT, Verdicts
from cepo.train.rewards.completions import Completion, read_completions

Encoder: TypeAlias = Callable[[str], ArrayLike]

_FULL_SCORE_RANGE = 10.0
_FULL_CRITERIA = 5


@dataclass(frozen=True)
class Sensitivity:
    """The three components of the proxy, each in [0, 1]."""

    coherence: float
    score_difference: float
    specificity: float

    @property
    def mean(self) -> float:
        """The proxy reward, in [0, 1]."""
        return (self.coherence + self.score_difference + self.specificity) / 3


class ProxyReward:
    """Reward criteria that resemble the analysis, scores that differ, and criteria of several lines.

    A TRL reward function. Its pickle omits a loaded encoder, which is loaded again on first use. Texts are encoded one
    at a time, so a reward does not depend on the batch.

    Args:
        encoder: Name or path of a Hugging Face encoder, loaded on first use, on the CPU, in float32; or a function from
            a text to a 1-D array, always of the same length.
        verdicts: Which written forms of a verdict count, see `JudgeLayout`.

    Raises:
        ValueError: If the encoder is neither.

    Source:
        j1-nano-causal, sensitivity = (coherence + score difference + specificity) / 3.
    """

    def __init__(
        self, encoder: str | Encoder = "sentence-transformers/all-MiniLM-L6-v2", *, verdicts: Verdicts = STRICT
    ) -> None:
        if not isinstance(encoder, str) and not callable(encoder):
            raise ValueError(
                f"encoder is {encoder!r}; expected a model's name or path, or a function from text to array"
            )
        self.__name__ = "proxy"
        self.encoder = encoder
        self.verdicts: Verdicts = verdicts
        self._encode: Encoder | None = None if isinstance(encoder, str) else encoder

    def __call__(
        self,
        completions: Sequence[Completion],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Return the proxy reward of each completion.

        Args:
            completions: Strings or message lists.
            log_metric: Given the batch mean of "proxy/coherence", "proxy/score_difference" and "proxy/specificity".
            log_extra: Given the same names, with one value per completion.
            **columns: as for `format_reward`.

        Returns:
            One reward per completion, in [0, 1]; 0.0 where a section is missing or the scores can't be read.

        Raises:
            ValueError: If the encoder can't be loaded or does not return finite 1-D arrays of one length.
        """
        if self._encode is None:
            self._encode = load_encoder(str(self.encoder))
        sensitivities = [
            measure_sensitivity(text, self._encode, thought_opened=opened, verdicts=self.verdicts)
            for text, opened in read_completions(completions, **columns)
        ]
        for component in ("coherence", "score_difference", "specificity"):
            values = [getattr(sensitivity, component) for sensitivity in sensitivities]
            if log_extra is not None:
                log_extra(f"proxy/{component}", values)
            if log_metric is not None and values:
                log_metric(f"proxy/{component}", sum(values) / len(values))
        return [sensitivity.mean for sensitivity in sensitivities]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encode": None if isinstance(self.encoder, str) else self.encoder}


def measure_sensitivity(
    text: str, encode: Encoder, *, thought_opened: bool = False, verdicts: Verdicts = STRICT
) -> Sensitivity:
    """Measure the three components of the proxy on a judge's output.

    - coherence: max(0, cosine of the embeddings of criteria and analysis); 0 if one is blank or has a zero embedding.
    - score difference: |a - b| / 10, at most 1.
    - specificity: number of non-blank lines of criteria over 5, at most 1.

    Args:
        text: The output; all components are 0 if a section is missing or the scores can't be read.
        encode: From a text to a 1-D array, always of the same length.
        thought_opened: whether the prompt ended inside a thought, see `find_thought`.
        verdicts: see `JudgeLayout`.

    Returns:
        The components.

    Raises:
        ValueError: If the encoder does not return finite 1-D arrays of one length.
    """
    completion = as_bytes(text)
    found = JudgeLayout(verdicts=verdicts).read(completion, thought_opened=thought_opened)
    if found.criteria is None or found.analysis is None or found.numbers is None:
        return Sensitivity(0.0, 0.0, 0.0)
    criteria, analysis = as_text(completion[slice(*found.criteria)]), as_text(completion[slice(*found.analysis)])
    scores = [float(completion[slice(*number)]) for number in found.numbers]
    written_lines = sum(bool(line.strip()) for line in criteria.splitlines())
    return Sensitivity(
        coherence=max(0.0, _cosine(encode, criteria.strip(), analysis.strip())),
        score_difference=min(abs(scores[0] - scores[1]) / _FULL_SCORE_RANGE, 1.0),
        specificity=min(written_lines / _FULL_CRITERIA, 1.0),
    )


def load_encoder(name: str) -> Encoder:
    """Load a Hugging Face encoder as a function from a text to the mean of its last hidden states.

    Args:
        name: Name on the hub or path. A text longer than the model can read is cut.

    Returns:
        The function; its arrays are (D,), float32.

    Raises:
        ValueError: If there is no such model, or it has no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"encoder is {name!r}, which can't be loaded: {error}") from error
    length_limit = min(tokenizer.model_max_length, position_limit(model.config) or 512)

    @torch.no_grad()
    def encode(text: str) -> np.ndarray:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=length_limit)
        hidden_TD = model(**inputs).last_hidden_state[0]
        # The text is not padded, so the mean needs no mask.
        return hidden_TD.mean(dim=0).numpy()

    return encode


def _cosine(encode: Encoder, first: str, second: str) -> float:
    if not first or not second:
        return 0.0
    first_D, second_D = (np.asarray(encode(text), dtype=np.float64) for text in (first, second))
    if first_D.ndim != 1 or first_D.shape != second_D.shape or not np.isfinite([first_D, second_D]).all():
        raise ValueError(
            f"encoder returned arrays of shapes {first_D.shape} and {second_D.shape}; "
            "expected finite 1-D arrays of one length"
        )
    norms = float(np.linalg.norm(first_D) * np.linalg.norm(second_D))
    return min(float(first_D @ second_D) / norms, 1.0) if norms > 0 else 0.0
