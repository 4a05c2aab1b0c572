"""Where rollouts are cut so that rows are shared, blocked or dropped: the group engine's plan, without a tensor.

All rollouts of a prompt share a stem: every token before the first that differs or must be cut. Behind it a rollout
runs in stages. A stage ends where a blocked span begins or ends (so that dropping a stage's cotangents is the
blocking), before a span that is a source (rows before it need no backward pass) and behind a span that is a target
(later rows owe it nothing). At most one such cut is made between two spans: the others would save a tag.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from cepo.jacobian.passes import Pass, passes_of
from cepo.jacobian.protocol import Request
from cepo.jacobian.records import Rollout, Span
from cepo.jacobian.targets import Term, target_terms

# Fewer rows than this are carried through the backward pass rather than run as a segment of their own.
_WORTH_A_SEGMENT = 16


class UnservedError(Exception):
    """Raised for a rollout that cannot be cut into segments; the oracle serves it."""


@dataclass(frozen=True)
class Job:
    """One rollout of one request, cut.

    Attributes:
        request: index of the request.
        rollout: what is differentiated.
        passes: the cotangents.
        terms: for each pass the terms of its score.
        first_rows: for each pass the first position whose gradient is wanted.
        blocked: for each pass the positions [start, end) that no cotangent may pass.
        edges: ascending ends of the stages; nothing is run from the last one on.
    """

    request: int
    rollout: Rollout
    passes: tuple[Pass, ...]
    terms: tuple[tuple[Term, ...], ...]
    first_rows: tuple[int, ...]
    blocked: tuple[tuple[tuple[int, int], ...], ...]
    edges: tuple[int, ...]


@dataclass(frozen=True)
class HeadRow:
    """One row of the head: the term that it serves, for which rollout and pass, and where it stands in its segment."""

    owner: int
    pass_index: int
    row: int
    term: Term


@dataclass(frozen=True)
class Stage:
    """One segment of several jobs, run as one padded batch.

    Attributes:
        starts: for each job the position of its first token.
        ends: and that behind its last.
        active: indices of the passes whose cotangents go back through this stage.
        head: its rows of the head.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    active: tuple[int, ...]
    head: tuple[HeadRow, ...]

    @property
    def length(self) -> int:
        """Tokens a job, padding included."""
        return max(end - start for start, end in zip(self.starts, self.ends, strict=True))


@dataclass(frozen=True)
class Stem:
    """What all jobs of a prompt share.

    Attributes:
        ids: the tokens [0, end).
        opening: [0, opening) is run without a graph, once for all prompts that begin with the same tokens.
        start: [opening, start) is run without a graph for this prompt; [start, end) is differentiated.
        end: first position behind the stem.
        differentiated: whether any cotangent enters it.
        head: rows of the head in [start, end); `owner` is an index into the jobs.
    """

    ids: tuple[int, ...]
    opening: int
    start: int
    end: int
    differentiated: bool
    head: tuple[HeadRow, ...]


@dataclass(frozen=True)
class Prompt:
    """Consecutive requests that share their prompt.

    Attributes:
        requests: their indices.
        jobs: the rollouts of those that can be cut, in order.
        stem: what the jobs share; None where there are none.
        unserved: request index -> why it cannot be cut.
    """

    requests: tuple[int, ...]
    jobs: tuple[Job, ...]
    stem: Stem | None
    unserved: Mapping[int, str]

    def members(self, request: int) -> list[int]:
        """Return the indices of a request's jobs, longest first: equal lengths side by side pad least."""
        own = [index for index, job in enumerate(self.jobs) if job.request == request]
        return sorted(own, key=lambda index: -self.jobs[index].edges[-1])


def cut_all(requests: Sequence[Request]) -> list[Prompt]:
    """Return the requests by prompt, with every rollout cut."""
    found = []
    numbered = enumerate(requests)
    for _, run in groupby(numbered, key=lambda pair: pair[1].group.rollouts[0].prompt_ids):
        indices, jobs, unserved = [], [], {}
        for index, request in run:
            indices.append(index)
            passes = tuple(passes_of(request.links))
            try:
                jobs += [_cut_rollout(request, index, rollout, passes) for rollout in request.group.rollouts]
            except UnservedError as error:
                unserved[index] = str(error)
        found.append(Prompt(tuple(indices), tuple(jobs), None, unserved))
    cut = [place for place, prompt in enumerate(found) if prompt.jobs]
    for place, stem in zip(cut, _stems([found[place].jobs for place in cut]), strict=True):
        found[place] = replace(found[place], stem=stem)
    return found


def stages(jobs: Sequence[Job], stem_end: int) -> list[Stage]:
    """Return the stages of jobs that share their passes and their number of edges; empty ones are left out."""
    bounds = [(stem_end, *(max(edge, stem_end) for edge in job.edges)) for job in jobs]
    found: list[Stage] = []
    downstream: set[int] = set()  # passes that a later stage sends cotangents back for
    for place in reversed(range(len(bounds[0]) - 1)):
        starts, ends = tuple(bound[place] for bound in bounds), tuple(bound[place + 1] for bound in bounds)
        if starts == ends:
            continue
        open_passes = [
            index
            for index in range(len(jobs[0].passes))
            if any(job.first_rows[index] < end for job, end in zip(jobs, ends, strict=True))
            and not any(
                _inside(start, end, job.blocked[index]) for job, start, end in zip(jobs, starts, ends, strict=True)
            )
        ]
        head = tuple(
            HeadRow(owner, index, term.position - 1 - start, term)
            for owner, (job, start, end) in enumerate(zip(jobs, starts, ends, strict=True))
            for index in open_passes
            for term in job.terms[index]
            if max(start, job.first_rows[index]) <= term.position - 1 < end
        )
        active = tuple(
            index for index in open_passes if index in downstream or any(row.pass_index == index for row in head)
        )
        downstream |= set(active)
        found.append(Stage(starts, ends, active, head))
    return found[::-1]


