"""Spans of a reasoner's output, on the bytes of sampled ids."""

from __future__ import annotations

from typing import Any

import pytest

from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.reasoner import ReasonerLayout
from cepo.jacobian.reading.token_bytes import TokenBytes
from tests.jacobian.reading.tiny_tokenizers import (
    read,
)


@pytest.mark.parametrize(
    ("text", "rationale", "answer", "found_by"),
    [
        ("<think>2 + 2 is 4.</think>\n<answer> 42 </answer>", "2 + 2 is 4.", "42", "tags"),
        ("<think>so</think><answer>It is \\boxed{7}.</answer>", "so", "7", "tags"),
        ("so it is</think><answer>42</answer>", "so it is", "42", "tags"),
        ("We add. <answer>42</answer> Done.", "We add.", "42", "tags"),
        ("<think>so</think>It is \\boxed{7}.", "so", "7", "boxed"),
        ("First \\boxed{1}, no: \\boxed{\\frac{1}{2}} it is.", "First \\boxed{1}, no:", "\\frac{1}{2}", "boxed"),
        ("We see \\boxed{a \\boxed{b}}", "We see \\boxed{a", "b", "boxed"),
        ("We see \\boxed{5} and \\boxed{6", "We see", "5", "boxed"),
        ("<think>so \\boxed{3}</think>It is 4.", "so \\boxed{3}", "It is 4.", "after rationale"),
        ("<think>so</think>We add.\nIt is 4. No, 5.\n", "so", "It is 4. No, 5.", "after rationale"),
        ("<think>so \\boxed{3}</think>The answer is 4.", "so \\boxed{3}", "4", "stated"),
        ("We add, so the answer is 4. Goodbye.", "We add,", "4", "stated"),
        ("3 x 6 = 18\n#### 18", "3 x 6 = 18", "18", "hashes"),
        ("<think>so</think>\n#### 18 jars\n", "so", "18", "hashes"),
        ("<think>so</think><answer>1</answer> no <answer>2</answer>", "so", "2", "tags"),
        ("<think>so</think><answer>1", "so", "1", "tags"),
        ("<think>so</think>1</answer>", "so", "1", "after rationale"),
        ("<think>\n</think>We add.<answer>1</answer>", "We add.", "1", "tags"),
        ("We add 2 and 2. That is 3.5 or so", "We add 2 and 2.", "That is 3.5 or so", "last sentence"),
        ("We add\n\n42\n", "We add", "42", "last sentence"),
        ("<think>In <answer> and </answer>.</think><answer>4</answer>", "In <answer> and </answer>.", "4", "tags"),
        ("<think>Is it <answer>5</answer>?</think><answer>4</answer>", "Is it <answer>5</answer>?", "4", "tags"),
        ("<think>In <think> as told.</think><answer>4</answer>", "In <think> as told.", "4", "tags"),
    ],
)
@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "fused"])
@pytest.mark.parametrize("end", ["", "<end>", "\n<end>"])
def test_reasoner_spans(
    tokenizers: dict[str, Any], kind: str, end: str, text: str, rationale: str, answer: str, found_by: str
) -> None:
    """Rationale and answer by tags, boxes or the last sentence; the end-of-sequence token is part of neither."""
    tokenizer = tokenizers[kind]
    rollout = read(tokenizer, text + end.replace("<end>", tokenizer.eos_token), ReasonerLayout())
    assert rollout.malformed is None
    assert rollout.found_by == found_by
    assert (rollout.spans["rationale"].text, rollout.spans["answer"].text) == (rationale, answer)
    pieces = TokenBytes(tokenizer).of(rollout.token_ids)
    written = b"".join(pieces[position] for position in rollout.spans["answer"].positions)
    assert answer.encode() in written
    assert len(written.strip()) <= len(answer) + 12  # at most a straddling tag on either side
    assert not set(rollout.spans["answer"].movable) & set(rollout.spans["rationale"].movable)


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("<think>so <answer>1</answer>", {}, "unclosed <think>"),
        ("<answer>1</answer><think>so</think>", {}, "empty rationale"),
        ("<think> </think><answer>1</answer>", {}, "empty rationale"),
        ("<answer>1</answer>", {}, "empty rationale"),
        ("<think>so</think><answer>\n</answer>", {}, "empty answer"),
        ("It is \\boxed{}", {}, "empty answer"),
        ("<think>so</think><answer>", {}, "missing <answer>"),
        ("so</think></answer>", {}, "missing <answer>"),
        ("The answer is 4.", {}, "empty rationale"),
        ("We add.\n#### 4", {"fallback": False}, "missing <answer>"),
        ("\\boxed{4}", {}, "empty rationale"),
        ("<think>so</think>", {}, "empty answer: nothing stands after </think>"),
        ("We add. It is 4.", {"fallback": False}, "missing <answer>"),
        ("<think>so</think> It is 4.", {"fallback": False}, "missing <answer>"),
        ("It is \\boxed{4}", {"fallback": False, "boxed": False}, "missing <answer>"),
        ("Only one sentence here", {}, "only one sentence"),
        ("", {}, "empty completion"),
    ],
)
def test_reasoner_malformed(tokenizers: dict[str, Any], text: str, options: dict[str, bool], reason: str) -> None:
    """Each way to break a reasoner's format has its reason."""
    rollout = read(tokenizers["byte level"], text, ReasonerLayout(**options))
    assert rollout.malformed is not None
    assert reason in rollout.malformed


@pytest.mark.parametrize("tag", ["<sol>", "</sol>", "sol>", "my sol", ""])
def test_a_tag_is_a_name(tag: str) -> None:
    """Nothing writes <<sol>>: the answer was found by another mark, its own tags and all."""
    with pytest.raises(ValueError, match="answer_tag is .*; expected the tag's name without brackets"):
        ReasonerLayout(answer_tag=tag)
    with pytest.raises(ValueError, match="scores_tag is .*; expected the tag's name without brackets"):
        JudgeLayout(scores_tag=tag)


def test_reasoner_settings(tokenizers: dict[str, Any]) -> None:
    """Tags are settings, and without `boxed` a box is plain text."""
    tokenizer = tokenizers["byte level"]
    layout = ReasonerLayout(rationale_tag="why", answer_tag="out")
    rollout = read(tokenizer, "<why>so</why><out>4</out>", layout)
    assert [rollout.spans[name].text for name in ("rationale", "answer")] == ["so", "4"]
    plain = read(tokenizer, "<think>so</think><answer>\\boxed{7}</answer>", ReasonerLayout(boxed=False))
    assert plain.spans["answer"].text == "\\boxed{7}"
