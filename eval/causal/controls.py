"""Controls: judges whose inner workings are known, criteria that nothing can see, parameters that mean nothing."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cepo.eval.causal.evidence import DEFAULT_LINK
from cepo.eval.causal.interventions import removal
from cepo.eval.causal.judge_model import EXTRA_TOKENS, JudgeModel, generate
from cepo.eval.statistics import spearman
from cepo.fusion.config import RewardConfig
from cepo.fusion.score import score_rollouts
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.records import Rollout
from cepo.jacobian.targets import sum_of_terms, target_terms
from cepo.train import testbed, testbed_judges

FOLLOWS = 0.9
"""A judge follows its criteria if its verdict follows at least this share of swapped criteria."""
IGNORES = 0.1
"""A judge ignores its criteria if swaps flip at most this share of its verdicts."""
SHARES = (0.1, 0.2, 0.5)
"""Shares of the criteria's tokens that count as the top ones in comprehensiveness and sufficiency."""
_STEPS = 6
_REDRAWN = 4
_SALIENT = ("X->Y", "Z->Y:total", "criteria->analysis")
_JUDGE_TOKENS = 48


@dataclass(frozen=True)
class ControlPair:
    """Two judges of the testbed that a true signal must separate: one follows its criteria, the other does not."""

    name: str
    follows: testbed_judges.JudgeKind
    ignores: testbed_judges.JudgeKind


PAIRS: tuple[ControlPair, ...] = (
    ControlPair("criteria against query", "criteria", "query"),
    ControlPair("able against lazy", "able", "lazy"),
)


def certificate(follows: Mapping[str, float], ignores: Mapping[str, float]) -> str | None:
    """Return why interventions do not certify a pair, or None where they do.

    Args:
        follows: what `testbed_judges.certify` says of the judge that must follow its criteria.
        ignores: what it says of the one that must not.
    """
    if follows["follows_swap"] < FOLLOWS:
        return (
            f"the first judge's verdict follows {follows['follows_swap']:.2f} of swapped criteria; "
            f"expected at least {FOLLOWS}"
        )
    if ignores["flips"] > IGNORES:
        return (
            f"swapped criteria flip {ignores['flips']:.2f} of the second judge's verdicts; expected at most {IGNORES}"
        )
    return None


def sample_judgements(judge: JudgeModel, items: Sequence[testbed.Item], *, seed: int) -> list[Rollout]:
    """Return one judgement of each testbed item, sampled at temperature 1; some may be malformed."""
    tokenizer = judge.reader.tokenizer
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": item.prompt}], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for item in items
    ]
    written = generate(
        prompts,
        judge,
        limits=[_JUDGE_TOKENS + EXTRA_TOKENS] * len(prompts),
        stop=f"</{judge.layout.scores_tag}>".encode(),
        temperature=1.0,
        seed=seed,
    )
    return [judge.reader.read(prompt, ids) for prompt, ids in zip(prompts, written, strict=True)]


def masked_scores(rollouts: Sequence[Rollout], judge: JudgeModel) -> dict[str, float]:
    """Return the largest influence, phi and norm that the criteria have on a judge that cannot see them.

    At every layer, later tokens cannot attend to the criteria's positions, so nothing there reaches the analysis or
    the scores: the Jacobian is exactly zero, and so are phi and influence. Anything above 0 is a leak.

    Args:
        rollouts: well-formed judgements, at least one.
        judge: the judge.
    """
    engine = JacobianEngine(judge.model)
    links = (DEFAULT_LINK, "criteria->analysis@log_likelihood")
    config = RewardConfig(links=dict.fromkeys(links, 1.0), counterfactuals=0, score="phi_influence")
    largest: dict[str, float] = {}
    for rollout in rollouts:
        with criteria_hidden(judge.model, rollout.spans["criteria"].positions):
            (score,) = score_rollouts([rollout], engine, config, judge.layout)
        for name, link in score.links.items():
            for measure in ("influence", "phi", "norm"):
                what = f"{measure} {name}"
                largest[what] = max(largest.get(what, 0.0), getattr(link, measure))
    return largest


