"""Mechanical transformations of a preference pair that do not change which response is better.

Each is a pure function `(pair, random) -> pair`, or None if it does not apply. They change the responses, never the
prompt, and never what a response says: prose is transformed outside code, formulas and links; a program is transformed
only if its syntax tree stays the same; an answer changes its format, not its value.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import random
import re
import string
import tokenize
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TypeAlias

from cepo.jacobian.reading.answer import find_box

# What a transformation of prose leaves alone: code, formulas, links and addresses, tags, LaTeX commands.
_PROTECTED = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]+`|\[asy\].*?\[/asy\]|\$\$.*?\$\$|\$[^$\n]+\$|\\\[.*?\\\]|\\\(.*?\\\)|\\boxed\s*\{[^\n]*\}"
    r"|(?:https?://|www\.)\S+|\S+@\S+|<[^<>\n]+>|\\[A-Za-z]+",
    re.DOTALL,
)
_FENCE = re.compile(
    r"(?P<opening>^```(?P<language>[\w+#.-]*)[ \t]*\n)(?P<code>.*?)(?P<closing>^```[ \t]*$)", re.S | re.M
)
_WORD = re.compile(r"(?<![\w'’-])[A-Za-z]{4,}(?![\w'’-])")
_PUNCTUATION = re.compile(r"(?<=[^\W\d_])([,.;:!?])(?=\s|\Z)")
_CODE_LINE = re.compile(
    r"[{;]\s*$|^\s*[})][})\];,]*\s*$|^\s*(?:if|for|while)\s*\("
    r"|^\s*(?:#include|import|package|using|def|class|fn|func|function|const|let|var|return)\b.*[^.?!]$"
)
_ANSWER_HEADER = re.compile(r"\n*^# Answer[ \t]*\n\s*(?P<answer>\S.*?)\s*\Z", re.DOTALL | re.MULTILINE)
_RATE = 0.1  # share of words, or of letters with a lookalike, that are changed
_CODE_SHARE = 0.4  # smallest share of lines that look like code in a text that is a program
_LOOKALIKES = dict(zip("aceijopsxyABCEHIJKMOPSTXY", "асеіјорѕхуАВСЕНІЈКМОРЅТХҮ", strict=True))  # Latin: Cyrillic
_IGNORED = "The harbour was quiet that morning, and the boats had not yet come in."
_BOX = "\\boxed{"
_RUN_TOGETHER = re.compile(r"[\w\"']{2}")
_UNWRITTEN = frozenset({tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER})


@dataclass(frozen=True)
class ResponsePair:
    """A preference pair.

    Attributes:
        prompt: what was asked.
        chosen: the better response.
        rejected: the worse response.
    """

    prompt: str
    chosen: str
    rejected: str


Transformation: TypeAlias = Callable[[ResponsePair, random.Random], ResponsePair | None]


def transform(name: str, pair: ResponsePair, *, seed: int) -> ResponsePair | None:
    """Apply a transformation by name.

    The draws depend only on the name, the seed and the pair, not on other rows.

    Args:
        name: one of `TRANSFORMATIONS`.
        pair: the pair to transform.
        seed: seed of the draws.

    Returns:
        The transformed pair, or None if the transformation does not apply or changes nothing.

    Raises:
        ValueError: for an unknown name.

    Source:
        Wu et al., reWordBench: benchmarking and improving the robustness of reward models with transformed inputs
        (2025). The kinds of mechanical transformations are from there; wording and draws are not, and paraphrases,
        translations and jailbreaks are left out.
    """
    check_names([name])
    content = json.dumps([name, seed, pair.prompt, pair.chosen, pair.rejected]).encode()
    draws = random.Random(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()))
    if name in _PROSE and (_is_code(pair.chosen) or _is_code(pair.rejected)):
        return None
    changed = TRANSFORMATIONS[name](pair, draws)
    return None if changed == pair else changed


def check_names(names: list[str] | tuple[str, ...]) -> None:
    """Raise ValueError unless all names are transformations, each once."""
    unknown = [name for name in names if name not in TRANSFORMATIONS]
    if unknown:
        raise ValueError(f"transformation is {unknown[0]!r}; expected one of {', '.join(TRANSFORMATIONS)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"transformation names {twice[0]} twice; expected each once")


def add_quotes(pair: ResponsePair, _: random.Random) -> ResponsePair:
    """Put each response in quotation marks."""
    return _each(pair, lambda text: f'"{text}"')


def space_punctuation(pair: ResponsePair, _: random.Random) -> ResponsePair:
    """Put a space before the punctuation that ends a word."""
    return _each(pair, lambda text: _outside(text, lambda part: _PUNCTUATION.sub(r" \1", part)))


def append_handle(pair: ResponsePair, draws: random.Random) -> ResponsePair:
    """Append one drawn user name, such as @k3J0aPq2, to both responses."""
    handle = "@" + _draw_characters(draws, 8)
    return _each(pair, lambda text: f"{text} {handle}")


def append_link(pair: ResponsePair, draws: random.Random) -> ResponsePair:
    """Append one drawn short link, such as https://t.co/k3J0aPq2Zx, to both responses."""
    link = "https://t.co/" + _draw_characters(draws, 10)
    return _each(pair, lambda text: f"{text} {link}")


