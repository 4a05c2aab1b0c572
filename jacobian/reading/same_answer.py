"""Compare answers as text: whether two say the same, however they are written."""

from __future__ import annotations

import re
import unicodedata

_THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:(?:,|\{,\}|[\u00a0\u2009\u202f])[0-9]{3})+(?![0-9,])")
_CHOICE = re.compile(r"\(?([a-z])\)")
_ASCII_SIGNS = {chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)} | {"−": "-"}
_QUOTES_AND_MARKUP = "\"'`“”‘’*_ "


def same_text(candidate: str, reference: str) -> bool:
    """Return whether two answers are equal as text, as `exact_match` compares them."""
    normalized = normal_form(candidate)
    return normalized != "" and normalized == normal_form(reference)


def normal_form(answer: str) -> str:
    """Return the answer without what does not change what it says.

    That is case, white space, surrounding punctuation, dollar signs, thousands separators, the script of digits, and
    the brackets of a lettered choice.
    """
    text = in_ascii_digits(answer).replace("\\$", "").replace("$", "")
    text = " ".join(_THOUSANDS.sub(lambda number: re.sub(r"\D", "", number[0]), text).casefold().split())
    # A leading point may open a decimal, and an exclamation mark may be a factorial: both stay.
    text = text.lstrip(_QUOTES_AND_MARKUP + ",;:").rstrip(_QUOTES_AND_MARKUP + ".,;:?。")
    return _CHOICE.sub(r"\1", text) if _CHOICE.fullmatch(text) else text


def in_ascii_digits(answer: str) -> str:
    """Return the answer with digits of any script and full-width signs replaced by ASCII."""
    return "".join(
        str(unicodedata.decimal(sign)) if sign.isdecimal() else _ASCII_SIGNS.get(sign, sign) for sign in answer
    )
