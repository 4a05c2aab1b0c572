"""The grammar of links, and groups of one prompt."""

from __future__ import annotations

from typing import Any

import pytest

from cepo.jacobian.links import Link, parse_link
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.reasoner import ReasonerLayout
from cepo.jacobian.records import Group
from tests.models import judge_rollout

LAYOUT = JudgeLayout()


def judge_link(text: str, target: str = "log_likelihood") -> Link:
    """Parse a link of a judge."""
    return parse_link(text, names=LAYOUT.names, roles=LAYOUT.roles, default_function=target)


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("Z->X", "log_likelihood", ("prompt", "criteria", "total", (), "log_likelihood")),
        ("X->Y", "log_likelihood", ("criteria", "scores", "total", (), "log_likelihood")),
        ("Z->Y", "log_likelihood", ("prompt", "scores", "direct", ("criteria",), "log_likelihood")),
        ("prompt->scores", "log_odds", ("prompt", "scores", "direct", ("criteria",), "log_odds")),
        ("Z->Y:total", "log_likelihood", ("prompt", "scores", "total", (), "log_likelihood")),
        ("Z->Y:residual", "margin", ("prompt", "scores", "residual", ("criteria",), "margin")),
        ("Z->analysis", "log_likelihood", ("prompt", "analysis", "total", (), "log_likelihood")),
        ("Z->analysis:direct", "log_likelihood", ("prompt", "analysis", "direct", ("criteria",), "log_likelihood")),
        ("X->Y:direct@margin", "log_odds", ("criteria", "scores", "direct", ("analysis",), "margin")),
        (" criteria -> analysis @ log_odds ", "margin", ("criteria", "analysis", "total", (), "log_odds")),
        ("analysis->scores", "expected_score", ("analysis", "scores", "total", (), "expected_score")),
        ("criteria->analysis", "expected_score", ("criteria", "analysis", "total", (), "log_likelihood")),
        ("X->Y@log_likelihood", "margin", ("criteria", "scores", "total", (), "log_likelihood")),
    ],
)
def test_link_grammar(text: str, target: str, expected: tuple[Any, ...]) -> None:
    """SOURCE->TARGET[:EFFECT][@SCORE] with roles, names, defaults and mediators."""
    link = judge_link(text, target)
    assert (link.source, link.target, link.effect, link.mediator, link.function) == expected
    assert link.name == text


def test_link_of_a_reasoner() -> None:
    """A reasoner's roles are rationale and answer; its answer is no number."""
    layout = ReasonerLayout()
    link = parse_link("Z->Y", names=layout.names, roles=layout.roles, default_function="margin")
    assert (link.target, link.effect, link.mediator, link.function) == (
        "answer",
        "direct",
        ("rationale",),
        "log_likelihood",
    )
    with pytest.raises(ValueError, match="margin"):
        parse_link("X->Y@margin", names=layout.names, roles=layout.roles)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("X", "not of the form"),
        ("", "not of the form"),
        ("X->Y->Z", "not of the form"),
        ("X=>Y", "not of the form"),
        ("X->W", "unknown span 'W'"),
        ("rationale->Y", "unknown span 'rationale'"),
        ("->Y", "unknown span ''"),
        ("x->Y", "unknown span 'x'"),
        ("Y->X", "zero by causality"),
        ("X->X", "zero by causality"),
        ("Z->Y:mediated", "effect 'mediated'"),
        ("Z->Y:", "effect ''"),
        ("Z->X:direct", "no span lies between"),
        ("criteria->analysis:residual", "no span lies between"),
        ("X->Y@entropy", "function 'entropy'"),
        ("X->Y@", "function ''"),
        ("Z->X@margin", "asks for margin"),
        ("X->analysis@expected_score", "asks for expected_score"),
    ],
)
def test_link_errors(text: str, message: str) -> None:
    """Each way to get a link wrong has its own sentence, which quotes the link."""
    with pytest.raises(ValueError, match=message) as caught:
        judge_link(text)
    assert repr(text) in str(caught.value)


def test_unknown_target() -> None:
    """The default target is checked too, and the message lists what there is."""
    with pytest.raises(ValueError, match="target is 'entropy'; expected one of log_likelihood, log_odds"):
        judge_link("X->Y", "entropy")


def test_group_shares_a_prompt() -> None:
    """A group is never empty and never mixes prompts."""
    with pytest.raises(ValueError, match="rollouts is empty"):
        Group(())
    with pytest.raises(ValueError, match="share their prompt_ids"):
        Group((judge_rollout(0), judge_rollout(1, prompt_seed=7)))
