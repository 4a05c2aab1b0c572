"""Where sentences end, in any script."""

from __future__ import annotations

import re
from collections.abc import Iterator

_SPACED = ".!?"  # end a sentence where white space follows: 3.5 is one number
_UNSPACED = "。！？｡؟۔।॥։።፧။៕‼⁇⁈⁉"  # end one wherever they stand
_CLOSING = "\"')]*”’»」』）】》"
# A full stop after a title or initials ends no sentence, nor does the space \! of LaTeX.
_UNENDING = r"(?<!\\)" + "".join(
    rf"(?<!\b{word})" for word in ("Mr", "Mrs", "Ms", "Dr", "St", "Prof", "vs", r"[A-Z]\.[A-Z]", r"No(?=\.\s\d)")
)


def sentence_ends(text: str, start: int = 0, end: int | None = None, *, clauses: bool = False) -> Iterator[int]:
    """Yield where the white space after a sentence begins, or the next sentence where none stands between.

    Args:
        text: any text.
        start: where to begin, in characters.
        end: where to stop; a sentence that reaches to it has no end.
        clauses: whether a semicolon or colon ends a sentence too.
    """
    stop = len(text) if end is None else end
    for mark in (_CLAUSE_END if clauses else _SENTENCE_END).finditer(text, start, stop):
        if mark.end() < stop and (text[mark.end()].isspace() or mark[1] in _UNSPACED):
            yield mark.end()


def _ends(spaced: str) -> re.Pattern[str]:
    # Possessive: a long run of marks is read once.
    return re.compile(rf"{_UNENDING}(?:([{spaced}{_UNSPACED}]))++[{re.escape(_CLOSING)}]*+")


_SENTENCE_END, _CLAUSE_END = _ends(_SPACED), _ends(_SPACED + ";:")
