"""Find the criteria, the analysis and the scores of a judgement, strictly or leniently."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from cepo.jacobian.reading.layout import ByteRange, MalformedError, tagged, trim_range
from cepo.jacobian.reading.verdict import Verdicts


def find_sections(
    completion: bytes, start: int, tags: Sequence[str], verdicts: Verdicts
) -> tuple[dict[str, ByteRange], list[str]]:
    """Return the content ranges of a judgement's sections by tag, and which sections are missing or empty.

    Strict: each tag opens and closes at most once, and the sections are in order. Lenient: the last scores section
    counts, and before it the last criteria and the analysis after them; an unclosed section ends where the next one
    opens; without a scores section, the scores are what follows the analysis.

    Args:
        completion: any bytes.
        start: index of the byte after the thought.
        tags: tags of the criteria, the analysis and the scores.
        verdicts: "strict" or "lenient".

    Returns:
        The ranges, and a reason for each section that is missing or empty, in the order of the tags.

    Raises:
        MalformedError: for sections that are doubled, not closed, or out of order.
    """
    found = _strict(completion, start, tags) if verdicts == "strict" else _lenient(completion, start, tags)
    missing = [f"missing <{tag}>" for tag in tags if tag not in found]
    return found, missing + [f"empty <{tag}>" for tag in found if trim_range(completion, found[tag]) is None]


def _strict(completion: bytes, start: int, tags: Sequence[str]) -> dict[str, ByteRange]:
    found = {
        tag: tagged(completion, tag, start)
        for tag in tags
        if any(completion.find(f"<{slash}{tag}>".encode(), start) >= 0 for slash in ("", "/"))
    }
    for (left_tag, left), (right_tag, right) in pairwise(found.items()):
        if right[0] - len(f"<{right_tag}>") < left[1] + len(f"</{left_tag}>"):
            raise MalformedError(f"out of order: <{right_tag}> opens before </{left_tag}>")
    return found


def _lenient(completion: bytes, start: int, tags: Sequence[str]) -> dict[str, ByteRange]:
    opening = {tag: f"<{tag}>".encode() for tag in tags}
    closing = {tag: f"</{tag}>".encode() for tag in tags}
    criteria, analysis, scores = tags
    found: dict[str, ByteRange] = {}
    closed = completion.rfind(closing[scores], start)
    limit = completion.rfind(opening[scores], start, closed if closed >= 0 else None)
    has_scores = limit >= 0
    if has_scores:
        begin = limit + len(opening[scores])
        end = completion.find(closing[scores], begin)
        found[scores] = (begin, end if end >= 0 else len(completion))
    else:
        limit = closed if closed >= 0 else len(completion)
    criteria_end = completion.rfind(closing[criteria], start, limit)
    criteria_at = completion.rfind(opening[criteria], start, criteria_end if criteria_end >= 0 else limit)
    analysis_at = completion.find(opening[analysis], max(criteria_end, criteria_at, start), limit)
    analysis_end = completion.rfind(closing[analysis], max(analysis_at, start), limit)
    if analysis_at >= 0 and (analysis_end >= 0 or has_scores):
        found[analysis] = (analysis_at + len(opening[analysis]), analysis_end if analysis_end >= 0 else limit)
    if criteria_at >= 0:
        ends = next(at for at in (criteria_end, analysis_at, limit) if at >= 0)
        found[criteria] = (criteria_at + len(opening[criteria]), ends)
    if not has_scores:
        found[scores] = (analysis_end + len(closing[analysis]) if analysis_end >= 0 else start, limit)
    return {tag: found[tag] for tag in tags if tag in found}
