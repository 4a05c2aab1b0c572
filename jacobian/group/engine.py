"""The group engine: the oracle's Jacobians at the cost that the maths allows."""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.cost import CostModel, Plan, free_memory, measured_cost, plan_requests
from cepo.jacobian.group.cotangents import add, append_stage, mix, slice_of_stage, stacked
from cepo.jacobian.group.cuts import Job, Stem, cut_all, enters_stem, stages
from cepo.jacobian.group.run import (
    Cotangents,
    KeyValues,
    Segment,
    backward,
    leaves_of,
    run_segment,
    through_prefix_attention,
)
from cepo.jacobian.group.swaps import Swaps, find_swaps, swapped
from cepo.jacobian.links import Link, parse_link
from cepo.jacobian.model import HeldModel
from cepo.jacobian.passes import Pass, link_jacobians
from cepo.jacobian.protocol import Answer, Request
from cepo.jacobian.records import Group, LinkJacobian, Rollout, Span
from cepo.jacobian.targets import Term
from cepo.kernels.launch import Implementation, takes_over

logger = logging.getLogger("cepo")


class GroupEngine:
    """Computes Jacobians of whole groups, sharing every row that rollouts have in common.

    A rollout is cut into a stem, which it shares with all rollouts and counterfactuals of its prompt, and stages behind
    it (`cepo.jacobian.group.cuts`). Each segment is run by the model's own modules on the keys and values of the ones
    before it, handed over as detached leaves; the backward pass goes from the last stage to the stem, and what a stage
    asks of earlier keys and values is carried as an explicit cotangent. All cotangents of a segment go back in one
    batched pass over one set of saved activations. A blocked span is a stage whose cotangents are dropped.

    Equal to `JacobianEngine` to rounding, whatever the batch and the chunks. Serves every causal LM whose layers all
    attend over a standard key-value cache; the others (sliding windows, hybrid or recurrent layers, attention that does
    not go through transformers' interface) are handed to the oracle, which is logged once with the reason.

    Args:
        model: a causal LM, PEFT-wrapped or not.
        adapters: False runs the base model with its adapters disabled (PEFT models only).
        memory_budget: bytes that one call may add to what the model holds. None: half of what is free.
        kernels: "torch" for plain PyTorch; "auto" for the Triton kernels where the model is on CUDA and they agree with
            the oracle in a trial; "triton" for them, refused where they cannot run. See `cepo.jacobian.group.swaps`.

    Raises:
        ValueError: as `JacobianEngine`, or for a budget that is not positive, or kernels that cannot be had.
    """

    def __init__(
        self,
        model: Any,
        *,
        adapters: bool = True,
        memory_budget: float | None = None,
        kernels: Implementation = "torch",
    ) -> None:
        self.kernels = kernels
        self._held = HeldModel(model, adapters=adapters)
        if memory_budget is not None and not memory_budget > 0:
            raise ValueError(f"memory_budget is {memory_budget!r}; expected a positive number of bytes, or None")
        self._model = self._held.causal_lm
        self._oracle = JacobianEngine(model, adapters=adapters)
        self._budget, self._over_budget = memory_budget, False
        self._cost: CostModel | None = None
        self._unserved: str | None = None
        self._swaps = Swaps()
        takes_over(kernels, self._model.get_input_embeddings().weight)  # refuses what cannot be

    @property
    def width(self) -> int:
        """D, the size of the embeddings that enter the first layer."""
        return self._held.width

    @property
    def unserved(self) -> str | None:
        """Why the model is handed to the oracle, or None; by a look at its layers and a trial of twelve tokens."""
        if self._cost is None and self._unserved is None:
            with self._held.prepared():
                self._unserved = self._why_unserved(self.kernels)
                if self._unserved is not None and self.kernels == "auto" and self._swaps != Swaps():
                    logger.warning("the group engine goes on without kernels: %s", self._unserved)
                    self._unserved = self._why_unserved("torch")
            if self._unserved is not None:
                logger.warning(
                    "the group engine hands %s to the oracle: %s", type(self._model).__name__, self._unserved
                )
        return self._unserved

    @property
    def swaps(self) -> Swaps:
        """What the kernels take over of the model; nothing where the oracle serves it."""
        return self._swaps if self.unserved is None else Swaps()

    def refusal(self, rollout: Rollout) -> str | None:
        """Return why the model cannot take this rollout (too long, ids outside its vocabulary), or None."""
        return self._held.refusal(rollout)

    def jacobians(self, group: Group, links: Sequence[Link], *, context_energy: bool = True) -> Answer:
        """Return, for each rollout of the group, the Jacobian of each link by the link's name.

        Args:
            group: well-formed rollouts of one prompt.
            links: from `parse_link`.
            context_energy: whether the records carry it; costs a backward pass through all of the prompt.

        Raises:
            ValueError: if a rollout is malformed or refused.
        """
        return next(self.compute([Request(group, tuple(links), context_energy)]))

    def plan(self, requests: Group | Sequence[Request], links: Sequence[Link] | None = None) -> Plan:
        """Return what `compute` would run, without running it.

        Args:
            requests: what would be computed, or a group for its Jacobians without counterfactuals.
            links: of a group; by default Z->X, X->Y and Z->Y of its first, second and last span.

        Raises:
            ValueError: if a rollout is malformed or refused, or the oracle serves the model (it has no plan).
        """
        if isinstance(requests, Group):
            requests = [Request(requests, tuple(_default_links(requests) if links is None else links))]
        self._held.check(requests)
        if self.unserved is not None or self._cost is None:
            raise ValueError(f"the oracle serves this model, so there is no plan: {self.unserved}")
        return plan_requests(requests, self._cost, self._budget_left())

    def compute(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Yield the answer to each request, in order; see `cepo.jacobian.protocol.Request`.

        Consecutive requests of one prompt share its stem, and prompts that begin alike share that beginning where no
        link differentiates it. Each answer is yielded before the next is computed.

        Raises:
            ValueError: if a rollout is malformed or refused, before the first is run.
        """
        self._held.check(requests)
        if self.unserved is not None:
            yield from self._oracle.compute(requests)
            return
        opening: KeyValues = []
        for prompt in cut_all(requests):
            trunk: _Trunk | None = None
            for index in prompt.requests:
                if index in prompt.unserved:
                    logger.warning("the group engine hands a request to the oracle: %s", prompt.unserved[index])
                    yield from self._oracle.compute([requests[index]])
                    continue
                with self._held.prepared(), through_prefix_attention(self._model), swapped(self._swaps):
                    if trunk is None and prompt.stem is not None:
                        if prompt.stem.opening and not opening:
                            opening = self._run_plain(prompt.stem.ids[: prompt.stem.opening], 0, [])
                        trunk = self._run_trunk(prompt.stem, opening if prompt.stem.opening else [])
                    answer = self._answer(requests[index], prompt.jobs, prompt.members(index), trunk)  # type: ignore[arg-type]
                yield answer

    def _run_trunk(self, stem: Stem, opening: KeyValues) -> _Trunk:
        constant = opening
        if stem.start > stem.opening:  # more of this prompt that nothing differentiates
            constant = self._run_plain(stem.ids[stem.opening : stem.start], stem.opening, opening)
        segment = self._forward(
            [stem.ids[stem.start :]],
            [stem.start],
            [constant],
            [stem.start],
            [(0, row.row, row.term) for row in stem.head],
            differentiated=stem.differentiated,
        )
        return _Trunk(stem, segment, constant, [tensor.detach() for tensor in segment.keys_values])

    def _answer(self, request: Request, jobs: Sequence[Job], members: Sequence[int], trunk: _Trunk) -> Answer:
        """Return the answer to one request, whose jobs are `members`, longest first."""
        own = [jobs[index] for index in members]
        if request.signs:
            return self._run_mixed(request, own, members, trunk)
        records: dict[int, dict[str, LinkJacobian]] = {}
        for batch, run in self._run_chunks(own, members, trunk, with_stem=True):
            for index, gradients in zip(batch, run.gradients, strict=True):
                records[index] = link_jacobians(jobs[index].rollout, request.links, gradients, request.context_energy)
        return [records[index] for index in sorted(records)]

    def _run_mixed(self, request: Request, jobs: Sequence[Job], members: Sequence[int], trunk: _Trunk) -> Answer:
        """Return the combined Jacobians of one request, whose rollouts' cotangents are mixed before the stem."""
        place_of = {index: place for place, index in enumerate(sorted(members))}  # jobs run longest first
        total: dict[int, Cotangents] = {}
        for batch, run in self._run_chunks(jobs, members, trunk, with_stem=False):
            signs_NB = torch.tensor([[row[place_of[index]] for index in batch] for row in request.signs])
            for key, cotangents in run.asked.items():
                mixed = [None if asked is None else mix(signs_NB, asked) for asked in cotangents]
                total[key] = add(total[key], mixed) if key in total else mixed
        run = self._new_run([jobs[0]] * len(request.signs))
        run.asked.update(total)
        self._run_stem(run, trunk)
        answer = []
        for gradients in run.gradients:
            records = link_jacobians(jobs[0].rollout, request.links, gradients, context_energy=False)
            answer.append({name: replace(record, target_positions=()) for name, record in records.items()})
        return answer

    def _run_chunks(
        self, jobs: Sequence[Job], members: Sequence[int], trunk: _Trunk, *, with_stem: bool
    ) -> Iterator[tuple[list[int], _Run]]:
        """Run jobs of one kind in chunks that fit the budget; a chunk that does not fit after all is halved."""
        assert self._cost is not None
        size = self._cost.chunk(jobs, trunk.stem, self._budget_left())
        least = self._cost.needed(jobs[:1], trunk.stem)
        if self._budget is not None and least > self._budget and not self._over_budget:
            self._over_budget = True  # said once
            logger.warning(
                "memory_budget is %.0f MiB, and one rollout alone may take %.0f MiB: going on above the budget",
                *(self._budget / 2**20, least / 2**20),
            )
        done = 0
        while done < len(jobs):
            batch, indices = jobs[done : done + size], list(members[done : done + size])
            try:
                run = self._run_stages(batch, indices, trunk)
                if with_stem:
                    self._run_stem(run, trunk)
            except RuntimeError as error:
                if not _is_out_of_memory(error) or len(batch) == 1:
                    raise
                size = (len(batch) + 1) // 2
                logger.warning("out of memory with %d rollouts at once; going on with %d", len(batch), size)
                del error
            else:
                done += len(batch)
                yield indices, run
                continue
            _release_memory()  # outside of the handler, whose traceback holds the failed chunk

    def _run_stages(self, jobs: Sequence[Job], members: Sequence[int], trunk: _Trunk) -> _Run:
        """Run the stages of a chunk forward, and their cotangents back to the stem's door."""
        stem, plan = trunk.stem, stages(jobs, trunk.stem.end)
        to_stem = set(enters_stem(jobs, stem))
        segments: list[Segment] = []
        middle: KeyValues = []
        lengths = [0] * len(jobs)
        behind: set[int] = set()  # passes with cotangents for an earlier stage
        for stage in plan:
            trunk_kv = leaves_of(trunk.keys_values, len(jobs), bool(to_stem & set(stage.active)))
            middle_kv = leaves_of(middle, len(jobs), bool(behind & set(stage.active)))
            segments.append(
                self._forward(
                    [job.rollout.token_ids[a:b] for job, a, b in zip(jobs, stage.starts, stage.ends, strict=True)],
                    stage.starts,
                    [trunk.constant, trunk_kv, middle_kv],
                    [stem.end + length for length in lengths],
                    [(row.owner, row.row, row.term) for row in stage.head],
                    differentiated=bool(stage.active),
                )
            )
            behind |= set(stage.active)
            if stage is not plan[-1]:
                middle, lengths = append_stage(middle, lengths, segments[-1].keys_values, stage)
        run = self._new_run(jobs)
        asked: list[dict[int, Cotangents]] = [{} for _ in plan]
        for place in reversed(range(len(plan))):
            stage, segment, wanted = plan[place], segments.pop(), asked.pop()
            if not stage.active:
                continue
            _, trunk_leaves, middle_leaves = segment.past
            cotangents = stacked(stage, segment, wanted)
            trunk_leaves = [leaf for leaf in trunk_leaves if leaf.requires_grad]
            middle_leaves = [leaf for leaf in middle_leaves if leaf.requires_grad]
            leaf_CBTD, *rest = backward(segment, cotangents, [segment.leaf_BTD, *trunk_leaves, *middle_leaves])
            to_trunk, to_middle = rest[: len(trunk_leaves)], rest[len(trunk_leaves) :]
            for index, key in enumerate(stage.active):
                run.write(key, leaf_CBTD[index], stage.starts, stage.ends)
                if to_trunk and key in to_stem:
                    given: Cotangents = [None, *(tensor_C[index] for tensor_C in to_trunk)]
                    run.asked[key] = add(run.asked[key], given) if key in run.asked else given
                for earlier in range(place) if to_middle else ():
                    if key in plan[earlier].active:
                        given = [
                            None,
                            *(slice_of_stage(tensor_C[index], plan[earlier], stem.end) for tensor_C in to_middle),
                        ]
                        of = asked[earlier]
                        of[key] = add(of[key], given) if key in of else given
        for key in to_stem:
            rows = [(row, at) for at, row in enumerate(stem.head) if row.pass_index == key and row.owner in members]
            if rows:
                hidden_BTD = trunk.segment.hidden_BTD.new_zeros(len(jobs), stem.end - stem.start, self.width)
                for row, at in rows:
                    hidden_BTD[members.index(row.owner), row.row] += trunk.segment.head_PD[at]
                given = [hidden_BTD, *[None] * len(trunk.keys_values)]
                run.asked[key] = add(run.asked[key], given) if key in run.asked else given
        return run

    def _run_stem(self, run: _Run, trunk: _Trunk) -> None:
        """Send the cotangents of a run back through the stem, and write the gradients of its rows."""
        assert self._cost is not None
        stem = trunk.stem
        waiting = [(key, place) for key in run.asked for place in range(len(run.jobs))]
        size = self._cost.cotangents(stem, self._budget_left())
        for start in range(0, len(waiting), size):
            chunk = waiting[start : start + size]
            cotangents: Cotangents = []
            for output in range(1 + len(trunk.keys_values)):
                asked = [run.asked[key][output] for key in run.asked]
                if all(tensor is None for tensor in asked):
                    cotangents.append(None)
                    continue
                like = next(tensor for tensor in asked if tensor is not None)[0]
                parts = [run.asked[key][output] for key, _ in chunk]
                stacked = [
                    torch.zeros_like(like) if part is None else part[place]
                    for part, (_, place) in zip(parts, chunk, strict=True)
                ]
                cotangents.append(torch.stack(stacked)[:, None])
            (leaf_CBTD,) = backward(trunk.segment, cotangents, [trunk.segment.leaf_BTD], keep=True)
            for (key, place), leaf_BTD in zip(chunk, leaf_CBTD, strict=True):
                run.gradients[place][run.jobs[place].passes[key]][stem.start : stem.end] = leaf_BTD[0]

    def _run_plain(self, ids: Sequence[int], start: int, before: KeyValues) -> KeyValues:
        """Return the keys and values of `before` and these tokens, without a graph."""
        segment = self._forward([ids], [start], [before], [start], [], differentiated=False)
        if not before:
            return segment.keys_values
        return [torch.cat(pair, dim=2) for pair in zip(before, segment.keys_values, strict=True)]

    def _forward(
        self,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        past: list[KeyValues],
        past_lengths: Sequence[int],
        head: Sequence[tuple[int, int, Term]],
        *,
        differentiated: bool,
    ) -> Segment:
        return run_segment(
            self._model,
            self._held.forward,
            ids,
            starts,
            past,
            past_lengths,
            head,
            differentiated=differentiated,
            swaps=self._swaps,
        )

    def _new_run(self, jobs: Sequence[Job]) -> _Run:
        dtype = torch.promote_types(self._model.get_input_embeddings().weight.dtype, torch.float32)
        gradients = [
            {
                key: torch.zeros(len(job.rollout.token_ids), self.width, dtype=dtype, device=self._device)
                for key in job.passes
            }
            for job in jobs
        ]
        return _Run(list(jobs), gradients)

    @property
    def _device(self) -> torch.device:
        return self._model.get_input_embeddings().weight.device

    def _budget_left(self) -> float:
        return self._budget if self._budget is not None else free_memory(self._device) / 2

    def _why_unserved(self, kernels: Implementation) -> str | None:
        """Return why the model cannot be run in segments, or None, with the cost model measured on the way."""
        if self._model.get_output_embeddings() is None:
            return "it has no output embeddings"
        parameters = inspect.signature(self._held.forward).parameters
        missing = [name for name in ("position_ids", "past_key_values") if name not in parameters]
        if missing:
            return f"its forward takes no {' and no '.join(missing)}"
        layers = DynamicCache(config=self._model.config).layers
        others = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
        if others:
            return f"its cache holds {', '.join(others)}, not whole keys and values"
        rollout, links = _trial(self._model.get_input_embeddings().weight.shape[0])
        request = Request(Group((rollout,)), links)
        try:
            wanted = next(self._oracle.compute([request]))[0]
            self._swaps = find_swaps(self._model, self._held.forward, kernels)
            with through_prefix_attention(self._model), swapped(self._swaps):
                self._cost = self._measured_cost(rollout.token_ids)
                (prompt,) = cut_all([request])
                assert prompt.stem is not None
                trunk = self._run_trunk(prompt.stem, [])
                (found,) = self._answer(request, prompt.jobs, prompt.members(0), trunk)
        except Exception as error:  # whatever a foreign forward raises, the oracle is there
            self._cost = None
            return f"a trial in segments failed with {type(error).__name__}: {error}"
        narrow = self._model.get_input_embeddings().weight.dtype in (torch.bfloat16, torch.float16)
        for name, record in wanted.items():
            difference = float((found[name].jac_SD - record.jac_SD).norm() / record.jac_SD.norm().clamp_min(1e-30))
            if not difference <= (0.3 if narrow else 1e-3):
                self._cost = None
                return f"a trial in segments gave another {name}, by {difference:.1e} relative"
        return None

    def _measured_cost(self, ids: Sequence[int]) -> CostModel:
        """Return the model's costs, with the bytes that its graph keeps read off two tiny runs."""

        def saved_bytes(tokens: int, before: KeyValues, start: int) -> int:
            sizes: dict[int, int] = {}
            own = {parameter.untyped_storage().data_ptr() for parameter in self._model.parameters()}

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    sizes[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor)  # alive, so that no address is used twice
                return tensor

            kept: list[Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                segment = self._forward(
                    [ids[start : start + tokens]],
                    [start],
                    [leaves_of(before, 1, True)],
                    [start],
                    [],
                    differentiated=True,
                )
            del segment
            return sum(sizes.values())

        return measured_cost(
            self._model,
            saved_bytes(4, [], 0),
            saved_bytes(8, [], 0),
            saved_bytes(4, self._run_plain(ids[:8], 0, []), 8),
        )


# --- what a run holds -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trunk:
    """The stem, run: its segment with a graph, and the keys and values of everything before a stage."""

    stem: Stem
    segment: Segment
    constant: KeyValues
    keys_values: KeyValues


@dataclass
class _Run:
    """A chunk of jobs: the gradients found so far, and for each pass what the stages asked of the stem's outputs."""

    jobs: list[Job]
    gradients: list[dict[Pass, Tensor]]
    asked: dict[int, Cotangents] = field(default_factory=dict)

    def write(self, key: int, leaf_BTD: Tensor, starts: Sequence[int], ends: Sequence[int]) -> None:
        for place, (job, start, end) in enumerate(zip(self.jobs, starts, ends, strict=True)):
            self.gradients[place][job.passes[key]][start:end] = leaf_BTD[place, : end - start]


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _default_links(group: Group) -> list[Link]:
    names = tuple(group.rollouts[0].spans)
    roles = {"Z": names[0], "X": names[1], "Y": names[-1]}
    return [parse_link(text, names=names, roles=roles) for text in ("Z->X", "X->Y", "Z->Y")]


def _trial(vocabulary: int) -> tuple[Rollout, tuple[Link, ...]]:
    """Return twelve tokens with three spans, and the paper's links."""
    ids = tuple((7 * place + 3) % vocabulary for place in range(12))
    spans = {
        name: Span(name, positions, (), (), "")
        for name, positions in {"Z": (1, 2, 3, 4), "X": (6, 7, 8), "Y": (10, 11)}.items()
    }
    group = Group((Rollout(ids[:5], ids[5:], spans),))
    return group.rollouts[0], tuple(_default_links(group))
