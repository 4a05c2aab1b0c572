"""Rows, a judge that follows a rule, and its records: what tests of preference benchmarks share."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from cepo.eval.judges.journal import judgement_record
from cepo.eval.judges.settings import Judgement, Messages
from cepo.eval.rewardbench.items import PreferenceItem, judge_tasks, read_item
from cepo.eval.rewardbench.metrics import MetricEstimate
from cepo.train.prompts import JUDGE_LITERALS

SCORES = "<scores>\\boxed{{{}, {}}}</scores>"


def row(number: int, chosen: str = "good", rejected: str = "bad", **more: Any) -> dict[str, Any]:
    return {"id": number, "prompt": f"query {number}", "chosen": chosen, "rejected": rejected, **more}


def shown(messages: Messages) -> tuple[str, str, str]:
    """Query and responses of a judge prompt."""
    text = messages[0]["content"]
    parts = []
    for before, after in pairwise(JUDGE_LITERALS):
        start = text.index(before) + len(before)
        parts.append(text[start : text.index(after, start)])
    return parts[0], parts[1], parts[2]


class Rule:
    """A judge that follows a rule of (query, A, B) and remembers what it was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str, str]] = []

    def judge(self, prompts: Sequence[Messages]) -> Iterator[tuple[int, Judgement]]:
        for index, messages in enumerate(prompts):
            self.asked.append(shown(messages))
            answer = self.answer(*self.asked[-1])
            yield index, answer if isinstance(answer, Judgement) else Judgement(answer, tokens=3)


def longer(query: str, first: str, second: str) -> str:
    return SCORES.format(len(first) % 10, len(second) % 10)


def records_of(items: Sequence[PreferenceItem], answer: Any) -> dict[str, Any]:
    """The records of a judge that answers (item, chosen's place) with text, or a Judgement."""
    records = {}
    for item in items:
        for task in judge_tasks([item]):
            place = str(task.facts["chosen_at"])
            given = answer(item, place)
            judgement = given if isinstance(given, Judgement) else Judgement(given)
            records[task.key] = judgement_record(task, judgement)
    return records


def value(measures: Sequence[MetricEstimate], metric: str, scope: str = "all") -> float:
    (found,) = [measure for measure in measures if (measure.metric, measure.scope) == (metric, scope)]
    return found.estimate.value


def prefer(place: str, *, chosen: bool = True) -> str:
    """A verdict for the chosen response, which stands at `place`, or for the other."""
    return SCORES.format(*((7, 3) if (place == "A") is chosen else (3, 7)))


def items_of(subsets: Sequence[str]) -> list[PreferenceItem]:
    return [read_item(row(number, subset=subset), "line 1") for number, subset in enumerate(subsets)]
