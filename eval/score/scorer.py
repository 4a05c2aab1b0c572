"""Scoring of rows for `cepo score`, in this process or in a Ray worker: the model, the donors, and the records."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cepo.counterfactual.exchange import exchanged_prompts
from cepo.eval.score.criteria import criteria_of
from cepo.eval.score.matrices import save_matrices
from cepo.eval.score.rows import Line, read_lines, rollout_of
from cepo.files import content_hash, counted
from cepo.fusion.config import RewardConfig
from cepo.fusion.records import LinkScore
from cepo.fusion.score import Pools, RolloutScore, RolloutScorer, pools_of
from cepo.jacobian.engines import EngineName, new_engine
from cepo.jacobian.group.halving import is_out_of_memory, release_memory
from cepo.jacobian.loading import ModelSource, load_tokenizer, load_weights
from cepo.jacobian.protocol import Engine
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout
from cepo.train.prompts import JUDGE

logger = logging.getLogger("cepo")


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How rows are scored.

    Attributes:
        model: see `resolve_model`.
        config: links, hardening, score, fusion.
        layout: format of the completions.
        raw: whether to take prompt text as it is, without the chat template.
        donors: file of rollouts whose spans serve as donors, in a format of the input; None for the scored rows.
        dtype: dtype of the weights.
        device: device to run on.
        adapters: False disables the adapters of a PEFT model.
        engine: "group" or "autograd" (the oracle).
        memory_gib: GiB that the group engine may use besides the model.
        trust_remote_code: whether a hub repository's own code may run.
    """

    model: str
    config: RewardConfig = field(default_factory=RewardConfig)
    layout: Layout = JUDGE
    raw: bool = False
    donors: Path | None = None
    dtype: str = "float32"
    device: str = "cpu"
    adapters: bool = True
    engine: EngineName = "group"
    memory_gib: float = 3.0
    trust_remote_code: bool = False


def open_reader(scoring: Scoring, source: ModelSource) -> SpanReader:
    """Return the reader of spans, which needs the tokenizer but no weights."""
    return SpanReader(load_tokenizer(source, trust_remote_code=scoring.trust_remote_code), scoring.layout)


def open_engine(scoring: Scoring, source: ModelSource) -> Engine:
    """Load the weights, and return the engine."""
    code = scoring.trust_remote_code
    model = load_weights(source, dtype=scoring.dtype, device=scoring.device, trust_remote_code=code)
    budget = scoring.memory_gib * 2**30
    return new_engine(scoring.engine, model, adapters=scoring.adapters, memory_budget=budget)


def donor_pools(scoring: Scoring, lines: Sequence[Line], reader: SpanReader, *, origin: Path | None) -> Pools | None:
    """Return the donor candidates for each source span, from the donors file or else the lines.

    Args:
        scoring: how rows are scored.
        lines: all rows to score.
        reader: finds their spans.
        origin: file of the lines, for the error message.

    Returns:
        The candidates; None if the score uses no donors.

    Raises:
        ValueError: if `no_donor` is "zero" and no span can have a donor: the donors file has no well-formed rollout, or
            it and the lines have well-formed rollouts of one prompt alone.
    """
    if not scoring.config.reads_effects:
        return None
    named = "input" if scoring.donors is None else "donors_file"
    offered = lines if scoring.donors is None else read_lines(scoring.donors, layout=scoring.layout, named=named)
    rollouts = [rollout_of(line, reader, raw=scoring.raw) for line in offered]
    links = scoring.config.parsed_links(scoring.layout)
    pools = pools_of(rollouts, links)
    wrong = Counter(one.malformed for one in rollouts if one.malformed)
    if scoring.donors is None and wrong.total() == len(rollouts):
        return pools  # there is no span that could need a donor: all rows are scored 0
    prompts = served = _prompts_of(pools)
    if scoring.donors is not None:
        served = _prompts_of(pools_of((rollout_of(line, reader, raw=scoring.raw) for line in lines), links))
    if scoring.config.no_donor == "zero" and (not prompts or (served and len(prompts | served) < 2)):
        reasons = "; ".join(f"{reason} ({count}x)" for reason, count in wrong.most_common(3))
        cause = f"{wrong.total()} of {len(rollouts)} rows are malformed: {reasons}. It " if wrong else "It "
        raise ValueError(
            f"{named} {str(scoring.donors or origin)!r} has no donors. {cause}holds well-formed rollouts of "
            f"{counted(len(prompts), 'prompt')}, and a donor is the content of another prompt's rollout; name a "
            "file of other prompts' rollouts with --donors, or compare with permuted tokens: --no-donor permute"
        )
    return pools


def _prompts_of(pools: Pools) -> set[str]:
    return {candidate.prompt for pool in pools.values() for candidate in pool}


def batches_of(lines: Mapping[int, Line], size: int) -> list[list[int]]:
    """Return the rows in batches of at most `size`; rows of a prompt share a batch unless they are more than that.

    Args:
        lines: lines by row number.
        size: at least 1.
    """
    by_prompt: dict[str, list[int]] = {}
    for row, line in lines.items():
        by_prompt.setdefault(content_hash(line.prompt), []).append(row)
    batches: list[list[int]] = []
    for rows in by_prompt.values():
        if batches and len(batches[-1]) + len(rows) <= size:
            batches[-1] += rows
        else:
            batches += [rows[start : start + size] for start in range(0, len(rows), size)]
    return batches


