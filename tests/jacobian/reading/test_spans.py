"""Spans of a judge's output, on the bytes of sampled ids: byte-level, SentencePiece-like and other tokenizers."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.reading.token_bytes import TokenBytes
from tests.jacobian.reading.tiny_tokenizers import (
    BODY,
    BUILDERS,
    GOOD,
    QUESTION,
    assert_spans_fit,
    chat,
    encode,
    pick,
    read,
    spread,
)
from tests.paths import DATA

TRAJECTORIES = DATA / "judge" / "j1_micro_trajectories.jsonl"


@pytest.mark.parametrize("kind", BUILDERS)
def test_judge_spans(tokenizers: dict[str, Any], kind: str) -> None:
    """Criteria, analysis and scores are the tokens that carry a byte of their content, on every kind of tokenizer."""
    tokenizer = tokenizers[kind]
    for text, scores in ((GOOD, ["9", "6"]), (GOOD.replace("9, 6", "10,\n2"), ["10", "2"])):
        rollout = read(tokenizer, text)
        contents = {"criteria": ["Be right. Be short."], "analysis": ["The good one is A."]}
        assert_spans_fit(tokenizer, rollout, contents)
        assert rollout.spans["scores"].text == " … ".join(scores)
        assert rollout.found_by == "tags"
        pieces = TokenBytes(tokenizer).of(rollout.token_ids)
        for digits, written in zip(rollout.numbers, scores, strict=True):
            value = 0.0
            for digit in digits:
                gain = dict(digit.candidates)[rollout.token_ids[digit.position]]
                assert gain == 0.0 or re.search(rb"[0-9]", pieces[digit.position])
                value += gain
            assert value == float(written)
        assert set(rollout.spans["scores"].positions) == {
            digit.position
            for digits in rollout.numbers
            for digit in digits
            if dict(digit.candidates)[rollout.token_ids[digit.position]]
        }
        values = [value for _, value in rollout.numbers[-1][0].candidates]
        if kind != "trained":  # which has the whole number in one token that it learned by heart
            assert len(set(values)) >= 10  # the sampled digit alone would make a constant of the expectation


def test_straddling_tokens(tokenizers: dict[str, Any]) -> None:
    """A token that carries content and a piece of a tag is in and never moves; one of tag and white space is out."""
    tokenizer = tokenizers["byte level"]
    ids = [
        *spread(tokenizer, "<specific_criteria"),
        *pick(tokenizer, ">\n", *"Be", " good", ".</"),
        *spread(tokenizer, "specific_criteria"),
        *pick(tokenizer, ">\n", "<analysis>", *"ok", "</analysis>", "<scores>", " \\boxed{9", *", ", "10", "}\n</"),
        *spread(tokenizer, "scores>"),
    ]
    rollout = read(tokenizer, ids)
    start = len(rollout.prompt_ids)
    assert rollout.malformed is None
    criteria = rollout.spans["criteria"]
    assert tuple(p - start for p in criteria.positions) == (19, 20, 21, 22)
    assert tuple(p - start for p in criteria.movable) == (19, 20, 21)
    assert criteria.text == "Be good."
    assert [rollout.token_ids[p] for p in rollout.spans["scores"].positions] == pick(tokenizer, " \\boxed{9", "10")
    assert [rollout.token_ids[p] for p in rollout.spans["scores"].movable] == pick(tokenizer, "10")
    assert [len(digits) for digits in rollout.numbers] == [1, 1]


def score_ids(tokenizer: Any, *pieces: str) -> list[int]:
    """Return a completion whose scores block is made of these very tokens."""
    head = "<specific_criteria>a</specific_criteria><analysis>b</analysis><scores>"
    return [*spread(tokenizer, head), *pick(tokenizer, *pieces), *spread(tokenizer, "</scores>")]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["\\boxed{", "9,", " 6", *"}"], [[("9,", 9.0)], [(" 6", 6.0)]]),
        (["\\boxed{", *"10", *",6}"], [[("1", 1.0), ("0", 9.0)], [("6", 6.0)]]),
        (["\\boxed{", *"1", *",6}"], [[("1", 1.0), (",", 0.0)], [("6", 6.0)]]),
        (["\\boxed{", *"1.5", *",6}"], [[("1", 1.5), (".", 0.0)], [("6", 6.0)]]),
        (["\\boxed{", "10", *",6}"], [[("10", 10.0)], [("6", 6.0)]]),
        (["\\boxed{", "10,", *" 6}"], [[("10,", 10.0)], [("6", 6.0)]]),
        (["\\boxed", "{1", "0, ", *"6}"], [[("{1", 1.0), ("0, ", 9.0)], [("6", 6.0)]]),
        (["\\boxed{", *"9.5,6}"], [[("9", 9.5)], [("6", 6.0)]]),
        (["\\boxed{", *"9.25,6}"], [[("9", 9.25)], [("6", 6.0)]]),
        (["\\boxed{", "9.", *"5,6}"], [[("9.", 9.5)], [("6", 6.0)]]),
        (["\\boxed{", *"9", ".5", *",6}"], [[("9", 9.5)], [("6", 6.0)]]),
        (["\\boxed{", "9.5", *",6}"], [[("9.5", 9.5)], [("6", 6.0)]]),
        (["\\boxed{", *"8", *"5,6}"], [[("8", 8.0), ("5", 77.0)], [("6", 6.0), ("}", 0.0)]]),
        (["\\boxed{", "12", "00", *",6}"], [[("12", 12.0), ("00", 1188.0)], [("6", 6.0), ("}", 0.0)]]),
        (["\\boxed{", "8,6", *"}"], [[("8,6", 8.0)], [("8,6", 6.0)]]),
        (["\\boxed{", "7, 3", *"}"], [[("7, 3", 7.0)], [("7, 3", 3.0)]]),
    ],
    ids=lambda value: "|".join(value) if isinstance(value[0], str) else "",
)
def test_digits(tokenizers: dict[str, Any], pieces: list[str], expected: list[list[tuple[str, float]]]) -> None:
    r"""The tokens that decide the numbers of `\boxed{a, b}` under every way to cut it, and what each adds to them.

    The decimal part counts as written, and a number that could have gone on is read one token further.
    """
    tokenizer = tokenizers["byte level"]
    if pieces[0] == "\\boxed":
        pieces = [*"\\boxed", *pieces[1:]]
    rollout = read(tokenizer, score_ids(tokenizer, *pieces))
    found = [
        [
            (rollout.token_ids[digit.position], dict(digit.candidates)[rollout.token_ids[digit.position]])
            for digit in digits
        ]
        for digits in rollout.numbers
    ]
    assert found == [[(pick(tokenizer, piece)[0], gain) for piece, gain in digits] for digits in expected]


def test_candidates(tokenizers: dict[str, Any]) -> None:
    """The tokens that could stand there carry the same surroundings, other digits, and stay on the scale."""
    tokenizer = tokenizers["byte level"]
    rollout = read(tokenizer, score_ids(tokenizer, "\\boxed{", "9,", " 6", *"}"))
    first, second = rollout.numbers
    with_comma = {pick(tokenizer, f"{number},")[0]: float(number) for number in (0, 7, 8, 9, 10)}
    assert dict(first[0].candidates) == with_comma
    assert list(first[0].candidates) == sorted(first[0].candidates)
    assert dict(second[0].candidates) == {pick(tokenizer, f" {number}")[0]: float(number) for number in range(11)}
    rollout = read(tokenizer, score_ids(tokenizer, "\\boxed{", *"9,6}"))
    plain = {pick(tokenizer, str(number))[0]: float(number) for number in range(10)}
    plain |= {pick(tokenizer, "10")[0]: 10.0, pick(tokenizer, "00")[0]: 0.0}
    assert dict(rollout.numbers[0][0].candidates) == plain  # not "12": above the scale


def test_candidates_where_ten_is_two_tokens(tokenizers: dict[str, Any]) -> None:
    """Any digit could stand at the first token, and 8 is not 80: only a 0 goes on with a 1, with a comma or without."""
    tokenizer = tokenizers["byte level"]

    def of(text: str) -> int:
        return pick(tokenizer, text)[0]

    for written in ("10", "1"):
        rollout = read(tokenizer, score_ids(tokenizer, "\\boxed{", *written, *",6}"))
        first, second = rollout.numbers[0]
        plain = {of(str(number)): float(number) for number in range(10)} | {of("10"): 10.0, of("00"): 0.0}
        assert dict(first.candidates) == plain
        ended = {of(","): 0.0} if written == "1" else {}
        assert dict(second.candidates) == {of("0"): 9.0, of("0,"): 9.0, of("0, "): 9.0} | ended
    rollout = read(tokenizer, score_ids(tokenizer, "\\boxed{", *"85,6}"))
    first, second = rollout.numbers[0]
    assert dict(first.candidates)[of("7")] == 75.0  # what was written after it goes on with it
    assert dict(first.candidates)[of("10")] == 10.0  # or does not, where 105 leaves the scale
    assert dict(second.candidates)[of("9")] == 81.0


@pytest.mark.parametrize(
    "text",
    [
        f"<think>Let me see.</think>{BODY}",
        f"<think>I write <scores>\\boxed{{1, 2}}</scores> and <analysis></think>{BODY}",
        f"Some thought whose tag the prompt opened: {BODY}</think>\n{BODY}",
        f"{BODY}\nB left a </think> behind.",
        f"Certainly!\n{BODY}\nThat was it.<|im_end|>",
        BODY.replace(">a<", ">\n\n a \t\n<"),
        BODY.replace("\\boxed{9, 6}", "They get \\boxed{ 9 ,  6 } points"),
    ],
)
def test_well_formed(tokenizers: dict[str, Any], text: str) -> None:
    """A thought is not searched, whatever it rehearses; words around the tags and white space within don't matter."""
    rollout = read(tokenizers["byte level"], text)
    assert rollout.malformed is None
    assert list(rollout.spans) == ["prompt", "criteria", "analysis", "scores"]
    assert [rollout.spans[name].text for name in rollout.spans] == ["Which is good?", "a", "b", "9 … 6"]
    body = text.rindex("<specific_criteria>")
    assert rollout.spans["criteria"].positions[0] >= len(rollout.prompt_ids) + len(
        encode(tokenizers["byte level"], text[:body])
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty completion"),
        (" \n\t", "empty completion"),
        ("I like A.", "missing <specific_criteria>"),
        (BODY.replace("<analysis>b</analysis>", ""), "missing <analysis>"),
        (BODY.replace("<scores>\\boxed{9, 6}</scores>", ""), "missing <scores>"),
        (BODY.replace("</analysis>", ""), "unclosed <analysis>"),
        (BODY[: -len("</scores>")], "unclosed <scores>"),
        (BODY.replace("<analysis>", ""), "</analysis> without <analysis>"),
        (BODY.replace("<analysis>b</analysis>", "</analysis>b<analysis>"), "out of order: </analysis> comes before"),
        (BODY + BODY, "doubled <specific_criteria>"),
        (BODY.replace(">b<", "><analysis>b<"), "doubled <analysis>"),
        (BODY.replace("</scores>", "</scores></scores>"), "doubled <scores>"),
        (BODY.replace(">a<", "> <"), "empty <specific_criteria>"),
        (BODY.replace(">b<", "><"), "empty <analysis>"),
        (BODY.replace("\\boxed{9, 6}", "\n"), "empty <scores>"),
        ("<analysis>b</analysis><specific_criteria>a</specific_criteria>" + BODY[53:], "out of order: <analysis>"),
        ("<scores>\\boxed{9, 6}</scores>" + BODY[: BODY.index("<scores>")], "out of order: <scores>"),
        (BODY.replace("</specific_criteria><analysis>", "<analysis></specific_criteria>"), "out of order: <analysis>"),
        (f"<analysis>{BODY.replace('<analysis>', '')}", "out of order: <analysis>"),
        (BODY.replace("9, 6", "9"), "no \\boxed{a, b}"),
        (BODY.replace("9, 6", "9, 6, 3"), "no \\boxed{a, b}"),
        (BODY.replace("9, 6", "-9, 6"), "no \\boxed{a, b}"),
        (BODY.replace("9, 6", "nine, six"), "no \\boxed{a, b}"),
        (BODY.replace("9, 6", "٩, ٦"), "no \\boxed{a, b}"),
        (BODY.replace("9, 6", "9" * 10_000 + ", 6"), "no \\boxed{a, b}"),
        (BODY.replace("\\boxed{9, 6}", "9, 6"), "no \\boxed{a, b} with two numbers in <scores>, which holds '9, 6'"),
        (BODY.replace("\\boxed{9, 6}", "\\boxed{9, 6} \\boxed{1, 2}"), "doubled \\boxed"),
        (f"<think>{BODY}", "unclosed <think>"),
        (f"\n <think>\n{BODY}", "unclosed <think>"),
    ],
)
@pytest.mark.parametrize("kind", ["byte level", "fused"])
def test_malformed_has_its_reason(tokenizers: dict[str, Any], kind: str, text: str, reason: str) -> None:
    """Each way to break the format has its own reason; the rollout keeps its ids and has no spans."""
    if kind == "fused" and len(text) > 1000:
        text = text[:300]  # decoding ever longer prefixes is quadratic, and the reason is another one
        reason = "unclosed <scores>"
    rollout = read(tokenizers[kind], text)
    assert rollout.malformed is not None
    assert reason in rollout.malformed
    assert (dict(rollout.spans), rollout.numbers) == ({}, ())
    assert rollout.completion_ids == tuple(encode(tokenizers[kind], text))


