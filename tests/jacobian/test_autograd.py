"""The VJP engine against finite differences, dense autograd and a cached forward with the mediator held fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev
from transformers import AutoModelForSeq2SeqLM, DynamicCache, T5Config

from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.links import Link, parse_link
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.records import Group, LinkJacobian, Rollout
from tests.models import FAMILIES, VOCABULARY, WIDTH, InDouble, judge_rollout, span, tiny_model

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


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def _in_double() -> Iterator[None]:
    with InDouble():
        yield


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
        for digit in number:
            p_BN = torch.stack([log_p_BTV[:, digit.position - 1, token].exp() for token, _ in digit.candidates], -1)
            values_N = torch.tensor([value for _, value in digit.candidates], dtype=p_BN.dtype)
            mean_B = mean_B + digit.place * (p_BN @ values_N) / p_BN.sum(-1)
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


def lora_model(family: str = "llama", *, seed: int = 3, dropout: float = 0.0, **options: Any) -> nn.Module:
    """Return a PEFT model whose LoRA matrices, both of them, are random."""
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, lora_alpha=4
    )
    model = get_peft_model(tiny_model(family, **options), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model.double().eval()


@in_double
def test_adapters_on_and_off() -> None:
    """With adapters the Jacobians are those of the merged model, without them those of the base model, to the bit."""
    rollout = judge_rollout()
    group = Group((rollout,))
    adapted = lora_model()
    on = JacobianEngine(adapted).jacobians(group, LINKS)[0]
    off = JacobianEngine(adapted, adapters=False).jacobians(group, LINKS)[0]
    again = JacobianEngine(adapted).jacobians(group, LINKS)[0]
    base = jacobians(tiny_model("llama"), rollout)
    merged = jacobians(lora_model().merge_and_unload(), rollout)
    for name in base:
        assert torch.equal(off[name].jac_SD, base[name].jac_SD), name
        assert torch.equal(on[name].jac_SD, again[name].jac_SD), name
        assert relative(on[name].jac_SD, merged[name].jac_SD) < 1e-10, name
        assert relative(on[name].jac_SD, base[name].jac_SD) > 1e-2, name


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": "all-linear"}]
)
def test_adapters_on_the_embeddings(options: dict[str, Any]) -> None:
    """Adapters that wrap or copy the embedding module leave E(A) where it was: what enters the first layer."""
    options = {"target_modules": ["q_proj", "embed_tokens"], **options}
    if "modules_to_save" in options:
        options["target_modules"] = ["q_proj"]
    model = get_peft_model(tiny_model("llama"), LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, **options))
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
            parameter.data = parameter.data.double() + 0.3 * noise
            assert "lora" in name or "modules_to_save" in name
    model, rollout = model.eval(), judge_rollout()
    leaf_TD = embeddings(model, rollout).requires_grad_()
    score = plain_scores(model, rollout, leaf_TD[None])["scores", "log_odds"]
    (expected_TD,) = torch.autograd.grad(score.sum(), leaf_TD)
    found = jacobians(model, rollout, [link("X->Y@log_odds")])["X->Y@log_odds"]
    # Without InDouble transformers' own float32 casts limit how well two orders of the same sum agree.
    assert relative(found.jac_SD, expected_TD[list(found.source_positions)]) < 1e-6


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("adapters", [True, False])
def test_adapter_state_is_left_as_found(adapters: bool, trainable: bool) -> None:
    """Switching adapters off for a moment neither freezes trainable matrices nor thaws frozen ones."""
    model = lora_model()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(trainable)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    JacobianEngine(model, adapters=adapters).jacobians(Group((judge_rollout(),)), LINKS)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def mixed_modes(model: nn.Module) -> dict[str, bool]:
    """Put some modules in train mode and some in eval mode, and return which."""
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 1
    return {name: module.training for name, module in model.named_modules()}


def hook_count(model: nn.Module) -> int:
    """Return how many forward and backward hooks hang on the model's modules."""
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (
            *(module._forward_hooks, module._forward_pre_hooks, module._backward_hooks),
            *(module._backward_pre_hooks, module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs),
        )
    )


@pytest.mark.parametrize("build", [lambda: tiny_model("llama"), lora_model], ids=["plain", "lora"])
def test_model_is_left_as_found(build: Callable[[], nn.Module]) -> None:
    """Training flags, gradients, hooks, requires_grad and weights are what they were before."""
    model = build()
    parameters = dict(model.named_parameters())
    kept = next(name for name in parameters if "norm" in name)
    parameters[kept].grad = torch.full_like(parameters[kept], 3.0)
    frozen = next(name for name in parameters if "mlp" in name)
    parameters[frozen].requires_grad_(False)
    modes, weights = mixed_modes(model), {name: value.detach().clone() for name, value in parameters.items()}
    flags, hooks = {name: value.requires_grad for name, value in parameters.items()}, hook_count(model)
    with torch.no_grad():
        JacobianEngine(model).jacobians(Group((judge_rollout(),)), LINKS)
        assert not torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert hook_count(model) == hooks
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[name])
        if name == kept:
            assert torch.equal(value.grad, torch.full_like(value, 3.0))
        else:
            assert value.grad is None


