"""Protects that one text has one verdict: spans, rewards, scores and evaluations read the same pair, or all refuse."""

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from cepo.benchmarks.forms import IN_SCORES, JUDGEMENTS
from cepo.eval.judges.encoding import PromptEncoder, TextReader
from cepo.eval.judges.journal import JudgeTask, collect_judgements, judgement_record
from cepo.eval.judges.settings import Judgement, JudgeSettings, Messages
from cepo.jacobian.reading.judge import (
    SECTIONS,
    JudgeLayout,
    after_judges_thought,
    find_numbers,
    find_verdict_end,
    read_scores,
    write_judgement,
)
from cepo.jacobian.reading.layout import MalformedError
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.reading.thought import thought_opened
from cepo.jacobian.reading.verdict import Verdicts
from cepo.train.rewards.proxy import measure_sensitivity
from cepo.train.rewards.task import argmax_reward, format_reward
from tests.byte_tokenizer import CHATML, OPENED, byte_tokenizer

GOOD = write_judgement("Right facts.", "A is right; B is not.", (8, 6))
TAGS = [f"<{slash}{name}>" for name in (*SECTIONS, "think", "thinking") for slash in ("", "/")]
PIECES = [*TAGS, *IN_SCORES, "`</think>`", "<think> and </think>", "\n", " ", "{", "}", "\\boxed{", "8", ",", "text"]
SOFT = re.compile("(?:missing|empty) <(?:specific_criteria|analysis)>")
"""What is wrong with a judgement whose verdict can be read all the same."""


def mutated(draw: random.Random) -> str:
    """Return a judgement with pieces taken out, doubled, exchanged and put in."""
    text = draw.choice([GOOD, *JUDGEMENTS.values(), GOOD.replace("\\boxed{8, 6}", draw.choice(IN_SCORES))])
    pieces = re.split(r"(<[/\w]+>)", text)
    for _ in range(draw.randrange(4)):
        at, other = draw.randrange(len(pieces)), draw.randrange(len(pieces))
        match draw.randrange(5):
            case 0:
                pieces[at] = ""
            case 1:
                pieces[at] *= 2
            case 2:
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case 3:
                pieces.insert(at, draw.choice(PIECES))
            case 4:
                pieces = pieces[: max(at, 1)] if draw.random() < 0.3 else pieces
    return "".join(pieces)


DRAW = random.Random(12)
TEXTS = [*JUDGEMENTS.values(), *(GOOD.replace("\\boxed{8, 6}", form) for form in IN_SCORES)]
TEXTS += [mutated(DRAW) for _ in range(600)]


def spans_read(text: str, layout: JudgeLayout, *, opened: bool) -> tuple[float, ...] | str:
    try:
        found = layout.find(text.encode(), thought_opened=opened)
    except MalformedError as reason:
        return str(reason)
    return tuple(float(text.encode()[start:end]) for start, end in found.numbers)


