"""The group engine's schedule, which it runs and from which plans are made: waves, batches, chunks and stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, groupby, zip_longest
from typing import NamedTuple

from cepo.jacobian.group.cost import CostModel
from cepo.jacobian.group.cuts import (
    HeadRow,
    Job,
    Segment,
    Stem,
    UnservedError,
    cut_request,
    joined,
    stages_of,
    stems_of,
)
from cepo.jacobian.group.halving import AtOnce
from cepo.jacobian.links import Link
from cepo.jacobian.protocol import Request
from cepo.jacobian.targets import FEWEST_HEAD_ROWS

WAVE = 8
"""Rows of a wave relative to the rows that run at once: enough for full batches, and few enough that answers come soon
and take little memory compared with their computation."""


class Kind(NamedTuple):
    """What requests that run as one batch have in common.

    Attributes:
        links: their links.
        context_energy: whether they record it.
        stages: most stages of a rollout.
    """

    links: tuple[Link, ...]
    context_energy: bool
    stages: int


@dataclass(frozen=True)
class Chunk:
    """Jobs of one kind that run at once.

    Attributes:
        jobs: the rollouts.
        places: for each job the index of the stem's sequence that it continues.
        stages: their stages after the stem, in order.
        entering: the passes whose cotangents enter the stem.
        stem_rows: indices of the rows of the stem's head that are read for these jobs.
        stem_head: these rows; `job` is the index in the chunk.
    """

    jobs: tuple[Job, ...]
    places: tuple[int, ...]
    stages: tuple[Segment, ...]
    entering: tuple[int, ...]
    stem_rows: tuple[int, ...]
    stem_head: tuple[HeadRow, ...]

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """For each job, how many jobs before it continue the same sequence."""
        return tuple(self.places[:at].count(place) for at, place in enumerate(self.places))

    @property
    def stem_cotangents(self) -> int:
        """Number of cotangents that go back through the whole stem: one per entering pass and slot."""
        return len(self.entering) * (max(self.slots) + 1)


@dataclass(frozen=True)
class Work:
    """Requests of one kind, for the prompts of one batch.

    Attributes:
        kind: what they have in common.
        jobs: their rollouts: the longest of every prompt, then the second longest of every prompt, and so on.
        at_once: how much runs at once.
    """

    kind: Kind
    jobs: tuple[Job, ...]
    at_once: AtOnce

    def chunks(self, stem: Stem) -> list[Chunk]:
        """Return the chunks that run at once, if memory suffices."""
        size = self.at_once.sequences
        return [chunk_of(self.jobs[start : start + size], stem) for start in range(0, len(self.jobs), size)]


@dataclass(frozen=True)
class Batch:
    """Prompts with requests of the same kinds, which run as one batch.

    Attributes:
        stems: the stem of each prompt.
        works: all of their requests, by kind.
    """

    stems: tuple[Stem, ...]
    works: tuple[Work, ...]

    @cached_property
    def stem(self) -> Stem:
        """All stems as one."""
        return joined(self.stems)

    def part(self, stems: Sequence[Stem]) -> Batch:
        """Return the batch of some of its prompts, given their stems."""
        if len(stems) == len(self.stems):
            return self
        prompts = {prompt for stem in stems for prompt in stem.prompts}
        works = [replace(work, jobs=tuple(job for job in work.jobs if job.prompt in prompts)) for work in self.works]
        return Batch(tuple(stems), tuple(works))


@dataclass(frozen=True)
class Wave:
    """Consecutive requests that are answered together.

    Attributes:
        answers: for each request the numbers of its jobs, or why it is not served.
        batches: their work.
    """

    answers: tuple[tuple[int, ...] | str, ...]
    batches: tuple[Batch, ...]


@dataclass(frozen=True)
class Schedule:
    """All work of one call.

    Attributes:
        opening: what all prompts share, run before the first of them; None if it is too short.
        waves: the requests in order.
    """

    opening: Segment | None
    waves: tuple[Wave, ...]


def schedule(requests: Sequence[Request], cost: CostModel, budget: float) -> Schedule:
    """Return the work that the requests need, in batches and chunks that fit the budget in bytes."""
    numbers = count()
    answers: list[list[tuple[int, ...] | str]] = []  # by prompt
    jobs_of: dict[int, dict[Kind, list[Job]]] = {}
    by_prompt = groupby(requests, key=lambda request: request.group.rollouts[0].prompt_ids)
    for prompt, (_, of_prompt) in enumerate(by_prompt):
        answers.append([])
        for request in of_prompt:
            try:
                jobs = cut_request(request, numbers, prompt)
            except UnservedError as error:
                answers[prompt].append(str(error))
                continue
            answers[prompt].append(tuple(sorted(job.number for job in jobs)))
            kind = Kind(request.links, request.context_energy, len(jobs[0].cuts))
            jobs_of.setdefault(prompt, {}).setdefault(kind, []).extend(jobs)
    opening, stems = stems_of([[job for jobs in kinds.values() for job in jobs] for kinds in jobs_of.values()])
    stem_of = dict(zip(jobs_of, stems, strict=True))
    rows = [
        sum(max(0, job.cuts[-1] - stem_of[prompt].end) for jobs in jobs_of.get(prompt, {}).values() for job in jobs)
        for prompt in range(len(answers))
    ]
    waves = [
        Wave(
            tuple(answer for prompt in prompts for answer in answers[prompt]),
            tuple(
                _batches([(stem_of[prompt], jobs_of[prompt]) for prompt in prompts if prompt in jobs_of], cost, budget)
            ),
        )
        for prompts in _in_waves(rows, WAVE * cost.rows_at_once)
    ]
    return Schedule(opening, tuple(waves))


def bytes_needed(chunk: Chunk, stem: Stem, cost: CostModel) -> float:
    """Return the bytes held for a chunk's stages and its stem, including the allocator's overhead."""
    passes = len(chunk.jobs[0].passes)
    stages = cost.stages_bytes(chunk.stages, passes, chunk.entering, stem)
    return cost.held_bytes(max(cost.stem_forward_bytes(stem), cost.stem_bytes(stem) + stages))


def chunk_of(jobs: Sequence[Job], stem: Stem) -> Chunk:
    """Return the chunk that runs these jobs of one kind at once."""
    ends = dict(zip(stem.prompts, stem.segment.ends, strict=True))
    stages = stages_of(jobs, [ends[job.prompt] for job in jobs])
    place_of = {job.number: place for place, job in enumerate(jobs)}
    in_stem = [
        (index, replace(row, job=place_of[row.job]))
        for index, row in enumerate(stem.segment.head)
        if row.job in place_of
    ]
    sent = {index for stage in stages for index in stage.active} | {row.pass_index for _, row in in_stem}
    entering = tuple(
        index for index in sorted(sent) if any(job.passes[index].first_row < ends[job.prompt] for job in jobs)
    )
    return Chunk(
        tuple(jobs),
        tuple(stem.prompts.index(job.prompt) for job in jobs),
        stages,
        entering,
        tuple(index for index, _ in in_stem),
        tuple(row for _, row in in_stem),
    )


def _in_waves(rows: Sequence[int], most: int) -> Iterator[range]:
    """Yield runs of prompts with at most `most` rows together; a prompt with more is a run by itself."""
    start = total = 0
    for prompt, of_prompt in enumerate(rows):
        if prompt > start and total + of_prompt > most:
            yield range(start, prompt)
            start, total = prompt, 0
        total += of_prompt
    if rows:
        yield range(start, len(rows))


def _batches(
    prompts: Sequence[tuple[Stem, Mapping[Kind, Sequence[Job]]]], cost: CostModel, budget: float
) -> Iterator[Batch]:
    """Yield batches of prompts: of the same kinds, of similar length, with at most `rows_at_once` rows of stems."""
    alike: dict[tuple[object, ...], list[tuple[Stem, Mapping[Kind, Sequence[Job]]]]] = {}
    for stem, kinds in prompts:
        key = (stem.opening, stem.constant is None, stem.segment.differentiated, *kinds)
        alike.setdefault(key, []).append((stem, kinds))
    for members in alike.values():
        members.sort(key=lambda member: -member[0].end)
        longest = members[0][0]
        size = max(1, cost.rows_at_once // (longest.end - longest.opening))
        for start in range(0, len(members), size):
            yield from _fitting(members[start : start + size], cost, budget)


def _fitting(
    members: Sequence[tuple[Stem, Mapping[Kind, Sequence[Job]]]], cost: CostModel, budget: float
) -> Iterator[Batch]:
    """Yield the prompts as one batch, or in halves if the budget does not let one rollout of each run at once."""
    stems = tuple(stem for stem, _ in members)
    stem, kinds = joined(stems), members[0][1]
    works = [_work(kind, [of_prompt[kind] for _, of_prompt in members], stem, cost, budget) for kind in kinds]
    fits = cost.held_bytes(cost.stem_forward_bytes(stem)) <= budget / 2
    if len(members) == 1 or (fits and all(work.at_once.sequences >= len(members) for work in works)):
        yield Batch(stems, tuple(works))
        return
    half = len(members) // 2
    yield from _fitting(members[:half], cost, budget)
    yield from _fitting(members[half:], cost, budget)


def _work(kind: Kind, jobs_of: Sequence[Sequence[Job]], stem: Stem, cost: CostModel, budget: float) -> Work:
    """Return the work of one kind, given the jobs of each prompt of a batch."""
    columns = zip_longest(*(sorted(jobs, key=lambda job: -job.cuts[-1]) for jobs in jobs_of))
    jobs = [job for column in columns for job in column if job is not None]
    prompts = len(stem.prompts)
    longest = max((stage.length for stage in chunk_of(jobs, stem).stages), default=1)
    size = min(len(jobs), max(1, cost.rows_at_once // longest))
    size -= size % prompts if size > prompts else 0  # full slots, since each slot costs a backward pass of the stem
    while size > 1 and bytes_needed(chunk_of(jobs[:size], stem), stem, cost) > budget:
        size = (size + 1) // 2
    at_once = AtOnce(size, len(jobs[0].passes), cost.stem_cotangents_at_once(stem, budget))
    return Work(kind, tuple(jobs), at_once)


@dataclass(frozen=True)
class Rows:
    """Token rows of one kind of segment: a row is one token in one forward or backward pass, padding included."""

    segment: str
    forward: int = 0
    backward: int = 0
    head: int = 0


@dataclass(frozen=True)
class Plan:
    """What a computation runs.

    Attributes:
        rows: by segment: "opening" (shared by all prompts), "stem" (shared by a prompt's rollouts), "stages"; for path
            requests "stem", "rollouts" (each run once for all requests), "branches" (counterfactuals and points).
        flops: floating-point operations of the matrix products; a mixture of experts is counted whole.
        peak_bytes: estimated peak of the memory that the computation adds to the model, allocator overhead included.
        chunks: rollouts in each chunk of the stages.
    """

    rows: tuple[Rows, ...]
    flops: float
    peak_bytes: float
    chunks: tuple[int, ...]

    @property
    def forward_rows(self) -> int:
        """Forward rows of all segments."""
        return sum(row.forward for row in self.rows)

    @property
    def backward_rows(self) -> int:
        """Backward rows of all segments."""
        return sum(row.backward for row in self.rows)

    @property
    def head_rows(self) -> int:
        """Rows through the head; each goes back once too if it is differentiated."""
        return sum(row.head for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'segment':<10}{'forward':>10}{'backward':>10}{'head':>8}"]
        lines += [f"{row.segment:<10}{row.forward:>10,}{row.backward:>10,}{row.head:>8,}" for row in self.rows]
        lines.append(f"{'all':<10}{self.forward_rows:>10,}{self.backward_rows:>10,}{self.head_rows:>8,}")
        lines.append(
            f"{self.flops / 1e12:.3f} TFLOP, about {self.peak_bytes / 2**30:.2f} GiB beside the model, "
            f"chunks of {', '.join(map(str, sorted(set(self.chunks), reverse=True))) or 'none'} rollouts"
        )
        return "\n".join(lines)


class Tally:
    """Adds up the rows, the FLOPs and the memory of what runs.

    Args:
        cost: the model's costs.
        kinds: the kinds of segments, in the order of the plan.
    """

    def __init__(self, cost: CostModel, *kinds: str) -> None:
        self._cost, self._flops, self._peak = cost, 0.0, 0.0
        self._rows = {kind: Rows(kind) for kind in kinds}

    def add(self, kind: str, segment: Segment | None, cotangents: int = 0) -> None:
        """Add a forward pass of a segment, and the backward pass of that many cotangents."""
        if segment is None:
            return
        cost, old = self._cost, self._rows[kind]
        head = max(FEWEST_HEAD_ROWS, len(segment.head)) if segment.head else 0
        back = cotangents * segment.rows
        self._rows[kind] = Rows(kind, old.forward + segment.rows, old.backward + back, old.head + head)
        context = sum(segment.starts) / len(segment.starts) + segment.length / 2
        self._flops += cost.flops(segment.rows, context, backward=False) + cost.flops(back, context, backward=True)
        self._flops += (4.0 if segment.differentiated else 2.0) * cost.head * head

    def reach(self, held_bytes: float) -> None:
        """Record the bytes held at some moment; the plan reports the maximum."""
        self._peak = max(self._peak, held_bytes)

    def plan(self, chunks: Sequence[int]) -> Plan:
        """Return the plan of what was added up, with the number of rollouts of each chunk."""
        return Plan(tuple(self._rows.values()), self._flops, self._peak, tuple(chunks))


def plan_of(work: Schedule, cost: CostModel) -> Plan:
    """Return the rows, FLOPs and memory that a schedule adds up to."""
    tally = Tally(cost, "opening", "stem", "stages")
    sizes: list[int] = []
    tally.add("opening", work.opening)
    for batch in (batch for wave in work.waves for batch in wave.batches):
        stem = batch.stem
        chunks = [(chunk, each.at_once) for each in batch.works for chunk in each.chunks(stem)]
        tally.add("stem", stem.constant)
        tally.add("stem", stem.segment, sum(chunk.stem_cotangents for chunk, _ in chunks))
        for chunk, at_once in chunks:
            sizes.append(len(chunk.jobs))
            for stage in chunk.stages:
                tally.add("stages", stage, len(stage.active))
            tally.reach(_peak(chunk, stem, at_once, cost))
    return tally.plan(sizes)


def _peak(chunk: Chunk, stem: Stem, at_once: AtOnce, cost: CostModel) -> float:
    cotangents = chunk.stem_cotangents
    if not cotangents:
        return bytes_needed(chunk, stem, cost)
    back = cost.stem_backward_bytes(
        len(chunk.jobs), len(chunk.jobs[0].passes), cotangents, min(at_once.in_stem, cotangents), stem
    )
    return max(bytes_needed(chunk, stem, cost), cost.held_bytes(cost.stem_bytes(stem) + back))