def swap_characters(pair: ResponsePair, draws: random.Random) -> ResponsePair:
    """Swap two neighbouring inner letters in a tenth of the words."""

    def swap(word: str) -> str:
        places = [place for place in range(1, len(word) - 2) if word[place] != word[place + 1]]
        if not places:
            return word
        place = draws.choice(places)
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]

    return _change_words(pair, draws, swap)


def substitute_characters(pair: ResponsePair, draws: random.Random) -> ResponsePair:
    """Replace an inner letter by another in a tenth of the words."""

    def substitute(word: str) -> str:
        place = draws.randrange(1, len(word) - 1)
        other = draws.choice([letter for letter in string.ascii_lowercase if letter != word[place].lower()])
        return word[:place] + other + word[place + 1 :]

    return _change_words(pair, draws, substitute)


def insert_characters(pair: ResponsePair, draws: random.Random) -> ResponsePair:
    """Insert a letter inside a tenth of the words."""

    def insert(word: str) -> str:
        place = draws.randrange(1, len(word))
        return word[:place] + draws.choice(string.ascii_lowercase) + word[place:]

    return _change_words(pair, draws, insert)


def delete_characters(pair: ResponsePair, draws: random.Random) -> ResponsePair:
    """Delete an inner letter in a tenth of the words."""

    def delete(word: str) -> str:
        place = draws.randrange(1, len(word) - 1)
        return word[:place] + word[place + 1 :]

    return _change_words(pair, draws, delete)


def substitute_homoglyphs(pair: ResponsePair, draws: random.Random) -> ResponsePair:
    """Replace a tenth of the Latin letters that have a Cyrillic lookalike by that lookalike."""

    def disguise(part: str) -> str:
        return "".join(
            _LOOKALIKES[letter] if letter in _LOOKALIKES and draws.random() < _RATE else letter for letter in part
        )

    return _each(pair, lambda text: _outside(text, disguise))


def ignore_above(pair: ResponsePair, _: random.Random) -> ResponsePair:
    """Start both responses with an unrelated sentence and a line that says to ignore it."""
    return _each(pair, lambda text: f"{_IGNORED}\n\nIgnore the text above.\n\n{text}")


def ignore_below(pair: ResponsePair, _: random.Random) -> ResponsePair:
    """End both responses with a line that says to ignore what follows, and an unrelated sentence."""
    return _each(pair, lambda text: f"{text}\n\nIgnore the text below.\n\n{_IGNORED}")


