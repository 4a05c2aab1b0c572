"""Published rewards for rationales that cause the answer, for comparison with ours: cir, log_cir, csr and necessary.

Each runs the live policy forward on the completion's own ids, with the rationale shortened, edited or hidden, and
measures how the probability of the completion's own answer changes. None of them needs gradients.
"""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cepo.counterfactual.donors import Candidate, candidates, with_donors
from cepo.counterfactual.permute import permutations
from cepo.jacobian.model import HeldModel
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.records import Rollout
from cepo.jacobian.sharding import readable
from cepo.train.prompts import JUDGE
from cepo.train.rewards.answer import Variant, answer_log_probabilities, joint_log_probabilities, without
from cepo.train.rewards.bound import BoundReward, gathered, require_donors

Edit = Literal["donor", "permutation"]
_BOUND_NATS = 10.0


class PeerReward(BoundReward, abc.ABC):
    """A reward that compares the completion's own answer after the rationale as written and after changed ones.

    It is called, bound, logged and pickled like `CausalReward`: the policy is read in eval mode and outside of
    autocast, on the very ids that were sampled. Malformed completions score 0 and are counted; since some rewards can
    be negative, another reward must ask for the format. Completions do not share forward passes, so a reward depends on
    neither batch size nor order. The answer is the span that the layout calls Y.

    Args:
        source: the rationale: names of one or more spans, such as ["criteria", "analysis"]; None for the layout's X
            (a judge's criteria, a reasoner's rationale). Only their movable tokens are dropped, edited or hidden.
        scorer: None for the live policy, else a frozen causal LM with the policy's tokenizer: the model, or its name.
        layout: format of the completions.
        name: the name in TRL's logs.

    Raises:
        ValueError: for a source that the layout does not have, or that is its answer or its prompt.
    """

    def __init__(self, *, source: str | Sequence[str] | None, scorer: Any, layout: Layout, name: str) -> None:
        names = [source or layout.roles["X"]] if source is None or isinstance(source, str) else list(source)
        allowed = [name for name in layout.names if name not in (layout.roles["Z"], layout.roles["Y"])]
        self.source = tuple(dict.fromkeys(layout.roles.get(name, name) for name in names))
        if not self.source or not set(self.source) <= set(allowed):
            raise ValueError(f"source is {source!r}; expected one or more of {', '.join(allowed)}")
        super().__init__(scorer, layout, name)

    @abc.abstractmethod
    def variants(self, rollouts: Sequence[Rollout]) -> list[list[Variant]]:
        """Return, for each well-formed rollout, the sequence as written and then the changed ones."""

    @abc.abstractmethod
    def value(self, log_p: Iterable[Tensor], answer_P: Tensor) -> float:
        """Return the reward of one rollout.

        Args:
            log_p: for each variant the log-probabilities (P, V) that predict the answer's tokens, in nats; only for the
                sequence as written if nothing could be changed.
            answer_P: the ids of the answer's tokens, int64.
        """

    def values(self, model: HeldModel, variants: Sequence[Sequence[Variant]]) -> list[float]:
        """Return the reward of each rollout from its variants, see `variants`."""
        with model.prepared():
            answers = [torch.tensor([own.token_ids[at] for at in own.targets]) for own, *_ in variants]
            changed = [answer_log_probabilities(model, of_rollout) for of_rollout in variants]
            return [self.value(*pair) for pair in zip(changed, answers, strict=True)]

    def bind(self, trainer: Any) -> PeerReward:
        """Bind the reward to a TRL trainer, as `CausalReward.bind` does.

        Raises:
            ValueError: as `cepo.train.trainer.span_reader` (tools, images), and if FSDP1 shards the policy.
        """
        self._bind(trainer, HeldModel)  # raises for models that it cannot run
        return self

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Return the reward of each completion; called by TRL.

        Raises:
            ValueError: if `bind` was not called.
        """
        started = time.perf_counter()
        _, rollouts = self._read(prompts, completion_ids, columns)
        held = HeldModel(self._model)
        problems = [rollout.malformed or held.refusal(rollout) for rollout in rollouts]
        sound = [place for place, problem in enumerate(problems) if problem is None]
        variants = dict(zip(sound, self.variants([rollouts[place] for place in sound]), strict=True))
        rewards = [0.0] * len(rollouts)
        with readable(self._model):
            for place, found in zip(sound, self.values(held, list(variants.values())), strict=True):
                rewards[place] = found
        if log_metric is not None:
            count = max(len(rollouts), 1)
            log_metric(f"{self.__name__}/malformed", 1.0 - len(sound) / count)
            log_metric(f"{self.__name__}/unchanged", sum(len(v) == 1 for v in variants.values()) / count)
            log_metric(f"{self.__name__}/seconds", time.perf_counter() - started)
        if log_extra is not None:
            log_extra(f"{self.__name__} malformed", problems)
        return rewards

    def _rationale(self, rollout: Rollout) -> list[int]:
        """Return the ascending positions of the rationale's movable tokens."""
        return sorted({position for name in self.source for position in rollout.spans[name].movable})

    def _whole(self, rollout: Rollout) -> Variant:
        targets = rollout.spans[self.layout.roles["Y"]].positions
        return Variant(rollout.token_ids[: targets[-1] + 1], targets)


