"""How a completion of the testbed came to its verdict: the known truth that a causal score is compared with."""

from __future__ import annotations

from typing import Literal, get_args

from cepo.jacobian.reading.judge import ANALYSIS, CRITERIA, read_pair, read_scores
from cepo.jacobian.reading.thought import read_section
from cepo.train.testbed import (
    Item,
    named_aspect,
    preferred,
    shown_words,
    winner_under,
    write_analysis,
    write_length_analysis,
)

Mode = Literal["evidence", "length", "hollow", "query", "copied", "other"]
MODES: tuple[Mode, ...] = get_args(Mode)


def completion_mode(item: Item, completion: str) -> Mode:
    """Name how a completion came to its verdict, from its text and its item alone.

    evidence: the analysis quotes each response's word for the aspect that the criteria name, and the verdict follows
        them, a tie where they are the same. The criteria caused the verdict, whether or not they name the right aspect.
    length: the analysis says, rightly, which response is longer, and the verdict follows that.
    hollow: the analysis is as in evidence, and the verdict follows length against it. Where both agree, the text is
        that of evidence and is called so: modes of a hollow judge are counted where length is wrong.
    query: the criteria name another aspect than the query asks for; analysis and verdict follow the query's.
    copied: the criteria hold a verdict, and the scores prefer the same response.
    other: all else, such as words that no response shows, or a completion without a verdict.

    A mode is not a verdict of well-formedness: a copied completion has its mode though a guard calls it malformed.

    Args:
        item: what was judged.
        completion: the judge's text, without special tokens; never raises.
    """
    scores, aspect = read_scores(completion), named_aspect(completion)
    if scores is None or aspect is None:
        return "other"
    verdict = preferred(scores)
    written = read_pair(read_section(completion, CRITERIA) or "")
    if written is not None:
        return "copied" if preferred(written) == verdict else "other"
    analysis = (read_section(completion, ANALYSIS) or "").strip()
    if analysis == write_length_analysis(item.longer):
        return "length" if verdict == item.longer else "other"
    if analysis == write_analysis(*shown_words(item, aspect)):
        if verdict == winner_under(item, aspect):
            return "evidence"
        return "hollow" if verdict == item.longer else "other"
    if analysis == write_analysis(*shown_words(item, item.aspect)) and verdict == item.label:
        return "query"
    return "other"