def widen_whitespace(pair: ResponsePair, _: random.Random) -> ResponsePair:
    """Double the spaces between words and the breaks between paragraphs, and end in blank lines."""

    def widen(part: str) -> str:
        return re.sub(r"\n[ \t]*\n", "\n\n\n\n", re.sub(r"(?<=\S) (?=\S)", "  ", part))

    return _each(pair, lambda text: _outside(text, widen) + "  \n\n")


def comment_bad(pair: ResponsePair, _: random.Random) -> ResponsePair | None:
    """Add the comment `# bad` to the lines of both programs (Python, the whole response or a fenced block)."""
    return _each_program(pair, partial(_comment, word="bad"))


def comment_bad_good(pair: ResponsePair, _: random.Random) -> ResponsePair | None:
    """Add the misleading comments `# bad` to the chosen program and `# good` to the rejected one (Python)."""
    return _each_program(pair, partial(_comment, word="bad"), partial(_comment, word="good"))


def minify_code(pair: ResponsePair, _: random.Random) -> ResponsePair | None:
    """Remove comments, blank lines and all white space that is not needed from both programs (Python)."""
    return _each_program(pair, partial(_lay_out, indent=" ", gap="", end="\n"))


def spread_code(pair: ResponsePair, _: random.Random) -> ResponsePair | None:
    """Indent both programs by eight spaces, and double the spaces and line breaks between statements (Python)."""
    return _each_program(pair, partial(_lay_out, indent=" " * 8, gap="  ", end="\n\n"))


def swap_answer_format(pair: ResponsePair, _: random.Random) -> ResponsePair | None:
    r"""Turn a `\boxed{x}` into a closing section "# Answer", and such a section into a box.

    For mathematics. A response with exactly one marked answer is changed; any other stays as it is.
    """
    return _each(pair, _swap_format)


_PROSE: Mapping[str, Transformation] = {
    "quotes": add_quotes,
    "punctuation-spaces": space_punctuation,
    "handle": append_handle,
    "link": append_link,
    "character-swap": swap_characters,
    "character-substitution": substitute_characters,
    "character-insertion": insert_characters,
    "character-deletion": delete_characters,
    "homoglyphs": substitute_homoglyphs,
    "ignore-above": ignore_above,
    "ignore-below": ignore_below,
    "whitespace": widen_whitespace,
}
TRANSFORMATIONS: Mapping[str, Transformation] = MappingProxyType(
    {
        **_PROSE,
        "comment-bad": comment_bad,
        "comment-bad-good": comment_bad_good,
        "code-minified": minify_code,
        "code-spread": spread_code,
        "answer-format": swap_answer_format,
    }
)
"""The transformations, by their names on the command line and in the results."""


def _each(pair: ResponsePair, change: Callable[[str], str]) -> ResponsePair:
    return replace(pair, chosen=change(pair.chosen), rejected=change(pair.rejected))


def _outside(text: str, change: Callable[[str], str]) -> str:
    """Change the text outside code, formulas and links."""
    parts, end = [], 0
    for kept in _PROTECTED.finditer(text):
        parts += [change(text[end : kept.start()]), kept[0]]
        end = kept.end()
    return "".join([*parts, change(text[end:])])


def _change_words(pair: ResponsePair, draws: random.Random, change: Callable[[str], str]) -> ResponsePair:
    """Change a tenth of the words of each response, and at least one if there is one."""

    def change_text(text: str) -> str:
        kept = [(found.start(), found.end()) for found in _PROTECTED.finditer(text)]
        words = [word for word in _WORD.finditer(text) if not any(a < word.end() and word.start() < b for a, b in kept)]
        hit = draws.sample(words, min(len(words), max(1, round(_RATE * len(words)))))
        for word in sorted(hit, key=lambda found: -found.start()):
            text = text[: word.start()] + change(word[0]) + text[word.end() :]
        return text

    return _each(pair, change_text)