@pytest.mark.parametrize("broken", ["o_proj", "norm"])
def test_model_is_left_as_found_after_an_exception(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass that dies (out of memory, say) leaves flags and hooks as they were."""
    model = tiny_model("llama")
    modes, hooks = mixed_modes(model), hook_count(model)
    module = model.model.layers[1].self_attn.o_proj if broken == "o_proj" else model.model.norm

    def fail(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(module, "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            jacobians(model, judge_rollout())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert hook_count(model) == hooks
    assert torch.is_grad_enabled()
    assert jacobians(model, judge_rollout())["X->Y@log_odds"].jac_SD.norm() > 0


def test_live_dropout_is_off() -> None:
    """A policy in train mode with dropout gives what it gives in eval mode, and stays in train mode."""
    rollout = judge_rollout()
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = jacobians(model, rollout)
    found = jacobians(model.train(), rollout)
    assert all(module.training for module in model.modules())
    for name in expected:
        assert torch.equal(found[name].jac_SD, expected[name].jac_SD)
    adapted = lora_model(dropout=0.5)
    expected, found = jacobians(adapted, rollout), jacobians(adapted.train(), rollout)
    assert torch.equal(found["X->Y@margin"].jac_SD, expected["X->Y@margin"].jac_SD)


def test_gradient_checkpointing_changes_nothing() -> None:
    """A trainer that recomputes activations gets the same Jacobians, direct effect included."""
    rollout, model = judge_rollout(), tiny_model("llama")
    expected = jacobians(model, rollout)
    model.gradient_checkpointing_enable()
    found = jacobians(model.train(), rollout)
    for name in expected:
        assert torch.equal(found[name].jac_SD, expected[name].jac_SD)


def in_no_grad() -> Any:
    """Return a context without gradients."""
    return torch.no_grad()


def in_inference_mode() -> Any:
    """Return a context in inference mode."""
    return torch.inference_mode()


def in_autocast() -> Any:
    """Return a context that computes in bfloat16."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("context", [in_no_grad, in_inference_mode, in_autocast])
def test_surroundings_change_nothing(context: Callable[[], Any]) -> None:
    """No-grad, inference mode and a bf16 trainer's autocast leave a float32 result as it is, bit for bit."""
    model, rollout = tiny_model("qwen3", dtype=torch.float32), judge_rollout()
    expected = jacobians(model, rollout)
    with context():
        found = jacobians(model, rollout)
    for name in expected:
        assert found[name].jac_SD.dtype == torch.float32
        assert torch.equal(found[name].jac_SD, expected[name].jac_SD)
        assert found[name].context_energy == expected[name].context_energy
        assert not found[name].jac_SD.requires_grad


@pytest.mark.parametrize("wrapped", ["plain", "peft"])
def test_autocast_wrapper_on_the_instance_is_not_entered(wrapped: str) -> None:
    """accelerate replaces `model.forward` on the instance by a bf16 autocast; the engine calls the class's own."""
    rollout = judge_rollout()
    model = tiny_model("llama", dtype=torch.float32) if wrapped == "plain" else lora_model().float()
    expected = jacobians(model, rollout)
    calls = 0

    def wrap(module: nn.Module) -> None:
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return inner(*args, **kwargs)

        module.forward = forward

    wrap(model)
    if wrapped == "peft":
        wrap(model.get_base_model())
    found = jacobians(model, rollout)
    assert calls == 0
    for name in expected:
        assert torch.equal(found[name].jac_SD, expected[name].jac_SD)


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


def test_refuses_what_the_model_cannot_take() -> None:
    """Too long rollouts and foreign token ids get a reason, and are never run."""
    engine = JacobianEngine(tiny_model("llama"))
    rollout = judge_rollout()
    assert engine.refusal(rollout) is None
    assert engine.refusal(replace(rollout, completion_ids=(5,) * 55)) is None  # 64 exactly
    long = replace(rollout, completion_ids=(5,) * 56)
    assert engine.refusal(long) == "too long: 65 tokens, and the model takes 64"
    for bad in (VOCABULARY, -1):
        foreign = replace(rollout, completion_ids=(*rollout.completion_ids[:-1], bad))
        assert engine.refusal(foreign) == f"token id {bad} is outside the model's vocabulary of {VOCABULARY}"
    malformed = Rollout(rollout.prompt_ids, (5,), malformed="missing <analysis>")
    for bad_rollout, reason in ((long, "too long"), (malformed, "missing <analysis>")):
        with pytest.raises(ValueError, match=reason):
            engine.jacobians(Group((rollout, bad_rollout)), LINKS)
    assert engine.width == WIDTH


def prompt_tuned() -> nn.Module:
    """Return a model with two virtual tokens before the text."""
    return get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))


def encoder_decoder() -> nn.Module:
    """Return a tiny T5."""
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=VOCABULARY, **shape))


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (encoder_decoder, {}, "encoder-decoder"),
        (prompt_tuned, {}, "prompt-learning"),
        (tiny_model, {"adapters": False}, "not a PeftModel"),
        (lambda: nn.Linear(2, 2), {}, "Linear"),
    ],
    ids=["encoder-decoder", "prompt-tuning", "no adapters", "no language model"],
)
def test_constructor_refuses(build: Callable[[], nn.Module], options: dict[str, bool], message: str) -> None:
    """A model whose Jacobians would be wrong is refused before any work, by a message that says why."""
    with pytest.raises(ValueError, match=message):
        JacobianEngine(build(), **options)


@pytest.fixture(autouse=True)
def _grad_enabled() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()
