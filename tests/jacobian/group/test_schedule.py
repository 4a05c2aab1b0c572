"""The schedule and its plan: the rows that are run, what they share, and the memory that they take."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from cepo.fusion.requests import reward_requests
from cepo.jacobian.group import run as run_module
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.group.schedule import Plan
from cepo.jacobian.protocol import Request
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.records import Group, Rollout
from tests.jacobian.group.ragged import PAPER, ragged_rollout
from tests.jacobian.group.test_paths import request as path_request
from tests.jacobian.test_autograd import link
from tests.models import VOCABULARY, span, tiny_model


def rows_run(engine: GroupEngine, model: Any, requests: Sequence[Request]) -> dict[str, int]:
    """Compute the requests, and count the rows that pass through the model's modules and back."""
    counted = {"forward": 0, "backward": 0, "head": 0}

    def embedded(module: Any, inputs: Any, output: torch.Tensor) -> None:
        counted["forward"] += inputs[0].numel()

    def headed(module: Any, inputs: Any, output: torch.Tensor) -> None:
        counted["head"] += output.shape[:-1].numel()

    original = run_module.backward

    def backward(run: Any, cotangents: Any, inputs: Any, **options: Any) -> Any:
        found = original(run, cotangents, inputs, **options)
        counted["backward"] += found[0].shape[:-1].numel()
        return found

    handles = [
        model.get_input_embeddings().register_forward_hook(embedded),
        model.get_output_embeddings().register_forward_hook(headed),
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_module, "backward", backward)
        list(engine.compute(requests))
    for handle in handles:
        handle.remove()
    return counted


@pytest.mark.parametrize("budget", [1.0, 2e5, 1e9])
def test_plan_counts_what_is_run(budget: float) -> None:
    """Forward rows, backward rows and head rows of the plan are those that pass through the model's modules.

    One prompt and several that share an opening, any chunks, and direct effects that turn out to be zero.
    """
    model = tiny_model("llama", dtype=torch.float32, max_position_embeddings=128)
    engine = GroupEngine(model, memory_budget=budget)
    assert engine.unserved is None
    opening = [(7 * place + 5) % VOCABULARY for place in range(20)]
    one_prompt = {index: ragged_rollout(index) for index in range(3)}
    prompts = {index: [*opening, *range(3 + index % 2, 14)] for index in range(3)}
    two_prompts = {index: ragged_rollout(index, prompt=prompts[index], lead=20) for index in range(3)}
    blocked = {index: answer_after_criteria(rollout) for index, rollout in one_prompt.items()}
    several = (("X->Y",), ("Z->X", "X->Y", "Z->Y"), ("criteria->analysis", "Z->Y:total"))
    for rollouts, links_of in ((one_prompt, several), (two_prompts, several[1:2]), (blocked, (("Z->Y",),))):
        for names in links_of:
            for energy in (False, True):
                links = [link(name) for name in names]
                groups = reward_requests(
                    rollouts, links, counterfactuals=2, permutation="uniform", seed=1, context_energy=energy
                )
                requests = [request for group in groups for request in group.requests]
                plan = engine.plan(requests)
                assert rows_run(engine, model, requests) == {
                    "forward": plan.forward_rows,
                    "backward": plan.backward_rows,
                    "head": plan.head_rows,
                }
                assert plan.rows[0].forward > 0 or energy or rollouts is not two_prompts
                assert sum(plan.chunks) == sum(len(request.group.rollouts) for request in requests)
                assert plan.flops > 0
                assert plan.peak_bytes > 0
                assert str(plan.forward_rows) in str(plan).replace(",", "")


def answer_after_criteria(rollout: Rollout) -> Rollout:
    """Return the rollout with scores of one token right after the criteria, whose direct effect on them is zero."""
    after = rollout.spans["criteria"].positions[-1] + 1
    return replace(rollout, spans={**rollout.spans, "scores": span("scores", (after,))})