@contextlib.contextmanager
def criteria_hidden(model: Any, positions: Sequence[int]) -> Iterator[None]:
    """Hide some positions from all tokens, at every layer, while the context is open.

    Args:
        model: a Hugging Face causal language model whose decoder takes a (B, T) attention mask.
        positions: places in the sequences that the model is run on.
    """

    def hide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids_BT = args[0] if args else kwargs["input_ids"]
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[:, [at for at in positions if at < ids_BT.shape[1]]] = 0
        return args, {**kwargs, "attention_mask": mask_BT}

    handle = model.get_decoder().register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def randomisation(rollouts: Sequence[Rollout], judge: JudgeModel, *, seed: int) -> list[dict[str, Any]]:
    """Return how much of the saliencies and scores is left when the parameters are redrawn from the top layer down.

    Each step redraws the layers of the step before and some layers below them: matrices from a normal distribution with
    their own standard deviation, vectors (gains and biases) by shuffling their entries. The last step redraws the
    embeddings, and a tied head with them. A measure of what the model learnt must lose its order. A redrawn model has
    an order of its own, which chance makes the same for all rollouts, so several models are drawn.

    Args:
        rollouts: well-formed judgements.
        judge: the judge; not changed.
        seed: of the redrawn parameters.

    Returns:
        One record per step: what was redrawn; `saliency`, for each link and draw the rank correlation of the Jacobian's
        row norms with the original's within each rollout (NaN where it is undetermined); for each draw the
        `influence` and `phi` of X->Y of each rollout.

    Source:
        Adebayo et al., Sanity checks for saliency maps (2018), section 4.1 (cascading randomisation).
    """
    count = len(_layers(judge.model))
    edges = np.unique(np.linspace(0, count, min(count, _STEPS) + 1).round().astype(int)).tolist()
    names = ["nothing", *(f"top {below} of {count} layers" for below in edges[1:]), "and the embeddings"]
    records: list[dict[str, Any]] = [
        {"depth": depth, "redrawn": name, "saliency": {link: [] for link in _SALIENT}, "influence": [], "phi": []}
        for depth, name in enumerate(names)
    ]
    original = _salience(rollouts, judge, judge.model)
    for draw in range(_REDRAWN):
        model = copy.deepcopy(judge.model)
        layers = _layers(model)
        generator = torch.Generator().manual_seed((seed << 8) + draw)
        redrawn = [layers[count - below : count - above] for above, below in pairwise(edges)]
        for record, modules in zip(records, [[], *redrawn, [model.get_input_embeddings()]], strict=True):
            for module in modules:
                _redraw(module, generator)
            norms, influence, phi = _salience(rollouts, judge, model)
            for link in _SALIENT:
                pairs = zip(original[0], norms, strict=True)
                record["saliency"][link].append([spearman(one[link], other[link]) for one, other in pairs])
            record["influence"].append(influence)
            record["phi"].append(phi)
    return records


def captum_difference(rollouts: Sequence[Rollout], judge: JudgeModel) -> float | None:
    """Return the largest difference between our J_XY and Captum's gradient, relative to its largest entry.

    Args:
        rollouts: well-formed judgements.
        judge: the judge.

    Returns:
        The largest over the rollouts; None where captum, an optional extra, is not installed.
    """
    try:
        # By name, so that type checkers do not look for an optional package.
        saliency_of = importlib.import_module("captum.attr").Saliency
    except ImportError:
        return None
    config = RewardConfig(links={"X->Y": 1.0}, counterfactuals=0, score="phi")
    scores = score_rollouts(rollouts, GroupEngine(judge.model), config, judge.layout, keep_jacobians=True)
    worst = 0.0
    for rollout, score in zip(rollouts, scores, strict=True):
        terms = target_terms(rollout, "scores", "log_likelihood")
        ids_BT = torch.tensor([rollout.token_ids[: terms[-1].position]], device=judge.model.device)

        def score_of(embedded_BTD: Tensor, terms: Any = terms) -> Tensor:
            logits_TV = judge.model(inputs_embeds=embedded_BTD, use_cache=False).logits[0]
            return sum_of_terms(logits_TV[[term.position - 1 for term in terms]], terms)[None]

        embedded_BTD = judge.model.get_input_embeddings()(ids_BT).detach().requires_grad_()
        gradient_TD = saliency_of(score_of).attribute(embedded_BTD, abs=False)[0]
        theirs_SD = gradient_TD[list(rollout.spans["criteria"].positions)].double()
        ours_SD = score.jacobians["X->Y"].base.jac_SD.double()
        worst = max(worst, float((ours_SD - theirs_SD).abs().max() / theirs_SD.abs().max()))
    return worst


def faithfulness(
    rollouts: Sequence[Rollout], saliency: Sequence[Sequence[float]], judge: JudgeModel, *, seed: int
) -> list[dict[str, Any]]:
    """Return comprehensiveness and sufficiency of the gradient's ranking of criteria tokens, and of a random one.

    Args:
        rollouts: well-formed judgements.
        saliency: for each, the row norms of J_XY.
        judge: the judge.
        seed: of the random rankings.

    Returns:
        Records of row, share, ranking ("gradient" or "random"), comprehensiveness and sufficiency, in nats.
    """
    rng = np.random.default_rng(seed)
    random = [tuple(rng.random(len(ranking))) for ranking in saliency]
    records = []
    for share in SHARES:
        for name, rankings in (("gradient", saliency), ("random", random)):
            for row, (without, alone) in enumerate(removal(rollouts, rankings, share, judge)):
                record = {"row": row, "share": share, "ranking": name}
                records.append({**record, "comprehensiveness": without, "sufficiency": alone})
    return records


def _salience(
    rollouts: Sequence[Rollout], judge: JudgeModel, model: Any
) -> tuple[list[dict[str, np.ndarray]], list[float], list[float]]:
    """Return a model's row norms by link, and its influence and phi on X->Y, of each rollout."""
    config = RewardConfig(links=dict.fromkeys(_SALIENT, 1.0), counterfactuals=0, score="phi_influence")
    scores = score_rollouts(rollouts, GroupEngine(model), config, judge.layout, keep_jacobians=True)
    norms = [
        {name: link.base.jac_SD.double().norm(dim=1).cpu().numpy() for name, link in score.jacobians.items()}
        for score in scores
    ]
    direct = [score.links["X->Y"] for score in scores]
    return norms, [float(link.influence or 0.0) for link in direct], [float(link.phi or 0.0) for link in direct]


def _layers(model: Any) -> list[nn.Module]:
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"model is a {type(model).__name__}, in which no list of {count} layers was found")


def _redraw(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * float(
                    weight.double().std()
                )
                weight.copy_(drawn.to(weight))
            else:
                weight.copy_(weight[torch.randperm(len(weight), generator=generator).to(weight.device)])
