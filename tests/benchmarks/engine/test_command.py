"""`cepo bench`: no time without an equal Jacobian. Nothing here looks at how long anything took."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cepo.benchmarks.engine import command as throughput
from cepo.benchmarks.engine import effects, loss, memory
from cepo.benchmarks.engine.cases import PEERS, contenders, jacobian_requests, new_subject, worst_error
from cepo.benchmarks.engine.command import run_benchmark
from cepo.benchmarks.engine.effects import CHAIN, DONORS, QUESTIONS, effect_contenders, effect_subject
from cepo.benchmarks.engine.figures import draw_scaling
from cepo.benchmarks.engine.loss import loss_contenders, loss_subject
from cepo.benchmarks.engine.peers import ALL_LINKS, Jacobians, count_rows, reference_jacobians
from cepo.benchmarks.engine.sizes import SIZES, Shapes, random_workload
from cepo.benchmarks.measure import matmul_rate
from cepo.jacobian.group.cost import measured_cost
from cepo.jacobian.records import Span
from tests.models import InDouble

PNG = b"\x89PNG\r\n\x1a\n"
MEASURED = ("seconds", "rollouts_per_s", "rows_per_s", "flops", "matmul_fraction", "forward_rows")


@pytest.fixture(autouse=True)
def _timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case is timed once, not three times, and the machine's rate for a moment."""
    monkeypatch.setattr("cepo.benchmarks.measure._SHORT", 0.0)
    monkeypatch.setattr("cepo.benchmarks.engine.cases.matmul_rate", lambda *shape: matmul_rate(*shape[:4], 1e-9))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def installed(*peers: str) -> list[str]:
    return [peer for peer in peers if throughput.importlib.util.find_spec(peer) is not None]


def test_tiny_runs_end_to_end_and_everybody_agrees(tmp_path: Path) -> None:
    """Every case has its row, with its figures, its environment and an error within the tolerance."""
    told: list[str] = []
    tables = run_benchmark("tiny", tmp_path, progress=told.append)
    rows = rows_of(tmp_path)
    of_peers = [row for row in rows if row["section"] == "peers"]
    assert len(of_peers) == 9 == len({row["case"] for row in of_peers})
    of_effects = [row for row in rows if row["section"] == "effects"]
    questions = ("effect of X->Y", "chain's effect", "path, 4 nodes")
    named = {f"{who}: {question}" for question in questions for who in ("reference", "group")}
    named |= {f"{peer}: integrated gradients" for peer in ("captum", "inseq")}
    assert len(of_effects) == 9
    assert {row["case"] for row in of_effects} == {*named, "reference schedule: chain's effect"}
    of_loss = [row for row in rows if row["section"] == "loss"]
    assert [row["case"] for row in of_loss] == ["policy update", "causal loss", "reference: causal loss"]
    by_section = {"peers": of_peers, "effects": of_effects, "loss": of_loss}
    for section, K in (("peers", 2), ("effects", 3), ("loss", 1)):
        assert {row["shapes"]["K"] for row in by_section[section]} == {K}
    compared = of_peers + of_effects + of_loss
    for row in rows:
        peer = row["case"].partition(":")[0]
        if peer in ("captum", "inseq") and not installed(peer):
            assert row["status"] == "not installed"
            assert row["seconds"] is None
            continue
        assert row["status"] == "ok", row
        assert all(row[name] > 0 for name in MEASURED)
        has_jacobians = row["section"] not in ("effects", "loss")
        assert (row["vjps"] is not None) == has_jacobians
        assert not has_jacobians or row["vjps_per_s"] == pytest.approx(row["vjps"] / row["seconds"])
        by_values = "effect" in row["case"] and "schedule" not in row["case"]
        assert (row["backward_rows"] > 0) == (not by_values)
        assert row["error"] is None or row["error"] <= row["tolerance"]
        assert (row["size"], row["dtype"], row["seed"]) == ("tiny", "float32", 0)
        assert {"device", "driver", "threads", "torch", "triton", "transformers", "python", "commit"} <= row.keys()
    assert all(row["error"] is not None for row in compared if row["status"] == "ok")
    assert all(row["speedup_by_flops"] > 0 for row in compared if row["status"] == "ok")
    baselines = {row["case"] for row in compared if row["speedup"] == 1.0}
    of_schedule = {"reference schedule", "reference schedule: chain's effect"}
    assert baselines == {*of_schedule, "reference: effect of X->Y", "reference: path, 4 nodes", "policy update"}
    static = [row for row in rows if row["section"] == "static"]
    assert [row["shapes"]["opening"] for row in static] == [32, 32, 32, 0]
    exact, whole = (row for row in static if row["case"] == "group: all links, exact")
    assert exact["backward_rows"] < whole["backward_rows"]
    for axis in SIZES["tiny"].scaling:
        assert (tmp_path / f"scaling_{axis}.png").read_bytes().startswith(PNG)
    text = (tmp_path / "bench.txt").read_text()
    assert "group: all links, exact" in text
    assert "reference schedule (scaled from 1 of 4 rollouts)" in text
    assert len(tables) == 5
    assert sum(len(table.rows) for table in tables) == len(compared) + len(static)
    assert "token rows/s" in text  # all columns are in the file, the main ones on the console
    assert tables[0].header == ("case", "error", "seconds", "rollouts/s", "VJPs/s", "peak MiB", "× reference")
    assert told
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-8), (torch.bfloat16, 0.25)])
def test_values_agree_in_double_and_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, limit: float
) -> None:
    """In true double all meet 1e-8; in bfloat16 they err, against a float32 copy, as the oracle itself does."""
    monkeypatch.setitem(throughput.SIZES, "tiny", replace(SIZES["tiny"], dtype=dtype))
    if dtype == torch.float64:
        with InDouble():
            run_benchmark("tiny", tmp_path, scaling=False)
    else:
        run_benchmark("tiny", tmp_path, scaling=False)
    rows = [row for row in rows_of(tmp_path) if row["status"] != "not installed"]
    assert len(rows) == 18 + 2 * len(installed("captum")) + len(installed("inseq"))
    for row in rows:
        assert row["status"] == "ok", row
        assert row["error"] <= row["tolerance"] <= limit
        assert (row["oracle_error"] > 0) == (dtype == torch.bfloat16)
        by_values = row["case"].endswith(" effect") or "effect of" in row["case"]
        assert ("error_in_float32" in row) == (by_values and dtype == torch.bfloat16)
        assert row.get("error_in_float32", 0.0) <= 1e-4
    assert not list(tmp_path.glob("*.png"))


