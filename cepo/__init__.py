"""cepo: exact d(score)/d(criteria) rewards for language-model judges and reasoners."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cepo.fusion.engine import PAPER, PAPER_LINKS, RewardConfig, RolloutScore, score_rollouts
    from cepo.fusion.power_mean import power_mean
    from cepo.fusion.scores import LinkScore
    from cepo.jacobian.group import GroupEngine
    from cepo.jacobian.layouts import JudgeLayout, ReasonerLayout
    from cepo.jacobian.loading import load_model, resolve_model
    from cepo.jacobian.records import Group, LinkJacobian, Rollout, Span, parse_link
    from cepo.jacobian.spans import SpanReader
    from cepo.jacobian.vjp import JacobianEngine
    from cepo.train.causal import CausalReward
    from cepo.train.proxy import ProxyReward
    from cepo.train.rewards import argmax_reward, exact_match, format_reward

# Loaded on first use, so that `cepo --help` and a refused argument do not wait for torch.
_HOMES = {
    "PAPER": "fusion.engine",
    "PAPER_LINKS": "fusion.engine",
    "RewardConfig": "fusion.engine",
    "RolloutScore": "fusion.engine",
    "score_rollouts": "fusion.engine",
    "power_mean": "fusion.power_mean",
    "LinkScore": "fusion.scores",
    "load_model": "jacobian.loading",
    "resolve_model": "jacobian.loading",
    "Group": "jacobian.records",
    "LinkJacobian": "jacobian.records",
    "Rollout": "jacobian.records",
    "Span": "jacobian.records",
    "parse_link": "jacobian.records",
    "GroupEngine": "jacobian.group",
    "JudgeLayout": "jacobian.layouts",
    "ReasonerLayout": "jacobian.layouts",
    "SpanReader": "jacobian.spans",
    "JacobianEngine": "jacobian.vjp",
    "CausalReward": "train.causal",
    "ProxyReward": "train.proxy",
    "argmax_reward": "train.rewards",
    "exact_match": "train.rewards",
    "format_reward": "train.rewards",
}
__all__ = [
    "PAPER",
    "PAPER_LINKS",
    "CausalReward",
    "Group",
    "GroupEngine",
    "JacobianEngine",
    "JudgeLayout",
    "LinkJacobian",
    "LinkScore",
    "ProxyReward",
    "ReasonerLayout",
    "RewardConfig",
    "Rollout",
    "RolloutScore",
    "Span",
    "SpanReader",
    "argmax_reward",
    "exact_match",
    "format_reward",
    "load_model",
    "parse_link",
    "power_mean",
    "resolve_model",
    "score_rollouts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cepo' has no attribute {name!r}")
    return getattr(import_module(f"cepo.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