def enters_stem(jobs: Sequence[Job], stem: Stem) -> tuple[int, ...]:
    """Return the passes of the jobs whose gradient is wanted somewhere in the stem."""
    return tuple(index for index in range(len(jobs[0].passes)) if any(job.first_rows[index] < stem.end for job in jobs))


def _stems(jobs_by_prompt: Sequence[Sequence[Job]]) -> list[Stem]:
    """Return the stem of each prompt's jobs; prompts that need no gradient at their beginning share an opening."""
    ends = [_stem_end(jobs) for jobs in jobs_by_prompt]
    firsts = [
        min([end, *(row for job in jobs for row in job.first_rows)])
        for jobs, end in zip(jobs_by_prompt, ends, strict=True)
    ]
    # At least one token stays behind the opening, for the stem to be a segment.
    can_share = [
        jobs[0].rollout.token_ids[: min(first, end - 1)]
        for jobs, first, end in zip(jobs_by_prompt, firsts, ends, strict=True)
        if first > 0
    ]
    shared = _shared_length(can_share) if can_share else 0
    shared = shared if shared >= _WORTH_A_SEGMENT else 0
    found = []
    for jobs, first, end in zip(jobs_by_prompt, firsts, ends, strict=True):
        opening = shared if first > 0 else 0
        differentiated = any(row < end for job in jobs for row in job.first_rows)
        start = first if differentiated and first - opening >= _WORTH_A_SEGMENT else opening
        head = tuple(
            HeadRow(owner, index, term.position - 1 - start, term)
            for owner, job in enumerate(jobs)
            for index, terms in enumerate(job.terms)
            for term in terms
            if job.first_rows[index] <= term.position - 1 < end
        )
        found.append(Stem(jobs[0].rollout.token_ids[:end], opening, start, end, differentiated, head))
    return found


def _cut_rollout(request: Request, index: int, rollout: Rollout, passes: tuple[Pass, ...]) -> Job:
    terms = tuple(target_terms(rollout, key.target, key.function) for key in passes)
    first_rows = []
    for key in passes:
        sources = [link.source for link in request.links if key in passes_of([link])]
        needed = min(rollout.spans[name].positions[0] for name in sources)
        first_rows.append(0 if request.context_energy else needed)
    last = max(term.position for of_pass in terms for term in of_pass)
    split = len(rollout.prompt_ids)
    spans = sorted(
        (span for span in rollout.spans.values() if span.positions[0] >= split), key=lambda span: span.positions[0]
    )
    blocked = {name: _run_of(rollout, name) for key in passes for name in key.blocked}
    edges = _edges(
        spans,
        blocked,
        sources={link.source for link in request.links},
        targets={key.target for key in passes},
    )
    return Job(
        index,
        rollout,
        passes,
        terms,
        tuple(first_rows),
        tuple(tuple(blocked[name] for name in key.blocked) for key in passes),
        (*(min(edge, last) for edge in edges), last),
    )


def _edges(
    spans: Sequence[Span], blocked: Mapping[str, tuple[int, int]], sources: Iterable[str], targets: Iterable[str]
) -> list[int]:
    """Return the cuts between the completion's spans, ascending, as many for every rollout with these span names."""
    edges: list[int] = []
    for before, after in zip([None, *spans], [*spans, None], strict=True):
        must, may = [], []
        if before is not None and before.name in blocked:
            must.append(blocked[before.name][1])
        if after is not None and after.name in blocked:
            must.append(blocked[after.name][0])
        if after is not None and after.name in sources:
            may.append(after.positions[0])
        if before is not None and after is not None and before.name in targets:
            may.append(before.positions[-1])
        for edge in must or may[:1]:
            if edges and edge < edges[-1]:
                if must:
                    raise UnservedError(f"a blocked span overlaps its neighbour at position {edge}")
                edge = edges[-1]
            edges.append(edge)
    return edges


def _run_of(rollout: Rollout, name: str) -> tuple[int, int]:
    positions = rollout.spans[name].positions
    start, end = positions[0], positions[-1] + 1
    if len(positions) != end - start or start < len(rollout.prompt_ids):
        raise UnservedError(f"the blocked span {name!r} is not one run of completion tokens")
    return start, end


def _stem_end(jobs: Sequence[Job]) -> int:
    return min(_shared_length([job.rollout.token_ids for job in jobs]), *(job.edges[0] for job in jobs))


def _shared_length(sequences: Sequence[Sequence[int]]) -> int:
    for length, column in enumerate(zip(*sequences, strict=False)):
        if any(token != column[0] for token in column):
            return length
    return min(map(len, sequences))


def _inside(start: int, end: int, runs: Sequence[tuple[int, int]]) -> bool:
    return start < end and any(first <= start and end <= last for first, last in runs)
