"""The VJP engine against finite differences, dense autograd and a cached forward with the mediator held fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev
from transformers import DynamicCache

from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.links import Link, parse_link
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.records import Group, LinkJacobian, Rollout
from tests.models import FAMILIES, VOCABULARY, WIDTH, judge_rollout, span, tiny_model

TARGETS = ("log_likelihood", "log_odds", "expected_score", "margin")
# No span in one piece, one token in two spans, and the criteria's last token predicts the first score.
SCATTERED = {
    "prompt": (0, 2, 5, 8),
    "criteria": (9, 11, 12, 15, 18),
    "analysis": (15, 16, 17),
    "scores": (19, 20, 24),
}

in_double = pytest.mark.usefixtures("_in_double")
Scores = dict[tuple[str, str], Tensor]


def link(text: str) -> Link:
    """Parse a link against the judge's spans."""
    layout = JudgeLayout()
    return parse_link(text, names=layout.names, roles=layout.roles)


LINKS = [
    link(text)
    for text in (
        *("Z->X", "Z->X@log_odds", "criteria->analysis", "criteria->analysis@log_odds"),
        *(
            f"{ends}@{target}"
            for target in TARGETS
            for ends in ("X->Y", "analysis->scores", "Z->Y:direct", "Z->Y:total", "Z->Y:residual")
        ),
    )
]


def jacobians(model: nn.Module, rollout: Rollout, links: list[Link] | None = None) -> dict[str, LinkJacobian]:
    """Ask a fresh engine for one rollout's Jacobians."""
    return JacobianEngine(model).jacobians(Group((rollout,)), LINKS if links is None else links)[0]


def written_out_scores(logits_BTV: Tensor, rollout: Rollout) -> Scores:
    """Return every (span, target function) score of a batch, by the definitions, from all the logits."""
    ids = torch.tensor(rollout.token_ids)
    log_p_BTV = torch.log_softmax(logits_BTV, -1)
    scores = {}
    for name, found in rollout.spans.items():
        rows = [position for position in found.positions if position > 0]
        log_p_BP = torch.stack([log_p_BTV[:, row - 1, ids[row]] for row in rows], -1)
        scores[name, "log_likelihood"] = log_p_BP.sum(-1)
        others = [[token for token in range(VOCABULARY) if token != ids[row]] for row in rows]
        log_rest_BP = torch.stack(
            [log_p_BTV[:, row - 1, rest].logsumexp(-1) for row, rest in zip(rows, others, strict=True)], -1
        )
        scores[name, "log_odds"] = (log_p_BP - log_rest_BP).sum(-1)
    means = []
    for number in rollout.numbers:
        mean_B = torch.zeros(logits_BTV.shape[0], dtype=logits_BTV.dtype)
        reached_B = torch.ones_like(mean_B)  # the probability of the number's tokens so far
        for index, digit in enumerate(number):
            p_BN = torch.stack([log_p_BTV[:, digit.position - 1, token].exp() for token, _ in digit.candidates], -1)
            if index == 0:
                p_BN = p_BN / p_BN.sum(-1, keepdim=True)
            gains_N = torch.tensor([gain for _, gain in digit.candidates], dtype=p_BN.dtype)
            mean_B = mean_B + reached_B * (p_BN @ gains_N)
            written = [token for token, _ in digit.candidates].index(rollout.token_ids[digit.position])
            reached_B = reached_B * p_BN[:, written]
        means.append(mean_B)
    scores["scores", "expected_score"] = means[0] + means[1]
    scores["scores", "margin"] = means[0] - means[1]
    return scores


def embeddings(model: nn.Module, rollout: Rollout) -> Tensor:
    """Return what the embedding module puts out for the rollout, (T, D)."""
    return model.get_input_embeddings()(torch.tensor([rollout.token_ids]))[0].detach()


def plain_scores(model: nn.Module, rollout: Rollout, embeddings_BTD: Tensor) -> Scores:
    """Run the model on embeddings, and score all of it."""
    return written_out_scores(model(inputs_embeds=embeddings_BTD, use_cache=False).logits, rollout)