@pytest.mark.parametrize("verdicts", ["strict", "lenient"])
@pytest.mark.parametrize("opened", [False, True])
def test_every_reader_gives_the_same_pair_or_the_same_refusal(verdicts: Verdicts, opened: bool) -> None:
    prompt = "Judge.<think>\n" if opened else "Judge."
    seen = set()
    for text in TEXTS:
        pair = read_scores(text, thought_opened=opened, verdicts=verdicts)
        spans = spans_read(text, JudgeLayout(guard="off", verdicts=verdicts), opened=opened)
        reading = JudgeLayout(verdicts=verdicts).read(text.encode(), thought_opened=opened)
        if isinstance(spans, str):
            assert spans == reading.reasons[0], text
            assert pair is None or all(SOFT.fullmatch(reason) for reason in reading.reasons), text
            assert pair is not None or not all(SOFT.fullmatch(reason) for reason in reading.reasons), text
        else:
            assert spans == pair, text
        columns = {"prompts": [prompt], "verdicts": verdicts}
        tags = sum(tag in after_judges_thought(text, thought_opened=opened) for tag in TAGS[:6])
        assert format_reward([text], **columns) == [pytest.approx((tags / 8 + (pair is not None) / 4) / 5)], text
        won = [argmax_reward([text], [label], **columns)[0] for label in "AB"]
        assert won == [float(pair is not None and pair[0] > pair[1]), float(pair is not None and pair[0] < pair[1])]
        judged = ("<think>" if opened else "") + text
        record = judgement_record(JudgeTask("key", []), Judgement(judged, verdicts=verdicts))
        assert record["scores"] == pair, text
        numbers = find_numbers(judged.encode(), verdicts=verdicts)  # those of the expected scores
        assert (numbers and tuple(float(judged.encode()[start:end]) for start, end in numbers)) == pair, text
        sensitivity = measure_sensitivity(text, lambda _: [1.0], thought_opened=opened, verdicts=verdicts)
        assert sensitivity.score_difference == pytest.approx(
            min(abs(spans[0] - spans[1]) / 10, 1.0) if isinstance(spans, tuple) else sensitivity.score_difference
        )
        if verdicts == "strict":  # what generation stops at is what is read of the whole
            end = find_verdict_end(text.encode(), thought_opened=opened)
            assert pair is None or end is not None, text
            assert end is None or read_scores(text.encode()[:end].decode(), thought_opened=opened) is not None, text
        seen.add((pair is None, isinstance(spans, str)))
    assert seen == {(False, False), (False, True), (True, True)}


@pytest.mark.parametrize("opened", [False, True])
def test_what_lenient_reads_of_a_strict_verdict_is_the_same(opened: bool) -> None:
    """Protects the two settings from each other: lenient reads more, and nothing else."""
    for text in TEXTS:
        strict = read_scores(text, thought_opened=opened)
        assert strict is None or strict == read_scores(text, thought_opened=opened, verdicts="lenient"), text


@pytest.mark.parametrize("opened", [False, True])
def test_spans_of_ids_are_those_of_the_text(opened: bool) -> None:
    """Protects the reader of ids: it knows from the prompt's ids what the template opened."""
    tokenizer = byte_tokenizer()
    prompt = tokenizer("Judge.<think>\n" if opened else "Judge.")["input_ids"]
    for verdicts in ("strict", "lenient"):
        layout = JudgeLayout(guard="off", verdicts=verdicts)
        reader = SpanReader(tokenizer, layout)
        for text in filter(str.strip, TEXTS[:130]):
            rollout = reader.read(prompt, tokenizer(text)["input_ids"])
            found = spans_read(text, layout, opened=opened)
            if rollout.malformed is None:
                written = text.encode()
                digits = [written[position - len(prompt)] for position in rollout.spans["scores"].positions]
                numbers = layout.find(written, thought_opened=opened).numbers
                assert digits == [byte for start, end in numbers for byte in written[start:end]], text
            else:
                assert rollout.malformed == found, text


def test_a_cut_draft_in_a_thought_that_the_template_opened_is_no_verdict() -> None:
    """Protects training and evaluation from drafts, whoever says that a thought was opened."""
    cut = f"I draft it first.\n{GOOD}\nWait, A is the one with the facts, so"
    for columns in (
        {"prompts": ["Judge.\n<think>\n"]},
        {"prompts": [[{"role": "user", "content": "?"}]], "thought_opened": [True]},
    ):
        assert format_reward([cut], **columns) == [0.0]
        assert argmax_reward([cut], ["A"], **columns) == [0.0]
    assert thought_opened("Judge.\n<think>\n")
    assert spans_read(cut, JudgeLayout(), opened=True) == "unclosed <think>: the output ends inside its thought"


