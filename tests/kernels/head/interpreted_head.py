"""The Triton kernels of the head against float64; run by test_interpreter.py and, on a GPU, by tests/gpu/."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.kernels.checks import DEVICE, assert_close, batched_gradients, normal


@pytest.mark.parametrize(
    ("target", "dtype", "rows", "size", "vocabulary", "count"),
    [
        ("log_odds", torch.float32, 1, 64, 100, 1),
        ("log_likelihood", torch.float32, 63, 100, 100, 5),
        ("log_odds", torch.float32, 100, 63, 2, 2),
        ("log_likelihood", torch.float16, 100, 96, 300, 2),
        ("log_odds", torch.float16, 150, 64, 100, 1),
        ("log_odds", torch.bfloat16, 63, 128, 300, 5),
        ("log_likelihood", torch.bfloat16, 1, 150, 129, 2),
    ],
    ids=str,
)
def test_head_equals_the_definition(
    target: str, dtype: torch.dtype, rows: int, size: int, vocabulary: int, count: int, launches: Counter[str]
) -> None:
    """Values and gradients of the rows, with the target in the first, the last and a middle column."""
    from cepo.kernels.head import dispatch as head

    operation = getattr(head, f"head_{target}")
    hidden = normal(0, rows, size, dtype=dtype).requires_grad_()
    weight = (normal(1, vocabulary, size) * size**-0.5).to(dtype)
    ids = torch.arange(rows, device=DEVICE) * 7 % vocabulary
    ids[-1] = vocabulary - 1
    got = operation(hidden, weight, ids, implementation="triton")
    assert got.dtype == torch.float32
    cotangents = normal(2, count, rows)
    (gradients,) = batched_gradients(got, [hidden], cotangents)
    assert gradients.dtype == dtype
    wide = hidden.detach().double().requires_grad_()
    true = operation(wide, weight.double(), ids, implementation="torch")
    each = [torch.autograd.grad(true, wide, row.double(), retain_graph=True)[0] for row in cotangents]
    # The values are float32 in every dtype, from exact products: the tightest tolerance holds.
    assert_close(got.detach(), true.detach(), "values")
    assert_close(gradients, torch.stack(each), "gradients")
    assert launches == {"head_forward_kernel": 1, "head_probs_kernel": 1}


def test_head_in_chunks_and_splits_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch, launches: Counter[str]) -> None:
    """Several chunks, the last one ragged; several blocks a split; strided rows and a strided head."""
    from cepo.kernels.head import log_odds as triton_head
    from cepo.kernels.head.dispatch import head_log_odds

    monkeypatch.setattr(triton_head, "CHUNK_ELEMENTS", 128 * 20)
    monkeypatch.setattr(triton_head, "PROGRAMS", 3)
    hidden = normal(0, 20, 128)[:, ::2].requires_grad_()
    weight = normal(1, 500, 80)[:, :64]
    ids = torch.arange(20, device=DEVICE) * 25
    got = head_log_odds(hidden, weight, ids, implementation="triton")
    wide = hidden.detach().double().requires_grad_()
    true = head_log_odds(wide, weight.double(), ids, implementation="torch")
    assert_close(got.detach(), true.detach())
    assert_close(torch.autograd.grad(got.sum(), hidden)[0], torch.autograd.grad(true.sum(), wide)[0])
    assert launches["head_probs_kernel"] == 4


def test_head_of_a_confident_model_keeps_its_digits() -> None:
    """With p within 1e-9 of 1 the log-likelihood's gradient is tiny, and right relative to itself."""
    from cepo.kernels.head.dispatch import head_log_likelihood, head_log_odds

    weight = normal(1, 100, 64)
    ids = torch.arange(9, device=DEVICE)
    hidden = (weight[ids] * 0.4).requires_grad_()
    for operation in (head_log_likelihood, head_log_odds):
        got = operation(hidden, weight, ids, implementation="triton")
        wide = hidden.detach().double().requires_grad_()
        true = head_log_odds(wide, weight.double(), ids, implementation="torch")
        if operation is head_log_likelihood:
            assert float((-true).detach().exp().max()) < 1e-4
            true = torch.nn.functional.logsigmoid(true)
        error = (got.detach().double() - true.detach()).abs() / true.detach().abs()
        assert float(error.max()) < 1e-4  # of a logit near 25, exponentiated: 25 units of rounding
        mine, theirs = torch.autograd.grad(got.sum(), hidden)[0], torch.autograd.grad(true.sum(), wide)[0]
        assert float(((mine.double() - theirs).abs().amax(1) / theirs.abs().amax(1)).max()) < 1e-4


def test_head_refuses_what_it_would_read_wrongly() -> None:
    from cepo.kernels.head.dispatch import head_log_odds

    hidden, weight, ids = normal(0, 5, 64), normal(1, 100, 64), torch.arange(5, device=DEVICE)
    for arguments in (
        (hidden, weight[:, :32], ids),
        (hidden, weight.half(), ids),
        (hidden, weight, ids[:4]),
        (hidden, weight, ids.int()),
        (hidden, weight[:1], ids),
    ):
        with pytest.raises(ValueError, match="expected"):
            head_log_odds(*arguments, implementation="triton")
    outside = torch.tensor([0, 100, -1, 3, 4], device=DEVICE)
    unknown = head_log_odds(hidden, weight, outside, implementation="triton").isnan()
    assert unknown.tolist() == [False, True, True, False, False]
