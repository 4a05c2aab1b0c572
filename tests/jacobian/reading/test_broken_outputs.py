"""2,000 broken outputs, random ids and random texts: spans that hold together or a reason, and never an exception."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cepo.fusion.config import RewardConfig
from cepo.fusion.score import score_rollouts
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.reasoner import ReasonerLayout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout
from tests.jacobian.reading.tiny_tokenizers import (
    BODY,
    BUILDERS,
    GOOD,
    INSTRUCTIONS,
    PIECES,
    assert_spans_fit,
    byte_level_pieces,
    encode,
    read,
)
from tests.models import tiny_model

TAGS = [
    f"<{slash}{tag}>" for tag in ("specific_criteria", "analysis", "scores", "think", "answer") for slash in ("", "/")
]
FRAGMENTS = [
    *TAGS,
    *("\\boxed{9, 6}", "\\boxed{", "\\boxed{{9}, {6}}", "}", "{", "9", "10", ", ", ".", "\n", " ", "\x00", "\ud800"),
    *("é", "\u202eשלום\u202c", "مرحبا", "🙂", "\ufffd", "<|im_end|>", "<|im_start|>", "<|pad|>", "<|fake|>", "9" * 500),
    *("Be right.", "The good one is A", "<", ">", "</", "\u00a0", "\u2028", "①", "٩", "²"),
]


def mutate(generator: random.Random) -> str:
    """Return a judge's output with up to four injuries."""
    text = random.Random(generator.random()).choice(["", "<think>Hm. <scores></think>"]) + GOOD
    for _ in range(generator.randint(1, 4)):
        at, to = sorted((generator.randint(0, len(text)), generator.randint(0, len(text))))
        tag, other = generator.choice(TAGS), generator.choice(TAGS)
        text = generator.choice(
            [
                lambda text, at, to, tag, other: text[:at],
                lambda text, at, to, tag, other: text[:at] + text[to:],
                lambda text, at, to, tag, other: text + text[at:to],
                lambda text, at, to, tag, other: text.replace(tag, other),
                lambda text, at, to, tag, other: text.replace(tag, other, 1).replace(other, tag, 1),
                lambda text, at, to, tag, other: text.replace(tag, tag + other),
                lambda text, at, to, tag, other: text.replace(tag, ""),
                lambda text, at, to, tag, other: text[:at] + generator.choice(FRAGMENTS) + text[at:],
                lambda text, at, to, tag, other: text.replace(
                    "9, 6", generator.choice(["10, 1", "9.5,6", "9,", "²,6"])
                ),
                lambda text, at, to, tag, other: text.replace("Be right. Be short.", generator.choice(FRAGMENTS)),
                lambda text, at, to, tag, other: text[:at] + "".join(generator.choices(FRAGMENTS, k=5)) + text[to:],
            ]
        )(text, at, to, tag, other)
    return text


def assert_sound(rollout: Rollout, layout: Any) -> None:
    """Check that a rollout has either spans that hold together or a reason."""
    if rollout.malformed is not None:
        assert rollout.malformed
        assert (dict(rollout.spans), rollout.numbers) == ({}, ())
        return
    split, count = len(rollout.prompt_ids), len(rollout.token_ids)
    assert tuple(rollout.spans) == layout.names
    for name, span in rollout.spans.items():
        assert span.name == name
        assert span.positions
        assert list(span.positions) == sorted(set(span.positions))
        low, high = (0, split) if name == "prompt" else (split, count)
        assert low <= span.positions[0] <= span.positions[-1] < high
        assert set(span.movable) <= set(span.positions)
        assert list(span.movable) == sorted(set(span.movable))
        assert len(span.sentences) == len(span.movable)
        assert span.text.strip(" \t\r\n\f\v")
    for left, right in pairwise(layout.names):
        assert rollout.spans[left].positions[-1] <= rollout.spans[right].positions[0]
    assert len(rollout.numbers) == (2 if "scores" in layout.names else 0)
    for digits in rollout.numbers:
        assert digits
        for digit in digits:
            assert {digit.position, digit.position - 1} & set(rollout.spans["scores"].positions)
            assert rollout.token_ids[digit.position] in dict(digit.candidates)
            assert all(math.isfinite(value) for _, value in digit.candidates)


PROMPTS = ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "x", "<|im_end|>", "\x00\ufffd")


def read_all(tokenizer: Any, completions: Sequence[Sequence[int]]) -> list[tuple[Rollout, Any]]:
    """Read each completion as a judge's and as a reasoner's, after this prompt or that, and check what came."""
    layouts = (JudgeLayout(instructions=INSTRUCTIONS), ReasonerLayout(), JudgeLayout())
    readers = [SpanReader(tokenizer, layout) for layout in layouts]
    prompts = [encode(tokenizer, prompt) or [0] for prompt in PROMPTS]
    found = []
    for index, ids in enumerate(completions):
        for reader in readers[:2] if index % 4 else readers[1:]:
            rollout = reader.read(prompts[index % 9 if index % 9 < 4 else 0], ids)
            assert_sound(rollout, reader.layout)
            found.append((rollout, reader.layout))
    return found


