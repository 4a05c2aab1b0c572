"""A writer that follows rules, and may lie, ramble or fail at each thing that it is asked."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cepo.counterfactual.text.pairs import Source
from cepo.counterfactual.text.synthesise import Messages

TOPICS = ("tides", "bread", "chess", "violins", "glaciers", "printing", "bees", "harbours")
SOURCES = [
    Source(f"s{number}", f"Explain {topic} briefly.", f"{topic} right clear", f"{topic} wrong vague and much longer")
    for number, topic in enumerate(TOPICS)
]
WEIGHTS = {"accuracy": 0.7, "clarity": 0.3}
_SIGNS = {"accuracy": ("right", "wrong"), "clarity": ("clear", "vague")}  # good and bad word of each attribute


class FakeWriter:
    """Answers each prompt of `prompts.py` by rule: an attribute is one word of a response.

    Args:
        replies: by what is asked (attributes, degrade, upgrade, aligned, paraphrase, differ, relevance), another reply.
    """

    def __init__(self, **replies: Any) -> None:
        self.replies = replies
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[Messages]) -> list[str | Exception]:
        return [self.answer(prompt) for prompt in prompts]

    def answer(self, prompt: Messages) -> str | Exception:
        text = prompt[-1]["content"]
        self.asked.append(text)
        what = what_is_asked(text)
        if what in self.replies:
            reply = self.replies[what]
            return reply(text) if callable(reply) else reply
        return '<think>\n{"attributes": []} <response>draft</response>\n</think>\n' + honest(what, text)


def what_is_asked(text: str) -> str:
    openings = {
        "Which attributes decide": "attributes",
        "Rewrite the weaker": "aligned",
        "Say the response": "paraphrase",
        "Compare two": "differ",
        "Does either": "relevance",
    }
    found = next((what for opening, what in openings.items() if text.startswith(opening)), None)
    return found or ("degrade" if "clearly worse in" in text else "upgrade")


def honest(what: str, text: str) -> str:
    """The reply of a writer that does what it is told."""
    if what == "attributes":
        return "Here:\n" + json.dumps({"attributes": [{"name": n, "weight": w} for n, w in WEIGHTS.items()]})
    if what == "relevance":
        query, first, second = part(text, "Query"), part(text, "Response A"), part(text, "Response B")
        return json.dumps({"answers": any(word in query for word in (first.split()[0], second.split()[0]))})
    if what == "differ":
        first, second = part(text, "Response A"), part(text, "Response B")
        points = {name: sign(first, name) - sign(second, name) for name in WEIGHTS}
        total = sum(WEIGHTS[name] * point for name, point in points.items())
        better = "neither" if not total else "A" if total > 0 else "B"
        return json.dumps({"differ": [name for name, point in points.items() if point], "better": better})
    response = part(text, "Response")
    if what == "aligned":
        for good, bad in _SIGNS.values():
            response = response.replace(bad, good)
    elif what == "paraphrase":
        response = " ".join(reversed(response.split()))
    else:
        attribute = re.search(r"(?:worse|better) in (.*?), and", text)[1]  # type: ignore[index]
        good, bad = _SIGNS[attribute]
        response = response.replace(*((good, bad) if what == "degrade" else (bad, good)))
    return f"Sure.\n<response>\n{response}\n</response>\nDone."


def part(text: str, name: str) -> str:
    return re.search(rf"\[{name}\]\n(.*?)\n\[End of", text, re.DOTALL)[1]  # type: ignore[index]


def sign(response: str, attribute: str) -> int:
    return int(_SIGNS[attribute][0] in response.split())


def by_kind(pairs: Sequence[Any]) -> Mapping[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for pair in pairs:
        found.setdefault(pair.kind, []).append(pair)
    return found
