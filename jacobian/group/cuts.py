"""Cut rollouts into the group engine's segments, so that rows are shared, blocked or dropped; without tensors.

All rollouts of a prompt share a stem: every token before the first that differs or must be cut. After it, a rollout
runs in stages. A stage ends where a blocked span begins or ends (so that dropping its cotangents blocks the span),
before a source span (rows before it need no backward pass) and after a target span (later rows contribute nothing to
it). Between two spans at most one cut of the latter two kinds is made: a second one would save only a tag's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cepo.jacobian.passes import Pass, passes_of
from cepo.jacobian.protocol import Request
from cepo.jacobian.records import Rollout, Span
from cepo.jacobian.targets import Term, target_terms

# Fewer rows than this are kept in the next segment, and its backward pass, rather than made a segment of their own.
_WORTH_A_SEGMENT = 16


class UnservedError(Exception):
    """A model or request cannot be run in segments, for the reason in the message; the oracle serves it."""


@dataclass(frozen=True)
class JobPass:
    """One pass of one rollout.

    Attributes:
        key: the pass.
        terms: the terms of its target function.
        first_row: the first position whose gradient is needed.
        blocked: the positions [start, end) that no cotangent may cross.
    """

    key: Pass
    terms: tuple[Term, ...]
    first_row: int
    blocked: tuple[tuple[int, int], ...]

    def blocks(self, start: int, end: int) -> bool:
        """Return whether the positions [start, end) lie within a blocked span."""
        return start < end and any(first <= start and end <= last for first, last in self.blocked)


@dataclass(frozen=True)
class Job:
    """One rollout of one request, cut into stages.

    Attributes:
        number: its index among the jobs of one call, ascending in the order of the rollouts.
        prompt: the index of its prompt among those of one call.
        rollout: the rollout to differentiate.
        passes: the passes that the request's links need; all jobs of a request have the same keys.
        cuts: ascending ends of the stages; tokens from the last one on are not run.
    """

    number: int
    prompt: int
    rollout: Rollout
    passes: tuple[JobPass, ...]
    cuts: tuple[int, ...]


@dataclass(frozen=True)
class HeadRow:
    """One row of the head.

    Attributes:
        job: what it is read for: in a stage the index of a job in the batch, in a stem a job's number, for path
            requests the index of a variant.
        pass_index: the pass that it is read for.
        sequence: index of the sequence in the segment's batch.
        row: its row within that sequence.
        term: what is read from it.
    """

    job: int
    pass_index: int
    sequence: int
    row: int
    term: Term


@dataclass(frozen=True)
class Segment:
    """Tokens that are run as one padded batch.

    Attributes:
        ids: the token ids of each sequence, ragged.
        starts: the position of each sequence's first token.
        head: the rows that are read through the head.
        differentiated: whether a graph is kept.
        active: in a stage, the indices of the passes whose cotangents go back through it.
    """

    ids: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    head: tuple[HeadRow, ...] = ()
    differentiated: bool = False
    active: tuple[int, ...] = ()

    @property
    def ends(self) -> tuple[int, ...]:
        """The position after the last token of each sequence."""
        return tuple(start + len(ids) for start, ids in zip(self.starts, self.ids, strict=True))

    @property
    def length(self) -> int:
        """Tokens per sequence, padding included."""
        return max(map(len, self.ids))

    @property
    def rows(self) -> int:
        """Token rows of one forward pass, padding included."""
        return len(self.ids) * self.length


@dataclass(frozen=True, eq=False)
class Stem:
    """The tokens [0, end) that all jobs of a prompt share, for one prompt or several that run as one batch.

    Attributes:
        prompts: indices of the prompts, one for each sequence.
        opening: [0, opening) is shared with other prompts and run once for all of them, without a graph.
        constant: [opening, start), run without a graph for each prompt; None if empty.
        segment: [start, end), run with a graph if any gradient in it is needed.
    """

    prompts: tuple[int, ...]
    opening: int
    constant: Segment | None
    segment: Segment

    @property
    def start(self) -> int:
        """First position of the segment; the largest over the prompts."""
        return max(self.segment.starts)

    @property
    def end(self) -> int:
        """First position after the stem; the largest over the prompts."""
        return max(self.segment.ends)


def cut_request(request: Request, numbers: Iterator[int], prompt: int) -> tuple[Job, ...]:
    """Return the request's rollouts as jobs, longest first, since batches of similar length need least padding.

    Args:
        request: the request.
        numbers: yields the numbers of its rollouts, in their order.
        prompt: the index of its prompt.

    Raises:
        UnservedError: if a rollout cannot be cut.
    """
    sources = {
        key: {link.source for link in request.links if key in passes_of([link])} for key in passes_of(request.links)
    }
    jobs = [_cut_rollout(request, rollout, sources, next(numbers), prompt) for rollout in request.group.rollouts]
    return tuple(sorted(jobs, key=lambda job: -job.cuts[-1]))


def stems_of(jobs_by_prompt: Sequence[Sequence[Job]]) -> tuple[Segment | None, list[Stem]]:
    """Return the opening that prompts share and that needs no gradient, if any, and the stem of each prompt."""
    ends = [_stem_end(jobs) for jobs in jobs_by_prompt]
    firsts = [
        min([end, *(each.first_row for job in jobs for each in job.passes)])
        for jobs, end in zip(jobs_by_prompt, ends, strict=True)
    ]
    # At least one token is left after the opening, so that the stem's segment is not empty.
    can_share = [
        jobs[0].rollout.token_ids[: min(first, end - 1)]
        for jobs, first, end in zip(jobs_by_prompt, firsts, ends, strict=True)
        if first > 0
    ]
    shared = shared_length(can_share) if can_share else 0
    shared = shared if shared >= _WORTH_A_SEGMENT else 0
    found = []
    for jobs, first, end in zip(jobs_by_prompt, firsts, ends, strict=True):
        ids = jobs[0].rollout.token_ids
        opening = shared if first > 0 else 0
        start = first if first < end and first - opening >= _WORTH_A_SEGMENT else opening
        head = tuple(
            HeadRow(job.number, index, 0, term.position - 1 - start, term)
            for job in jobs
            for index, each in enumerate(job.passes)
            for term in each.terms
            if each.first_row <= term.position - 1 < end
        )
        constant = Segment((ids[opening:start],), (opening,)) if start > opening else None
        found.append(
            Stem((jobs[0].prompt,), opening, constant, Segment((ids[start:end],), (start,), head, first < end))
        )
    return Segment((can_share[0][:shared],), (0,)) if shared else None, found


def joined(stems: Sequence[Stem]) -> Stem:
    """Return the stems of prompts of one kind as one batch."""
    if len(stems) == 1:
        return stems[0]
    segments = [stem.segment for stem in stems]
    constants = [stem.constant for stem in stems if stem.constant is not None]
    head = tuple(replace(row, sequence=sequence) for sequence, segment in enumerate(segments) for row in segment.head)
    return Stem(
        tuple(prompt for stem in stems for prompt in stem.prompts),
        stems[0].opening,
        _side_by_side(constants) if constants else None,
        replace(_side_by_side(segments), head=head, differentiated=segments[0].differentiated),
    )


def _side_by_side(segments: Sequence[Segment]) -> Segment:
    return Segment(
        tuple(ids for segment in segments for ids in segment.ids),
        tuple(start for segment in segments for start in segment.starts),
    )


def stages_of(jobs: Sequence[Job], stem_ends: Sequence[int]) -> tuple[Segment, ...]:
    """Return the stages of jobs of one kind after their stems; empty stages are left out."""
    bounds = [(end, *(max(cut, end) for cut in job.cuts)) for job, end in zip(jobs, stem_ends, strict=True)]
    found: list[Segment] = []
    downstream: set[int] = set()  # passes that a later stage sends cotangents back for
    for place in reversed(range(len(bounds[0]) - 1)):
        pieces = [(job, bound[place], bound[place + 1]) for job, bound in zip(jobs, bounds, strict=True)]
        if all(start == end for _, start, end in pieces):
            continue
        open_passes = [
            index
            for index in range(len(jobs[0].passes))
            if any(job.passes[index].first_row < end for job, _, end in pieces)
            and not any(job.passes[index].blocks(start, end) for job, start, end in pieces)
        ]
        head = tuple(
            HeadRow(sequence, index, sequence, term.position - 1 - start, term)
            for sequence, (job, start, end) in enumerate(pieces)
            for index in open_passes
            for term in job.passes[index].terms
            if max(start, job.passes[index].first_row) <= term.position - 1 < end
        )
        used = downstream | {row.pass_index for row in head}
        active = tuple(index for index in open_passes if index in used)
        downstream |= set(active)
        ids = tuple(job.rollout.token_ids[start:end] for job, start, end in pieces)
        found.append(Segment(ids, tuple(start for _, start, _ in pieces), head, bool(active), active))
    return tuple(found[::-1])


def _cut_rollout(request: Request, rollout: Rollout, sources: Mapping[Pass, set[str]], number: int, prompt: int) -> Job:
    blocked = {name: _run_of(rollout, name) for key in sources for name in key.blocked}
    passes = tuple(
        JobPass(
            key,
            target_terms(rollout, key.target, key.function),
            0 if request.context_energy else min(rollout.spans[name].positions[0] for name in names),
            tuple(blocked[name] for name in key.blocked),
        )
        for key, names in sources.items()
    )
    last = max(term.position for each in passes for term in each.terms)
    split = len(rollout.prompt_ids)
    spans = sorted(
        (span for span in rollout.spans.values() if span.positions[0] >= split), key=lambda span: span.positions[0]
    )
    cuts = _cuts(
        spans, blocked, sources={link.source for link in request.links}, targets={key.target for key in sources}
    )
    return Job(number, prompt, rollout, passes, (*(min(cut, last) for cut in cuts), last))


def _cuts(
    spans: Sequence[Span], blocked: Mapping[str, tuple[int, int]], sources: Iterable[str], targets: Iterable[str]
) -> list[int]:
    """Return the cuts between the completion's spans, ascending; their number depends only on the spans' names."""
    cuts: list[int] = []
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
        for cut in must or may[:1]:
            if cuts and cut < cuts[-1]:
                if must:
                    raise UnservedError(f"a blocked span overlaps its neighbour at position {cut}")
                cut = cuts[-1]
            cuts.append(cut)
    return cuts


def _run_of(rollout: Rollout, name: str) -> tuple[int, int]:
    positions = rollout.spans[name].positions
    start, end = positions[0], positions[-1] + 1
    if len(positions) != end - start or start < len(rollout.prompt_ids):
        raise UnservedError(f"the blocked span {name!r} is not one run of completion tokens")
    return start, end


def _stem_end(jobs: Sequence[Job]) -> int:
    """Return where the stem ends; never inside a number, whose terms must be read together."""
    end = min(shared_length([job.rollout.token_ids for job in jobs]), *(job.cuts[0] for job in jobs))
    for first, last in sorted({rows for job in jobs for each in job.passes for rows in _rows_of_numbers(each.terms)})[
        ::-1
    ]:
        if first < end <= last:
            end = first
    return end


def _rows_of_numbers(terms: Sequence[Term]) -> list[tuple[int, int]]:
    """Return the first and the last row of each number."""
    rows: list[tuple[int, int]] = []
    for term in terms:
        if term.kind == "number":
            rows.append((term.position - 1, term.position - 1))
        elif term.kind == "number_goes_on":
            rows[-1] = (rows[-1][0], term.position - 1)
    return rows


def shared_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest common prefix."""
    for length, column in enumerate(zip(*sequences, strict=False)):
        if any(token != column[0] for token in column):
            return length
    return min(map(len, sequences))
