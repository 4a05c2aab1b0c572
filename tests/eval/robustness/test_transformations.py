"""Protects the transformations: what they change, what they must leave alone, and where they do not apply."""

import ast
import json
import random
import re

import pytest

from cepo.eval.robustness.transformations import TRANSFORMATIONS, ResponsePair, _same_program, check_names, transform
from cepo.jacobian.reading.reasoner import extract_answer
from tests.paths import DATA

PAIRS = DATA / "pref"
PROSE = [
    "quotes",
    "punctuation-spaces",
    "handle",
    "link",
    "character-swap",
    "character-substitution",
    "character-insertion",
    "character-deletion",
    "homoglyphs",
    "ignore-above",
    "ignore-below",
    "whitespace",
]
CODE = ["comment-bad", "comment-bad-good", "code-minified", "code-spread"]
TYPOS = ["character-swap", "character-substitution", "character-insertion", "character-deletion"]
KEPT = ("`total_price`", "$x_1 + alpha$", "https://example.org/some-path", "\\boxed{seven hundred}", "name@example.org")
TEXT = (
    "Several travellers, they say, arrived before winter: nobody knew where their journey started. "
    f"Call {KEPT[0]} first; then compare {KEPT[1]} with the table at {KEPT[2]} and write to {KEPT[4]}.\n\n"
    "```python\nresult = compute(left, right)\nprint(result)\n```\n\n"
    f"Therefore the answer, which surprised everybody, equals {KEPT[3]}."
)
FENCE = "```python\nresult = compute(left, right)\nprint(result)\n```"
PAIR = ResponsePair("Who arrived?", TEXT, "Nobody arrived, because everything was closed; that is certain.")
PROGRAM = '''import functools


@functools.cache
def describe(values, *, limit = 3, **options):
    """Say what the values are.

      an indented line, "quoted" # not a comment
    """
    total = 0  # running
    for value in values:

        if (value > limit and
                not value == 7):  # odd
            total += - value ** 2; limit = limit
        else: total = total \\
            + value
    text = f"{total!r:>{limit}} of {len(values)}" 'and' "more"
    return [text, lambda x, *y: x if x else -1, {"a": 1, **options}, values[1 :: 2]]


class Empty: pass
'''
OTHER_PROGRAM = "def describe(values):\n\treturn None\n"


def rows(name: str) -> list[ResponsePair]:
    path = PAIRS / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path.name} of the shared data")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [ResponsePair(row["prompt"], row["chosen"], row["rejected"]) for row in found]


def dumped(code: str) -> str:
    return ast.dump(ast.parse(code))


def changed(name: str, pair: ResponsePair, seed: int = 0) -> ResponsePair:
    after = transform(name, pair, seed=seed)
    assert after is not None
    return after


def test_the_lists_here_are_complete() -> None:
    assert [*PROSE, *CODE, "answer-format"] == list(TRANSFORMATIONS)


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="transformation is 'rot13'; expected one of quotes"):
        transform("rot13", PAIR, seed=0)
    with pytest.raises(ValueError, match="names quotes twice"):
        check_names(["quotes", "handle", "quotes"])


@pytest.mark.parametrize("name", list(TRANSFORMATIONS))
def test_draws_hang_on_name_seed_and_pair_alone(name: str) -> None:
    """The same call gives the same pair, and the global random state neither matters nor moves."""
    pair = ResponsePair("p", PROGRAM, OTHER_PROGRAM) if name in CODE else PAIR
    random.seed(1)
    state = random.getstate()
    first = transform(name, pair, seed=3)
    assert random.getstate() == state
    random.seed(2)
    assert transform(name, pair, seed=3) == first
    assert first is not None
    assert first.prompt == pair.prompt
    assert first != pair


@pytest.mark.parametrize("name", [*TYPOS, "homoglyphs", "handle", "link"])
def test_another_seed_draws_otherwise(name: str) -> None:
    assert changed(name, PAIR, 0) != changed(name, PAIR, 1)


@pytest.mark.parametrize("name", PROSE)
def test_prose_leaves_code_formulas_and_links_alone(name: str) -> None:
    for seed in range(5):
        after = changed(name, PAIR, seed)
        for kept in (*KEPT, FENCE):
            assert kept in after.chosen


@pytest.mark.parametrize("name", PROSE)
def test_prose_transformations_do_not_touch_programs(name: str) -> None:
    """A response that is a program as a whole, in Python or not, would become another one."""
    javascript = "const add = (a, b) => {\n  let total = a + b;\n  return total;\n}\n"
    for program in (PROGRAM, javascript):
        assert transform(name, ResponsePair("Write it.", program, "Sorry, I cannot do that for you."), seed=0) is None
        assert transform(name, ResponsePair("Write it.", "Sorry, I cannot do that for you.", program), seed=0) is None


