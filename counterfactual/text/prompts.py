"""All prompts for the writer.

Replies are read by `cepo.counterfactual.text.replies`: responses are between tags, everything else is JSON.
"""

from __future__ import annotations

from collections.abc import Sequence

from cepo.counterfactual.text.pairs import Source
from cepo.counterfactual.text.synthesise import Messages

MOST_ATTRIBUTES = 5
END_OF_RESPONSE = "[End of response]"
OTHER = "other"
"""The name of a difference that none of the attributes covers."""

_ATTRIBUTES = """\
Which attributes decide how good a response to the query below is? Name at most {most}, each in one to three words,
such as "factual accuracy" or "completeness", with a weight. The weights are positive and sum to 1. Leave out what does
not make a response better in itself: length, formatting, tone, confidence, unless the query asks for it.

{query}

Answer with JSON alone, in this form:
{{"attributes": [{{"name": "...", "weight": 0.6}}, {{"name": "...", "weight": 0.4}}]}}"""

_CHANGE = """\
Rewrite the response below so that it is clearly {direction} in {attribute}, and in nothing else. Every other \
attribute, the
length, the format and the tone stay as they are. Do not say what you changed.

{query}

{response}

Answer with the whole rewritten response between <response> and </response>."""

_ALIGN = """\
Rewrite the weaker response below so that it is exactly as good as the model response in each of these attributes:
{attributes}. It keeps its own length, format, tone and manner of speech. Do not say what you changed.

{query}

[Model response]
{model}
[End of model response]

{response}

Answer with the whole rewritten response between <response> and </response>."""

_PARAPHRASE = """\
Say the response below in other words. Its content, and how good it is in each of these attributes, stay exactly as they
are: {attributes}. Do not say what you changed.

{query}

{response}

Answer with the whole rewritten response between <response> and </response>."""

_DIFFERENCES = """\
Compare two responses to the query below. In which of these attributes is one clearly better than the other:
{attributes}? And which response answers the query better?

{query}

[Response A]
{first}
[End of response A]

[Response B]
{second}
[End of response B]

Answer with JSON alone, in this form:
{{"differ": ["..."], "better": "A"}}
"differ" holds names from the list above, "{other}" for anything else that makes one response better, and nothing where
they are equally good; "better" is "A", "B" or "neither"."""

_RELEVANT = """\
Does either of the two responses below answer the query, even in part, or better than the other?

{query}

[Response A]
{first}
[End of response A]

[Response B]
{second}
[End of response B]

Answer with JSON alone: {{"answers": true}} if so, {{"answers": false}} if both miss the query altogether."""


_DIRECTIONS = {"degrade": "worse", "upgrade": "better"}
_EDITS = {"degrade": _CHANGE, "upgrade": _CHANGE, "aligned": _ALIGN, "paraphrase": _PARAPHRASE}


def ask_attributes(prompt: str) -> Messages:
    """Ask which attributes decide under a prompt, with their weights."""
    return _fill(_ATTRIBUTES, prompt, most=MOST_ATTRIBUTES)


def ask_edit(kind: str, source: Source, response: str, attributes: Sequence[str], attribute: str | None) -> Messages:
    """Ask for a rewritten response.

    Args:
        kind: degrade and upgrade change one attribute, aligned and paraphrase none.
        source: the preference.
        response: its chosen or its rejected response.
        attributes: the attributes that decide under the prompt.
        attribute: the one to change; None for aligned and paraphrase.
    """
    marked = f"[Response]\n{response}\n{END_OF_RESPONSE}"
    named = {"attributes": ", ".join(attributes), "attribute": attribute, "direction": _DIRECTIONS.get(kind)}
    return _fill(_EDITS[kind], source.prompt, response=marked, model=source.chosen, **named)


def ask_differences(prompt: str, first: str, second: str, attributes: Sequence[str]) -> Messages:
    """Ask in which attributes two responses differ, and which is better."""
    return _fill(_DIFFERENCES, prompt, first=first, second=second, attributes=", ".join(attributes), other=OTHER)


def ask_relevance(prompt: str, first: str, second: str) -> Messages:
    """Ask whether either of two responses answers a prompt that neither was written for."""
    return _fill(_RELEVANT, prompt, first=first, second=second)


def _fill(template: str, prompt: str, **values: object) -> Messages:
    query = f"[Query]\n{prompt}\n[End of query]"
    return [{"role": "user", "content": template.format(query=query, **values)}]
