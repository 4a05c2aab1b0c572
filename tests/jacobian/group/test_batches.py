"""Requests of prompts that are too short to fill a batch run as one: fewer calls of the model, and the same answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from cepo.fusion.requests import reward_requests
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group import chunk as chunk_module
from cepo.jacobian.group import paths as paths_module
from cepo.jacobian.group import schedule as schedule_module
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.protocol import Request
from cepo.jacobian.records import Group, Rollout
from tests.jacobian.group.ragged import PAPER, assert_same, ragged_rollout
from tests.jacobian.group.test_halving import limit, sequences
from tests.jacobian.group.test_paths import assert_same as assert_same_paths
from tests.jacobian.group.test_paths import request
from tests.jacobian.test_autograd import SCATTERED, link
from tests.models import VOCABULARY, InDouble, judge_rollout, tiny_model


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    torch.set_num_threads(1)
    with InDouble():
        yield


def prompts_of(count: int, *, opening: int = 0) -> list[list[int]]:
    """Return prompts of lengths from 9 up that begin alike."""
    shared = [(7 * place + 5) % VOCABULARY for place in range(opening)]
    return [[*shared, *((3 * place + number) % VOCABULARY for place in range(9 + number))] for number in range(count)]


def asked(prompts: Sequence[Sequence[int]], *, lead: int = 0, energy: bool = True) -> list[Request]:
    """Return what the paper's reward asks of one to three rollouts of each prompt, two counterfactuals each."""
    rollouts: list[Rollout] = [
        ragged_rollout(10 * number + seed, prompt=prompt, lead=lead)
        for number, prompt in enumerate(prompts)
        for seed in range(1 + number % 3)
    ]
    groups = reward_requests(
        dict(enumerate(rollouts)), PAPER, counterfactuals=2, permutation="uniform", seed=0, context_energy=energy
    )
    return [each for group in groups for each in group.requests]


def calls(run: Callable[[], object], model: Any) -> int:
    """Return how often the model is called."""
    seen: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    run()
    handle.remove()
    return len(seen)


@pytest.mark.parametrize(("opening", "lead", "energy"), [(0, 0, True), (20, 20, False), (20, 0, False), (0, 3, True)])
def test_prompts_of_unequal_length_and_number_of_rollouts(opening: int, lead: int, energy: bool) -> None:
    """With and without an opening and a part of each prompt that nothing differentiates; the plan counts the same."""
    model = tiny_model("qwen3")
    engine, requests = GroupEngine(model), asked(prompts_of(5, opening=opening), lead=lead, energy=energy)
    for found, wanted in zip(engine.compute(requests), JacobianEngine(model).compute(requests), strict=True):
        assert_same(found, wanted, 1e-10)


def test_five_prompts_take_few_more_calls_of_the_model_than_one() -> None:
    """Stems and stages of prompts that ask for the same are one batch; one that cannot be permuted asks for less."""
    model = tiny_model("llama")
    engine, prompts = GroupEngine(model), prompts_of(5)
    assert engine.unserved is None
    alone = [calls(lambda prompt=prompt: list(engine.compute(asked([prompt]))), model) for prompt in prompts]  # type: ignore[misc]
    assert calls(lambda: list(engine.compute(asked(prompts))), model) < 3 * max(alone) < sum(alone)
    tails = [request([ragged_rollout(seed, prompt=prompt)], "X->Y") for seed, prompt in enumerate(prompts_of(5))]
    one = calls(lambda: list(engine.paths(tails[:1])), model)
    assert calls(lambda: list(engine.paths(tails)), model) <= one + 1  # what all prompts begin with


def test_waves_and_batches_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many prompts run at once, and however few rows a wave has, answers are the same and in order."""
    model, requests = tiny_model("llama"), asked(prompts_of(6))
    wanted = list(GroupEngine(model).compute(requests))
    monkeypatch.setattr(schedule_module, "WAVE", 0)
    for found, right in zip(GroupEngine(model).compute(requests), wanted, strict=True):
        assert_same(found, right, 1e-12)
    monkeypatch.undo()
    for found, right in zip(GroupEngine(model, memory_budget=3e5).compute(requests), wanted, strict=True):
        assert_same(found, right, 1e-12)


def test_prompts_are_halved_where_their_stems_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, requests = tiny_model("llama"), asked(prompts_of(4))
    engine = GroupEngine(model, memory_budget=1e9)
    wanted = list(engine.compute(requests))
    ran = limit(monkeypatch, chunk_module, "run_segment", 2, sequences)
    with caplog.at_level(logging.WARNING, logger="cepo"):
        for found, right in zip(engine.compute(requests), wanted, strict=True):
            assert_same(found, right, 1e-12)
    assert max(ran) == 2
    assert "out of memory" in caplog.text


def test_values_of_several_prompts_are_those_of_each_alone() -> None:
    """Prompts of unequal length, links of two sources, and another prompt as the counterfactual."""
    model = tiny_model("qwen2")
    rollouts = [
        [ragged_rollout(10 * number + seed, prompt=prompt) for seed in range(1 + number % 2)]
        for number, prompt in enumerate(prompts_of(5))
    ]
    texts = ("criteria->analysis", "analysis->scores", "Z->X")
    requests = [request(of_prompt, text, count=2) for of_prompt in rollouts for text in texts]
    requests.insert(4, request(rollouts[1], "criteria->analysis", nodes=2))
    engine, oracle = GroupEngine(model), JacobianEngine(model)
    for found, right in zip(engine.paths(requests), oracle.paths(requests), strict=True):
        assert_same_paths(found, right, 1e-10)
    for found, right in zip(GroupEngine(model, memory_budget=2e5).paths(requests), oracle.paths(requests), strict=True):
        assert_same_paths(found, right, 1e-10)


def test_an_unserved_request_among_others_is_answered_in_its_place(caplog: pytest.LogCaptureFixture) -> None:
    """A blocked span in pieces cannot be run in segments: the oracle answers it, between answers of the wave."""
    model, requests = tiny_model("llama"), asked(prompts_of(3))
    torn = Request(Group((judge_rollout(1, positions=SCATTERED),)), (link("Z->Y"),))
    mixed = [requests[0], torn, *requests[1:]]
    with caplog.at_level(logging.WARNING, logger="cepo"):
        found = list(GroupEngine(model).compute(mixed))
    for one, right in zip(found, JacobianEngine(model).compute(mixed), strict=True):
        assert_same(one, right, 1e-10)
    assert "hands a request to the oracle" in caplog.text


def test_a_rollout_is_run_once_for_the_links_of_all_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows are answered together: the chain's two requests run it together, two rollouts not."""
    monkeypatch.setattr(paths_module, "WAVE", 0)
    rollouts, engine = [ragged_rollout(1), ragged_rollout(2)], GroupEngine(tiny_model("llama"))
    of_one, of_other = (
        [request([rollout], text) for text in ("criteria->analysis", "analysis->scores")] for rollout in rollouts
    )
    both, alone = engine.plan_paths(of_one), [engine.plan_paths([each]) for each in of_one]
    assert both.forward_rows < sum(plan.forward_rows for plan in alone)
    assert engine.plan_paths([*of_one, *of_other]).forward_rows > both.forward_rows
    assert [len(run) for run in paths_module.together([*of_one, *of_other], engine._planned(of_one).cost)] == [2, 2]