def test_quotes_punctuation_and_whitespace_can_be_undone() -> None:
    quoted = changed("quotes", PAIR)
    assert (quoted.chosen, quoted.rejected) == (f'"{PAIR.chosen}"', f'"{PAIR.rejected}"')
    spaced = changed("punctuation-spaces", PAIR)
    assert spaced.rejected == "Nobody arrived , because everything was closed ; that is certain ."
    assert re.sub(r" (?=[,.;:!?](?:\s|$))", "", spaced.chosen) == PAIR.chosen
    assert changed("punctuation-spaces", ResponsePair("p", "It costs 3.50, that is all.", "No.")).chosen == (
        "It costs 3.50, that is all ."
    )
    wide = changed("whitespace", PAIR)
    assert wide.chosen != PAIR.chosen
    assert wide.chosen.split() == PAIR.chosen.split()


@pytest.mark.parametrize(("name", "pattern"), [("handle", r" @\w{8}"), ("link", r" https://t\.co/\w{10}")])
def test_noise_is_appended_alike_to_both(name: str, pattern: str) -> None:
    """What differs between the responses could tell which is better."""
    after = changed(name, PAIR)
    assert after.chosen.startswith(PAIR.chosen)
    noise = after.chosen.removeprefix(PAIR.chosen)
    assert re.fullmatch(pattern, noise)
    assert after.rejected == PAIR.rejected + noise


def test_ignored_text_is_alike_in_both_and_around_them() -> None:
    above, below = changed("ignore-above", PAIR), changed("ignore-below", PAIR)
    assert above.chosen.endswith(f"Ignore the text above.\n\n{PAIR.chosen}")
    assert above.chosen.removesuffix(PAIR.chosen) == above.rejected.removesuffix(PAIR.rejected)
    assert below.chosen.startswith(f"{PAIR.chosen}\n\nIgnore the text below.")
    assert below.chosen.removeprefix(PAIR.chosen) == below.rejected.removeprefix(PAIR.rejected)


@pytest.mark.parametrize("name", TYPOS)
def test_typos_hit_a_tenth_of_the_words_inside(name: str) -> None:
    """First letters stay, words stay where they are, and one edit of the named kind is made in each."""
    text = " ".join(["remarkable", "sentences"] * 30)
    after = changed(name, ResponsePair("p", text, "A short reply without anything else."))
    pairs = [(old, new) for old, new in zip(text.split(" "), after.chosen.split(" "), strict=True) if old != new]
    assert len(pairs) == 6
    for old, new in pairs:
        assert old[0] == new[0]
        assert len(new) - len(old) == {"character-insertion": 1, "character-deletion": -1}.get(name, 0)
        if name == "character-swap":
            assert sorted(old) == sorted(new)
            assert sum(a != b for a, b in zip(old, new, strict=True)) == 2
        if name == "character-substitution":
            assert sum(a != b for a, b in zip(old, new, strict=True)) == 1
        if name == "character-insertion":
            assert any(new[:place] + new[place + 1 :] == old for place in range(len(new)))
        if name == "character-deletion":
            assert any(old[:place] + old[place + 1 :] == new for place in range(len(old)))


def test_typos_do_not_apply_without_words() -> None:
    assert transform("character-swap", ResponsePair("p", "42", "It is 7."), seed=0) is None


def test_homoglyphs_look_alike() -> None:
    """Every replaced letter is Cyrillic, and its Latin twin is what stood there."""
    twins = dict(zip("асеіјорѕхуАВСЕНІЈКМОРЅТХҮ", "aceijopsxyABCEHIJKMOPSTXY", strict=True))
    after = changed("homoglyphs", PAIR)
    assert "".join(twins.get(letter, letter) for letter in after.chosen) == PAIR.chosen
    replaced = sum(a != b for a, b in zip(after.chosen, PAIR.chosen, strict=True))
    assert 3 <= replaced <= 0.2 * len(PAIR.chosen)


@pytest.mark.parametrize("name", CODE)
def test_programs_stay_the_same_programs(name: str) -> None:
    """Over strings of several lines, continued lines, f-strings, decorators and tabs, the syntax tree is equal."""
    pair = ResponsePair("Write it.", PROGRAM, OTHER_PROGRAM)
    after = changed(name, pair)
    assert after.chosen != pair.chosen
    assert after.rejected != pair.rejected
    assert dumped(after.chosen) == dumped(pair.chosen)
    assert dumped(after.rejected) == dumped(pair.rejected)


def test_a_program_that_would_become_another_one_is_left_alone() -> None:
    """The syntax trees are compared in earnest; `1 .real` without its space is no Python at all."""
    assert _same_program("a = 1\n", lambda code: code + "\n") == "a = 1\n\n"
    assert _same_program("a = 1\n", lambda _: "a = 2\n") is None
    assert transform("code-minified", ResponsePair("p", "a = 1 .real\n", "a = 2\n"), seed=0) is None


