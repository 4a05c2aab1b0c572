"""Path requests: both engines against a plain definition, completeness, independence of batch, chunks and prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from cepo.counterfactual.donors import replace_span
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group import paths as paths_module
from cepo.jacobian.group import run as run_module
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.links import Link
from cepo.jacobian.protocol import Nodes, PathAnswer, PathRequest
from cepo.jacobian.records import Group, LinkPath, Rollout
from tests.jacobian.group.ragged import ragged_rollout
from tests.jacobian.test_autograd import link
from tests.models import FAMILIES, VOCABULARY, WIDTH, judge_rollout, randomise, tiny_model

TOTAL = ("criteria->analysis", "analysis->scores", "X->Y", "Z->X", "Z->Y:total", "analysis->scores@log_odds")


def counterfactuals(rollout: Rollout, source: str, count: int, seed: int = 0) -> tuple[Rollout, ...]:
    generator = torch.Generator().manual_seed(1000 * seed + count)
    size = len(rollout.spans[source].movable)
    return tuple(
        replace_span(rollout, source, torch.randint(3, VOCABULARY, (size,), generator=generator).tolist())
        for _ in range(count)
    )


def request(
    rollouts: Sequence[Rollout], text: str, *, count: int = 2, nodes: Nodes = 0, tolerance: float = 0.1
) -> PathRequest:
    one = link(text)
    others = tuple(counterfactuals(each, one.source, count, seed) for seed, each in enumerate(rollouts))
    return PathRequest(Group(tuple(rollouts)), others, (one,), nodes, tolerance)


def assert_same(found: PathAnswer, wanted: PathAnswer, tolerance: float) -> None:
    assert len(found) == len(wanted)
    for records, oracles in zip(found, wanted, strict=True):
        assert list(records) == list(oracles)
        for name, oracle in oracles.items():
            record: LinkPath = records[name]
            assert (record.link, record.source_positions, record.target_positions, record.nodes) == (
                oracle.link,
                oracle.source_positions,
                oracle.target_positions,
                oracle.nodes,
            )
            assert [record.own, *record.others] == pytest.approx([oracle.own, *oracle.others], rel=tolerance)
            assert record.sums == pytest.approx(oracle.sums, rel=tolerance, abs=tolerance)
            if oracle.attribution_S is None:
                assert record.attribution_S is None
            else:
                torch.testing.assert_close(record.attribution_S, oracle.attribution_S, rtol=tolerance, atol=tolerance)


def log_likelihood(model: nn.Module, rollout: Rollout, one: Link, embeddings_BTD: Tensor) -> Tensor:
    """Return s_B written out, from embeddings."""
    log_p_TV = model(inputs_embeds=embeddings_BTD).logits[0].log_softmax(-1)
    return torch.stack([log_p_TV[at - 1, rollout.token_ids[at]] for at in rollout.spans[one.target].positions]).sum()


@pytest.mark.usefixtures("_in_double")
@pytest.mark.parametrize("text", ["criteria->analysis", "Z->X"])
def test_the_oracle_is_the_definition(text: str) -> None:
    """Values, and the midpoint's gradient contracted with the difference row by row, written out with inputs_embeds."""
    model, one = tiny_model("llama"), link(text)
    asked = request([judge_rollout(1)], text, nodes=1)
    (answer,) = next(JacobianEngine(model).paths([asked]))
    (rollout,), (others,) = asked.group.rollouts, asked.counterfactuals
    ends = [model.get_input_embeddings()(torch.tensor([each.token_ids])).detach() for each in (rollout, *others)]
    record = answer[text]
    with torch.no_grad():
        values = [float(log_likelihood(model, rollout, one, end)) for end in ends]
    assert [record.own, *record.others] == pytest.approx(values, rel=1e-12)
    rows = []
    for end in ends[1:]:
        leaf = ((ends[0] + end) / 2).requires_grad_()
        (gradient,) = torch.autograd.grad(log_likelihood(model, rollout, one, leaf), leaf)
        rows.append((gradient * (ends[0] - end))[0, list(record.source_positions)].sum(-1))
    assert record.sums == pytest.approx([float(row.sum()) for row in rows], rel=1e-10)
    assert record.attribution_S is not None
    torch.testing.assert_close(record.attribution_S, torch.stack(rows).mean(0), rtol=1e-10, atol=1e-12)
    assert record.delta == pytest.approx(values[0] - sum(values[1:]) / 2)
    assert record.certificate == pytest.approx(
        max(abs(float(row.sum()) - (values[0] - value)) for row, value in zip(rows, values[1:], strict=True))
    )


