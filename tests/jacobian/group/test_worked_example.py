"""The worked example of docs/engine.md: the rows that its tables name are those that the engine plans and runs."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from cepo.counterfactual.donors import replace_span
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.group.schedule import Plan
from cepo.jacobian.links import parse_link
from cepo.jacobian.protocol import PathRequest, Request
from cepo.jacobian.reading.reasoner import ReasonerLayout
from cepo.jacobian.records import Group, Rollout
from tests.jacobian.group.test_schedule import rows_run
from tests.models import span, tiny_model
from tests.paths import ROOT

PROMPT = (11, 12, 13)
LAYOUT = ReasonerLayout()
SPANS = {name: span(name, at) for name, at in zip(LAYOUT.names, ((0, 1, 2), (3, 4), (6, 7)), strict=True)}
TAG = 5
FIRST = Rollout(PROMPT, (21, 22, TAG, 31, 32), SPANS)
SECOND = Rollout(PROMPT, (23, 24, TAG, 33, 34), SPANS)
LINKS = tuple(parse_link(text, names=LAYOUT.names, roles=LAYOUT.roles) for text in ("Z->X", "X->Y", "Z->Y"))


def page() -> str:
    """Return the example's part of the page."""
    text = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    return text.split("## A worked example")[1].split("\n## ")[0]


def rows_on_page(first_cell: str) -> tuple[int, int]:
    """Return the rows forward and back that end a row of a table of the page, found by its first words."""
    (line,) = (line for line in page().splitlines() if line.startswith(f"| {first_cell}"))
    forward, back = re.findall(r"(\d+) \|", line)[-2:]
    return int(forward), int(back)


def rows_of(plan: Plan) -> dict[str, tuple[int, int]]:
    return {row.segment: (row.forward, row.backward) for row in plan.rows}


def permuted(rollout: Rollout) -> Rollout:
    one, other, *rest = rollout.completion_ids
    return replace(rollout, completion_ids=(other, one, *rest))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model("llama", dtype=torch.float32)


def test_jacobians_of_two_rollouts_and_a_permutation_of_each(model: torch.nn.Module) -> None:
    """Stem, two stages, and the permutations' one stage; what is run is what is planned, and equals the oracle."""
    base = Request(Group((FIRST, SECOND)), LINKS, context_energy=False)
    moved = Request(Group((permuted(FIRST), permuted(SECOND))), LINKS[1:2], context_energy=False)
    engine = GroupEngine(model)
    planned = {"base": rows_of(engine.plan([base])), "both": rows_of(engine.plan([base, moved]))}
    stem, criteria, scores, swapped = map(
        rows_on_page, ("stem `z z z`, once", "stage `X`", "stage `tag", "stage `X' tag")
    )
    assert planned["base"] == {"opening": (0, 0), "stem": stem, "stages": _sum(criteria, scores)}
    assert planned["both"] == {"opening": (0, 0), "stem": stem, "stages": _sum(criteria, scores, swapped)}
    assert rows_on_page("all Jacobians") == _sum(stem, criteria, scores, swapped)
    ran = rows_run(engine, model, [base, moved])
    assert (ran["forward"], ran["backward"]) == rows_on_page("all Jacobians")
    # Each alone: 7 of its 8 tokens, and as often back as it has links.
    alone = (2 * 7 + 2 * 7, 2 * 3 * 7 + 2 * 1 * 7)
    assert rows_on_page("each alone, Jacobians") == alone
    found, wanted = (list(each.compute([base, moved])) for each in (engine, JacobianEngine(model)))
    for ours, theirs in zip(found, wanted, strict=True):
        for records, oracles in zip(ours, theirs, strict=True):
            for name, oracle in oracles.items():
                torch.testing.assert_close(records[name].jac_SD, oracle.jac_SD, rtol=1e-4, atol=1e-6)


def test_an_effect_and_a_path_to_one_donor(model: torch.nn.Module) -> None:
    """The donor begins like the own criteria, so its branch leaves one token later."""
    others = tuple((replace_span(each, "rationale", (each.completion_ids[0], 25)),) for each in (FIRST, SECOND))
    asked = PathRequest(Group((FIRST, SECOND)), others, LINKS[1:2])
    engine = GroupEngine(model)
    stem, rollouts, branches, point = map(
        rows_on_page, ("stem `z z z`, no", "rollouts", "branches `x'", "branches halfway")
    )
    assert rows_of(engine.plan_paths([asked])) == {"stem": stem, "rollouts": rollouts, "branches": branches}
    path = rows_of(engine.plan_paths([replace(asked, nodes=1)]))
    assert path == {"stem": stem, "rollouts": rollouts, "branches": _sum(branches, point)}
    assert rows_on_page("all of effect and path") == _sum(stem, rollouts, branches, point)
    assert rows_on_page("each alone, effect and path") == (2 * 7 + 2 * 7 + 2 * 7, 2 * 7)


def _sum(*rows: tuple[int, int]) -> tuple[int, int]:
    forward, back = zip(*rows, strict=True)
    return sum(forward), sum(back)
