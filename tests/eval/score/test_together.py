"""Protects rows that are scored together: the records of each alone, from fewer token rows, within the memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cepo.eval.score.rows import Line, line_of, rollout_of
from cepo.eval.score.scorer import Scoring, batches_of, donor_pools, open_engine, open_reader, score_lines
from cepo.fusion.config import RewardConfig
from cepo.jacobian.loading import resolve_model
from cepo.jacobian.protocol import PathAnswer, PathRequest
from cepo.train import testbed
from tests.eval.score.records import check_alike
from tests.models import InDouble

ITEMS = testbed.generate_items(8, seed=9, cue_agreement=0.5)


class Scored:
    """Rows of two prompts in turn, two completions each; then a malformed one, and one that cannot be used."""

    def __init__(self, judge: Path, config: RewardConfig) -> None:
        rows: list[Any] = [
            {"id": f"{prompt}/{place}", "prompt": ITEMS[prompt].prompt, "completion": ITEMS[prompt + place].completion}
            for place in (0, 2)
            for prompt in (0, 1)
        ]
        rows += [{**rows[0], "completion": "no tags"}, {"id": "broken", "prompt": "no completion"}]
        self.lines = [line_of(row, f"line {number}") for number, row in enumerate(rows, start=1)]
        self.scoring = Scoring(model=str(judge), config=config, dtype="float64")
        source = resolve_model(str(judge))
        self.reader, self.engine = open_reader(self.scoring, source), open_engine(self.scoring, source)
        donors = [line_of({"prompt": item.prompt, "completion": item.completion}, "donor") for item in ITEMS]
        self.pools = donor_pools(self.scoring, donors, self.reader, origin=None)
        self.token_rows = 0
        assert self.engine is not None
        assert self.engine.unserved is None  # its trial runs tokens too
        self.engine._held.layers[0].mlp.register_forward_pre_hook(self._count)

    def _count(self, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self.token_rows += inputs[0].shape[:-1].numel()

    def __call__(self, batches: Sequence[Sequence[int]]) -> tuple[list[dict[str, Any]], int]:
        """Return the records of all rows, scored in batches, in order, and the token rows that went forward."""
        before, found = self.token_rows, {}
        for batch in batches:
            lines = [self.lines[row] for row in batch]
            for place, record in score_lines(self.scoring, lines, self.reader, self.engine, self.pools, rows=batch):
                found[batch[place]] = record
        return [found[row] for row in range(len(self.lines))], self.token_rows - before


@pytest.mark.parametrize(
    ("config", "times"),
    [(RewardConfig(also=("order_leak",)), 2.5), (RewardConfig.paper(counterfactuals=1), 1)],
    ids=["default and order leak", "paper"],
)
def test_a_record_does_not_depend_on_the_rows_beside_it(judge: Path, config: RewardConfig, times: float) -> None:
    """Its prompt is not run again for every completion: once for what is scored, twice for the order leak, whose two
    prompts begin alike and share that when they are alone too."""
    with InDouble():
        scored = Scored(judge, config)
        rows = range(len(scored.lines))
        alone, rows_alone = scored([[row] for row in rows])
        together, rows_together = scored([rows])
    check_alike(together, alone, 1e-10)
    assert [record["malformed"] is None for record in alone] == [True] * 4 + [False] * 2
    repeated = [len(rollout_of(line, scored.reader).prompt_ids) for line in scored.lines[2:4]]
    assert rows_alone - rows_together >= times * sum(repeated)


def test_rows_of_one_prompt_share_a_batch() -> None:
    """They stand together wherever the file has them, and are parted only where a batch cannot hold them."""
    lines = {
        10 * row: Line(f"line {row}", row={"prompt": prompt, "completion": str(row)})
        for row, prompt in enumerate("abacbab")
    }
    assert batches_of(lines, 4) == [[0, 20, 50], [10, 40, 60, 30]]
    assert batches_of(lines, 2) == [[0, 20], [50], [10, 40], [60, 30]]
    assert batches_of(lines, 1) == [[0], [20], [50], [10], [40], [60], [30]]
    assert batches_of({}, 3) == []


class Small:
    """An engine with memory for a few rollouts, which runs out with more, in the midst of its answers."""

    def __init__(self, engine: Any, room: int) -> None:
        self.engine, self.room, self.calls = engine, room, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def paths(self, requests: Sequence[PathRequest]) -> Iterator[PathAnswer]:
        rollouts = {rollout.token_ids for request in requests for rollout in request.group.rollouts}
        self.calls.append(len(rollouts))
        for number, answer in enumerate(self.engine.paths(requests)):
            if number == min(2, self.room) and len(rollouts) > self.room:
                raise torch.OutOfMemoryError("no more")
            yield answer


def test_where_memory_runs_out_fewer_rows_are_scored_together(judge: Path) -> None:
    """No record is lost, none is there twice, and a row that is too much alone is an error."""
    scored = Scored(judge, RewardConfig())
    wanted, _ = scored([range(len(scored.lines))])
    small = Small(scored.engine, room=2)
    scored.engine = small  # type: ignore[assignment]
    found, _ = scored([range(len(scored.lines))])
    assert small.calls == [4, 3, 2]  # the first of four had come, and the first of three
    check_alike(found, wanted, 1e-6)
    small.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        scored([range(len(scored.lines))])
