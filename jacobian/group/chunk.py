"""Run one chunk of rollouts: forward from the stem through its stages, and cotangents back to the embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cepo.jacobian.group.cotangents import Asked
from cepo.jacobian.group.cuts import Segment, Stem
from cepo.jacobian.group.halving import AtOnce
from cepo.jacobian.group.run import KeyValues, Past, SegmentModel, SegmentRun, backward_in_parts, run_segment
from cepo.jacobian.group.schedule import Chunk, Kind
from cepo.jacobian.passes import link_jacobians
from cepo.jacobian.records import LinkJacobian


@dataclass(frozen=True)
class StemRun:
    """The stem after its forward pass.

    Attributes:
        stem: the stem.
        run: its segment, with a graph.
        before: keys and values of everything before the segment.
        own: keys and values of the segment, detached.
    """

    stem: Stem
    run: SegmentRun
    before: tuple[Past, ...]
    own: Past


@dataclass(frozen=True)
class _StageRun:
    """A stage after its forward pass, and the leaves of its past that receive cotangents.

    Attributes:
        stage: the stage.
        run: its forward pass.
        of_stem: keys and values of the stem; empty if no cotangent goes back to them.
        of_stages: likewise for each stage before it.
    """

    stage: Segment
    run: SegmentRun
    of_stem: KeyValues
    of_stages: list[KeyValues]


def run_opening(model: SegmentModel, opening: Segment | None) -> tuple[Past, ...]:
    """Return the keys and values of the opening that prompts share."""
    return (_past_of(opening, run_segment(model, opening)),) if opening is not None else ()


def run_stem(model: SegmentModel, stem: Stem, opening: tuple[Past, ...]) -> StemRun:
    """Run the stem of one prompt, or of several prompts as a batch."""
    before = opening if stem.opening else ()
    if stem.constant is not None:  # tokens after the opening that no link differentiates
        before = (*before, _past_of(stem.constant, run_segment(model, stem.constant, before)))
    run = run_segment(model, stem.segment, before)
    return StemRun(stem, run, before, _past_of(stem.segment, run))


def chunk_gradients(model: SegmentModel, chunk: Chunk, stem: StemRun, at_once: AtOnce) -> Tensor:
    """Return the gradient of each pass of each job with respect to the embedding rows, (P, B, T, D).

    The backward pass goes from the last stage to the stem. A stage's gradients at earlier keys and values are carried
    as explicit cotangents; up to `at_once` cotangents of a segment go back in one batched pass over one set of saved
    activations. Rows whose gradient no link needs may be zero.
    """
    runs = _run_stages(model, chunk, stem)
    embedding_VD = model.held.embedding.weight
    gradient_PBTD = embedding_VD.new_zeros(
        len(chunk.jobs[0].passes),
        len(chunk.jobs),
        max(len(job.rollout.token_ids) for job in chunk.jobs),
        embedding_VD.shape[1],
        dtype=torch.promote_types(embedding_VD.dtype, torch.float32),
    )
    of_stem, of_stages = Asked(chunk.entering), [Asked(stage.active) for stage in chunk.stages]
    while runs:
        if runs[-1].stage.active:  # in a separate call, so that each stage is freed before the preceding one goes back
            _stage_backward(runs.pop(), of_stages, of_stem, gradient_PBTD, at_once.passes)
        else:
            runs.pop()
        of_stages.pop()
    _stem_backward(chunk, stem, of_stem, gradient_PBTD, at_once.in_stem)
    return gradient_PBTD


def chunk_answers(kind: Kind, chunk: Chunk, gradient_PBTD: Tensor) -> dict[int, dict[str, LinkJacobian]]:
    """Return the Jacobians of each job of the chunk, by the job's number."""
    answers = {}
    for job, gradient_PTD in zip(chunk.jobs, gradient_PBTD.unbind(1), strict=True):
        gradients = {each.key: gradient_TD for each, gradient_TD in zip(job.passes, gradient_PTD, strict=True)}
        answers[job.number] = link_jacobians(job.rollout, kind.links, gradients, kind.context_energy)
    return answers


def _past_of(segment: Segment, run: SegmentRun) -> Past:
    return Past([tensor.detach() for tensor in run.keys_values], tuple(map(len, segment.ids)))