@pytest.mark.parametrize("kind", BUILDERS)
def test_mutated_outputs_never_raise(tokenizers: dict[str, Any], kind: str) -> None:
    """2,000 injured judge outputs over five tokenizers: spans or a reason, both of them often enough to count."""
    generator = random.Random(f"mutations {kind}")
    texts = [mutate(generator) for _ in range(400)]
    if kind != "fused":  # which is quadratic
        texts += ["9" * 10_000, GOOD.replace("9, 6", "9" * 10_000), "<scores>" * 500, "\\boxed{" * 500, "{" * 3000]
    found = read_all(tokenizers[kind], [encode(tokenizers[kind], text) for text in texts])
    judged = [rollout for rollout, layout in found if isinstance(layout, JudgeLayout)]
    reasons = {re.sub(r"'.*'", "", rollout.malformed) for rollout in judged if rollout.malformed}
    assert sum(rollout.malformed is None for rollout in judged) > 30
    assert len(reasons) > 12


@pytest.mark.parametrize("kind", BUILDERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_ids_never_raise(tokenizers: dict[str, Any], kind: str, data: st.DataObject) -> None:
    """Random ids, ids past the vocabulary among them, and random fragments in random cuts."""
    tokenizer = tokenizers[kind]
    size = len(tokenizer)
    fragments = st.sampled_from(FRAGMENTS[:-1]).map(lambda text: encode(tokenizer, text[:40]))
    piece = st.one_of(fragments, st.integers(0, size + 50).map(lambda token: [token]))
    ids = data.draw(st.lists(piece, max_size=25).map(lambda pieces: [token for piece in pieces for token in piece]))
    read_all(tokenizer, [ids])


@given(text=st.text(alphabet=st.characters(), max_size=60))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_text_never_raises(tokenizers: dict[str, Any], text: str) -> None:
    """Any text there is, alone and inside each span, lone surrogates replaced by the tokenizer's caller."""
    tokenizer = tokenizers["byte level"]
    texts = [text, BODY.replace(">a<", f">{text}<"), BODY.replace("9, 6", text), f"<think>{text}</think><answer>{text}"]
    read_all(tokenizer, [encode(tokenizer, each) for each in texts])


@given(seed=st.integers(0, 10**6), cuts=st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_spans_do_not_depend_on_the_cut(tokenizers: dict[str, Any], seed: int, cuts: float) -> None:
    """However the same text is cut into tokens, the spans are those tokens that carry a byte of their content."""
    tokenizer, generator = tokenizers["byte level"], random.Random(seed)
    vocabulary, rest, ids = tokenizer.get_vocab(), byte_level_pieces(GOOD), []
    while rest:
        fits = [piece for piece in map(byte_level_pieces, PIECES) if rest.startswith(piece)]
        piece = generator.choice(fits) if fits and generator.random() < cuts else rest[0]
        ids.append(vocabulary[piece])
        rest = rest[len(piece) :]
    rollout = read(tokenizer, ids)
    assert_spans_fit(tokenizer, rollout, {"criteria": ["Be right. Be short."], "analysis": ["The good one is A."]})
    assert rollout.spans["scores"].text == "9 … 6"


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "fused"])
@pytest.mark.parametrize("token", [-1, -100, 2**32, 2**63])
def test_impossible_ids_never_raise(tokenizers: dict[str, Any], kind: str, token: int) -> None:
    """An id that no tokenizer can hold (a padding mark, say) gives no bytes, as any unknown one."""
    tokenizer = tokenizers[kind]
    rollout = read(tokenizer, [*encode(tokenizer, BODY), token])
    assert rollout.malformed is None
    assert rollout.spans["criteria"].text == "a"


def test_mutated_outputs_are_scored(tokenizers: dict[str, Any]) -> None:
    """Injured outputs go all the way: every reward is a number in [0, 1], 0 with a reason where there are no spans."""
    tokenizer, generator = tokenizers["byte level"], random.Random("scored")
    layout, size = JudgeLayout(), len(tokenizer)
    options = {"vocab_size": size, "max_position_embeddings": 400, "num_hidden_layers": 1}
    engine = JacobianEngine(tiny_model("llama", dtype=torch.float32, attention="sdpa", **options))
    reader = SpanReader(tokenizer, layout)
    prompt = encode(tokenizer, PROMPTS[0])
    rollouts = [reader.read(prompt, encode(tokenizer, mutate(generator))) for _ in range(60)]
    rollouts += [reader.read(prompt, generator.choices(range(size), k=30)) for _ in range(5)]
    links = {"Z->X": 1.0, "X->Y@margin": 1.0, "Z->Y": 1.0, "analysis->scores@expected_score": 1.0}
    config = RewardConfig(links=links, counterfactuals=2, rank=1, score="influence_retained")
    tasks = [generator.random() for _ in rollouts]
    scores = score_rollouts(rollouts, engine, config, layout, task_rewards=tasks)
    for score in scores:
        assert math.isfinite(score.reward)
        assert 0.0 <= score.reward <= 1.0
        assert (score.malformed is None) == bool(score.links)
        assert score.malformed is None or score.reward == 0.0
    assert sum(score.malformed is None for score in scores) >= 5
    assert sum(score.malformed is not None for score in scores) >= 20
