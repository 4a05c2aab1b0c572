"""The answers of models by prompt: each prompt is asked once, and its answer is written to disk immediately."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from cepo.counterfactual.text.pairs import Pair
from cepo.counterfactual.text.synthesise import Messages
from cepo.eval.judges.settings import Judge
from cepo.files import Row, append_jsonl, content_hash, resume_jsonl
from cepo.train.reward_scores import RewardModel


class Answers:
    """Answers by key, and the file to which they are appended; prompts that failed in an earlier run are asked again.

    Args:
        path: a JSONL file; each record has a key, and an error if there is no answer.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.found = path, resume_jsonl(path)

    def add(self, records: Sequence[Row]) -> None:
        """Add answers, and append them to the file."""
        self.found |= {record["key"]: record for record in records}
        append_jsonl(self._path, records)


class JournaledWriter:
    """A writer for `synthesise` that asks a model only what no earlier run has asked.

    Args:
        path: file of the answers.
        open_writer: opens the model; called once, and only if there is something to ask.
        on_answer: called after each answer.
    """

    def __init__(self, path: Path, open_writer: Callable[[], Judge], on_answer: Callable[[], None]) -> None:
        self._answers, self._on_answer = Answers(path), on_answer
        self._open = functools.cache(open_writer)
        self.used: dict[str, bool] = {}
        """For each answer that was used, by key, whether an earlier run had asked for it."""

    def __call__(self, prompts: Sequence[Messages]) -> list[str | Exception]:
        """Return the model's reply to each prompt, or the error that prevented one."""
        keys = [content_hash(prompt) for prompt in prompts]
        new = [at for at, key in enumerate(keys) if key not in self._answers.found]
        self.used |= {key: True for key in keys if key in self._answers.found and key not in self.used}
        for place, answer in self._open().judge([prompts[at] for at in new]) if new else ():
            at, record = new[place], answer.record()
            written = {name: record[name] for name in ("text", "tokens", "cut", "seconds", "error")}
            self.used[keys[at]] = False
            self._answers.add([{"key": keys[at], "prompt": prompts[at][-1]["content"], **written}])
            self._on_answer()
        records = [self._answers.found[key] for key in keys]
        return [RuntimeError(record["error"]) if record["error"] else record["text"] for record in records]

    @property
    def failed(self) -> Counter[str]:
        """Number of prompts without an answer, by reason."""
        return Counter(str(self._answers.found[key]["error"]) for key in self.used if self._answers.found[key]["error"])

    @property
    def cut(self) -> int:
        """Number of answers that were cut off at the largest number of tokens."""
        return sum(self._answers.found[key]["cut"] for key in self.used)

    @property
    def told(self) -> str:
        """How many answers were used, as text."""
        return f"{len(self.used)} answers, {sum(self.used.values())} from an earlier run"


def journaled_difference(path: Path, model: RewardModel) -> Callable[[Sequence[Pair]], list[float]]:
    """Return a function for `filter_pairs` that scores only pairs which no earlier run has scored."""
    answers = Answers(path)

    def difference(pairs: Sequence[Pair]) -> list[float]:
        keys = [content_hash(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
        new = [at for at, key in enumerate(keys) if key not in answers.found]
        if new:
            texts = [(pairs[at].prompt, pairs[at].chosen, pairs[at].rejected) for at in new]
            scores = model.differences(*zip(*texts, strict=True))
            answers.add(
                [
                    {"key": keys[at], "difference": float(number), "left_out": scores.left_out.get(place)}
                    for place, (at, number) in enumerate(zip(new, scores.values_N, strict=True))
                ]
            )
        found = [answers.found[key]["difference"] for key in keys]
        return [math.nan if value is None else value for value in found]  # null in the file

    return difference
