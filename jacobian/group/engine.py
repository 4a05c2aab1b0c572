"""The group engine: the oracle's Jacobians, running once the rows that rollouts have in common.

Start with the worked example in docs/engine.md, which follows eight tokens row by row. Terms: docs/glossary.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Any, TypeVar

from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.chunk import chunk_answers, chunk_gradients, run_opening, run_stem
from cepo.jacobian.group.cost import free_memory
from cepo.jacobian.group.cuts import Job, Stem, UnservedError
from cepo.jacobian.group.halving import AtOnce, run_in_parts
from cepo.jacobian.group.paths import PathRunner, plan_paths, together
from cepo.jacobian.group.run import Past
from cepo.jacobian.group.schedule import Batch, Kind, Plan, Schedule, bytes_needed, chunk_of, plan_of, schedule
from cepo.jacobian.group.swaps import Swaps
from cepo.jacobian.group.trial import Served, default_links, try_segments
from cepo.jacobian.links import Link
from cepo.jacobian.model import ModelEngine
from cepo.jacobian.protocol import Answer, PathAnswer, PathRequest, Request
from cepo.jacobian.records import Group, LinkJacobian
from cepo.kernels.launch import Implementation, takes_over

logger = logging.getLogger("cepo")

AnyRequest = TypeVar("AnyRequest", Request, PathRequest)


class GroupEngine(ModelEngine):
    """Computes Jacobians of whole groups; rows that rollouts have in common are run once.

    A rollout is cut into a stem, which it shares with all rollouts and counterfactuals of its prompt, and stages after
    it (`cepo.jacobian.group.cuts`). The model's own modules run each segment on the keys and values of the segments
    before it, which enter as detached leaves. The backward pass goes from the last stage to the stem
    (`cepo.jacobian.group.chunk`). A blocked span is a stage whose cotangents are dropped.

    Results equal those of `JacobianEngine` up to rounding, whatever the batches and chunks. The engine serves every
    causal LM whose layers all attend over a standard key-value cache. Others (sliding windows, hybrid or recurrent
    layers, attention that does not go through transformers' interface) are handed to the oracle, and the reason is
    logged once. So are requests with a rollout longer than the length at which rotary tables change (LongRoPE), see
    `cepo.jacobian.positions`.

    Args:
        model: a causal LM, PEFT-wrapped or not.
        adapters: False runs the base model with its adapters disabled (PEFT models only).
        memory_budget: bytes that one call may use besides the model, above 0. None: half of the free memory.
        kernels: "torch" for plain PyTorch; "auto" for the Triton kernels if the model is on CUDA and they agree with
            the oracle in a trial; "triton" for the kernels, or an error where they cannot run. See
            `cepo.jacobian.group.swaps`.

    Raises:
        ValueError: as `JacobianEngine`; for a budget that is not positive; for kernels that cannot run.
    """

    def __init__(
        self,
        model: Any,
        *,
        adapters: bool = True,
        memory_budget: float | None = None,
        kernels: Implementation = "auto",
    ) -> None:
        super().__init__(model, adapters=adapters)
        if memory_budget is not None and not memory_budget > 0:
            raise ValueError(f"memory_budget is {memory_budget!r}; expected a positive number of bytes, or None")
        self.kernels = kernels
        self._oracle = JacobianEngine(self._held)
        self._budget, self._over_budget, self._was_unsettled = memory_budget, False, False
        self._trial: Served | str | None = None
        takes_over(kernels, self._held.embedding.weight)  # raises for kernels that cannot run

    @property
    def unserved(self) -> str | None:
        """Why the model is handed to the oracle, or None; from its layers and a trial of twelve tokens."""
        served = self._tried()
        return served if isinstance(served, str) else None

    @property
    def swaps(self) -> Swaps:
        """What the kernels replace in the model; nothing if the oracle serves it."""
        served = self._tried()
        return Swaps() if isinstance(served, str) else served.model.swaps

    def plan(self, requests: Group | Sequence[Request], links: Sequence[Link] | None = None) -> Plan:
        """Return what `compute` would run, without running it.

        Args:
            requests: the requests, or a group for its Jacobians without counterfactuals.
            links: the links of a group; by default Z->X, X->Y and Z->Y of its first, second and last span.

        Raises:
            ValueError: if a rollout is malformed or refused, or the oracle serves the model, for which there is no
                plan.
        """
        self._check([requests] if isinstance(requests, Group) else (request.group for request in requests))
        if isinstance(requests, Group):
            requests = [Request(requests, default_links(requests) if links is None else tuple(links))]
        served, work = self._fitting(requests, self._planned(requests))
        return plan_of(work, served.cost)

    def plan_paths(self, requests: Sequence[PathRequest]) -> Plan:
        """Return what `paths` would run, without running it; for nodes "auto", the first round with one node.

        Raises:
            ValueError: as `plan`.
        """
        self._check_paths(requests)
        served = self._fitting_paths(requests, self._planned(requests))
        return plan_paths(requests, served.cost, self._budget_now())

    def _planned(self, requests: Sequence[Request] | Sequence[PathRequest]) -> Served:
        """Return the model, or raise ValueError if the oracle serves it or one of the requests."""
        served = self._tried()
        reasons = (served if isinstance(served, str) else self._unsettled(request) for request in requests)
        reason = next((one for one in reasons if one is not None), None)
        if reason is not None or isinstance(served, str):
            raise ValueError(f"this model runs on the oracle, so there is no plan: {reason or served}")
        return served

    def compute(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Yield the answer to each request, in order; see `cepo.jacobian.protocol.Request`.

        Consecutive requests of one prompt share its stem, and prompts share their common prefix if no link
        differentiates it. Requests of several prompts run as one batch if each is too small to fill one; the answers to
        a few batches are computed before the first of them is yielded.

        Raises:
            ValueError: if a rollout is malformed or refused, before the first is run.
        """
        self._check(request.group for request in requests)
        for served, alike in self._by_server(requests):
            yield from self._oracle.compute(alike) if served is None else self._compute(alike, served)

    def _compute(self, requests: Sequence[Request], served: Served) -> Iterator[Answer]:
        served, work = self._fitting(requests, served)
        opening: tuple[Past, ...] | None = None
        in_order = iter(requests)
        for wave in work.waves:
            answers: dict[int, dict[str, LinkJacobian]] = {}
            for batch in wave.batches:
                with served.model.prepared():
                    opening = run_opening(served.model, work.opening) if opening is None else opening
                    answers |= self._answers(batch, opening, served)
            for request, numbers in zip(islice(in_order, len(wave.answers)), wave.answers, strict=True):
                if isinstance(numbers, str):
                    logger.warning("the group engine hands a request to the oracle: %s", numbers)
                    yield from self._oracle.compute([request])
                else:
                    yield [answers.pop(number) for number in numbers]

    def paths(self, requests: Sequence[PathRequest]) -> Iterator[PathAnswer]:
        """Yield the answer to each path request, in order; see `cepo.jacobian.protocol.PathRequest`.

        The common prefix of a prompt's rollouts is run once, and so is that of a rollout and its counterfactuals.
        Consecutive small requests without nodes are answered together.

        Raises:
            ValueError: if a rollout or a counterfactual is malformed or refused, before the first is run.
        """
        self._check_paths(requests)
        for served, alike in self._by_server(requests):
            if served is None:
                yield from self._oracle.paths(alike)
                continue
            served = self._fitting_paths(alike, served)
            runner = PathRunner(served, self._budget_now())
            for run in together(alike, served.cost):
                with served.model.prepared():
                    answers = runner.answers(run)
                yield from answers

    def _by_server(self, requests: Sequence[AnyRequest]) -> Iterator[tuple[Served | None, list[AnyRequest]]]:
        """Yield runs of consecutive requests with the model that serves them; None stands for the oracle."""
        served = self._tried()
        if isinstance(served, str):
            yield None, list(requests)
            return
        for settled, alike in groupby(requests, key=lambda request: self._unsettled(request) is None):
            yield (served if settled else None), list(alike)

    def _unsettled(self, request: Request | PathRequest) -> str | None:
        """Return why a request is too long for segments, whose rotary tables would differ, or None."""
        others = request.counterfactuals if isinstance(request, PathRequest) else ()
        rollouts = [*request.group.rollouts, *(other for of_one in others for other in of_one)]
        longest, settled = max(len(rollout.token_ids) for rollout in rollouts), self._held.settled_length
        if longest <= settled:
            return None
        reason = f"beyond {settled} tokens its rotary tables change with the length, and a rollout has {longest}"
        if not self._was_unsettled:
            self._was_unsettled = True
            logger.warning("the group engine hands requests to the oracle: %s", reason)
        return reason

    def _answers(self, batch: Batch, opening: tuple[Past, ...], served: Served) -> dict[int, dict[str, LinkJacobian]]:
        """Return the Jacobians of each rollout of a batch, by the number of its job."""
        self._warn_over_budget(batch, served)
        answers: dict[int, dict[str, LinkJacobian]] = {}

        def run_prompts(stems: Sequence[Stem], _: AtOnce) -> dict[int, dict[str, LinkJacobian]]:
            part = batch.part(stems)
            stem = run_stem(served.model, part.stem, opening)
            found: dict[int, dict[str, LinkJacobian]] = {}
            for work in part.works:

                def run(
                    jobs: Sequence[Job], at_once: AtOnce, kind: Kind = work.kind
                ) -> dict[int, dict[str, LinkJacobian]]:
                    chunk = chunk_of(jobs, part.stem)
                    return chunk_answers(kind, chunk, chunk_gradients(served.model, chunk, stem, at_once))

                for of_part in run_in_parts(work.jobs, work.at_once, run):
                    found |= of_part
            return found

        for of_prompts in run_in_parts(batch.stems, AtOnce(len(batch.stems)), run_prompts):
            answers |= of_prompts
        return answers

    def _fitting(self, requests: Sequence[Request], served: Served) -> tuple[Served, Schedule]:
        """Return the model, with recomputation if the requests would otherwise exceed the budget, and the schedule."""
        budget = self._budget_now()
        work = schedule(requests, served.cost, budget)
        if served.lean is None or plan_of(work, served.cost).peak_bytes <= budget:
            return served, work
        return served.lean, schedule(requests, served.lean.cost, budget)

    def _fitting_paths(self, requests: Sequence[PathRequest], served: Served) -> Served:
        """Return the model likewise for path requests; those without nodes keep nothing that could be recomputed."""
        if served.lean is None or not any(request.nodes for request in requests):
            return served
        budget = self._budget_now()
        return served if plan_paths(requests, served.cost, budget).peak_bytes <= budget else served.lean

    def _warn_over_budget(self, batch: Batch, served: Served) -> None:
        if self._budget is None or self._over_budget:
            return
        first = [chunk_of(work.jobs[: work.at_once.sequences], batch.stem) for work in batch.works]
        needed = max(bytes_needed(chunk, batch.stem, served.cost) for chunk in first)
        if needed > self._budget:
            self._over_budget = True
            logger.warning(
                "memory_budget is %.0f MiB, and one rollout alone may take %.0f MiB: continuing above the budget",
                *(self._budget / 2**20, needed / 2**20),
            )

    def _budget_now(self) -> float:
        return self._budget if self._budget is not None else free_memory(self._held.embedding.weight.device) / 2

    def _tried(self) -> Served | str:
        """Return the served model, or why it is not served; tried once."""
        if self._trial is None:
            try:
                self._trial = try_segments(self._held, self._oracle, self.kernels)
            except UnservedError as error:
                self._trial, name = str(error), type(self._held.causal_lm).__name__
                logger.warning("the group engine hands %s to the oracle: %s", name, error)
        return self._trial