def score_lines(
    scoring: Scoring,
    lines: Sequence[Line],
    reader: SpanReader,
    engine: Engine | None,
    pools: Pools | None,
    *,
    rows: Sequence[int | None],
    matrices: Path | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (index, record) of each line as it is scored; what rows have in common is computed once.

    A record depends on the other lines only by rounding. When memory runs out, the lines that are left are scored in
    batches of half the size.

    Args:
        scoring: how rows are scored.
        lines: the rows.
        reader: finds their spans.
        engine: computes effects and Jacobians; None if no line can be used.
        pools: donor candidates; None if no donors are used.
        rows: row number of each line in the input, from 0; None if it has no number.
        matrices: folder to write the matrices to, or None.
    """
    rollouts = [_taken(line, rollout_of(line, reader, raw=scoring.raw), engine) for line in lines]
    left, at_once = list(range(len(lines))), len(lines)
    while left:
        part = left[:at_once]
        try:
            some = [lines[place] for place in part], [rollouts[place] for place in part]
            for index, score in _scores(scoring, *some, reader, engine, pools):
                place = part[index]
                row, rollout = rows[place], rollouts[place]
                if matrices is not None and row is not None and rollout.token_ids:
                    save_matrices(matrices, row, lines[place].content, rollout, score)
                left.remove(place)
                yield place, _record(row, lines[place], rollout, score, reader)
            continue
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(part) == 1:
                raise
        at_once = (len(part) + 1) // 2
        logger.warning("out of memory with %d rows together; continuing with %d", len(part), at_once)
        release_memory()


def _taken(line: Line, rollout: Rollout, engine: Engine | None) -> Rollout:
    """Return the rollout; one without tokens, as of a line that cannot be used, if the model cannot take its prompt.

    No completion could have been scored then. Where only the completion is too much, it is malformed.
    """
    problem = None if engine is None else engine.refusal(Rollout(rollout.prompt_ids, ()))
    if problem is None:
        return rollout
    return Rollout((), (), malformed=f"{line.place}: the model cannot take its prompt: {problem}")


def _scores(
    scoring: Scoring,
    lines: Sequence[Line],
    rollouts: Sequence[Rollout],
    reader: SpanReader,
    engine: Engine | None,
    pools: Pools | None,
) -> Iterator[tuple[int, RolloutScore]]:
    """Yield (index, score) of each line, those that cannot be used first."""
    if engine is None:
        return ((index, RolloutScore({}, 0.0, one.malformed)) for index, one in enumerate(rollouts))
    scorer = RolloutScorer(engine, scoring.config, scoring.layout, keep_jacobians=True, one_by_one=True)
    return scorer.scores(
        rollouts,
        task_rewards=[line.task_reward for line in lines],
        pools=pools,
        exchanged=exchanged_prompts(rollouts, reader) if scoring.config.reads_leak else None,
    )


def _record(row: int | None, line: Line, rollout: Rollout, score: RolloutScore, reader: SpanReader) -> dict[str, Any]:
    texts = reader.texts(rollout.token_ids) if score.links else []
    links = {name: _link_record(link, score, rollout, texts) for name, link in score.links.items()}
    broken = not rollout.token_ids
    return {
        "row": row,
        "id": line.name,
        "reward": None if broken else score.reward,
        "malformed": score.malformed,
        "broken": broken,
        "task_reward": line.task_reward,
        "found_by": rollout.found_by if score.malformed is None else None,
        "prompt_found_by": rollout.prompt_found_by if score.malformed is None else None,
        "prompt_tokens": len(rollout.prompt_ids),
        "completion_tokens": len(rollout.completion_ids),
        "spans": {name: {"text": span.text, "tokens": len(span.positions)} for name, span in rollout.spans.items()},
        "S": dict(score.values),
        "order_leak": score.order_leak,
        "links": links,
        "content": line.content,
    }


def _link_record(link: LinkScore, score: RolloutScore, rollout: Rollout, texts: Sequence[str]) -> dict[str, Any]:
    """Return a link's record, with the Jacobian's row norm and the path's attribution for each token of its source."""
    facts = asdict(link)
    record = {"S": facts.pop("value"), **{key: value for key, value in facts.items() if key != "link"}}
    hardened, path = score.jacobians.get(link.link), score.paths.get(link.link)
    where = hardened.base if hardened is not None else path
    if where is not None:
        record["source_positions"] = list(where.source_positions)
        record["target_positions"] = list(where.target_positions)
    if hardened is not None:
        record["row_norms"] = [float(f"{norm:.6g}") for norm in hardened.base.jac_SD.double().norm(dim=1).tolist()]
    if path is not None and path.attribution_S is not None:
        record["attribution"] = [float(f"{nats:.6g}") for nats in path.attribution_S.tolist()]
        record["criteria"] = [asdict(one) for one in criteria_of(path, rollout.spans[path.link.source], texts)]
    return record