def test_own_tags(tokenizers: dict[str, Any]) -> None:
    """The judge's tags are settings."""
    layout = JudgeLayout(criteria_tag="rubric", analysis_tag="why", scores_tag="verdict", thought_tag="scratch")
    text = "<scratch><rubric></scratch><rubric>a</rubric><why>b</why><verdict>\\boxed{9, 6}</verdict>"
    rollout = read(tokenizers["byte level"], text, layout)
    assert [rollout.spans[name].text for name in ("criteria", "analysis", "scores")] == ["a", "b", "9 … 6"]
    assert read(tokenizers["byte level"], BODY, layout).malformed == "missing <rubric>"


def test_special_tokens_are_never_content(tokenizers: dict[str, Any]) -> None:
    """Special tokens inside a span stay where they are and are no part of it, as ids and as text alike."""
    tokenizer = tokenizers["byte level"]
    ids = encode(tokenizer, BODY.replace(">a<", ">ab<|im_start|>cd<"))
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert special in ids
    rollout = read(tokenizer, ids)
    where = len(rollout.prompt_ids) + ids.index(special)
    assert rollout.spans["criteria"].positions == tuple(where + step for step in (-2, -1, 1, 2))
    only = read(tokenizer, BODY.replace(">a<", "><|pad|><"))
    assert only.malformed == "empty <specific_criteria>"


