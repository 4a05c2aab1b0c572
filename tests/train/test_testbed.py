"""Protects the synthetic judge world: its causal promises and its byte-exact tokenizer."""

from typing import get_args

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from cepo.jacobian.reading.judge import write_section
from cepo.train import testbed, testbed_judges
from cepo.train.testbed import ASPECTS, build_tokenizer, generate_items, named_aspect, winner_under, with_criterion
from tests.train.testbed_item import FORMAT, ITEM


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_tokenizer_round_trip_is_exact(tokenizer: PreTrainedTokenizerFast) -> None:
    """Every text of the world decodes to itself, also without special tokens, and holds no unknown word."""
    texts = [text for item in generate_items(300, seed=1, cue_agreement=0.5) for text in (item.prompt, item.completion)]
    texts += [with_criterion(ITEM, aspect) for aspect in ASPECTS]
    rng = np.random.default_rng(0)
    items = generate_items(60, seed=2, cue_agreement=0.5)
    for judge in get_args(testbed_judges.JudgeKind):
        texts += [testbed_judges._draw_completion(rng, item, judge, True) for item in items]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_token_strings_concatenate_to_the_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    """Spans are found on bytes token by token: each token's own bytes, laid end to end, are the text's."""
    byte_of = byte_level_alphabet()
    for item in generate_items(100, seed=3, cue_agreement=0.5):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(item.completion).input_ids)
        pieces = [bytes(byte_of[character] for character in token) for token in tokens]
        assert b"".join(pieces) == item.completion.encode()


def test_marks_are_ordinary_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    """Tags, digits and the box's punctuation are single tokens, and none of them is special."""
    ids = tokenizer(ITEM.completion).input_ids
    pieces = [tokenizer.decode([token]) for token in ids]
    for mark in (*testbed._TAGS, "\\boxed{", "8", ", ", "3", "}", "\n", "A", " shows", " correct", " B", " accuracy"):
        assert mark in pieces
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert len(ids) <= 40
    longest = max(len(tokenizer(item.prompt).input_ids) for item in generate_items(200, seed=0, cue_agreement=0.5))
    assert longest <= 58


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """A user's message opens the assistant's turn; a finished turn ends in eos."""
    messages = [{"role": "user", "content": "so"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>so<|assistant|>"
    messages = [{"role": "system", "content": "then"}, *messages, {"role": "assistant", "content": "well"}]
    text = "<|system|>then<|user|>so<|assistant|>well<|end|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    specials = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert len(specials) == 3
    assert tokenizer(text).input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("cue_agreement", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_cue_agrees_as_often_as_promised(cue_agreement: float) -> None:
    """The fraction is exact, and the agreeing items do not all come first."""
    agrees = [item.cue_agrees for item in generate_items(200, seed=4, cue_agreement=cue_agreement)]
    assert sum(agrees) == round(200 * cue_agreement)
    if 0.0 < cue_agreement < 1.0:
        assert agrees != sorted(agrees, reverse=True)


def test_gold_answer_is_consistent() -> None:
    """Criteria name the situation's aspect, the analysis quotes the words shown, the scores and the label follow."""
    labels, aspects = set(), set()
    for item in generate_items(300, seed=5, cue_agreement=0.5):
        match = FORMAT.fullmatch(item.completion)
        assert match is not None
        named, word_a, word_b, score_a, score_b = match.groups()
        assert named == item.aspect
        assert {word_a, word_b} == set(ASPECTS[item.aspect][:2])
        query, response_a, response_b = item.prompt.split("\n")
        assert word_a in response_a.split()
        assert word_b in response_b.split()
        assert item.scores == (int(score_a), int(score_b))
        assert ("A" if item.scores[0] > item.scores[1] else "B") == item.label == winner_under(item, item.aspect)
        assert sum(situation in query.split() for situation in ASPECTS[item.aspect][2]) == 1
        assert not set(ASPECTS) & set(item.prompt.split())
        labels.add(item.label)
        aspects.add(item.aspect)
    assert labels == {"A", "B"}
    assert aspects == set(ASPECTS)


def test_every_response_shows_every_aspect_once() -> None:
    """No word stands out: what a response shows does not depend on what is asked."""
    for item in generate_items(100, seed=6, cue_agreement=0.5):
        for line in item.prompt.split("\n")[1:]:
            words = line.split()
            for positive, negative, _ in ASPECTS.values():
                assert words.count(positive) + words.count(negative) == 1


def test_items_are_a_function_of_the_seed() -> None:
    """The same seed gives the same items, another seed others."""
    items = generate_items(50, seed=7, cue_agreement=0.9)
    assert items == generate_items(50, seed=7, cue_agreement=0.9)
    assert items != generate_items(50, seed=8, cue_agreement=0.9)


def test_interventions_on_a_known_item() -> None:
    """Winners under all six aspects, and the opened completion, are those read off by hand."""
    expected = {"accuracy": "A", "clarity": None, "depth": "B", "kindness": "B", "safety": "A", "style": "B"}
    assert {aspect: winner_under(ITEM, aspect) for aspect in ASPECTS} == expected
    assert not ITEM.cue_agrees
    assert with_criterion(ITEM, "style") == "<specific_criteria>\njudge by style of the answer\n</specific_criteria>"
    assert ITEM.completion.startswith(with_criterion(ITEM, "accuracy"))
    own = write_section("specific_criteria", "judge by depth of the answer\n\\boxed{8, 3}")
    assert with_criterion(ITEM, "style", f"{own}\n<analysis>") == own.replace("depth", "style")
    unnamed = write_section("specific_criteria", "well then")
    assert (
        with_criterion(ITEM, "style", unnamed) == with_criterion(ITEM, "style", "so") == with_criterion(ITEM, "style")
    )
    assert [named_aspect(text) for text in (own, unnamed, "so", ITEM.completion)] == ["depth", None, None, "accuracy"]


def test_bad_input_is_named() -> None:
    """Every bad argument raises a ValueError that names it."""
    with pytest.raises(ValueError, match="count"):
        generate_items(0, seed=0, cue_agreement=0.5)
    with pytest.raises(ValueError, match="cue_agreement"):
        generate_items(1, seed=0, cue_agreement=1.5)
    with pytest.raises(ValueError, match="aspect is 'wit'"):
        winner_under(ITEM, "wit")
    with pytest.raises(ValueError, match="aspect is 'wit'"):
        with_criterion(ITEM, "wit")


def byte_level_alphabet() -> dict[str, int]:
    """Map each character of GPT-2's byte alphabet to its byte, written anew so as not to trust the decoder."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