@pytest.mark.usefixtures("_in_double")
@pytest.mark.parametrize("family", FAMILIES)
def test_group_engine_equals_the_oracle(family: str) -> None:
    """Every total link, values alone and with nodes, of ragged rollouts that share a prompt, to 1e-10."""
    model = tiny_model(family)
    engine, oracle = GroupEngine(model), JacobianEngine(model)
    rollouts = [ragged_rollout(seed) for seed in range(3)]
    asked = [request(rollouts, text, nodes=nodes) for text in TOTAL for nodes in (0, 2)]
    for found, wanted in zip(engine.paths(asked), oracle.paths(asked), strict=True):
        assert_same(found, wanted, 1e-10)


@pytest.mark.usefixtures("_in_double")
def test_numeric_targets_and_several_links_of_a_source() -> None:
    model = tiny_model("qwen3")
    links = tuple(link(text) for text in ("criteria->analysis", "X->Y@margin", "X->Y@log_odds"))
    rollouts = [judge_rollout(seed) for seed in range(2)]
    others = tuple(counterfactuals(each, "criteria", 1) for each in rollouts)
    asked = PathRequest(Group(tuple(rollouts)), others, links, 3)
    assert_same(next(GroupEngine(model).paths([asked])), next(JacobianEngine(model).paths([asked])), 1e-10)


@pytest.mark.usefixtures("_in_double")
def test_the_path_is_complete() -> None:
    """With nodes enough its sum is the effect to 1e-6, and so is the attribution's; one node is not enough here."""
    engine, rollouts = GroupEngine(tiny_model("llama")), [ragged_rollout(seed) for seed in range(2)]
    for text in ("criteria->analysis", "X->Y"):
        (coarse, fine) = (next(engine.paths([request(rollouts, text, nodes=nodes)])) for nodes in (1, 64))
        for rough, record in zip((each[text] for each in coarse), (each[text] for each in fine), strict=True):
            assert record.certificate is not None
            assert rough.certificate is not None
            assert record.certificate < 1e-6 < rough.certificate
            assert record.attribution_S is not None
            assert float(record.attribution_S.sum()) == pytest.approx(record.delta, abs=1e-6)


@pytest.mark.usefixtures("_in_double")
def test_a_path_is_refused_where_ids_are_read_outside_of_the_embeddings() -> None:
    """Embeddings per layer stay the own text's while the others move: no number of nodes gives the effect."""
    model, rollout = tiny_model("llama"), ragged_rollout(0)
    asked, others = link("X->Y"), counterfactuals(rollout, "criteria", 1)
    table = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    ids: list[Tensor] = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True)
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output + table[ids[-1]])
    for engine in (JacobianEngine(model), GroupEngine(model)):
        effect = PathRequest(Group((rollout,)), (others,), (asked,))
        assert next(engine.paths([effect]))[0][asked.name].delta != 0.0
        with pytest.raises(ValueError, match="LlamaForCausalLM also reads token ids outside its input embeddings"):
            next(engine.paths([replace(effect, nodes=1)]))


@pytest.mark.usefixtures("_in_double")
def test_auto_doubles_until_the_certificate_holds() -> None:
    engine, rollouts = GroupEngine(tiny_model("llama")), [ragged_rollout(seed) for seed in range(3)]
    answer = next(engine.paths([request(rollouts, "X->Y", nodes="auto", tolerance=1e-3)]))
    for record in (each["X->Y"] for each in answer):
        assert record.nodes > 1
        assert math.log2(record.nodes).is_integer()
        assert record.certificate is not None
        assert record.certificate <= 1e-3 * max(1.0, max(abs(record.own - other) for other in record.others))
    capped = replace(request(rollouts, "X->Y", nodes="auto", tolerance=1e-12), most_nodes=4)
    assert {each["X->Y"].nodes for each in next(engine.paths([capped]))} == {4}


@pytest.mark.usefixtures("_in_double")
def test_batch_order_chunks_and_company_change_nothing() -> None:
    """Alone, in company, backwards, with a budget of one rollout: equal to 1e-12."""
    model, rollouts = tiny_model("llama"), [ragged_rollout(seed) for seed in range(4)]
    asked = [request(rollouts, text, nodes=2) for text in ("criteria->analysis", "analysis->scores")]
    for one in asked:
        whole = next(GroupEngine(model).paths([one]))
        backwards = PathRequest(Group(one.group.rollouts[::-1]), one.counterfactuals[::-1], one.links, 2)
        assert_same(next(GroupEngine(model).paths([backwards]))[::-1], whole, 1e-12)
        assert_same(next(GroupEngine(model, memory_budget=1.0).paths([one])), whole, 1e-12)
        for place, rollout in enumerate(rollouts):
            alone = PathRequest(Group((rollout,)), (one.counterfactuals[place],), one.links, 2)
            assert_same(next(GroupEngine(model).paths([alone])), [whole[place]], 1e-12)


