"""Find out, on twelve tokens, whether a model can be run in segments, with which kernels, and at what cost."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.chunk import chunk_answers, chunk_gradients, run_stem
from cepo.jacobian.group.cost import CostModel, measured_cost
from cepo.jacobian.group.cuts import Segment, UnservedError
from cepo.jacobian.group.recompute import recomputing, watching_mlps
from cepo.jacobian.group.run import Past, SegmentModel, run_segment
from cepo.jacobian.group.schedule import chunk_of, schedule
from cepo.jacobian.group.swaps import Swaps, find_swaps
from cepo.jacobian.links import Link, parse_link
from cepo.jacobian.model import HeldModel
from cepo.jacobian.protocol import Request
from cepo.jacobian.records import Group, Rollout, Span
from cepo.jacobian.sharding import RankFailedError, sharding_of, watching_saved
from cepo.kernels.launch import Implementation

logger = logging.getLogger("cepo")

# The largest relative difference of a Jacobian that rounding can explain. A wrong formula is off by about 1.
_ROUNDING = {torch.bfloat16: 0.3, torch.float16: 0.3}
_ROUNDING_OF_WIDE = 1e-3


@dataclass(frozen=True)
class Served:
    """A model that can be run in segments, and its costs.

    Attributes:
        model: the model.
        cost: its costs.
        lean: the same model with recomputation in the backward pass, for work that does not fit otherwise; None if
            nothing can be recomputed.
    """

    model: SegmentModel
    cost: CostModel
    lean: Served | None = None


def try_segments(held: HeldModel, oracle: JacobianEngine, kernels: Implementation) -> Served:
    """Return the model prepared for running in segments, after checking its layers and comparing with the oracle.

    Args:
        held: the model.
        oracle: the oracle of the same model.
        kernels: which kernels may be used; with "auto", none are if they fail the trial.

    Raises:
        UnservedError: if it cannot be run in segments, with the reason.
    """
    with held.prepared():
        _check_architecture(held)
        with _failures_named():
            swaps = find_swaps(held.causal_lm, held.forward, kernels)
        if kernels == "auto" and swaps != Swaps():
            try:
                return _with_lean(SegmentModel(held, swaps), oracle)
            except UnservedError as error:
                logger.warning("the group engine continues without kernels: %s", error)
                swaps = Swaps()
        return _with_lean(SegmentModel(held, swaps), oracle)


def default_links(group: Group) -> tuple[Link, ...]:
    """Return Z->X, X->Y and Z->Y of the group's first, second and last span."""
    names = tuple(group.rollouts[0].spans)
    roles = {"Z": names[0], "X": names[1], "Y": names[-1]}
    return tuple(parse_link(text, names=names, roles=roles) for text in ("Z->X", "X->Y", "Z->Y"))


def _check_architecture(held: HeldModel) -> None:
    if held.causal_lm.get_output_embeddings() is None:
        raise UnservedError("it has no output embeddings")
    if sharding_of(held.causal_lm) == "tensor parallel":
        raise UnservedError("its layers are split over ranks, and their collectives take one cotangent at a time")
    missing = [name for name in ("position_ids", "past_key_values") if name not in held.forward_takes]
    if missing:
        raise UnservedError(f"its forward takes no {' and no '.join(missing)}")
    layers = DynamicCache(config=held.causal_lm.config).layers
    others = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if others:
        raise UnservedError(f"its cache holds {', '.join(others)}, not whole keys and values")


def _with_lean(model: SegmentModel, oracle: JacobianEngine) -> Served:
    """Return the model and its costs, without and with recomputation, if it gives the oracle's Jacobians."""
    with watching_mlps(model.held.layers) as mlps:
        served = _compared(model, oracle)
    if not mlps or sharding_of(model.held.causal_lm) != "none":  # recomputation would find sharded weights
        return served
    lean = _compared(SegmentModel(model.held, recomputing(model.swaps, list(mlps))), oracle)
    allocator = replace(lean.cost.allocator, small=lean.cost.allocator.recomputing)
    cost = replace(lean.cost, working_row=served.cost.working_row, allocator=allocator)
    return replace(served, lean=replace(lean, cost=cost))


def _compared(model: SegmentModel, oracle: JacobianEngine) -> Served:
    """Return the model and its costs; raise UnservedError unless it gives the oracle's Jacobians."""
    embedding_VD = model.held.embedding.weight
    group = Group((_rollout(len(embedding_VD)),))
    request = Request(group, default_links(group))
    with _failures_named():
        wanted = next(oracle.compute([request]))[0]
        with model.prepared():
            cost = _measured_cost(model, group.rollouts[0].token_ids)
            (wave,) = schedule([request], cost, math.inf).waves
            (batch,) = wave.batches
            (work,) = batch.works
            chunk = chunk_of(work.jobs, batch.stem)
            stem = run_stem(model, batch.stem, ())
            (found,) = chunk_answers(work.kind, chunk, chunk_gradients(model, chunk, stem, work.at_once)).values()
    for name, record in wanted.items():
        difference = float((found[name].jac_SD - record.jac_SD).norm() / record.jac_SD.norm().clamp_min(1e-30))
        if not difference <= _ROUNDING.get(embedding_VD.dtype, _ROUNDING_OF_WIDE):  # a NaN is refused too
            raise UnservedError(f"a trial in segments gave another {name}, by {difference:.1e} relative")
    return Served(model, cost)


@contextlib.contextmanager
def _failures_named() -> Iterator[None]:
    try:
        yield
    except RankFailedError:
        raise
    except Exception as error:  # third-party code may raise anything, and the oracle can still serve the model
        raise UnservedError(f"a trial in segments failed with {type(error).__name__}: {error}") from error


def _rollout(vocabulary: int) -> Rollout:
    """Return a rollout of twelve tokens with three spans."""
    ids = tuple((7 * place + 3) % vocabulary for place in range(12))
    positions = {"Z": (1, 2, 3, 4), "X": (6, 7, 8), "Y": (10, 11)}
    return Rollout(ids[:5], ids[5:], {name: Span(name, at, (), (), "") for name, at in positions.items()})


def _measured_cost(model: SegmentModel, ids: Sequence[int]) -> CostModel:
    """Return the model's costs, with the bytes that its graph keeps measured on three tiny runs."""

    def saved_bytes(start: int, end: int, before: Sequence[Past]) -> int:
        sizes: dict[int, int] = {}
        kept: list[Tensor] = []  # keeps tensors alive, so that no address is reused

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
                sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
            return tensor

        segment = Segment((tuple(ids[start:end]),), (start,), differentiated=True)
        with watching_saved(keep):
            run_segment(model, segment, [piece.leaves([0], True) for piece in before])
        return sum(sizes.values())

    before = Past(run_segment(model, Segment((tuple(ids[:8]),), (0,))).keys_values, (8,))
    return measured_cost(
        model.held.causal_lm,
        saved_bytes(0, 4, []),
        saved_bytes(0, 8, []),
        saved_bytes(8, 12, [before]),
        has_logits=model.swaps.head == "torch",
    )
