"""cepo: rewards for language-model judges and reasoners whose criteria cause their verdicts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cepo.eval.score.ray import CepoScorer
    from cepo.eval.score.scorer import Scoring
    from cepo.fusion.config import PAPER, PAPER_LINKS, RewardConfig
    from cepo.fusion.power_mean import power_mean
    from cepo.fusion.records import LinkScore
    from cepo.fusion.score import RolloutScore, score_rollouts
    from cepo.jacobian.autograd import JacobianEngine
    from cepo.jacobian.group.engine import GroupEngine
    from cepo.jacobian.links import parse_link
    from cepo.jacobian.loading import load_model, resolve_model
    from cepo.jacobian.reading.judge import JudgeLayout
    from cepo.jacobian.reading.reasoner import ReasonerLayout
    from cepo.jacobian.reading.spans import SpanReader
    from cepo.jacobian.records import Group, LinkJacobian, Rollout, Span
    from cepo.train.rewards.causal import CausalReward
    from cepo.train.rewards.proxy import ProxyReward
    from cepo.train.rewards.task import argmax_reward, exact_match, format_reward

# Loaded on first use, so that `cepo --help` and a refused argument do not wait for torch.
_HOMES = {
    "CepoScorer": "eval.score.ray",
    "Scoring": "eval.score.scorer",
    "PAPER": "fusion.config",
    "PAPER_LINKS": "fusion.config",
    "RewardConfig": "fusion.config",
    "RolloutScore": "fusion.score",
    "score_rollouts": "fusion.score",
    "power_mean": "fusion.power_mean",
    "LinkScore": "fusion.records",
    "load_model": "jacobian.loading",
    "resolve_model": "jacobian.loading",
    "Group": "jacobian.records",
    "LinkJacobian": "jacobian.records",
    "Rollout": "jacobian.records",
    "Span": "jacobian.records",
    "parse_link": "jacobian.links",
    "GroupEngine": "jacobian.group.engine",
    "JudgeLayout": "jacobian.reading.judge",
    "ReasonerLayout": "jacobian.reading.reasoner",
    "SpanReader": "jacobian.reading.spans",
    "JacobianEngine": "jacobian.autograd",
    "CausalReward": "train.rewards.causal",
    "ProxyReward": "train.rewards.proxy",
    "argmax_reward": "train.rewards.task",
    "exact_match": "train.rewards.task",
    "format_reward": "train.rewards.task",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cepo' has no attribute {name!r}")
    return getattr(import_module(f"cepo.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
