"""Protects users from scores of text that the model cannot read: one warning, with the share that is unknown."""

import logging

import pytest

from cepo.jacobian.reading.spans import SpanReader
from cepo.train import testbed
from cepo.train.pair_encoding import PairEncoder, Shown
from cepo.train.prompts import JUDGE
from tests.byte_tokenizer import byte_tokenizer

ENGLISH = "What is the capital of Australia? Canberra, which was built for it, and not Sydney."


@pytest.mark.parametrize("reader", ["a reward model", "cepo score"])
def test_text_in_unknown_words_is_told_once(reader: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = testbed.build_tokenizer()
    item = testbed.generate_items(1, seed=0, cue_agreement=0.5)[0]
    encoder, spans = PairEncoder(tokenizer, Shown()), SpanReader(tokenizer, JUDGE)

    def read(text: str) -> None:
        if reader == "a reward model":
            encoder.ids(Shown().messages(text, text))
        else:
            spans.read(tokenizer(text)["input_ids"], tokenizer(text)["input_ids"])

    with caplog.at_level(logging.WARNING, logger="cepo"):
        read(item.prompt)
        assert "unknown" not in caplog.text
        read(ENGLISH)
        read(ENGLISH)
    assert caplog.text.count("of the tokens of a text are unknown to the model's tokenizer") == 1


def test_a_tokenizer_that_spells_every_text_knows_all(caplog: pytest.LogCaptureFixture) -> None:
    """Its unknown token is its end of text, which ends every completion."""
    tokenizer = byte_tokenizer()
    tokenizer.unk_token = tokenizer.eos_token
    ends = [tokenizer.eos_token_id] * 3
    SpanReader(tokenizer, JUDGE).read([*tokenizer("a")["input_ids"], *ends, 5], ends)
    assert "unknown" not in caplog.text