def test_a_wrong_peer_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer whose J is wrong is told how much, and neither timed nor used as the reference."""

    def spoilt(*arguments: Any) -> Jacobians:
        return {key: 1.001 * jac_SD for key, jac_SD in reference_jacobians(*arguments).items()}

    monkeypatch.setattr("cepo.benchmarks.engine.cases.reference_jacobians", spoilt)
    run_benchmark("tiny", tmp_path, peers=["reference"], scaling=False)
    wrong, *ours = (row for row in rows_of(tmp_path) if row["section"] == "peers")
    assert wrong["case"] == "reference schedule"
    assert wrong["status"] == "disagrees by 1.0e-03"
    assert wrong["seconds"] is None
    assert "rollouts_per_s" not in wrong
    assert len(ours) == 4
    assert all(row["status"] == "ok" and row["seconds"] > 0 and row["speedup"] is None for row in ours)
    assert wrong["status"] in (tmp_path / "bench.txt").read_text()


def test_the_worst_error() -> None:
    """Of all matrices; a missing one is infinitely wrong, a NaN never passes, and zero may be right."""
    one, two, zero = (("X->Y", ((number,),), ()) for number in range(3))
    right_SD = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    wanted = {one: right_SD, two: right_SD, zero: 0 * right_SD}
    assert worst_error(dict(wanted), wanted, [one, two, zero]) == 0.0
    assert worst_error({one: right_SD, two: 1.1 * right_SD}, wanted, [one]) == pytest.approx(0.1, rel=1e-5)
    assert worst_error({one: right_SD.roll(1, 0)}, wanted, []) == pytest.approx(2**0.5)
    assert worst_error({one: right_SD}, wanted, [one, two]) == float("inf")
    # As one answer of the link: the error of a small part of it counts for little.
    halves = {one: right_SD, two: 0.1 * right_SD}
    found = {one: right_SD, two: -0.1 * right_SD}
    assert worst_error(found, halves, []) == pytest.approx(2.0)
    assert worst_error(found, halves, [], by_link=True) == pytest.approx(0.2 / 1.01**0.5)
    assert worst_error({zero: right_SD}, wanted, []) > 1e9
    for found in ({one: right_SD * float("nan"), two: right_SD}, {one: right_SD, two: right_SD * float("nan")}):
        assert not worst_error(found, wanted, []) <= 1e9


def test_a_peer_that_goes_wrong_only_when_timed_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of the timed run are compared too, not only those of the warm-up."""
    calls: list[int] = []

    def spoilt(*arguments: Any) -> Jacobians:
        calls.append(1)
        factor = 1.0 if len(calls) == 1 else 1.01
        return {key: factor * jac_SD for key, jac_SD in reference_jacobians(*arguments).items()}

    monkeypatch.setattr("cepo.benchmarks.engine.cases.reference_jacobians", spoilt)
    run_benchmark("tiny", tmp_path, peers=["reference"], scaling=False)
    assert rows_of(tmp_path)[0]["status"] == "disagrees by 1.0e-02"


