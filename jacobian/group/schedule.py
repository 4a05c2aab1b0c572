"""The group engine's schedule, which it runs and its plan adds up: prompts, their requests, chunks, stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby

from cepo.jacobian.group.cost import CostModel
from cepo.jacobian.group.cuts import HeadRow, Job, Segment, Stem, UnservedError, cut_request, stages_of, stems_of
from cepo.jacobian.group.halving import AtOnce
from cepo.jacobian.protocol import Request
from cepo.jacobian.targets import FEWEST_HEAD_ROWS


@dataclass(frozen=True)
class Chunk:
    """Jobs of one request that run at once.

    Attributes:
        jobs: the rollouts, longest first.
        stages: what they run after the stem, first to last.
        entering: the passes whose cotangents enter the stem; one cotangent per pass and job.
        stem_rows: indices of the rows of the stem's head that serve these jobs.
        stem_head: these rows; `job` is the place in the chunk.
    """

    jobs: tuple[Job, ...]
    stages: tuple[Segment, ...]
    entering: tuple[int, ...]
    stem_rows: tuple[int, ...]
    stem_head: tuple[HeadRow, ...]

    @property
    def stem_cotangents(self) -> int:
        """How many cotangents enter the stem, one per entering pass and job."""
        return len(self.entering) * len(self.jobs)


@dataclass(frozen=True)
class Work:
    """One request that is served.

    Attributes:
        stem: what it shares with its prompt's other requests.
        jobs: its rollouts, longest first.
        at_once: how much of it runs at once.
    """

    stem: Stem
    jobs: tuple[Job, ...]
    at_once: AtOnce

    def chunks(self) -> list[Chunk]:
        """Return its jobs in chunks, if memory lasts."""
        size = self.at_once.sequences
        return [chunk_of(self.jobs[start : start + size], self.stem) for start in range(0, len(self.jobs), size)]


@dataclass(frozen=True)
class Schedule:
    """All work of one call.

    Attributes:
        opening: what prompts share, run before the first of them; None where it is not worth it.
        works: by request, in order; why it is not served where it is not.
    """

    opening: Segment | None
    works: tuple[Work | str, ...]


def schedule(requests: Sequence[Request], cost: CostModel, budget: float) -> Schedule:
    """Return the work that the requests need, in chunks that fit the budget in bytes."""
    numbers = count()
    jobs_of: dict[int, tuple[Job, ...]] = {}
    works: dict[int, Work | str] = {}
    for index, request in enumerate(requests):
        try:
            jobs_of[index] = cut_request(request, numbers)
        except UnservedError as error:
            works[index] = str(error)
    by_prompt = groupby(jobs_of, key=lambda index: requests[index].group.rollouts[0].prompt_ids)
    prompts = [list(indices) for _, indices in by_prompt]
    opening, stems = stems_of([[job for index in indices for job in jobs_of[index]] for indices in prompts])
    for indices, stem in zip(prompts, stems, strict=True):
        in_stem = cost.stem_cotangents_at_once(stem, budget)
        for index in indices:
            jobs = jobs_of[index]
            at_once = AtOnce(_chunk_size(jobs, stem, cost, budget), len(jobs[0].passes), in_stem)
            works[index] = Work(stem, jobs, at_once)
    return Schedule(opening, tuple(works[index] for index in range(len(requests))))


def bytes_needed(chunk: Chunk, stem: Stem, cost: CostModel) -> float:
    """Return the bytes of a chunk's stages, those of the stem and what the allocator holds back included."""
    passes = len(chunk.jobs[0].passes)
    stages = cost.stages_bytes(chunk.stages, passes, chunk.entering, stem)
    return cost.held_bytes(max(cost.stem_forward_bytes(stem), cost.stem_bytes(stem) + stages))


def chunk_of(jobs: Sequence[Job], stem: Stem) -> Chunk:
    """Return the chunk that runs these jobs of one request, longest first, at once."""
    stages = stages_of(jobs, stem.end)
    place_of = {job.number: place for place, job in enumerate(jobs)}
    in_stem = [
        (index, replace(row, job=place_of[row.job]))
        for index, row in enumerate(stem.segment.head)
        if row.job in place_of
    ]
    sent = {index for stage in stages for index in stage.active} | {row.pass_index for _, row in in_stem}
    entering = tuple(index for index in sorted(sent) if any(job.passes[index].first_row < stem.end for job in jobs))
    return Chunk(tuple(jobs), stages, entering, tuple(index for index, _ in in_stem), tuple(row for _, row in in_stem))


def _chunk_size(jobs: Sequence[Job], stem: Stem, cost: CostModel, budget: float) -> int:
    """Return how many of the jobs, longest first, run at once within the budget, at least one."""
    longest = max((stage.length for stage in stages_of(jobs[:1], stem.end)), default=1)
    size = min(len(jobs), max(1, cost.rows_at_once // longest))
    while size > 1 and bytes_needed(chunk_of(jobs[:size], stem), stem, cost) > budget:
        size = (size + 1) // 2
    return size


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
        rows: by segment: "opening" (shared by all prompts), "stem" (shared by a prompt's rollouts), "stages"; of path
            requests "stem", "prefixes" (shared by a rollout and its counterfactuals), "tails".
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
        """Rows through the head, each once forward and once back."""
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


def plan_of(work: Schedule, cost: CostModel) -> Plan:
    """Return the rows, FLOPs and memory that a schedule adds up to."""
    total = {kind: Rows(kind) for kind in ("opening", "stem", "stages")}
    flops = peak = 0.0
    sizes: list[int] = []

    def add(kind: str, segment: Segment | None, cotangents: int = 0) -> None:
        nonlocal flops
        if segment is None:
            return
        head = max(FEWEST_HEAD_ROWS, len(segment.head)) if segment.head else 0
        back, old = cotangents * segment.rows, total[kind]
        total[kind] = Rows(kind, old.forward + segment.rows, old.backward + back, old.head + head)
        context = sum(segment.starts) / len(segment.starts) + segment.length / 2
        flops += cost.flops(segment.rows, context, backward=False) + cost.flops(back, context, backward=True)
        flops += 4.0 * cost.head * head

    served = [each for each in work.works if isinstance(each, Work)]
    add("opening", work.opening)
    for stem, run in groupby(served, key=lambda each: each.stem):
        chunks = [(chunk, each.at_once) for each in run for chunk in each.chunks()]
        add("stem", stem.constant)
        add("stem", stem.segment, sum(chunk.stem_cotangents for chunk, _ in chunks))
        for chunk, at_once in chunks:
            sizes.append(len(chunk.jobs))
            for stage in chunk.stages:
                add("stages", stage, len(stage.active))
            peak = max(peak, _peak(chunk, stem, at_once, cost))
    return Plan(tuple(total.values()), flops, peak, tuple(sizes))


def _peak(chunk: Chunk, stem: Stem, at_once: AtOnce, cost: CostModel) -> float:
    cotangents = chunk.stem_cotangents
    if not cotangents:
        return bytes_needed(chunk, stem, cost)
    back = cost.stem_backward_bytes(
        len(chunk.jobs), len(chunk.jobs[0].passes), cotangents, min(at_once.in_stem, cotangents), stem
    )
    return max(bytes_needed(chunk, stem, cost), cost.held_bytes(cost.stem_bytes(stem) + back))