def long_rollout(seed: int, prompt: int, criteria: int, analysis: int, scores: int) -> Rollout:
    """Return a rollout whose spans follow each other without a gap, with completion tokens that the seed draws."""
    generator = torch.Generator().manual_seed(seed)
    spans, start = {}, 0
    for name, length in (("prompt", prompt), ("criteria", criteria), ("analysis", analysis), ("scores", scores)):
        spans[name] = span(name, range(start, start + length))
        start += length
    ids = torch.randint(3, VOCABULARY, (start - prompt,), generator=generator).tolist()
    return Rollout(tuple((7 * place) % VOCABULARY for place in range(prompt)), tuple(ids), spans)


def test_rows_are_shared_and_dropped() -> None:
    """The counts worked out by hand: 8 rollouts, K = 4, 256 tokens of prompt, 64 of criteria, 9 after them."""
    model = tiny_model("llama", dtype=torch.float32, max_position_embeddings=512)
    engine = GroupEngine(model)
    layout = JudgeLayout()

    rollouts = {seed: long_rollout(seed, 256, 64, 1, 8) for seed in range(8)}

    def rows(names: tuple[str, ...], counterfactuals: int) -> int:
        links = [link(name) for name in names]
        groups = reward_requests(
            rollouts,
            links,
            counterfactuals=counterfactuals,
            permutation="uniform",
            seed=0,
            context_energy=False,
        )
        plan = engine.plan([request for group in groups for request in group.requests])
        return plan.forward_rows + plan.backward_rows

    assert layout.names[1] == "criteria"
    reference = 8 * 9 * 3 * 329
    assert reference / rows(("X->Y",), 4) > 11
    assert reference / rows(("Z->X", "X->Y", "Z->Y"), 4) > 2
    # Without counterfactuals: the prompt once, each rollout's own rows, one backward pass per cotangent.
    once = 256 + 8 * 72
    assert rows(("X->Y",), 0) == once + 8 * 72


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, the model's own weights left out, and their peak."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.seen = WeakIdKeyDictionary()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.seen and storage.data_ptr() not in self.weights:
                self.seen[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, count: int) -> None:
        """Take the bytes of a tensor that died off."""
        self.now -= count


def tensors(plan: Plan, engine: GroupEngine) -> float:
    """The planned peak without what the allocator adds."""
    served = engine._tried()
    assert not isinstance(served, str)
    return served.cost.tensors_within(plan.peak_bytes)


@pytest.mark.parametrize("budget", [1e6, 1e9])
@pytest.mark.parametrize(("prompt", "criteria", "analysis"), [(64, 24, 16), (200, 40, 60), (16, 60, 100)])
def test_the_planned_peak_holds_the_measured_one(budget: float, prompt: int, criteria: int, analysis: int) -> None:
    """The plan is above the peak of the bytes of all live tensors, and not far above it.

    Long prompts, long completions, one chunk and several.
    """
    model = tiny_model("llama", dtype=torch.float32, max_position_embeddings=512)
    engine = GroupEngine(model, memory_budget=budget)
    group = Group(tuple(long_rollout(seed, prompt, criteria, analysis, 3) for seed in range(4)))
    for links, energy in ((PAPER[1:2], False), (PAPER, True)):
        planned = tensors(engine.plan([Request(group, links, energy)]), engine)
        with LiveBytes(model) as live:
            engine.jacobians(group, links, context_energy=energy)
        assert live.peak > 1e5
        assert live.peak <= planned <= 2.0 * live.peak
        assert live.now < live.peak / 4


@pytest.mark.parametrize("budget", [1e6, 1e9])
@pytest.mark.parametrize(("prompt", "nodes"), [(64, 0), (200, 2), (16, 2)])
def test_the_planned_peak_of_paths_holds_the_measured_one(budget: float, prompt: int, nodes: int) -> None:
    """Effects run without a graph, gradients along a path with one."""
    model = tiny_model("llama", dtype=torch.float32, max_position_embeddings=512)
    engine = GroupEngine(model, memory_budget=budget)
    rollouts = [long_rollout(seed, prompt, 40, 30, 3) for seed in range(4)]
    for text in ("criteria->analysis", "analysis->scores"):
        asked = path_request(rollouts, text, nodes=nodes)
        planned = tensors(engine.plan_paths([asked]), engine)
        with LiveBytes(model) as live:
            next(engine.paths([asked]))
        assert live.peak > 1e5
        assert live.peak <= planned <= 1.7 * live.peak