class HeldFixed:
    """Runs the rest of a rollout while the mediator's keys and values are those of the undisturbed run."""

    def __init__(self, model: nn.Module, rollout: Rollout, mediator: str) -> None:
        self.model, self.rollout = model, rollout
        self.blocked = set(rollout.spans[mediator].positions)
        self.cache = DynamicCache()
        with torch.no_grad():
            self.logits_TV = model(inputs_embeds=embeddings(model, rollout)[None], past_key_values=self.cache).logits[0]

    def scores(self, embeddings_BTD: Tensor) -> Scores:
        """Run position after position, with the mediator's cache rows spliced in where they belong."""
        batch, count, _ = embeddings_BTD.shape
        cache, logits = DynamicCache(), []
        for fixed, run in groupby(range(count), key=self.blocked.__contains__):
            positions = list(run)
            rows = slice(positions[0], positions[-1] + 1)
            if fixed:
                for index, layer in enumerate(self.cache.layers):
                    keys, values = (kept[:, :, rows].expand(batch, -1, -1, -1) for kept in (layer.keys, layer.values))
                    cache.update(keys, values, index)
                logits.append(self.logits_TV[rows].expand(batch, -1, -1))
            else:
                output = self.model(inputs_embeds=embeddings_BTD[:, rows], past_key_values=cache, use_cache=True)
                logits.append(output.logits)
        return written_out_scores(torch.cat(logits, 1), self.rollout)


def finite_differences(
    scores: Callable[[Tensor], Scores], embeddings_TD: Tensor, positions: tuple[int, ...]
) -> dict[tuple[str, str], Tensor]:
    """Return the central difference (fourth order) of every score at every coordinate of the positions, (S, D)."""
    width, step = embeddings_TD.shape[1], 2e-4
    units = torch.zeros(len(positions) * width, *embeddings_TD.shape, dtype=embeddings_TD.dtype)
    for row, position in enumerate(positions):
        for column in range(width):
            units[row * width + column, position, column] = step
    with torch.no_grad():
        at = {k: scores(embeddings_TD + k * units) for k in (-2, -1, 1, 2)}
    return {
        key: ((8 * (at[1][key] - at[-1][key]) - (at[2][key] - at[-2][key])) / (12 * step)).view(-1, width)
        for key in at[1]
    }


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def regressed(total_SD: Tensor, mediated_SD: Tensor) -> Tensor:
    """Return what least squares leaves of the total once the mediated component is its only regressor."""
    fit = torch.linalg.lstsq(mediated_SD.reshape(-1, 1), total_SD.reshape(-1, 1)).solution
    return total_SD - fit[0, 0] * mediated_SD


def check_links(
    found: dict[str, LinkJacobian],
    rollout: Rollout,
    gradient: Callable[[str, tuple[str, str], bool], Tensor],
    tolerance: float,
) -> None:
    """Compare every link with `gradient(source span, (target span, score), mediator held fixed)`."""
    for made in LINKS:
        wanted_SD = gradient(made.source, (made.target, made.function), made.effect == "direct")
        if made.effect == "residual":
            through_SD = gradient(made.source, ("criteria", "log_likelihood"), False)
            direction_D = gradient("criteria", (made.target, made.function), False).mean(0)
            wanted_SD = regressed(wanted_SD, through_SD * direction_D)
        jacobian = found[made.name]
        assert jacobian.source_positions == rollout.spans[made.source].positions
        assert jacobian.jac_SD.shape == (len(jacobian.source_positions), WIDTH)
        assert wanted_SD.norm() > 1e-4, made.name  # a comparison of zeros would say nothing
        assert relative(jacobian.jac_SD, wanted_SD) < tolerance, made.name


@in_double
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_link_and_target_equals_finite_differences(family: str, tied: bool) -> None:
    """The Jacobians are the derivatives of the scores as the paper defines them, on every family of models.

    The direct effect is differenced on an experiment: the prompt disturbed, the criteria's keys and values held.
    """
    model = tiny_model(family, tied=tied)
    rollout = judge_rollout(positions=SCATTERED if tied else None)
    start_TD = embeddings(model, rollout)
    held = HeldFixed(model, rollout, "criteria")
    sources = {name: rollout.spans[name].positions for name in ("prompt", "criteria", "analysis")}
    free = {
        name: finite_differences(lambda at: plain_scores(model, rollout, at), start_TD, positions)
        for name, positions in sources.items()
    }
    direct = finite_differences(held.scores, start_TD, sources["prompt"])
    found = jacobians(model, rollout)
    check_links(found, rollout, lambda name, key, fixed: direct[key] if fixed else free[name][key], 1e-6)
    assert relative(found["Z->Y:direct@margin"].jac_SD, found["Z->Y:total@margin"].jac_SD) > 1e-3


