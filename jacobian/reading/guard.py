r"""Find verdicts in criteria or analysis: scores of the responses, or a named winner, before the verdict itself.

Criteria that contain the verdict (`\boxed{8, 5}`, `Response A is better`) are the strongest possible cause of the
scores, and worthless. Only plain English is found. A verdict that is hidden better shows in the order leak: how much
less likely the criteria are when the two responses are exchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

Guard = Literal["strict", "standard", "criteria", "off"]
_SHOWN = 80  # most characters of a quotation

# Emphasis, quotation marks and invisible characters do not change what a text says, and a letter that looks like A or B
# is read as one.
_MARKS = str.maketrans(
    dict.fromkeys('*`"“”#«»~')
    | dict.fromkeys(map(chr, (0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF)))
    | {chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)}  # of full width
    | dict.fromkeys("АΑ", "A")  # Cyrillic, Greek
    | dict.fromkeys("ВΒ", "B")
)
_UNDERSCORES = re.compile(r"(?<!\w)_+|(?<!_)_++(?!\w)")  # of emphasis; that of response_A stays
_ENCLOSED = re.compile(r"\(([AB])\)|(?<!\w)['‘]([AB])['’](?!\w)")
_SPACES = re.compile(r"[^\S\n]+")
_BREAKS = re.compile(r" ?\n\s*")


def check_guard(guard: str) -> None:
    """Raise ValueError unless `guard` names a level."""
    if guard not in get_args(Guard):
        raise ValueError(f"guard is {guard!r}; expected one of {', '.join(get_args(Guard))}")


def find_verdict(text: str, *, winner: bool, ties: bool = False) -> tuple[str, str] | None:
    """Return the kind of verdict in a text ("scores", "a winner" or "a tie") and its words, or None.

    Args:
        text: criteria or an analysis.
        winner: whether a named winner counts as well as scores.
        ties: whether, with `winner`, a tie counts too.
    """
    found = {
        "scores": find_scores(text),
        "a winner": find_winner(text) if winner else None,
        "a tie": find_tie(text) if winner and ties else None,
    }
    return next(((what, words) for what, words in found.items() if words is not None), None)


def find_scores(text: str) -> str | None:
    r"""Return the first text that scores the responses, or None.

    `\boxed{8, 5}`, `Scores: 8, 5`, `A: 8/10, B: 5/10`, `Response A deserves a 9`. Weights, ranges and the points of a
    criterion (`Accuracy (5 points)`, `weight 3/10`) are not scores of a response.
    """
    return _first(_SCORES, text)


def find_winner(text: str) -> str | None:
    """Return the first text that says which response is the better one, or None.

    `Response A is better`, `B wins`, `the better answer is A`, `I prefer response B`, `[[A>B]]`. A comparison in one
    respect (`Response A is better organised`) does not count.
    """
    return _first(_WINNER, text)


def find_tie(text: str) -> str | None:
    """Return the first text that says that neither response is better, or None.

    `It is a tie`, `Both responses are equally good`, `Neither is better`, `A and B deserve the same score`. A condition
    (`where neither is better, prefer the shorter one`) and one respect (`both are equally long`) do not count.
    """
    return _first(_TIE, text)


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    plain = _ENCLOSED.sub(r"\1\2", _UNDERSCORES.sub("", text.translate(_MARKS)))
    found = pattern.search(_BREAKS.sub("\n", _SPACES.sub(" ", plain)))
    return None if found is None else " ".join(found[0].split())[:_SHOWN]


def _either(words: str) -> str:
    """Return a pattern of any of the words or phrases, which are separated by bars and may hold patterns."""
    return "(?:" + "|".join(word.strip().replace(" ", r"\s+") for word in words.split("|")) + ")"


def _fill(pattern: str, pieces: Mapping[str, str]) -> str:
    """Return the pattern with each NAME in capitals between angle brackets replaced by its piece."""
    return re.sub(r"<([A-Z]+)>", lambda name: pieces[name[1]], pattern)


_PIECES: dict[str, str] = {}
_PIECES["NOUN"] = _either("response|assistant|answer|candidate|model|output|reply|completion|solution")
_PIECES["NAMED"] = _fill(
    r"(?:\b<NOUN>[\s_]+(?:A|B|1|2|one|two)\b|\bthe\s+(?:first|second)\s+(?:<NOUN>|one)\b|\bthe\s+(?:former|latter)\b)",
    _PIECES,
)
_PIECES["LETTER"] = r"(?-i:\b[AB]\b(?!-))"
_PIECES["OWNS"] = _fill(r"(?:['’]s(?:\s+<NOUN>)?)?", _PIECES)
_PIECES["ANY"] = _fill(r"(?:<NAMED>|<LETTER>)<OWNS>", _PIECES)
# A letter alone is a response where a clause begins, not in "vitamin A is better".
_PIECES["BARE"] = _fill(
    r"(?:^|(?<=[.;:,!?()\n\[–—-])|(?<=\bthat)|(?<=\band)|(?<=\bbut)|(?<=\bso)|(?<=\bbecause)|(?<=\bsince)|"
    r"(?<=\boverall)|(?<=\btherefore)|(?<=\bthus)|(?<=\bthink))[ \t]*<LETTER>",
    _PIECES,
)
_PIECES["SUBJECT"] = _fill(r"(?<!\bif )(?<!\bwhether )(?<!\bneither )(?<!\bnor )(?:<NAMED>|<BARE>)<OWNS>", _PIECES)
_PIECES["BE"] = _either(
    "is|was|seems|appears|looks|remains|proves|(?:would|should|must|will|can|has to) be|emerges as|comes out|ends up|"
    "stands out as|turns out(?: to be)?|does|did|performs|performed"
)
_PIECES["DEGREE"] = (
    r"(?:(?:the|a|to|be|as|much|so|by|far|also|still|clear|obvious|overall|somewhat|therefore|thus|found|considered|"
    r"judged|deemed|(?-i:[a-z]+ly))\s+){0,3}"
)
_PIECES["BETTER"] = _either("better|superior|preferable|preferred|favou?red|stronger|winning")
_PIECES["RANK"] = _fill(r"(?:<BETTER>|best|strongest|winner|worse|worst|inferior|weaker|weakest|loser)", _PIECES)
# "better organised", "better at dates" and "better in tone" compare in one respect. "A is the best answer" may be that
# of a question with lettered choices.
_PIECES["WHOLE"] = _fill(
    r"(?=\s*(?:$|[.,;:!?)\]\n–—-]|(?:than|over|to|overall|because|since|as|due|and|but|so|while|here|by\s+far|"
    r"of\s+the\s+two|of\s+both|one|choice|<NOUN>)\b))(?<!best(?=\s+answer))",
    _PIECES,
)
_PIECES["WINS"] = _either(
    "wins|won|loses|lost|prevails|triumphs|outperforms|beats|outshines|surpasses|outclasses|edges out|"
    "(?:comes?|came) out (?:on top|ahead)|takes the (?:win|lead)|ranks (?:first|second|higher|lower)|"
    "has (?:the|an|a slight|a clear) (?:edge|advantage)|scores? (?:higher|lower|better|worse)|"
    "(?:deserves?|gets?|receives?|earns?|merits?) (?:the|a) (?:win|higher|better|lower|top)|"
    "(?:should|must|ought to|will|deserves? to) (?:win|lose|score (?:higher|lower)|be (?:preferred|chosen)|"
    "be (?:scored|rated|ranked) (?:higher|lower))"
)
_PIECES["PREFER"] = _either("prefer(?:s|red|ring)?|favou?r(?:s|ed|ing)?|vote for|go with|lean(?:s|ing)? towards?")

_WINNER = re.compile(
    "|".join(
        _fill(pattern, _PIECES)
        for pattern in (
            r"<SUBJECT>\s+(?:\w+ly\s+)?<BE>\s+<DEGREE><RANK><WHOLE>",
            r"<SUBJECT>\s+<BE>\s+not\s+(?:quite\s+)?as\s+(?:good|strong)\s+as\s+<ANY>",
            r"\b(?:give|award)s?\s+<ANY>\s+(?:the|a)\s+(?:win|higher|better|top)\b",
            r"<SUBJECT>\s+(?:\w+ly\s+)?<WINS>\b(?!-)",
            r"\b<BETTER>\s+(?:<NOUN>|one|choice)(?:\s+(?:here|overall))?\s*(?:is|was|:|=|would\s+be)\s*<ANY>(?![\w'’])",
            r"\bbest\s+(?:response|assistant|reply|candidate)\s*(?:is|was|:|=)\s*<ANY>(?![\w'’])",
            r"\b(?:winner|loser|verdict|decision|vote|preference|preferred|better|chosen\s+<NOUN>)\s*"
            r"(?:[:=→–—-]|\bis\b|\bgoes\s+to\b)\s*<ANY>(?!\s*[a-z/])",
            r"\b<PREFER>\s+<ANY>(?!\s*/|\s+(?:and|or|<NOUN>)\b)",
            r"\b(?:choose|chose|pick|picked)\s+<NAMED>",
            r"<ANY>\s*(?:>{1,2}|<{1,2}|≻)\s*<ANY>",
            r"\[\[\s*<LETTER>\s*\]\]",
        )
    ),
    re.IGNORECASE,
)

# A conditional clause or a question is not a verdict.
_PIECES["STATED"] = "".join(rf"(?<!\b{word} )" for word in ("if", "when", "where", "whether", "unless", "should"))
_PIECES["BOTH"] = _fill(
    r"<STATED>\b(?:both(?:\s+of\s+them|(?:\s+the)?\s+<NOUN>s)?|the\s+two(?:\s+<NOUN>s)?|they|(?:<NAMED>|<LETTER>)"
    r"\s*(?:and|&)\s*(?:<NAMED>|<LETTER>))",
    _PIECES,
)
_PIECES["ARE"] = _either("are|were|seem|appear|look|remain|(?:should|must|can|would) be|is")
_PIECES["EVEN"] = _either(
    "equal|even|tied|a tie|a draw|on (?:a )?par|the same|identical|indistinguishable|"
    "equally (?:good|bad|strong|weak|poor|fine|well|matched)|(?:just )?as good as (?:each|one another)|"
    "of (?:equal|the same|similar) (?:quality|merit|value|standard)"
)
_TIE = re.compile(
    "|".join(
        _fill(pattern, _PIECES)
        for pattern in (
            r"<BOTH>\s+<ARE>\s+(?:(?-i:[a-z]+ly|about|quite|all)\s+){0,2}<EVEN>(?=\s*(?:$|[.,;:!?)\]\n–—-]|"
            r"(?:overall|here|so|and|but|in\s+quality|other|another|because|since|as)\b))",
            r"<BOTH>\s+(?:should\s+|must\s+)?(?:gets?|scores?|receives?|earns?|deserves?|merits?|have|has)\s+"
            r"(?:an?\s+|the\s+)?(?:same|equal|identical)\s+(?:score|rating|mark|grade)s?\b",
            r"<STATED>\bneither(?:\s+<NOUN>|\s+one|\s+of\s+(?:them|the\s+(?:two|<NOUN>s)))?\s+<BE>\s+<DEGREE><RANK><WHOLE>",
            r"<STATED>\bneither(?:\s+<NOUN>|\s+one|\s+of\s+(?:them|the\s+(?:two|<NOUN>s)))?\s+<WINS>\b",
            r"<STATED>\b(?:it\s+is|it['’]s|this\s+is|that\s+is|call\s+it|ends?\s+in|results?\s+in|i\s+see)\s+(?:a|an)\s+"
            r"(?:(?-i:[a-z]+)\s+)?(?:tie|draw)\b",
            r"\b(?:winner|verdict|result|preference|preferred|better)\s*(?:[:=–—-]|\bis\b)\s*(?:an?\s+)?"
            r"(?:tie|tied|draw|neither|none|equal|both)\b",
            r"<STATED>\b(?:there\s+is\s+)?no\s+(?:clear\s+|real\s+)?(?:winner|better\s+(?:<NOUN>|one))\b",
            r"<ANY>\s*={1,2}\s*(?:<NAMED>|<LETTER>)(?![\w'’])",
            r"\[\[\s*(?:C|tie|A\s*=\s*B)\s*\]\]",
        )
    ),
    re.IGNORECASE,
)

_PIECES["NUMBER"] = r"(?:10|[0-9])(?:\.[0-9]+)?(?:\s*[-–]\s*(?:10|[0-9]))?"
_PIECES["UNIT"] = r"(?:\s*/\s*(?:5|10)\b|\s+out\s+of\s+(?:5|10|five|ten)\b|\s*(?:points?|marks?)\b)"
_PIECES["GIVES"] = _fill(
    r"(?:\s+(?:would|should|must|will|could))?\s+<GIVEN>(?:\s+(?:a|an|about|only))?(?:\s+(?:score|rating|mark|grade)\s+of)?",
    {"GIVEN": _either("gets?|scores?|receives?|earns?|deserves?|merits?|(?:is|be) (?:given|rated|scored|worth)")},
)
_PIECES["END"] = _fill(
    r"(?:<UNIT>|(?=\s*(?:$|[;,/)\n\]]|\.(?![0-9])|<ANY>|(?:and|but|while|vs|versus|for|overall)\b)))", _PIECES
)
_PIECES["SCORE"] = _fill(
    r"(?:(?:\s*[:=]|<GIVES>)?\s*[(\[]?\s*<NUMBER><END>|[^.\n\d]{1,60}?[(\[]\s*<NUMBER><UNIT>?\s*[)\]])", _PIECES
)
# A number that ends its line, after a response's name: not "Response A: 1. It is brief."
_PIECES["LAST"] = _fill(r"(?: ?[:=] ?[(\[]?| [–—-]>? | ?[(\[])<NUMBER>(?:<UNIT>|(?=[)\]]?[ .;,]*(?:$|\n|\()))", _PIECES)
# As in a verdict, on any scale; 58,500 is one number.
_PIECES["BOXED"] = _fill(r"\s*(?:<NAMED>|<LETTER>)?\s*[:=]?\s*[0-9]{1,4}(?:\.[0-9]+)?<UNIT>?\s*", _PIECES)
_SCORES = re.compile(
    "|".join(
        _fill(pattern, _PIECES)
        for pattern in (
            r"\\?boxed\s*\{+(?![0-9]{1,3},[0-9]{3}\s*\})<BOXED>[,;]<BOXED>\}",
            r"<NAMED><OWNS>(?: score| rating)?<LAST>",
            r"(?:^|(?<=\n))[^\w\n]*<LETTER><LAST>[ .;,)\]]*\n[^\w\n]*<LETTER><LAST>(?![ .;,)\]]*\n[^\w\n]*C\b)",
            r"\b(?:score|rating)(?: (?:of|for))? (?:response |assistant )?<LETTER> ?(?:[:=]|is) ?[(\[]?<NUMBER><END>",
            r"\| ?<ANY> ?\| ?<NUMBER><UNIT>? ?\|\W{0,9}<ANY> ?\| ?<NUMBER><UNIT>? ?\|",
            r"(?:<NAMED><OWNS>|<LETTER>['’]s):?\s\W{0,4}(?:score|rating)(?: ?[:=]| (?:is|of)) ?[(\[]?<NUMBER><END>",
            r"\b(?:rate|score)s? <ANY>(?: (?:as|at|with))?(?: (?:a|an|about))? <NUMBER><END>",
            r"(?:^|(?<=\n))[ \t]*[(\[{]?\s*<NUMBER>\s*(?:[,;:|]|vs\.?|and)\s*<NUMBER>\s*[)\]}]?[ \t.]*(?=\n|$)",
            r"\b(?:scores|ratings|verdict|marks|grades)\s*(?:[:=]|are|is|(?:would|should)\s+be)\s*"
            r"[(\[]?\s*<NUMBER><UNIT>?\s*(?:,|;|and|vs\.?|versus)\s*<NUMBER><UNIT>?(?!\s*(?:,|or|and)?\s*[0-9])",
            r"<ANY><SCORE>[^\d\n]{0,40}?<ANY><SCORE>",
            r"<NUMBER><UNIT>?\s*[)\]]?\s*(?:for|to)\s+<ANY>[^\d\n]{1,60}?<NUMBER><UNIT>?\s*[)\]]?\s*(?:for|to)\s+<ANY>",
            r"<SUBJECT><GIVES>\s+<NUMBER><END>",
            r"<SUBJECT>\s*[:=]\s*<NUMBER>\s*/\s*(?:5|10)\b",
        )
    ),
    re.IGNORECASE,
)