def test_sentences(tokenizers: dict[str, Any]) -> None:
    """Sentences are numbered by the tokens that end them, a full stop without white space where the script has none."""
    rollout = read(tokenizers["byte level"], BODY.replace(">a<", ">ab. c!\nd<"))
    criteria = rollout.spans["criteria"]
    letters = "".join(
        TokenBytes(tokenizers["byte level"]).of([rollout.token_ids[p]])[0].decode() for p in criteria.movable
    )
    assert letters == "ab. c!\nd"
    assert criteria.sentences == (0, 0, 0, 1, 1, 1, 2, 3)
    rollout = read(tokenizers["byte level"], BODY.replace(">a<", ">是。对；3.5。٤؟ x<"))
    criteria = rollout.spans["criteria"]
    pieces = TokenBytes(tokenizers["byte level"]).of([rollout.token_ids[p] for p in criteria.movable])
    numbered = [b"".join(pieces[i] for i, n in enumerate(criteria.sentences) if n == number) for number in range(4)]
    assert [sentence.decode().strip() for sentence in numbered] == ["是。", "对；3.5。", "٤؟", "x"]


def test_real_tokenizer(smollm2: Any) -> None:
    """SmolLM2 writes 10 as two digit tokens and its template brings a system message of its own."""
    messages = [{"role": "user", "content": QUESTION}]
    rendered = chat(smollm2, messages)
    for known in (messages, None):
        rollout = SpanReader(smollm2, JudgeLayout()).read(
            encode(smollm2, rendered), encode(smollm2, GOOD.replace("9, 6", "10, 6") + "<|im_end|>"), known
        )
        contents = {"prompt": [QUESTION], "criteria": ["Be right. Be short."], "analysis": ["The good one is A."]}
        assert_spans_fit(smollm2, rollout, contents)
        assert [len(digits) for digits in rollout.numbers] == [2, 1]
        assert [value for _, value in rollout.numbers[0][0].candidates] == [float(number) for number in range(10)]


def test_real_trajectories(smollm2: Any) -> None:
    """All ten outputs of a real thinking judge, which rehearses its tags, are read in full."""
    if not TRAJECTORIES.is_file():
        pytest.skip("../shared/data/judge is not there")
    rows = [json.loads(line) for line in TRAJECTORIES.read_text().splitlines()]
    assert len(rows) == 10
    for row in rows:
        text = row["judge_output"]
        layout = JudgeLayout(guard="off")  # two of them score both responses in their criteria
        rollout = SpanReader(smollm2, layout).read(encode(smollm2, "Why?"), encode(smollm2, text))
        assert rollout.malformed is None
        body = text[text.index("</think>") :]
        for name, tag in (("criteria", "specific_criteria"), ("analysis", "analysis")):
            expected = body.split(f"<{tag}>")[1].split(f"</{tag}>")[0].strip()
            assert rollout.spans[name].text == expected
        boxed = re.search(r"\\boxed\{(\d+), (\d+)\}", body)
        assert rollout.spans["scores"].text == f"{boxed[1]} … {boxed[2]}"
        assert len(rollout.spans["scores"].positions) == len(boxed[1]) + len(boxed[2])