@pytest.mark.usefixtures("_in_double")
def test_values_serve_another_prompt_of_another_length() -> None:
    """Without nodes a counterfactual may have a longer prompt: its spans stand further on."""
    model, rollout = tiny_model("llama"), judge_rollout(2)
    shift = 3
    moved = {
        name: replace(each, positions=tuple(at + shift for at in each.positions))
        for name, each in rollout.spans.items()
    }
    longer = Rollout((5, 6, 7, *rollout.prompt_ids), rollout.completion_ids, moved)
    asked = PathRequest(Group((rollout,)), ((longer,),), (link("Z->X"),))
    found, wanted = (next(engine.paths([asked])) for engine in (GroupEngine(model), JacobianEngine(model)))
    assert_same(found, wanted, 1e-10)
    assert found[0]["Z->X"].own != found[0]["Z->X"].others[0]


def test_the_plan_counts_the_rows_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with padding of every segment; K (1 + M) + 1 branches per rollout, nothing goes back in stems."""
    engine, rollouts = GroupEngine(tiny_model("llama", dtype=torch.float32)), [ragged_rollout(s) for s in range(3)]
    asked = [request(rollouts, text, nodes=2) for text in ("criteria->analysis", "analysis->scores")]
    plan = engine.plan_paths(asked)
    seen = {"forward": 0, "backward": 0, "head": 0}
    run, back = paths_module.run_segment, run_module.backward

    def counting(model, segment, *rest):  # type: ignore[no-untyped-def]
        seen["forward"] += segment.rows
        seen["head"] += max(4, len(segment.head)) if segment.head else 0
        return run(model, segment, *rest)

    def counting_back(of, cotangents, inputs, **options):  # type: ignore[no-untyped-def]
        seen["backward"] += len(inputs[0]) * inputs[0].shape[1]
        return back(of, cotangents, inputs, **options)

    monkeypatch.setattr(paths_module, "run_segment", counting)
    monkeypatch.setattr(run_module, "backward", counting_back)
    list(engine.paths(asked))
    assert seen == {"forward": plan.forward_rows, "backward": plan.backward_rows, "head": plan.head_rows}
    by_segment = {row.segment: row for row in plan.rows}
    assert by_segment["stem"].backward == by_segment["rollouts"].backward == 0
    assert sum(plan.chunks) == 2 * len(rollouts) * (2 + 2 * 2)


def test_live_adapters_and_narrow_dtypes() -> None:
    """LoRA on, the embeddings' included, equals the oracle; bfloat16 stays near float32."""
    asked = [request([ragged_rollout(seed) for seed in range(2)], "criteria->analysis", nodes=2)]
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj", "embed_tokens"], init_lora_weights=False)
    model = get_peft_model(tiny_model("llama", dtype=torch.float32), config)
    randomise(model, 5)
    assert_same(next(GroupEngine(model).paths(asked)), next(JacobianEngine(model).paths(asked)), 1e-4)
    wide, narrow = (
        next(GroupEngine(tiny_model("llama", dtype=dtype)).paths(asked)) for dtype in (torch.float32, torch.bfloat16)
    )
    for one, other in zip(wide, narrow, strict=True):
        assert other["criteria->analysis"].own == pytest.approx(one["criteria->analysis"].own, rel=0.05)


def test_without_counterfactuals_there_is_no_effect() -> None:
    asked = PathRequest(Group((judge_rollout(),)), ((),), (link("X->Y"),), 2)
    (answer,) = next(GroupEngine(tiny_model("llama")).paths([asked]))
    record = answer["X->Y"]
    assert (record.delta, record.path_sum, record.certificate, record.attribution_S) == (0.0, None, None, None)


def test_bad_requests() -> None:
    rollout = judge_rollout()
    (other,) = counterfactuals(rollout, "criteria", 1)
    group, fine = Group((rollout,)), (link("criteria->analysis"),)
    with pytest.raises(ValueError, match="all of the same source"):
        PathRequest(group, ((other,),), (*fine, link("Z->X")))
    with pytest.raises(ValueError, match="direct effect"):
        PathRequest(group, ((other,),), (link("Z->Y"),))
    with pytest.raises(ValueError, match="expected one for each"):
        PathRequest(group, (), fine)
    with pytest.raises(ValueError, match="nodes is -1"):
        PathRequest(group, ((other,),), fine, -1)
    with pytest.raises(ValueError, match="differs outside of 'analysis'"):
        PathRequest(group, ((other,),), (link("analysis->scores"),), 1)
    outside = replace_span(rollout, "criteria", (VOCABULARY,) * len(rollout.spans["criteria"].movable))
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        next(GroupEngine(tiny_model("llama")).paths([PathRequest(group, ((outside,),), fine)]))
