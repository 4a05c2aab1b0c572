"""Protects what happens where memory runs out, at every stage of the group engine: less at once, and the same results.

Memory is exhausted by hand: a step raises as PyTorch does where more than a limit runs at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group import chunk as chunk_module
from cepo.jacobian.group import paths as paths_module
from cepo.jacobian.group import run as run_module
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.group.halving import AtOnce, run_in_parts
from cepo.jacobian.records import Group
from tests.jacobian.group.ragged import PAPER, assert_same, ragged_rollout
from tests.jacobian.group.test_paths import assert_same as assert_same_paths
from tests.jacobian.group.test_paths import request
from tests.jacobian.test_autograd import link
from tests.models import InDouble, tiny_model

Measure = Callable[..., int]


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    torch.set_num_threads(1)
    with InDouble():
        yield


def full() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory")


def limit(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, most: int, size: Measure) -> list[int]:
    """Let a function of the engine fail where `size` of its arguments is above `most`; return the sizes that ran."""
    original, ran = getattr(module, name), []

    def tight(*arguments: Any, **options: Any) -> Any:
        if size(*arguments) > most:
            raise full()
        found = original(*arguments, **options)
        ran.append(size(*arguments))
        return found

    monkeypatch.setattr(module, name, tight)
    return ran


def sequences(model: Any, segment: Any, *rest: Any) -> int:
    return len(segment.ids)


def sequences_back(run: Any, cotangents: Any, inputs: Any) -> int:
    return int(inputs[0].shape[0])


def all_back(run: Any, cotangents: Any, inputs: Any) -> int:
    """Cotangents times the sequences of a segment."""
    return next(len(sent) for sent in cotangents if sent is not None) * int(inputs[0].shape[0])


def into_the_stem(run: Any, cotangents: Any, inputs: Any) -> int:
    """Cotangents that go back through what rollouts share, whose only input is its embeddings."""
    return all_back(run, cotangents, inputs) if len(inputs) == 1 else 0


# What fails, and above how many of what.
STAGES: dict[str, tuple[Any, str, int, Measure]] = {
    "forward through the stages": (chunk_module, "run_segment", 2, sequences),
    "the head": (run_module, "values_of_terms", 12, lambda logits, terms, *rest: len(terms)),
    "backward through the stages": (run_module, "backward", 2, sequences_back),
    "backward, one cotangent at a time": (run_module, "backward", 1, all_back),
    "backward through the stem": (run_module, "backward", 3, into_the_stem),
    "backward through the stem, one at a time": (run_module, "backward", 1, into_the_stem),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_that_runs_out_of_memory_runs_less_at_once(
    stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Six rollouts with three passes each: equal to the oracle, nothing above the limit, and a word for each try."""
    model = tiny_model("llama")
    group = Group(tuple(ragged_rollout(seed) for seed in range(6)))
    engine = GroupEngine(model, memory_budget=1e9)
    wanted = JacobianEngine(model).jacobians(group, PAPER)
    assert engine.unserved is None
    module, name, most, size = STAGES[stage]
    ran = limit(monkeypatch, module, name, most, size)
    with caplog.at_level(logging.WARNING, logger="cepo"):
        assert_same(engine.jacobians(group, PAPER), wanted, 1e-10)
    assert 0 < max(ran) <= most
    told = [record.getMessage() for record in caplog.records]
    assert told
    assert told[0].startswith("out of memory with 6 sequences, ")
    assert "continuing with 3 sequences, " in told[0]


def test_the_cotangents_of_the_stem_are_halved_where_one_rollout_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One rollout with three passes: there is nothing else to halve. A step that fails on one alone is an error."""
    model, group = tiny_model("llama"), Group((ragged_rollout(0),))
    engine = GroupEngine(model, memory_budget=1e9)
    wanted = JacobianEngine(model).jacobians(group, PAPER)
    assert engine.unserved is None
    with monkeypatch.context() as tight, caplog.at_level(logging.WARNING, logger="cepo"):
        ran = limit(tight, run_module, "backward", 1, into_the_stem)
        assert_same(engine.jacobians(group, PAPER), wanted, 1e-10)
        assert max(ran) == 1
    assert "1 sequences, 1 cotangents each, 1 in what they share" in caplog.records[-1].getMessage()
    limit(monkeypatch, run_module, "backward", 0, into_the_stem)
    with pytest.raises(torch.OutOfMemoryError):
        engine.jacobians(group, PAPER)
    assert model.config._attn_implementation == "eager"


PATHS: dict[str, tuple[Any, str, int, Measure]] = {
    "forward through the branches": (paths_module, "run_segment", 2, lambda model, segment, *rest: len(segment.ids)),
    "the head": (run_module, "values_of_terms", 6, lambda logits, terms, *rest: len(terms)),
    "backward through the branches": (run_module, "backward", 2, sequences_back),
    "backward, one cotangent at a time": (run_module, "backward", 1, all_back),
    "the rollouts themselves": (
        *(paths_module, "run_segment", 1),
        lambda model, segment, *rest: 0 if len(set(segment.starts)) > 1 else len(segment.ids),
    ),
}


@pytest.mark.parametrize("stage", PATHS)
def test_every_stage_of_a_path_that_runs_out_of_memory_runs_less_at_once(
    stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Effects and gradients along paths, of two links of one source; branches start at different places."""
    model, rollouts = tiny_model("llama"), [ragged_rollout(seed) for seed in range(4)]
    asked = request(rollouts, "analysis->scores", nodes=2)
    asked = type(asked)(asked.group, asked.counterfactuals, (*asked.links, link("analysis->scores@log_odds")), 2)
    engine = GroupEngine(model)
    wanted = next(engine.paths([asked]))
    module, name, most, size = PATHS[stage]
    ran = limit(monkeypatch, module, name, most, size)
    with caplog.at_level(logging.WARNING, logger="cepo"):
        assert_same_paths(next(engine.paths([asked])), wanted, 1e-10)
    assert 0 < max(ran) <= most
    assert "out of memory with 4 sequences" in caplog.text or "out of memory with 12 sequences" in caplog.text


def test_later_parts_stay_small_and_what_is_no_lack_of_memory_is_raised() -> None:
    ran: list[tuple[int, ...]] = []

    def run(part: Sequence[int], at_once: AtOnce) -> int:
        if len(part) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        ran.append(tuple(part))
        return sum(part)

    assert list(run_in_parts(range(7), AtOnce(4), run)) == [1, 5, 9, 6]
    assert ran == [(0, 1), (2, 3), (4, 5), (6,)]

    def broken(part: Sequence[int], at_once: AtOnce) -> int:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(run_in_parts(range(7), AtOnce(4), broken))


@pytest.mark.parametrize("told", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_other_words_for_no_memory_are_understood(told: str) -> None:
    """cuBLAS and the driver do not raise OutOfMemoryError."""

    def run(part: Sequence[int], at_once: AtOnce) -> int:
        if len(part) > 1:
            raise RuntimeError(told)
        return 0

    assert list(run_in_parts("ab", AtOnce(2), run)) == [0, 0]