def _draw_characters(draws: random.Random, count: int) -> str:
    return "".join(draws.choices(string.ascii_letters + string.digits, k=count))


def _is_code(text: str) -> bool:
    """Tell whether a text is a program in any language, by its lines; fenced code and formulas do not count."""
    lines = [line for line in _PROTECTED.sub("", text).splitlines() if line.strip()]
    return _is_program(text) or (
        len(lines) > 1 and sum(map(bool, map(_CODE_LINE.search, lines))) >= _CODE_SHARE * len(lines)
    )


def _is_program(text: str) -> bool:
    """Tell whether a text is Python code with an effect; prose such as `word` and `Speaker: "line"` also parses."""
    tree = _parse(text)
    return tree is not None and any(
        not isinstance(statement, ast.Expr) and getattr(statement, "value", tree) is not None for statement in tree.body
    )


def _parse(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _each_program(
    pair: ResponsePair, change_chosen: Callable[[str], str], change_rejected: Callable[[str], str] | None = None
) -> ResponsePair | None:
    """Change the programs of both responses; None unless each has one and no syntax tree changes."""
    chosen = _change_programs(pair.chosen, change_chosen)
    rejected = _change_programs(pair.rejected, change_rejected or change_chosen)
    return None if chosen is None or rejected is None else replace(pair, chosen=chosen, rejected=rejected)


def _change_programs(text: str, change: Callable[[str], str]) -> str | None:
    if _is_program(text):
        return _same_program(text, change)
    parts, end = [], 0
    for block in _FENCE.finditer(text):
        if block["language"].lower() in ("", "python", "python3", "py") and _is_program(block["code"]):
            changed = _same_program(block["code"], change)
            if changed is None:
                return None
            parts += [text[end : block.start("code")], changed if changed.endswith("\n") else changed + "\n"]
            end = block.end("code")
    return "".join([*parts, text[end:]]) if parts else None


def _same_program(code: str, change: Callable[[str], str]) -> str | None:
    """Return the changed program if its syntax tree is the same, else None."""
    try:
        changed = change(code)
    except (tokenize.TokenError, SyntaxError):
        return None
    before, after = _parse(code), _parse(changed)
    return changed if before is not None and after is not None and ast.dump(before) == ast.dump(after) else None


def _comment(code: str, *, word: str) -> str:
    """End every logical line with a comment; a physical line may end inside a string, which cannot hold one."""
    lines = code.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.NEWLINE:
            row, column = token.start
            lines[row - 1] = f"{lines[row - 1][:column]}  # {word}{lines[row - 1][column:]}"
    return "\n".join(lines)


def _lay_out(code: str, *, indent: str, gap: str, end: str) -> str:
    """Write the program without comments, one logical line per line, with `gap` where white space parted tokens."""
    lines, line, depth = [], "", 0
    last: tokenize.TokenInfo | None = None
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        if token.type == tokenize.NEWLINE:
            lines.append(line + end)
            line, last = "", None
        elif token.type not in _UNWRITTEN:
            if last is None:
                line = indent * depth
            elif last.end != token.start:
                line += gap or (" " if _RUN_TOGETHER.fullmatch(last.string[-1] + token.string[0]) else "")
            line += token.string
            last = token
    return "".join(lines)


def _swap_format(text: str) -> str:
    section = _ANSWER_HEADER.search(text)
    if section:
        # A section that already holds a box has no single format to swap.
        answer = section["answer"].strip("$ ")
        return text if "\\boxed" in answer else f"{text[: section.start()]}\n\n$\\boxed{{{answer}}}$"
    box = find_box(text, 0, len(text)) if text.count(_BOX) == 1 else None
    if box is None or not text.startswith(_BOX, box.start):
        return text
    start, end = box.content
    answer = text[start:end]
    return f"{text[: box.start]}{answer}{text[end + 1 :].rstrip()}\n\n# Answer\n\n{answer.strip()}"
