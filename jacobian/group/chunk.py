"""One chunk of rollouts: forward from the stem through its stages, and its cotangents back to the embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cepo.jacobian.group.cotangents import Asked, append_stage, slice_of_stage
from cepo.jacobian.group.cuts import Segment, Stem
from cepo.jacobian.group.halving import AtOnce
from cepo.jacobian.group.run import KeyValues, SegmentModel, SegmentRun, backward_in_parts, leaves_of, run_segment
from cepo.jacobian.group.schedule import Chunk
from cepo.jacobian.passes import link_jacobians
from cepo.jacobian.protocol import Request
from cepo.jacobian.records import LinkJacobian


@dataclass(frozen=True)
class StemRun:
    """The stem after its forward pass.

    Attributes:
        stem: the stem.
        run: its segment, with a graph.
        constant: keys and values of everything before the segment.
        keys_values: of the segment, detached.
    """

    stem: Stem
    run: SegmentRun
    constant: KeyValues
    keys_values: KeyValues


@dataclass(frozen=True)
class _StageRun:
    """A stage after its forward pass, and the leaves of the past that take cotangents of it."""

    stage: Segment
    run: SegmentRun
    of_stem: KeyValues
    of_middle: KeyValues


def run_opening(model: SegmentModel, opening: Segment | None) -> KeyValues:
    """Return the keys and values of what prompts share."""
    return run_segment(model, opening).keys_values if opening is not None else []


def run_stem(model: SegmentModel, stem: Stem, opening: KeyValues) -> StemRun:
    """Run what the rollouts of a prompt share."""
    constant = opening if stem.opening else []
    if stem.constant is not None:  # more of this prompt that nothing differentiates
        new = run_segment(model, stem.constant, [constant], [stem.opening]).keys_values
        constant = [torch.cat(pair, dim=2) for pair in zip(constant, new, strict=True)] if constant else new
    run = run_segment(model, stem.segment, [constant], [stem.start])
    return StemRun(stem, run, constant, [tensor.detach() for tensor in run.keys_values])


def chunk_gradients(model: SegmentModel, chunk: Chunk, stem: StemRun, at_once: AtOnce) -> Tensor:
    """Return the gradient of each pass of each job with respect to the embedding rows, (P, B, T, D).

    The backward pass goes from the last stage to the stem. What a stage asks of earlier keys and values is carried as
    an explicit cotangent; as many cotangents of a segment as run at once go back in one batched pass over one set of
    saved activations. Rows whose gradient nobody wants are zero.
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
    of_stem, of_stages = Asked(chunk.entering), [Asked(stage.active, stage) for stage in chunk.stages]
    while runs:
        if runs[-1].stage.active:  # in a call of its own, so that a stage is freed before the one before it
            _stage_backward(runs.pop(), of_stages, of_stem, gradient_PBTD, stem.stem.end, at_once.passes)
        else:
            runs.pop()
        of_stages.pop()
    _stem_backward(chunk, stem, of_stem, gradient_PBTD, at_once.in_stem)
    return gradient_PBTD


def chunk_answers(request: Request, chunk: Chunk, gradient_PBTD: Tensor) -> dict[int, dict[str, LinkJacobian]]:
    """Return the Jacobians of each job of the chunk, by the job's number."""
    answers = {}
    for job, gradient_PTD in zip(chunk.jobs, gradient_PBTD.unbind(1), strict=True):
        gradients = {each.key: gradient_TD for each, gradient_TD in zip(job.passes, gradient_PTD, strict=True)}
        answers[job.number] = link_jacobians(job.rollout, request.links, gradients, request.context_energy)
    return answers


def _run_stages(model: SegmentModel, chunk: Chunk, stem: StemRun) -> list[_StageRun]:
    runs: list[_StageRun] = []
    middle: KeyValues = []  # keys and values between the stem and the next stage, ragged
    lengths = [0] * len(chunk.jobs)
    sending: set[int] = set()  # passes with rows in an earlier stage
    for stage in chunk.stages:
        to_stem, to_middle = (bool(set(stage.active) & passes) for passes in (set(chunk.entering), sending))
        of_stem = leaves_of(stem.keys_values, len(chunk.jobs), to_stem)
        of_middle = leaves_of(middle, len(chunk.jobs), to_middle)
        run = run_segment(
            model, stage, [stem.constant, of_stem, of_middle], [stem.stem.end + length for length in lengths]
        )
        runs.append(_StageRun(stage, run, of_stem if to_stem else [], of_middle if to_middle else []))
        sending |= set(stage.active)
        if stage is not chunk.stages[-1]:
            middle, lengths = append_stage(middle, lengths, run.keys_values, stage)
    return runs


def _stage_backward(
    at: _StageRun, of_stages: Sequence[Asked], of_stem: Asked, gradient_PBTD: Tensor, stem_end: int, at_once: int
) -> None:
    """Send the cotangents of a stage, the last of these, back, and add what it asks of those before it."""
    *of_earlier, asked = of_stages
    asked.add_head(at.stage.head, at.run.head_PD, at.run.hidden_BTD.shape)
    inputs = [at.run.leaf_BTD, *at.of_stem, *at.of_middle]
    outputs = asked.of_outputs(len(at.run.keys_values))
    for part, (leaf_CBTD, *sent) in backward_in_parts(at.run, outputs, inputs, at_once):
        passes = at.stage.active[part]
        for place, (start, end) in enumerate(zip(at.stage.starts, at.stage.ends, strict=True)):
            gradient_PBTD[list(passes), place, start:end] = leaf_CBTD[:, place, : end - start].to(gradient_PBTD.dtype)
        of_stem.add_keys_values(passes, sent[: len(at.of_stem)])
        for earlier in of_earlier:
            if earlier.stage is not None and earlier.shares(passes):
                to_middle = sent[len(at.of_stem) :]
                earlier.add_keys_values(
                    passes, [slice_of_stage(sent_C, earlier.stage, stem_end) for sent_C in to_middle]
                )


def _stem_backward(chunk: Chunk, stem: StemRun, asked: Asked, gradient_PBTD: Tensor, at_once: int) -> None:
    """Send the cotangents of the stem's outputs back through it, and write the gradients of its rows."""
    if not chunk.entering:
        return
    run = stem.run
    asked.add_head(chunk.stem_head, run.head_PD[list(chunk.stem_rows)], (len(chunk.jobs), *run.hidden_BTD.shape[1:]))
    # One cotangent per pass and job, each of a batch of one.
    of_outputs = [
        None if sent_C is None else sent_C.flatten(0, 1)[:, None] for sent_C in asked.of_outputs(len(run.keys_values))
    ]
    passes_N = torch.tensor(chunk.entering).repeat_interleave(len(chunk.jobs))
    jobs_N = torch.arange(len(chunk.jobs)).repeat(len(chunk.entering))
    for part, (leaf_NBTD,) in backward_in_parts(run, of_outputs, [run.leaf_BTD], at_once, keep=True):
        gradient_PBTD[passes_N[part], jobs_N[part], stem.stem.start : stem.stem.end] = leaf_NBTD[:, 0].to(
            gradient_PBTD.dtype
        )