@pytest.mark.parametrize(("opening", "closing"), [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_tags_that_are_special_tokens_are_read_from_ids_everywhere(opening: str, closing: str) -> None:
    """Protects thinking models whose tokenizer has the thought's tags as special tokens."""
    tokenizer = byte_tokenizer(CHATML + OPENED.replace("<think>", opening))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", opening, closing]})
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], add_generation_prompt=True)["input_ids"]
    ids = tokenizer(f"A draft: {GOOD.replace('8, 6', '3, 9')}{closing}{GOOD}<|im_end|>")["input_ids"]
    opened = PromptEncoder(tokenizer, JudgeSettings("model")).opened
    assert read_scores(TextReader(tokenizer, opened).text(ids)) == (8.0, 6.0)
    rollout = SpanReader(tokenizer, JudgeLayout()).read(prompt, ids)
    assert rollout.spans["scores"].text == "8 … 6"


def test_a_judgement_of_ids_ends_with_its_verdict() -> None:
    """Protects backends from each other: one stops at the verdict, one writes on, and both give one judgement."""
    tokenizer = byte_tokenizer()
    reader = TextReader(tokenizer)
    ids = tokenizer(GOOD)["input_ids"]
    stopped, went_on = (
        reader.judgement([*ids, *tokenizer(rest)["input_ids"]], lambda _: {}, 4096) for rest in ("", f"\n{GOOD}")
    )
    assert (stopped.text, stopped.token_ids) == (went_on.text, went_on.token_ids)
    assert stopped.scores == went_on.scores == (8.0, 6.0)


LOOPS: dict[str, Callable[[int], str]] = {
    "boxes": lambda size: "<scores>" + "\\boxed{" * size,
    "boxes with a number": lambda size: "<scores>" + "\\boxed{8, " * size + "</scores>",
    "braces": lambda size: "<scores>\\boxed{" + "{8, 6" * size + "}" * size + "</scores>",
    "spaces": lambda size: "<scores>\\boxed{8" + " " * size + "x</scores>",
    "digits": lambda size: "<scores>\\boxed{" + "8" * size + ", 6}</scores>",
    "scores": lambda size: "<scores>\\boxed{8}</scores>" * (size // 8),
    "closing tags": lambda size: "</scores>" * (size // 8),
    "thoughts": lambda size: "<think>a</think>" * (size // 8),
    "quoted thoughts": lambda size: "<think>" + "<think> and </think>, " * (size // 8),
    "closed thoughts": lambda size: "so " + "`</think>`" * (size // 8),
    "criteria": lambda size: "<specific_criteria>" * (size // 8) + "</analysis>" * (size // 8),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_readers_take_linear_time(loop: str) -> None:
    """Protects training from a policy in a loop: sixteen times the text may take sixteen times as long, not 256."""

    def seconds(size: int) -> float:
        text = LOOPS[loop](size)
        started = time.process_time()
        for verdicts in ("strict", "lenient"):
            for opened in (False, True):
                read_scores(text, thought_opened=opened, verdicts=verdicts)
                find_verdict_end(text.encode(), thought_opened=opened, verdicts=verdicts)
        return time.process_time() - started

    small = min(seconds(4_000) for _ in range(3))
    assert min(seconds(64_000) for _ in range(2)) < 64 * small + 0.02


def test_an_evaluation_says_how_many_verdicts_another_setting_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Protects users of judges that were trained elsewhere: unread is counted, and the way out is named."""
    texts = [GOOD, GOOD.replace("{8, 6}", "{{8, 6}}"), "no verdict"]

    class Writer:
        def judge(self, prompts: Sequence[Messages]) -> Iterator[tuple[int, Judgement]]:
            yield from enumerate(map(Judgement, texts))

    tasks = [JudgeTask(str(index), [{"role": "user", "content": str(index)}]) for index in range(3)]
    collected = collect_judgements(tasks, tmp_path, {}, Writer)
    assert [record["scores"] for record in collected.records.values()] == [(8.0, 6.0), None, None]
    assert "1 of 3 judgements hold a verdict in another form" in caplog.text
    assert "--verdicts lenient" in caplog.text