def _run_stages(model: SegmentModel, chunk: Chunk, stem: StemRun) -> list[_StageRun]:
    runs: list[_StageRun] = []
    earlier: list[Past] = []
    everyone = range(len(chunk.jobs))
    before = [piece.leaves(chunk.places, differentiated=False) for piece in stem.before]
    for stage in chunk.stages:
        wanted = [
            bool(set(stage.active) & set(passes)) for passes in (chunk.entering, *(each.stage.active for each in runs))
        ]
        of_stem, *of_stages = [
            piece.leaves(places, differentiated)
            for piece, places, differentiated in zip(
                (stem.own, *earlier), (chunk.places, *[everyone] * len(earlier)), wanted, strict=True
            )
        ]
        run = run_segment(model, stage, [*before, of_stem, *of_stages])
        asked = [piece.keys_values if each else [] for piece, each in zip((of_stem, *of_stages), wanted, strict=True)]
        runs.append(_StageRun(stage, run, asked[0], asked[1:]))
        earlier.append(_past_of(stage, run))
    return runs


def _stage_backward(
    at: _StageRun, of_stages: Sequence[Asked], of_stem: Asked, gradient_PBTD: Tensor, at_once: int
) -> None:
    """Send the cotangents of the last stage back, and add the results to those of the segments before it."""
    *of_earlier, asked = of_stages
    asked.add_head(at.stage.head, at.run.head_PD, at.run.hidden_BTD.shape)
    pieces = [at.of_stem, *at.of_stages]
    outputs = asked.of_outputs(len(at.run.keys_values))
    everyone = range(len(at.stage.ids))
    inputs = [at.run.leaf_BTD, *(tensor for piece in pieces for tensor in piece)]
    for part, (leaf_CBTD, *sent) in backward_in_parts(at.run, outputs, inputs, at_once):
        passes = at.stage.active[part]
        for place, key in enumerate(passes):
            _write_rows(gradient_PBTD[key], everyone, at.stage, everyone, leaf_CBTD[place])
        for piece, earlier in zip(pieces, (of_stem, *of_earlier), strict=True):
            earlier.add_keys_values(passes, sent[: len(piece)])
            sent = sent[len(piece) :]


def _stem_backward(chunk: Chunk, stem: StemRun, asked: Asked, gradient_PBTD: Tensor, at_once: int) -> None:
    """Send the cotangents of the stem's outputs back through it, and write the gradients of its rows."""
    if not chunk.entering:
        return
    run, slots = stem.run, chunk.slots
    asked.add_head(chunk.stem_head, run.head_PD[list(chunk.stem_rows)], (len(chunk.jobs), *run.hidden_BTD.shape[1:]))
    # One cotangent of the whole batch per pass and slot: slot 0 holds the first job of every prompt, slot 1 the second.
    prompts, rows = len(stem.stem.prompts), max(slots) + 1
    at_B = torch.tensor([slot * prompts + place for slot, place in zip(slots, chunk.places, strict=True)])
    of_outputs = [
        None if sent_C is None else _in_slots(sent_C, at_B, rows, prompts)
        for sent_C in asked.of_outputs(len(run.keys_values))
    ]
    jobs_of = [[job for job, slot in enumerate(slots) if slot == row] for row in range(rows)]
    for part, (leaf_NSTD,) in backward_in_parts(run, of_outputs, [run.leaf_BTD], at_once, keep=True):
        for number, leaf_STD in zip(range(part.start, part.stop), leaf_NSTD, strict=True):
            jobs = jobs_of[number % rows]
            places = [chunk.places[job] for job in jobs]
            _write_rows(gradient_PBTD[chunk.entering[number // rows]], jobs, stem.stem.segment, places, leaf_STD)


def _in_slots(sent_CB: Tensor, at_B: Tensor, rows: int, prompts: int) -> Tensor:
    """Return cotangents (C, B, ...) as (C * rows, prompts, ...), each job's at its slot and prompt, 0 elsewhere."""
    if len(at_B) != rows * prompts or not torch.equal(at_B, torch.arange(len(at_B))):
        filled_CB = sent_CB.new_zeros(len(sent_CB), rows * prompts, *sent_CB.shape[2:])
        filled_CB[:, at_B.to(sent_CB.device)] = sent_CB
        sent_CB = filled_CB
    return sent_CB.unflatten(1, (rows, prompts)).flatten(0, 1)


def _write_rows(
    gradient_BTD: Tensor, jobs: Sequence[int], segment: Segment, sequences: Sequence[int], leaf_STD: Tensor
) -> None:
    """Write the gradients of a segment's sequences to the rows of their jobs, without padding."""
    bounds = list(zip(segment.starts, segment.ends, strict=True))
    for job, sequence in zip(jobs, sequences, strict=True):
        start, end = bounds[sequence]
        gradient_BTD[job, start:end] = leaf_STD[sequence, : end - start]