@in_double
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_link_and_target_equals_dense_autograd(family: str, tied: bool) -> None:
    """The Jacobians equal jacrev of an independently written score to 1e-10, the direct ones one past the cache."""
    model = tiny_model(family, tied=tied, seed=1)
    rollout = judge_rollout(1, positions=SCATTERED if not tied else None)
    start_TD = embeddings(model, rollout)
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def all_scores(at_TD: Tensor) -> Scores:
        arguments = {"inputs_embeds": at_TD[None], "use_cache": False}
        return written_out_scores(functional_call(model, weights, (), arguments).logits, rollout)

    dense = {key: value[0] for key, value in jacrev(all_scores)(start_TD).items()}
    leaf_TD = start_TD.clone().requires_grad_()
    held = HeldFixed(model, rollout, "criteria").scores(leaf_TD[None])
    direct = {
        key: torch.autograd.grad(score.sum(), leaf_TD, retain_graph=True)[0]
        for key, score in held.items()
        if key[0] == "scores"
    }

    def gradient(name: str, key: tuple[str, str], fixed: bool) -> Tensor:
        return (direct if fixed else dense)[key][list(rollout.spans[name].positions)]

    found = jacobians(model, rollout)
    check_links(found, rollout, gradient, 1e-10)
    for text in ("Z->X", "Z->Y:total@margin"):  # the energy of the context is the whole gradient's
        whole_TD = dense[link(text).target, link(text).function]
        assert found[text].context_energy == pytest.approx(float(whole_TD.square().sum()), rel=1e-10)
    whole_TD = direct["scores", "log_odds"].clone()
    whole_TD[list(rollout.spans["criteria"].positions)] = 0.0
    assert found["Z->Y:direct@log_odds"].context_energy == pytest.approx(float(whole_TD.square().sum()), rel=1e-10)


@in_double
def test_forward_mode_agrees_too() -> None:
    """A derivative taken forwards, which shares no code with the engine's backward pass, gives the same numbers."""
    model, rollout = tiny_model("llama"), judge_rollout()
    start_TD = embeddings(model, rollout)
    positions = list(rollout.spans["criteria"].positions)

    def margin(at_SD: Tensor) -> Tensor:
        return plain_scores(model, rollout, start_TD.index_put((torch.tensor(positions),), at_SD)[None])[
            "scores", "margin"
        ][0]

    found = jacobians(model, rollout, [link("X->Y@margin")])["X->Y@margin"].jac_SD
    assert relative(found, jacfwd(margin)(start_TD[positions])) < 1e-10


@in_double
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_one_token_answer_has_its_gradient(attention: str) -> None:
    """A one-token target is not lost: the reference CE-PO, shifted by one, got exactly zero for it."""
    model = tiny_model("qwen3", attention=attention)
    rollout = judge_rollout()
    rollout = replace(rollout, spans={**rollout.spans, "scores": span("scores", (14,))}, numbers=())
    start_TD = embeddings(model, rollout)
    positions = rollout.spans["criteria"].positions
    expected = finite_differences(lambda at: one_token(model, rollout, at), start_TD, positions)["scores", "one"]
    found = jacobians(model, rollout, [link("X->Y")])["X->Y"]
    assert found.target_positions == (14,)
    assert found.jac_SD.norm() > 1e-2
    assert relative(found.jac_SD, expected) < 1e-6


def one_token(model: nn.Module, rollout: Rollout, embeddings_BTD: Tensor) -> Scores:
    """Return log p of the token at 14 alone."""
    log_p_BTV = model(inputs_embeds=embeddings_BTD, use_cache=False).logits.log_softmax(-1)
    return {("scores", "one"): log_p_BTV[:, 13, rollout.token_ids[14]]}


