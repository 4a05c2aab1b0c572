"""Find where sentences end, in any script."""

from __future__ import annotations

import re
from collections.abc import Iterator

_SPACED = ".!?…‽"  # end a sentence only before white space, since 3.5 is one number
_UNSPACED = "。！？｡．﹒﹖﹗؟۔।॥։።፧။។៕꯫᱾᱿᠃᠉‼⁇⁈⁉"  # always end a sentence, but for a point in a number
_POINT = "．"
_CLOSING = "\"')]*”’»」』）】》"
# A full stop after a title or initials does not end a sentence, nor does LaTeX's \!.
_UNENDING = r"(?<!\\)" + "".join(
    rf"(?<!\b{word})" for word in ("Mr", "Mrs", "Ms", "Dr", "St", "Prof", "vs", r"[A-Z]\.[A-Z]", r"No(?=\.\s\d)")
)


def sentence_ends(text: str, start: int = 0, end: int | None = None, *, clauses: bool = False) -> Iterator[int]:
    """Yield the end of each sentence, after its closing marks and before white space, in characters.

    Args:
        text: any text.
        start: where to begin, in characters.
        end: where to stop; the end of a sentence that extends to it is not yielded.
        clauses: whether a semicolon or colon ends a sentence too.
    """
    stop = len(text) if end is None else end
    for mark in (_CLAUSE_END if clauses else _SENTENCE_END).finditer(text, start, stop):
        if mark.end() == stop:
            return
        after = text[mark.end()]
        if after.isspace() or (mark[1] in _UNSPACED and not (mark[1] == _POINT and after.isdecimal())):
            yield mark.end()


def _ends(spaced: str) -> re.Pattern[str]:
    # Possessive quantifiers, so that a long run of marks takes linear time.
    return re.compile(rf"{_UNENDING}(?:([{spaced}{_UNSPACED}]))++[{re.escape(_CLOSING)}]*+")


_SENTENCE_END, _CLAUSE_END = _ends(_SPACED), _ends(_SPACED + ";:")