def test_the_engine_gets_no_time_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds for peers holds for us, of effects, paths and the causal loss as well."""
    from cepo.jacobian.group.engine import GroupEngine

    compute, paths, values_of = GroupEngine.compute, GroupEngine.paths, loss.causal_values

    def spoilt_values(*arguments: Any, **options: Any) -> Any:
        values_B, has_donor_B = values_of(*arguments, **options)
        return 1.001 * values_B, has_donor_B

    def spoilt(self: GroupEngine, requests: Any) -> Any:
        for answer in compute(self, requests):
            yield [
                {name: replace(record, jac_SD=-record.jac_SD) for name, record in records.items()} for records in answer
            ]

    def slightly_spoilt(self: GroupEngine, requests: Any) -> Any:
        for answer in paths(self, requests):
            yield [
                {
                    name: replace(
                        path,
                        others=tuple(path.own + 1.001 * (other - path.own) for other in path.others),
                        attribution_S=None if path.attribution_S is None else 1.001 * path.attribution_S,
                    )
                    for name, path in paths.items()
                }
                for paths in answer
            ]

    monkeypatch.setattr(GroupEngine, "compute", spoilt)
    monkeypatch.setattr(GroupEngine, "paths", slightly_spoilt)
    monkeypatch.setattr(loss, "causal_values", spoilt_values)
    run_benchmark("tiny", tmp_path, peers=["padded"])
    rows = rows_of(tmp_path)
    ours = [row for row in rows if row["section"] == "peers" and row["case"].startswith("group")]
    assert len(ours) == 4
    compared = [row for row in rows if row["section"] in ("effects", "loss")]
    assert len(compared) == 4
    assert all(row["status"].startswith("disagrees by 1.0e-03") and row["seconds"] is None for row in compared)
    assert all(row["status"] == "disagrees by 2.0e+00" and row["seconds"] is None for row in ours)
    assert {row["case"] for row in rows if row["seconds"]} == {"padded autograd", "padded autograd: X->Y"}


def test_a_peer_that_fails_or_runs_out_of_memory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that raises loses its own figures, nobody else's; a batch that does not fit is halved."""
    from cepo.benchmarks.engine.peers import padded_jacobians

    def no_room_for_three(model: Any, workload: Any, *, links: Any, batch: int) -> Jacobians:
        if batch > 2:
            raise torch.OutOfMemoryError
        return padded_jacobians(model, workload, links=links, batch=batch)

    def fails(*arguments: Any) -> Jacobians:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("cepo.benchmarks.engine.cases.padded_jacobians", no_room_for_three)
    monkeypatch.setattr("cepo.benchmarks.engine.cases.functional_jacobians", fails)
    run_benchmark("tiny", tmp_path, peers=["padded", "functional"], scaling=False)
    by_case = {row["case"]: row for row in rows_of(tmp_path)}
    assert by_case["torch.func vmap of vjp"]["status"] == "failed with RuntimeError: no such operator"
    assert by_case["padded autograd"]["status"] == "ok"
    assert by_case["padded autograd"]["batch"] == 2
    assert "batches of 2" in (tmp_path / "bench.txt").read_text()