def test_later_tokens_change_nothing() -> None:
    """Rows after the target are zero, and tokens after it have no part in the result."""
    model, rollout = tiny_model("llama"), judge_rollout()
    changed = replace(rollout, completion_ids=(*rollout.completion_ids[:-2], 7, 8))
    assert changed.completion_ids != rollout.completion_ids
    for made in (link("Z->X"), link("Z->Y"), link("X->Y@margin")):
        found, again = (jacobians(model, each, [made])[made.name] for each in (rollout, changed))
        assert torch.equal(found.jac_SD, again.jac_SD)
        assert found.context_energy == again.context_energy
    # The source may reach past the target's last token where spans overlap; those rows are zero.
    late = replace(rollout, spans={**rollout.spans, "prompt": span("prompt", (3, 24, 25))})
    rows_SD = jacobians(model, late, [link("Z->X")])["Z->X"].jac_SD
    assert rows_SD[0].norm() > 0
    assert not rows_SD[1:].any()


@in_double
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_context_energy_is_that_of_all_rows(family: str) -> None:
    """The denominator of influence counts tags, template and target tokens, not the named spans alone."""
    model, rollout = tiny_model(family), judge_rollout()
    leaf_TD = embeddings(model, rollout).requires_grad_()
    scores = plain_scores(model, rollout, leaf_TD[None])
    (gradient_TD,) = torch.autograd.grad(scores["scores", "log_likelihood"].sum(), leaf_TD)
    found = jacobians(model, rollout, [link("X->Y"), link("analysis->scores"), link("Z->Y:residual")])
    whole = float(gradient_TD.square().sum())
    assert found["X->Y"].context_energy == pytest.approx(whole, rel=1e-12)
    assert found["analysis->scores"].context_energy == found["X->Y"].context_energy
    # Under the residual effect only the prompt's rows are other ones.
    rest = whole - float(gradient_TD[list(rollout.spans["prompt"].positions)].square().sum())
    residual = float(found["Z->Y:residual"].jac_SD.square().sum())
    assert found["Z->Y:residual"].context_energy == pytest.approx(rest + residual, rel=1e-10)


@in_double
def test_sdpa_equals_eager() -> None:
    """Fused attention, whose backward is another kernel, gives the same Jacobians."""
    rollout = judge_rollout()
    eager, fused = (jacobians(tiny_model("qwen2", attention=attention), rollout) for attention in ("eager", "sdpa"))
    for name, jacobian in eager.items():
        assert relative(fused[name].jac_SD, jacobian.jac_SD) < 1e-10, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.25)])
def test_lower_precision_stays_close(dtype: torch.dtype, tolerance: float) -> None:
    """float32 keeps four digits and more; bfloat16, with its 8 bits, keeps the direction. Both come back as float32."""
    rollout = judge_rollout()
    exact_model = tiny_model("llama")
    if dtype == torch.bfloat16:  # so that only the arithmetic is compared, not the rounding of the weights
        exact_model = exact_model.to(dtype).double()
    exact = jacobians(exact_model, rollout)
    rough = jacobians(tiny_model("llama", dtype=dtype), rollout)
    for name, jacobian in exact.items():
        assert jacobian.jac_SD.dtype == torch.float64
        assert rough[name].jac_SD.dtype == torch.float32
        assert relative(rough[name].jac_SD, jacobian.jac_SD) < tolerance, name


def test_batch_and_order_do_not_matter() -> None:
    """A rollout's Jacobians are the same bits whatever stands beside it, in whatever order."""
    model = tiny_model("llama", dtype=torch.float32, attention="sdpa")
    rollouts = [judge_rollout(seed) for seed in range(3)]
    short = replace(rollouts[2], completion_ids=rollouts[2].completion_ids[:-2])
    rollouts[2] = short
    engine = JacobianEngine(model)
    alone = [engine.jacobians(Group((rollout,)), LINKS)[0] for rollout in rollouts]
    together = engine.jacobians(Group(tuple(rollouts)), LINKS)
    backwards = engine.jacobians(Group(tuple(reversed(rollouts))), list(reversed(LINKS)))[::-1]
    single = [engine.jacobians(Group((rollout,)), [link("Z->Y:direct@margin")])[0] for rollout in rollouts]
    for index in range(3):
        for made in LINKS:
            first = alone[index][made.name]
            for other in (together[index][made.name], backwards[index][made.name]):
                assert torch.equal(first.jac_SD, other.jac_SD)
                assert first.context_energy == other.context_energy
        name = "Z->Y:direct@margin"
        assert relative(single[index][name].jac_SD, alone[index][name].jac_SD) < 1e-4


@pytest.fixture(autouse=True)
def _grad_enabled() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()
