"""Effects are small differences of large sums: right ones pass in float32 and bfloat16, and wrong ones in neither."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from cepo.benchmarks.engine import command
from cepo.benchmarks.engine.cases import Case, Subject, new_subject
from cepo.benchmarks.engine.effects import CHAIN, EFFECT, effect_contenders, effect_subject
from cepo.benchmarks.engine.sizes import Shapes, random_workload
from cepo.jacobian.group import paths

DTYPES = (torch.float32, torch.bfloat16)
FAULTS = ("another donor", "own and donor exchanged", "target", "row", "stage", "positions")
VOCABULARY = 256


@contextmanager
def fault(name: str) -> Iterator[None]:
    """Plant a fault in the group engine's path requests."""
    run_segment, value_variants, terms_of = paths.run_segment, paths.value_variants, paths._terms

    def in_turn(order: Callable[[int], Sequence[int]]) -> Any:
        def variants(requests: Sequence[Any]) -> list[Any]:
            found, at = [], 0
            whole = value_variants(requests)
            for request in requests:
                for others in request.counterfactuals:
                    found += [whole[at + place] for place in order(len(others))]
                    at += 1 + len(others)
            return found

        return variants

    def on(change: Callable[[Any], Any], of_past: Callable[[Sequence[Any]], Sequence[Any]] = list) -> Any:
        def run(model: Any, segment: Any, past: Sequence[Any] = (), moved: Any = None) -> Any:
            return run_segment(model, change(segment), of_past(past) if segment.head else past, moved)

        return run

    def of_token_before(request: Any, rollout: Any) -> Any:
        ids = rollout.token_ids
        return tuple(
            tuple(replace(term, position=term.position - 1, token=ids[term.position - 1]) for term in terms)
            for terms in terms_of(request, rollout)
        )

    planted = {
        "another donor": ("value_variants", in_turn(lambda count: [0, *range(2, count + 1), 1])),
        "own and donor exchanged": ("value_variants", in_turn(lambda count: [1, 0, *range(2, count + 1)])),
        "target": ("_terms", of_token_before),
        "row": (
            "run_segment",
            on(lambda segment: replace(segment, head=tuple(replace(row, row=row.row - 1) for row in segment.head))),
        ),
        "stage": (
            "run_segment",
            on(lambda segment: segment, lambda past: [each for each in past if any(each.lengths)][:-1]),
        ),
        "positions": ("run_segment", on(lambda segment: replace(segment, starts=(0,) * len(segment.starts)))),
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(paths, *planted[name])
        yield


def subject_of(dtype: torch.dtype, question: str, *, seed: int = 0, config: Any = None, check: Any = None) -> Subject:
    """Return a subject with random weights."""
    of = config or Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.08,
        tie_word_embeddings=True,
    )
    workload = random_workload(VOCABULARY, check or Shapes(2, 24, 12, 4, 1), seed)
    return effect_subject(new_subject("tiny", of, dtype, torch.device("cpu"), workload, seed), question)


def error_of(subject: Subject, question: str) -> tuple[float, float]:
    """Return the error of the group engine, and of its copy in float32, in units of their bounds."""
    (case,) = effect_contenders(subject, (), question=question)

    def units(case: Case, subject: Subject) -> float:
        return command._error(case, subject.check, 1, subject, subject.wanted) / subject.tolerance

    return units(case, subject), units(case.exact, subject.exact) if case.exact and subject.exact else float("nan")


@pytest.fixture(scope="module", params=[(dtype, question) for dtype in DTYPES for question in (EFFECT, CHAIN)], ids=str)
def asked(request: pytest.FixtureRequest) -> tuple[Subject, str]:
    """Return a subject and what is asked of it, in float32 and in bfloat16."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cepo.benchmarks.engine.cases.matmul_rate", lambda *shape: 1.0)
        dtype, question = request.param
        return subject_of(dtype, question), question


def test_right_effects_are_within_the_bounds(asked: tuple[Subject, str]) -> None:
    """In bfloat16 as plain autograd errs there, and by a tenth of the bound in float32."""
    subject, question = asked
    error, error_in_float32 = error_of(subject, question)
    if subject.exact is None:
        assert error < 0.1
    else:
        assert error < 1
        assert error_in_float32 < 0.1


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_effects_are_beyond_the_bounds(asked: tuple[Subject, str], name: str) -> None:
    """By a factor of a thousand in float32. In bfloat16 by a factor of two where the effects are clear, as here; of a
    model in which they are not, the row fails all the same, by its error in float32."""
    subject, question = asked
    (case,) = effect_contenders(subject, (), question=question)
    with fault(name):
        error, error_in_float32 = error_of(subject, question)
        row, _ = command._measured(subject, case, subject.check, subject.wanted, checked=True, alone=None)
    assert row["seconds"] is None
    assert row["status"].startswith("disagrees by ")
    if subject.exact is None:
        assert error > 1000
    else:
        assert error > 2
        assert error_in_float32 > 1000
        assert row["status"].endswith(" in float32")
        assert row["error_in_float32"] / subject.exact.tolerance == pytest.approx(error_in_float32)