def test_ragged_rollouts_are_padded_right() -> None:
    """Padding changes nobody's Jacobian: every contender agrees with the oracle on rollouts of unequal length."""
    shapes = Shapes(3, 12, 8, 3, 1)
    workload = random_workload(128, shapes, 0)
    cut = []
    for shorter, rollout in enumerate(workload.rollouts):
        ends = {"rationale": (12, 20 - shorter), "answer": (20 - shorter, 23 - 2 * shorter)}
        spans = dict(rollout.spans)
        for name, (start, end) in ends.items():
            positions = tuple(range(start, end))
            spans[name] = Span(name, positions, positions, (0,) * len(positions), "")
        cut.append(replace(rollout, completion_ids=rollout.completion_ids[: 11 - 2 * shorter], spans=spans))
    ragged = replace(workload, rollouts=tuple(cut))
    subject = new_subject("tiny", SIZES["tiny"].models["tiny"], torch.float32, torch.device("cpu"), ragged, 0)
    for case in contenders(subject, (*PEERS[:3], *installed("captum"))):
        found = case.run(ragged, 2)
        assert found.keys() <= subject.wanted.keys()
        assert worst_error(found, subject.wanted, []) <= 1e-5, case.name


def test_memory_of_one_rollout_is_measured_without_and_with_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row each, in which the Jacobians of the second run are those of the first."""
    monkeypatch.setattr(memory, "LENGTHS", (60,))
    memory.main(tmp_path / "memory.jsonl", memory_gib=1e-9, size="tiny")
    free, short = map(json.loads, (tmp_path / "memory.jsonl").read_text().splitlines())
    assert (free["tokens"], free["error"], short["tokens"]) == (60, 0.0, 60)
    assert short["error"] <= 1e-5
    assert short["planned_peak_bytes"] < free["planned_peak_bytes"]


def test_rows_of_the_reference_schedule() -> None:
    """1 + 2K forward and twice as many backward passes over whole rollouts, all rows through the head."""
    model = AutoModelForCausalLM.from_config(SIZES["tiny"].models["tiny"])
    cost = measured_cost(model, 0, 0, 0)
    workload = random_workload(128, Shapes(8, 256, 64, 9, 4), 0)
    counts = count_rows(cost, workload, ALL_LINKS, whole_head=True, always_both=True)
    tokens = 8 * 9 * 329
    assert (counts.forward, counts.backward, counts.head) == (tokens, 2 * tokens, tokens)
    assert counts.rows == 3 * tokens
    assert counts.vjps == 8 * (2 + 4 * 2 + 4), "permutations of the rationale need the answer's score alone"


def test_vjps_do_not_depend_on_the_schedule() -> None:
    """One per rollout and target as sampled, and per permutation; the direct Z->Y needs one that X->Y does not."""
    workload = random_workload(128, Shapes(3, 24, 8, 3, 2), 0)
    subject = new_subject("tiny", SIZES["tiny"].models["tiny"], torch.float32, torch.device("cpu"), workload, 0)
    found = {case.name: case.count(workload).vjps for case in contenders(subject, ("padded",))}
    assert found["group: X->Y"] == found["padded autograd: X->Y"] == 3 * (1 + 2)
    assert found["padded autograd"] == 3 * (2 + 2 * 2 + 2)
    assert found["group: all links, exact"] == 3 * (3 + 2 * 2 + 2)
    assert found["group: all links, base only"] == 3 * 3


def test_peers_and_the_engine_are_asked_for_the_same_permutations() -> None:
    """Three tokens of rationale have five other orders, however many are asked for: an order that came twice would
    cost a peer time that the engine does not spend."""
    workload = random_workload(128, Shapes(2, 6, 3, 2, 8), 0)
    requests = jacobian_requests(workload, dict.fromkeys(ALL_LINKS, 1.0))
    of_engine = [rollout.token_ids for request in requests for rollout in request.group.rollouts]
    of_peers = [rollout.token_ids for version in workload.versions(ALL_LINKS) for rollout in version.rollouts]
    assert sorted(of_peers) == sorted(of_engine)
    assert len(set(of_peers)) == 2 * (1 + 5 + 8)


def test_rows_of_effects_and_paths_alone() -> None:
    """1 + K forward passes for an effect, 1 + 2K for a chain's two, and K times the nodes both ways for a path; the
    schedule of the reference goes back twice after each forward pass."""
    workload = random_workload(128, Shapes(3, 24, 8, 3, DONORS), 0)
    subject = new_subject("tiny", SIZES["tiny"].models["tiny"], torch.float32, torch.device("cpu"), workload, 0)
    cases = {
        case.name: case
        for question in QUESTIONS
        for case in effect_contenders(effect_subject(subject, question), ["reference"], question=question)
    }
    expected = {
        "reference: effect of X->Y": (1 + DONORS, 0),
        "reference schedule: chain's effect": (1 + 2 * DONORS, 2 * (1 + 2 * DONORS)),
        "reference: chain's effect": (1 + 2 * DONORS, 0),
        "reference: path, 4 nodes": (4 * DONORS, 4 * DONORS),
    }
    rollouts, tokens = 3, 35
    for name, (forward, backward) in expected.items():
        counts = cases[name].count(workload)
        assert counts.forward == counts.head == rollouts * tokens * forward, name
        assert counts.backward == rollouts * tokens * backward, name


def test_the_reference_schedule_of_the_chain_forms_the_jacobians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both targets at each rollout and each counterfactual; its values alone would not show that it does."""
    called: list[int] = []
    monkeypatch.setattr(effects, "backward", lambda scores, _: called.append(len(scores)))
    workload = random_workload(128, Shapes(2, 24, 8, 3, DONORS), 0)
    subject = new_subject("tiny", SIZES["tiny"].models["tiny"], torch.float32, torch.device("cpu"), workload, 0)
    cases = {case.name: case for case in effect_contenders(subject, ["reference"], question=CHAIN)}
    cases["reference: chain's effect"].run(workload, 2)
    assert called == []
    cases["reference schedule: chain's effect"].run(workload, 2)
    assert called == [2] * 2 * (1 + 2 * DONORS)


