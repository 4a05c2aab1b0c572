"""The causal loss: a differentiable causal term, which also acts where all completions of a prompt are alike.

In GRPO a reward compares the completions of one prompt, so it cannot change what all of them share, such as a judge
that quotes evidence in every completion and then follows length. The loss needs no comparison: teacher-forced on the
sampled ids, it reads what the policy would say after other content.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cepo.jacobian.links import Link, parse_link
from cepo.jacobian.reading.layout import Layout

FIRST_WEIGHT = 0.5
Objective = Literal["divergence", "csr", "interchange"]


@dataclass(frozen=True)
class CausalLoss:
    """The settings of the causal loss.

    Attributes:
        weight: weight of the term relative to TRL's loss, >= 0; "auto" starts at 0.5 and is then adapted by
            `cepo.train.controller`.
        links: links whose source lies in the completion; () for the layout's last one (analysis->scores for a judge,
            rationale->answer for a reasoner).
        donors: K >= 1, counterfactuals per completion and link.
        objective: "interchange" trains the policy to give the donor's target after the donor's source. That is right
            only if the target should depend on nothing but the source, so the link must end in the scores or the
            answer. "divergence" raises the Jensen-Shannon divergence between the target's distributions after the own
            source and after a donor's, in any direction, and also for text outside the verdict. "csr" raises
            KL(own, donor), which is unbounded.
        seed: seed of the choice of donors.

    Raises:
        ValueError: for any setting out of range.
    """

    weight: float | Literal["auto"] = FIRST_WEIGHT
    links: Sequence[str] = ()
    donors: int = 1
    objective: Objective = "interchange"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weight != "auto" and not (_is_number(self.weight) and 0.0 <= self.weight < math.inf):
            raise ValueError(f"weight is {self.weight!r}; expected a number >= 0, or auto")
        if isinstance(self.links, str) or not all(isinstance(link, str) for link in self.links):
            raise ValueError(f"links is {self.links!r}; expected a list of links, such as ['analysis->scores']")
        if not isinstance(self.donors, int) or isinstance(self.donors, bool) or self.donors < 1:
            raise ValueError(f"donors (K) is {self.donors!r}; expected an integer >= 1")
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective is {self.objective!r}; expected one of {', '.join(get_args(Objective))}")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed is {self.seed!r}; expected an integer")

    @property
    def first_weight(self) -> float:
        """The weight at the first step."""
        return FIRST_WEIGHT if self.weight == "auto" else float(self.weight)

    @property
    def compares(self) -> bool:
        """Whether the objective raises a distance between what follows the own source and a donor's."""
        return self.objective != "interchange"

    @property
    def distance(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The distance that the objective raises, if it `compares`."""
        return sensitivity if self.objective == "csr" else divergence

    def parsed_links(self, layout: Layout) -> list[Link]:
        """Return the links, parsed.

        Raises:
            ValueError: for a link that the layout does not have, that starts in the prompt, that names an effect or a
                function (the loss compares whole distributions and blocks nothing), or does not suit the objective.
        """
        written = self.links or ["->".join(layout.names[-2:])]
        links = [parse_link(text, names=layout.names, roles=layout.roles) for text in written]
        for link in links:
            if ":" in link.name or "@" in link.name:
                raise ValueError(f"links holds {link.name!r}; expected SOURCE->TARGET without an effect or a function")
            if link.source == layout.names[0]:
                raise ValueError(f"links holds {link.name!r}, whose source is the prompt; expected a completion's span")
            if self.objective == "interchange" and link.target != layout.names[-1]:
                raise ValueError(
                    f"links holds {link.name!r}, but interchange asks the target to follow from the source alone; "
                    f"expected a link that ends in {layout.names[-1]!r}, or the objective divergence or csr"
                )
        if len({(link.source, link.target) for link in links}) < len(links):
            raise ValueError(f"links is {list(written)!r}, which names one link twice; expected each once")
        return links


def divergence(own_NPV: Tensor, donor_NPV: Tensor, targets_NP: Tensor) -> Tensor:
    """Return the mean Jensen-Shannon divergence over the target tokens, in [0, log 2] nats.

    JS(p, q) = (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2, between the next-token distributions after the own source
    and after a donor's, for verdict digits and long analyses alike. Gradients flow through both.

    Args:
        own_NPV: finite logits after the own source; row p predicts the token at p.
        donor_NPV: the same after a donor's source.
        targets_NP: bool, which positions are target tokens.

    Returns:
        (N,), float32 or wider; 0 without a target token.

    Source:
        Lin, Divergence measures based on the Shannon entropy, IEEE Transactions on Information Theory 37, 1991.
    """
    own, donor = _log_probabilities(own_NPV), _log_probabilities(donor_NPV)
    mean = torch.logaddexp(own, donor) - math.log(2.0)
    js_NP = 0.5 * (own.exp() * (own - mean) + donor.exp() * (donor - mean)).sum(-1)
    return _mean_over(js_NP, targets_NP)


def sensitivity(own_NPV: Tensor, donor_NPV: Tensor, targets_NP: Tensor) -> Tensor:
    """Return the mean of KL(own, donor) over the target tokens, in nats, >= 0; arguments and result as `divergence`.

    Source:
        Shihab et al., Counterfactual Sensitivity Regularization, 2025, arXiv 2509.01544: L - lambda KL. The paper edits
        operators of a formal rationale; the edit here is a donor's content.
    """
    own, donor = _log_probabilities(own_NPV), _log_probabilities(donor_NPV)
    return _mean_over((own.exp() * (own - donor)).sum(-1), targets_NP)


def interchange(logits_NPV: Tensor, ids_NP: Tensor, targets_NP: Tensor) -> Tensor:
    """Return the mean negative log-likelihood, in nats, of the donor's target tokens after the donor's source.

    Args:
        logits_NPV: logits after the donor's source in the own context; row p predicts the token at p.
        ids_NP: the token ids, at target positions the donor's, int64.
        targets_NP: bool, which positions are target tokens.

    Returns:
        (N,), float32 or wider; 0 without a target token.

    Source:
        Geiger et al., Inducing Causal Structure for Interpretable Neural Networks, 2022 (interchange intervention
        training), with text instead of activations interchanged.
    """
    chosen_NP = _log_probabilities(logits_NPV).gather(-1, ids_NP.unsqueeze(-1)).squeeze(-1)
    return -_mean_over(chosen_NP, targets_NP)


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _mean_over(values_NP: Tensor, targets_NP: Tensor) -> Tensor:
    return values_NP.where(targets_NP, 0.0).sum(-1) / targets_NP.sum(-1).clamp(min=1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