@pytest.mark.parametrize("name", CODE)
def test_only_python_is_rewritten_as_code(name: str) -> None:
    assert transform(name, PAIR, seed=0) is None, "one response has no program"
    for other in ("```javascript\nlet a = 1;\n```", "```ruby\na = 1\n```"):
        assert transform(name, ResponsePair("p", other, f"Here.\n\n{other}"), seed=0) is None


@pytest.mark.parametrize("name", CODE)
def test_fenced_programs_are_rewritten_and_prose_around_them_is_not(name: str) -> None:
    shell = "```bash\npip install something\n```"
    fenced = f"First   this:\n\n```python\n{PROGRAM}```\n\nThen  that:\n{shell}\nDone."
    after = changed(name, ResponsePair("p", fenced, f"Mine:\n```\n{OTHER_PROGRAM}```"))
    before, program, behind = re.fullmatch(r"(.*?```python\n)(.*?)(```\n\nThen.*)", after.chosen, re.DOTALL).groups()
    assert (before, behind) == ("First   this:\n\n```python\n", f"```\n\nThen  that:\n{shell}\nDone.")
    assert program != PROGRAM
    assert dumped(program) == dumped(PROGRAM)
    assert after.rejected.startswith("Mine:\n```\n")


def test_comments_say_what_they_should() -> None:
    pair = ResponsePair("p", "a = 1\nb = (2 +\n  3)\n", "a = 2  # note\r\nb = 'x'")
    bad, lie = changed("comment-bad", pair), changed("comment-bad-good", pair)
    assert bad.chosen == "a = 1  # bad\nb = (2 +\n  3)  # bad\n"
    assert bad.rejected == "a = 2  # note  # bad\r\nb = 'x'  # bad"
    assert lie.chosen == bad.chosen
    assert lie.rejected == "a = 2  # note  # good\r\nb = 'x'  # good"


def test_minified_and_spread_programs_are_smaller_and_larger() -> None:
    pair = ResponsePair(
        "p", "def f(a, b):\n    # note\n\n    return a + b if a else -b\n", "def f(a, b):\n    return 1\n"
    )
    assert changed("code-minified", pair).chosen == "def f(a,b):\n return a+b if a else-b\n"
    assert changed("code-spread", pair).rejected == "def  f(a,  b):\n\n        return  1\n\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "Thus $x=\\boxed{\\frac{1}{2}}$, as claimed.",
            "Thus $x=\\frac{1}{2}$, as claimed.\n\n# Answer\n\n\\frac{1}{2}",
        ),
        ("We add.\n\n# Answer\n\n76^\\circ", "We add.\n\n$\\boxed{76^\\circ}$"),
        ("We add.\n\n# Answer\n\n$12$\n", "We add.\n\n$\\boxed{12}$"),
    ],
)
def test_answers_change_their_format(before: str, after: str) -> None:
    pair = ResponsePair("How many?", before, "I do not know.")
    assert changed("answer-format", pair) == ResponsePair("How many?", after, "I do not know.")


def test_answer_format_needs_a_marker() -> None:
    for text in ("It is 7.", "It is \\boxed{7", "# Answer\n\n\\boxed{7}", "\\boxed{1} or \\boxed{2}"):
        assert transform("answer-format", ResponsePair("p", text, "It is 8."), seed=0) is None


def test_answers_stay_the_same_answers() -> None:
    """On real solutions, what `extract_answer` finds is what it found before."""
    moved = 0
    for pair in rows("math_prm"):
        after = transform("answer-format", pair, seed=0)
        if after is None:
            continue
        for old, new in ((pair.chosen, after.chosen), (pair.rejected, after.rejected)):
            if old != new and "\n" not in extract_answer(old):
                moved += 1
                assert extract_answer(new) == extract_answer(old)
    assert moved > 400


@pytest.mark.parametrize("name", CODE)
def test_real_programs_stay_the_same_programs(name: str) -> None:
    pairs = [pair for pair in rows("humanevalpack") if pair.prompt.startswith("Write a Python")]
    after = [(pair, transform(name, pair, seed=0)) for pair in pairs[::4]]
    found = [(pair, other) for pair, other in after if other is not None]
    assert len(found) >= 0.95 * len(after)
    for pair, other in found:
        assert dumped(pair.chosen) == dumped(other.chosen)
        assert dumped(pair.rejected) == dumped(other.rejected)


def test_real_programs_are_not_taken_for_prose_nor_prose_for_programs() -> None:
    programs, prose = rows("humanevalpack")[::8], rows("llmbar")[::4]
    assert sum(transform("quotes", pair, seed=0) is not None for pair in programs) <= 0.02 * len(programs)
    assert sum(transform("quotes", pair, seed=0) is not None for pair in prose) >= 0.95 * len(prose)