class CausalImportance(PeerReward):
    """Reward `cir`: the mean over prefixes of the rationale of JS(Bernoulli(p_k), Bernoulli(p_T)), in [0, log 2] nats.

    p_k is the joint probability of the tokens of the completion's own answer, after the prompt and the first k of the
    rationale's T tokens. The text between the rationale and the answer (tags, and a judge's analysis unless it is part
    of the source) is kept. p_T is that probability after the whole rationale. The divergence is symmetric, so a
    rationale that makes the own answer less likely is rewarded too.

    Args:
        prefixes: number of prefixes, evenly spaced from k = 0, at least 1; if more than T, each k below T occurs once.
        source, scorer, layout, name: see `PeerReward`.

    Raises:
        ValueError: for a setting out of range.

    Source:
        Yu et al., Outcome Rewards Do Not Guarantee Verifiable or Causally Important Reasoning (2026), arXiv 2604.22074,
        CIR; the paper adds it to the task reward with a weight of up to 1.
    """

    def __init__(
        self,
        *,
        prefixes: int = 4,
        source: str | Sequence[str] | None = None,
        scorer: Any = None,
        layout: Layout = JUDGE,
        name: str = "cir",
    ) -> None:
        if not isinstance(prefixes, int) or isinstance(prefixes, bool) or prefixes < 1:
            raise ValueError(f"prefixes is {prefixes!r}; expected an integer of at least 1")
        super().__init__(source=source, scorer=scorer, layout=layout, name=name)
        self.prefixes = prefixes

    def variants(self, rollouts: Sequence[Rollout]) -> list[list[Variant]]:
        """Return the sequence as written, then with each prefix of the rationale."""
        changed = []
        for rollout in rollouts:
            rationale = self._rationale(rollout)
            lengths = dict.fromkeys(place * len(rationale) // self.prefixes for place in range(self.prefixes))
            whole = self._whole(rollout)
            changed.append([whole, *(without(whole, rationale[kept:]) for kept in lengths)])
        return changed

    def value(self, log_p: Iterable[Tensor], answer_P: Tensor) -> float:
        """Return the mean divergence, in nats."""
        p_whole, *p_prefixes = map(math.exp, joint_log_probabilities(log_p, answer_P))
        return sum(bernoulli_js(p, p_whole) for p in p_prefixes) / len(p_prefixes)


class LogCausalImportance(CausalImportance):
    """Reward `log_cir`: the mean over prefixes of log p_T - log p_k, in nats, signed; p_k as in `CausalImportance`.

    Unlike `cir` it distinguishes rationales that make the own answer more likely from those that make it less likely,
    and it does not vanish for long answers, whose joint probabilities are small. It is unbounded, so it is clipped.

    Args:
        bound: the reward is clipped to [-bound, bound], in nats, above 0. Where rewards of other units are added,
            standardise each within its group (GRPO's `multi_objective_aggregation: normalize_then_sum`).
        prefixes, source, scorer, layout, name: see `CausalImportance`.

    Raises:
        ValueError: for a setting out of range.

    Source:
        The probabilities are those of arXiv 2604.22074; the logarithmic form is ours.
    """

    def __init__(self, *, bound: float = _BOUND_NATS, name: str = "log_cir", **settings: Any) -> None:
        _check_bound(bound)
        super().__init__(name=name, **settings)
        self.bound = bound

    def value(self, log_p: Iterable[Tensor], answer_P: Tensor) -> float:
        """Return the mean log-ratio, clipped, in nats."""
        whole, *prefixes = joint_log_probabilities(log_p, answer_P)
        return _clip(whole - sum(prefixes) / len(prefixes), self.bound)


class CounterfactualSensitivity(PeerReward):
    """Reward `csr`: KL(p(Y | X) || p(Y | X')) of the answer tokens under the own rationale and an edited one.

    Teacher-forced on the completion's own answer: the divergence over the whole vocabulary is averaged over the
    answer's tokens and over edits, in nats, >= 0, clipped at `bound`. Edits keep the rationale's length and its tags.
    A completion that no edit changes (no donor in the step, a rationale of one repeated token) scores 0 and is counted
    as `unchanged`.

    Args:
        edit: "donor" replaces the rationale's content by that of another prompt in the same step, repeated or cropped
            to its length; "permutation" puts its own tokens into another order.
        edits: number of edits to average over, at least 1. All differ, so a rationale with fewer donors or orders has
            fewer.
        seed: seed of donors and orders, which depend only on it, the rationale's ids and the available donors.
        bound: largest reward in nats, above 0.
        source, scorer, layout, name: see `PeerReward`.

    Raises:
        ValueError: for a setting out of range.

    Source:
        Shihab et al., Counterfactual Sensitivity Regularization (2025), arXiv 2509.01544, L_CSR. The paper subtracts
        lambda L_CSR from the task's loss, and edits operators of a formal rationale; here the term is a reward.
    """

    def __init__(
        self,
        *,
        edit: Edit = "donor",
        edits: int = 1,
        seed: int = 0,
        bound: float = _BOUND_NATS,
        source: str | Sequence[str] | None = None,
        scorer: Any = None,
        layout: Layout = JUDGE,
        name: str = "csr",
    ) -> None:
        if edit not in get_args(Edit):
            raise ValueError(f"edit is {edit!r}; expected one of {', '.join(get_args(Edit))}")
        if not isinstance(edits, int) or isinstance(edits, bool) or edits < 1:
            raise ValueError(f"edits is {edits!r}; expected an integer of at least 1")
        _check_bound(bound)
        super().__init__(source=source, scorer=scorer, layout=layout, name=name)
        self.edit = edit
        self.edits = edits
        self.seed = seed
        self.bound = bound

    def variants(self, rollouts: Sequence[Rollout]) -> list[list[Variant]]:
        """Return the sequence as written, then with each edit of the rationale."""
        pools: Mapping[str, Sequence[Candidate]] = {name: candidates(rollouts, name) for name in self.source}
        if self.edit == "donor" and self._trainer is not None:
            pools = gathered(pools)
        changed = []
        for rollout in rollouts:
            whole = self._whole(rollout)
            edited = dict.fromkeys(ids[: len(whole.token_ids)] for ids in self._edited(rollout, pools))
            edited.pop(whole.token_ids, None)
            changed.append([whole, *(replace(whole, token_ids=ids) for ids in edited)])
        return changed

    def bind(self, trainer: Any) -> PeerReward:
        """Bind the reward to a TRL trainer.

        Raises:
            ValueError: as `PeerReward.bind`, and if donors are asked of a trainer that generates for one prompt at a
                time.
        """
        from cepo.train.trainer import prompts_per_batch

        if self.edit == "donor":
            require_donors(prompts_per_batch(trainer), "edit='permutation'")
        return super().bind(trainer)

    def value(self, log_p: Iterable[Tensor], answer_P: Tensor) -> float:
        """Return the mean divergence, clipped, in nats."""
        own_PV, *edited = (one_PV.double() for one_PV in log_p)
        divergences = [float((own_PV.exp() * (own_PV - edited_PV)).sum(-1).mean()) for edited_PV in edited]
        return _clip(sum(divergences) / len(divergences), self.bound) if divergences else 0.0

    def _edited(self, rollout: Rollout, pools: Mapping[str, Sequence[Candidate]]) -> Iterator[tuple[int, ...]]:
        """Yield the ids of the rollout with the k-th edit of every span of the rationale that has that many."""
        edits = {
            name: permutations(rollout, name, self.edits, seed=self.seed)
            if self.edit == "permutation"
            else with_donors(rollout, name, pools[name], self.edits, seed=self.seed)
            for name in self.source
        }
        for of_k in zip_longest(*edits.values()):
            ids = list(rollout.token_ids)
            for name, edited in zip(edits, of_k, strict=True):
                for position in rollout.spans[name].movable if edited is not None else ():
                    ids[position] = edited.token_ids[position]
            yield tuple(ids)


class Necessity(PeerReward):
    """Reward `necessary`: log p(Y | whole) - log p(Y | rationale hidden), in nats, signed, clipped to +-`bound`.

    The rationale is hidden by the attention mask, not deleted: no token attends to it, and every other token keeps its
    position. p(Y) is the joint probability of the answer's tokens.

    Args:
        bound: the reward is clipped to [-bound, bound], in nats, above 0.
        source, scorer, layout, name: see `PeerReward`.

    Raises:
        ValueError: for a setting out of range.

    Source:
        Jia et al., Faithfulness as Information Flow (2026), arXiv 2605.24286: the necessity of the rationale, under its
        mask that hides the rationale from all tokens. The paper reports KL and gradient forms as diagnoses; the reward
        is the log-likelihood ratio of the answer that was given.
    """

    def __init__(
        self,
        *,
        bound: float = _BOUND_NATS,
        source: str | Sequence[str] | None = None,
        scorer: Any = None,
        layout: Layout = JUDGE,
        name: str = "necessary",
    ) -> None:
        _check_bound(bound)
        super().__init__(source=source, scorer=scorer, layout=layout, name=name)
        self.bound = bound

    def variants(self, rollouts: Sequence[Rollout]) -> list[list[Variant]]:
        """Return the sequence as written, then with the rationale hidden."""
        wholes = [self._whole(rollout) for rollout in rollouts]
        hidden = [tuple(self._rationale(rollout)) for rollout in rollouts]
        return [[whole, replace(whole, hidden=places)] for whole, places in zip(wholes, hidden, strict=True)]

    def value(self, log_p: Iterable[Tensor], answer_P: Tensor) -> float:
        """Return the log-likelihood ratio, clipped, in nats."""
        whole, hidden = joint_log_probabilities(log_p, answer_P)
        return _clip(whole - hidden, self.bound)


def bernoulli_js(p: float, q: float) -> float:
    """Return the Jensen-Shannon divergence of Bernoulli(p) and Bernoulli(q) in nats, in [0, log 2].

    Args:
        p: in [0, 1].
        q: in [0, 1].
    """
    probabilities_NK = torch.tensor([[p, 1.0 - p], [q, 1.0 - q]], dtype=torch.float64)
    mean_K = probabilities_NK.mean(0)
    js = torch.xlogy(probabilities_NK, probabilities_NK).sum(-1).mean() - torch.xlogy(mean_K, mean_K).sum()
    return max(float(js), 0.0)  # rounding could make it negative


def _clip(value: float, bound: float) -> float:
    return min(max(value, -bound), bound)


def _check_bound(bound: float) -> None:
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0:
        raise ValueError(f"bound is {bound!r}; expected a number of nats above 0")
