"""Expected scores as target functions: the numbers that evaluation reads off the same distributions, and gradients."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cepo.eval.judges.expected import expected_scores
from cepo.jacobian.group.swaps import KernelHead
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout
from cepo.jacobian.targets import LogitsHead, Term, sum_of_terms, target_terms, values_of_terms

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TEXT = (
    "<specific_criteria>\nclear\n</specific_criteria>\n<analysis>\nclear\n</analysis>\n<scores>\n\\boxed{%s}\n</scores>"
)
WRITTEN = ["10, 9", "1, 8", "7.5, 1", "1.5, 10", "85, 6", "100, 95", "0, 3"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are single bytes."""
    core = Tokenizer(models.BPE({character: token for token, character in enumerate(ALPHABET)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


TOKENIZER = byte_tokenizer()
READER = SpanReader(TOKENIZER, JudgeLayout())
PIECES = [READER.text_of([token]) for token in range(len(ALPHABET))]
IDS = {piece.decode(): token for token, piece in enumerate(PIECES) if piece < b"\x80"}


def rollout_of(numbers: str) -> Rollout:
    """Return a judgement with these scores, one token a digit."""
    ids = TOKENIZER(TEXT % numbers)["input_ids"]
    rollout = READER.read([1, 2], ids)
    assert rollout.malformed is None
    return rollout


def both(rollout: Rollout) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Return the terms of the expected score and of the margin."""
    return target_terms(rollout, "scores", "expected_score"), target_terms(rollout, "scores", "margin")


def rows_of(rollout: Rollout, terms: tuple[Term, ...], logits_TV: Tensor) -> Tensor:
    """Return the rows that predict the terms' tokens."""
    return logits_TV[[term.position - 1 for term in terms]]


def test_ten_of_two_tokens_counts_as_ten_and_eight_as_eight() -> None:
    """Half "1" and half "8" before a sure "0", then a sure 9: both scores are expected to be 9.

    The more likely the 8, the smaller the margin: digits counted by their place gave 36 and the other sign.
    """
    rollout = rollout_of("10, 9")
    logits_TV = torch.full((len(rollout.token_ids), len(PIECES)), -60.0, dtype=torch.float64)
    for position, token in enumerate(rollout.token_ids[1:]):
        logits_TV[position, token] = 0.0
    ten = rollout.numbers[0][0].position
    logits_TV[ten - 1, IDS["8"]] = 0.0
    logits_TV.requires_grad_()
    score, margin = (sum_of_terms(rows_of(rollout, terms, logits_TV), terms) for terms in both(rollout))
    assert (score.item(), margin.item()) == pytest.approx((18.0, 0.0), abs=1e-12)
    (gradient_TV,) = torch.autograd.grad(margin, logits_TV)
    assert float(gradient_TV[ten - 1, IDS["8"]]) == pytest.approx(0.5 * (8 - 9))
    assert float(gradient_TV[ten - 1, IDS["1"]]) == pytest.approx(0.5 * (10 - 9))


@pytest.mark.parametrize("numbers", WRITTEN)
def test_targets_and_evaluation_expect_the_same(numbers: str) -> None:
    """From one distribution, whatever was written: numbers of one digit, of two, of three, with decimals."""
    rollout = rollout_of(numbers)
    generator = torch.Generator().manual_seed(len(numbers))
    logits_TV = 3 * torch.randn(len(rollout.token_ids), len(PIECES), generator=generator, dtype=torch.float64)
    probabilities_TV = logits_TV.softmax(-1)
    pieces = [PIECES[token] for token in rollout.token_ids]

    def likely(at: int) -> dict[bytes, float]:
        return {piece: float(probabilities_TV[at - 1, token]) for token, piece in enumerate(PIECES)}

    found = expected_scores(pieces, likely)
    assert found is not None
    score, margin = (float(sum_of_terms(rows_of(rollout, terms, logits_TV), terms)) for terms in both(rollout))
    assert (score, margin) == pytest.approx((found[0] + found[1], found[0] - found[1]), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("numbers", WRITTEN[:3])
def test_gradients_go_through_every_token_of_a_number(numbers: str) -> None:
    """Against finite differences in float64, from logits and through the head of the kernels, which are the same."""
    rollout = rollout_of(numbers)
    _, terms = both(rollout)
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(len(PIECES), 3, generator=generator, dtype=torch.float64)
    hidden_PD = torch.randn(len(terms), 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def through_kernels(hidden_PD: Tensor) -> Tensor:
        return values_of_terms(KernelHead(hidden_PD, weight_VD, "torch"), terms, hidden_PD.device)

    def from_logits(hidden_PD: Tensor) -> Tensor:
        return values_of_terms(LogitsHead(hidden_PD @ weight_VD.T), terms, hidden_PD.device)

    assert torch.autograd.gradcheck(through_kernels, (hidden_PD,))
    assert torch.autograd.gradcheck(from_logits, (hidden_PD,))
    torch.testing.assert_close(through_kernels(hidden_PD), from_logits(hidden_PD), rtol=1e-12, atol=1e-12)