def test_losses_and_their_gradients_are_compared() -> None:
    """Every schedule answers what the oracle does on the small workload, and together they answer all of it."""
    workload = random_workload(128, SIZES["tiny"].check, 0)
    subject = new_subject("tiny", SIZES["tiny"].models["tiny"], torch.float32, torch.device("cpu"), workload, 0)
    of_loss = loss_subject(subject)
    found: Jacobians = {}
    for case in loss_contenders(of_loss, PEERS):
        of_case = case.run(workload, 2)
        assert worst_error(of_case, of_loss.wanted, [*of_case]) <= 1e-5
        found |= of_case
    assert found.keys() == of_loss.wanted.keys()
    assert all(value.norm() > 0 for value in found.values())


def test_a_smaller_workload_is_part_of_a_larger_one() -> None:
    """So that what the oracle says about the small one can be compared with the timed run's answers."""
    for size in SIZES.values():
        small = random_workload(128, size.check, 3)
        for shapes in size.shapes:
            large = random_workload(128, shapes, 3)
            assert large.rollouts[: len(small.rollouts)] == small.rollouts
            assert shapes.K >= size.check.K


def test_a_plot_without_a_single_time_is_drawn(tmp_path: Path) -> None:
    """Where everybody disagreed there is still a file."""
    row = {"case": "a", "seconds": None, "shapes": {"G": 2, "Lz": 4, "Lx": 4, "Ly": 2, "K": 1}}
    draw_scaling([row], "G", "nothing", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ("huge", {}, "size is 'huge'; expected one of tiny, small, a100, h100"),
        ("tiny", {"peers": ["padded", "jax"]}, "peers holds 'jax'; expected some of reference"),
        ("tiny", {"device": "tpu"}, "device is 'tpu'; expected cpu or cuda"),
        ("a100", {"device": "cpu"}, "size is 'a100', which needs a CUDA device"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, size: str, options: dict[str, Any], message: str) -> None:
    """Before anything is written."""
    with pytest.raises(ValueError, match=message):
        run_benchmark(size, tmp_path / "bench", **options)
    assert not (tmp_path / "bench").exists()


def test_gpu_sizes_need_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And say so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="size is 'h100', which needs a CUDA device"):
        run_benchmark("h100", tmp_path)
    with pytest.raises(ValueError, match="device is 'cuda', but there is no CUDA device"):
        run_benchmark("tiny", tmp_path, device="cuda")
