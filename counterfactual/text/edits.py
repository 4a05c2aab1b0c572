"""Edits of preferences by a model (the writer): in one attribute, or (neutrals) in none.

A second call verifies each edit without being told what was asked for: the two responses must differ only in the
attribute that was edited, and those of a neutral in none.

Source: Srivastava et al., Robust Reward Modeling via Causal Rubrics (arXiv 2506.16507).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np

from cepo.counterfactual.text.pairs import Pair, Source
from cepo.counterfactual.text.prompts import ask_attributes, ask_differences, ask_edit
from cepo.counterfactual.text.relevance import Peers
from cepo.counterfactual.text.replies import read_attributes, read_differences, read_response, same_text
from cepo.counterfactual.text.synthesise import Answers, Asked, Messages
from cepo.jacobian.reading.layout import MalformedError

Making: TypeAlias = Generator[Pair | Asked, Answers, None]
_Edited = Literal["chosen", "rejected"]


def degrade(source: Source, peers: Peers, rng: np.random.Generator) -> Making:
    """Yield the chosen response paired with a copy made worse in one attribute; one preference per attribute."""
    draft = Pair(f"{source.id}/degrade", source.prompt, source.chosen, source.chosen, kind="degrade", direction="down")
    yield from _edits(draft, "rejected", source, rng)


def upgrade(source: Source, peers: Peers, rng: np.random.Generator) -> Making:
    """Yield the rejected response paired with a copy made better in one attribute; one preference per attribute."""
    draft = Pair(
        f"{source.id}/upgrade", source.prompt, source.rejected, source.rejected, kind="upgrade", direction="up"
    )
    yield from _edits(draft, "chosen", source, rng)


def aligned(source: Source, peers: Peers, rng: np.random.Generator) -> Making:
    """Yield a tie of the chosen response and the rejected one rewritten to be as good, in its own style."""
    draft = Pair(f"{source.id}/aligned", source.prompt, source.chosen, source.rejected, kind="aligned", tie=True)
    yield from _edits(draft, "rejected", source, rng)


def paraphrase(source: Source, peers: Peers, rng: np.random.Generator) -> Making:
    """Yield a tie of the chosen response and a paraphrase of it."""
    draft = Pair(f"{source.id}/paraphrase", source.prompt, source.chosen, source.chosen, kind="paraphrase", tie=True)
    yield from _edits(draft, "rejected", source, rng)


def dropped(pair: Pair, reason: object) -> Pair:
    """Return a pair that is not kept; a reason's kind is what precedes its colon."""
    return replace(pair, kept=False, reason=str(reason))


def _edits(draft: Pair, edited: _Edited, source: Source, rng: np.random.Generator) -> Making:
    """Yield the draft with one of its responses rewritten: a preference for each attribute, or one tie."""
    draft = replace(draft, source_ids=(source.id,))
    (reply,) = yield Asked((ask_attributes(source.prompt),))
    try:
        weights = read_attributes(reply)
    except MalformedError as reason:
        yield dropped(draft, reason)
        return
    drafts = [draft]
    if not draft.tie:
        drafts = [
            replace(draft, id=f"{draft.id}-{number}", attribute=name, weight=weight)
            for number, (name, weight) in enumerate(weights.items())
        ]
    names, before = list(weights), getattr(draft, edited)
    replies = yield Asked(tuple(ask_edit(one.kind, source, before, names, one.attribute) for one in drafts))
    pairs = [_rewritten(one, edited, reply) for one, reply in zip(drafts, replies, strict=True)]
    # The order of the responses is random, so that a writer that follows position fails the check half of the time.
    to_check = [(pair, bool(rng.integers(2))) for pair in pairs if pair.kept]
    replies = yield Asked(tuple(_ask_check(pair, swapped, names) for pair, swapped in to_check))
    checked = {
        pair.id: _checked(pair, swapped, names, reply) for (pair, swapped), reply in zip(to_check, replies, strict=True)
    }
    yield from (checked.get(pair.id, pair) for pair in pairs)


def _rewritten(draft: Pair, edited: _Edited, reply: str | Exception) -> Pair:
    try:
        response = read_response(reply)
    except MalformedError as reason:
        return dropped(draft, reason)
    if same_text(response, getattr(draft, edited)):
        return dropped(draft, "unchanged edit: it is the response as it was")
    pair = replace(draft, chosen=response) if edited == "chosen" else replace(draft, rejected=response)
    if same_text(pair.chosen, pair.rejected):
        return dropped(pair, "equal responses: the edit is the other response")
    return pair


def _ask_check(pair: Pair, swapped: bool, attributes: Sequence[str]) -> Messages:
    first, second = (pair.rejected, pair.chosen) if swapped else (pair.chosen, pair.rejected)
    return ask_differences(pair.prompt, first, second, attributes)


def _checked(pair: Pair, swapped: bool, attributes: Sequence[str], reply: str | Exception) -> Pair:
    """Return the pair with the result of its check; not kept unless it passed."""
    try:
        differ, better = read_differences(reply, attributes)
    except MalformedError as reason:
        return dropped(pair, reason)
    prefers = "neither" if better == "neither" else "rejected" if (better == "A") == swapped else "chosen"
    found = f"the check finds a difference in {', '.join(sorted(differ)) or 'nothing'} and prefers {prefers}"
    if pair.tie:
        is_tie = not differ and prefers == "neither"
        pair = replace(pair, checks={"is_tie": is_tie})
        return pair if is_tie else dropped(pair, f"false tie: {found}")
    alone, right = differ == {pair.attribute}, prefers == "chosen"
    pair = replace(pair, checks={"one_attribute": alone, "better": right})
    if not alone:
        return dropped(pair, f"other change: {found}; expected {pair.attribute} alone")
    return pair if right else dropped(pair, f"wrong direction: {found}")
