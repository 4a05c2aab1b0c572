"""Irrelevant-query neutrals (IQN): ties of both responses of a preference under a prompt that neither was written for.

Source: Srivastava et al., Robust Reward Modeling via Causal Rubrics (arXiv 2506.16507).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cepo.counterfactual.text.edits import Making, dropped
from cepo.counterfactual.text.mechanical_text import other_prompts
from cepo.counterfactual.text.pairs import Pair, Source
from cepo.counterfactual.text.prompts import ask_relevance
from cepo.counterfactual.text.relevance import Peers
from cepo.counterfactual.text.replies import read_relevance
from cepo.counterfactual.text.synthesise import Asked
from cepo.jacobian.reading.layout import MalformedError

_DRAWS = 3  # most prompts that are tried per preference


def irrelevant_by_writer(source: Source, peers: Peers, rng: np.random.Generator) -> Making:
    """Yield a tie under an unrelated prompt, after those that the check refused.

    At most three prompts are drawn, until the writer says that neither response answers one. The refused pairs show how
    many random prompts would have made a false tie.
    """
    for draw, other in enumerate(other_prompts(source, peers, rng, _DRAWS)):
        pair = Pair(
            f"{source.id}/irrelevant-by-writer-{draw}",
            other.prompt,
            source.chosen,
            source.rejected,
            tie=True,
            kind="irrelevant-by-writer",
            source_ids=(source.id,),
        )
        (reply,) = yield Asked((ask_relevance(pair.prompt, pair.chosen, pair.rejected),))
        try:
            is_tie = not read_relevance(reply)
        except MalformedError as reason:
            yield dropped(pair, reason)
            continue
        pair = replace(pair, checks={"unrelated": is_tie})
        if is_tie:
            yield pair
            return
        yield dropped(pair, "related prompt: the writer finds that a response answers it")
