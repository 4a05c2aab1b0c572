"""Pairs for reward models that rules make from any preferences: without a model, and without knowing attributes.

Preferences teach what is a cause: an answer to the prompt over an answer to another one, a solution over a copy with a
wrong number, a response over a copy without one of its sentences. Ties teach what is not a cause: both responses under
an unrelated prompt, however much they differ, and a response and a copy in another style.

Source: Srivastava et al., Robust Reward Modeling via Causal Rubrics (arXiv 2506.16507), for irrelevant-query neutrals;
the others are the simplest rules that make pairs with a known label.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from cepo.counterfactual.text.pairs import MECHANICAL, Pair, Source
from cepo.counterfactual.text.relevance import Peers, why_related, words_of
from cepo.jacobian.reading.sentences import sentence_ends

OPENINGS = ("Sure! Here is an answer.", "Great question!", "Thank you for asking.", "Certainly.")
CLOSINGS = (
    "Feel free to ask for more detail.",
    "Is there anything else that you would like to know?",
    "I trust that this was useful.",
    "Have a nice day!",
)
_DRAWS = 8  # most other prompts that are tried per pair
_NEW_WORDS = 3  # a dropped sentence must hold at least this many content words that the rest lacks
_RESULT = re.compile(r"\d[^=\n]{0,60}?[-+*/×÷−\\][^=\n]{0,60}=\s*[$€£]?\s*(\d+(?:,\d+)*(?:\.\d+)?)")


def irrelevant(source: Source, peers: Peers, rng: np.random.Generator) -> Iterator[Pair]:
    """Yield ties of both responses under other prompts, up to the first prompt that passes the check."""
    for draw, other in enumerate(other_prompts(source, peers, rng)):
        related = why_related(other.prompt, source.prompt, source.chosen, source.rejected, peers=peers)
        kind, name = "irrelevant", f"irrelevant-{draw}"
        pair = _made(source, name, kind, source.chosen, source.rejected, prompt=other.prompt, tie=True)
        yield _checked(pair, "unrelated", related)
        if related is None:
            return


def relevance(source: Source, peers: Peers, rng: np.random.Generator) -> Iterator[Pair]:
    """Yield preferences of the chosen response over those of other prompts, up to the first that passes the check."""
    for draw, other in enumerate(other_prompts(source, peers, rng)):
        related = why_related(source.prompt, other.prompt, other.chosen, peers=peers)
        pair = _made(source, f"relevance-{draw}", "relevance", source.chosen, other.chosen, attribute="relevance")
        yield _checked(replace(pair, source_ids=(source.id, other.id)), "unrelated", related)
        if related is None or why_related(source.prompt, peers=peers):  # in the latter case no draw can pass
            return


def style(source: Source, peers: Peers, rng: np.random.Generator) -> Iterator[Pair]:
    """Yield a tie of one of the responses and a copy in another style: a stock line, bullets or exclamation marks."""
    response = (source.chosen, source.rejected)[rng.integers(2)]
    styled = {name: change(response, rng) for name, change in _STYLES.items()}
    changed = [name for name, text in styled.items() if text != response]
    name = changed[rng.integers(len(changed))]
    yield _made(source, "style", "style", response, styled[name], attribute=name, tie=True)


def wrong_number(source: Source, peers: Peers, rng: np.random.Generator) -> Iterator[Pair]:
    """Yield a preference of the chosen response over a copy with one digit of a calculation's result changed."""
    results = [found.span(1) for found in _RESULT.finditer(source.chosen)]
    if not results:
        return
    start, end = results[rng.integers(len(results))]
    digits = [place for place in range(start, end) if source.chosen[place].isdigit()]
    place = digits[rng.integers(len(digits))]
    others = [digit for digit in "123456789" if digit != source.chosen[place]]  # not 0, which could be a leading zero
    wrong = source.chosen[:place] + others[rng.integers(len(others))] + source.chosen[place + 1 :]
    pair = _made(source, "wrong-number", "wrong-number", source.chosen, wrong, attribute="correct numbers")
    yield replace(pair, direction="down", attribute_words=(source.chosen[start:end], wrong[start:end]))


def dropped_sentence(source: Source, peers: Peers, rng: np.random.Generator) -> Iterator[Pair]:
    """Yield a preference of the chosen response over a copy without a sentence that says what the others do not.

    The first and the last sentence stay, since openings and closings often say nothing.
    """
    text = source.chosen
    inner = [(start, end) for start, end in itertools.pairwise(sentence_ends(text)) if text[end:].strip()]
    for place in rng.permutation(len(inner)):
        start, end = inner[place]
        shorter = text[:start] + text[end:]
        if len(words_of(text[start:end]) - peers.common_words - words_of(source.prompt, shorter)) >= _NEW_WORDS:
            pair = _made(source, "dropped-sentence", "dropped-sentence", text, shorter, attribute="completeness")
            yield replace(pair, direction="down", attribute_words=(text[start:end],))
            return


def other_prompts(source: Source, peers: Peers, rng: np.random.Generator, draws: int = _DRAWS) -> Iterator[Source]:
    """Yield one preference of each of at most `draws` other prompts, in random order."""
    groups = peers.by_prompt
    for place in rng.choice(len(groups), size=min(draws + 1, len(groups)), replace=False)[:draws].tolist():
        group = groups[place]
        if source not in group:
            yield group[rng.integers(len(group))]


def _made(
    source: Source,
    name: str,
    kind: str,
    chosen: str,
    rejected: str,
    *,
    prompt: str | None = None,
    tie: bool = False,
    attribute: str | None = None,
) -> Pair:
    return Pair(
        f"{source.id}/{name}",
        source.prompt if prompt is None else prompt,
        chosen,
        rejected,
        tie=tie,
        kind=kind,
        attribute=attribute,
        source_ids=(source.id,),
        generator=MECHANICAL,
    )


def _checked(pair: Pair, check: str, refused: str | None) -> Pair:
    return replace(pair, checks={check: refused is None}, kept=refused is None, reason=refused)


def _with_opening(response: str, rng: np.random.Generator) -> str:
    return f"{OPENINGS[rng.integers(len(OPENINGS))]}\n\n{response}"


def _with_closing(response: str, rng: np.random.Generator) -> str:
    return f"{response}\n\n{CLOSINGS[rng.integers(len(CLOSINGS))]}"


def _with_bullets(response: str, rng: np.random.Generator) -> str:
    """Return the response with a bullet before every sentence; unchanged if it has one sentence, or several lines."""
    bounds = [0, *sentence_ends(response.strip()), len(response.strip())]
    if len(bounds) < 3 or "\n" in response.strip():
        return response
    return "\n".join(f"- {response.strip()[start:end].strip()}" for start, end in itertools.pairwise(bounds))


def _with_exclamation(response: str, rng: np.random.Generator) -> str:
    """Return the response with an exclamation mark in place of every full stop that ends a sentence."""
    ends = [*sentence_ends(response), len(response.rstrip())]
    stops = {end - 1 for end in ends if response[:end].endswith(".") and not response[:end].endswith("..")}
    return "".join("!" if place in stops else character for place, character in enumerate(response))


_STYLES: Mapping[str, Callable[[str, np.random.Generator], str]] = {
    "opening line": _with_opening,
    "closing line": _with_closing,
    "bullets": _with_bullets,
    "exclamation marks": _with_exclamation,
}
