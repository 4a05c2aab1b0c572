"""Permutations of a span's tokens, and the nuisance subspace against a full SVD."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cepo.counterfactual.nuisance import angles_between, nuisance_bases, remove_mean, remove_nuisance
from cepo.counterfactual.permute import BLOCK_TOKENS, check_permutation, permutations
from cepo.counterfactual.rank import check_rank
from cepo.jacobian.records import Rollout
from cepo.kernels.spectral import spectral_shares
from tests.models import span

KINDS = ("uniform", "sentence", "block")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def rollout_of(
    criteria: list[int],
    *,
    prompt: tuple[int, ...] = (50, 51, 52),
    movable: list[int] | None = None,
    sentences: list[int] | None = None,
) -> Rollout:
    """Return a rollout of a prompt, a tag (60), the criteria and two more tokens; `movable` are places in the span."""
    start = len(prompt) + 1
    positions = [start + index for index in range(len(criteria))]
    moved = positions if movable is None else [start + place for place in movable]
    spans = {"prompt": span("prompt", range(len(prompt))), "criteria": span("criteria", positions, moved, sentences)}
    return Rollout(prompt, (60, *criteria, 61, 62), spans)


def criteria_of(rollout: Rollout) -> list[int]:
    """Return the ids that stand in the criteria."""
    return [rollout.token_ids[position] for position in rollout.spans["criteria"].positions]


@given(
    ids=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    kind=st.sampled_from(KINDS),
    seed=st.integers(-5, 5),
    count=st.integers(1, 10),
    data=st.data(),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_only_movable_tokens_move(ids: list[int], kind: str, seed: int, count: int, data: st.DataObject) -> None:
    """The span's multiset, the straddling tokens, everything outside and all lengths stay; the order does not."""
    movable = sorted(data.draw(st.sets(st.integers(0, len(ids) - 1))))
    sentences = sorted(data.draw(st.lists(st.integers(0, 3), min_size=len(movable), max_size=len(movable))))
    rollout = rollout_of(ids, movable=movable, sentences=sentences)
    orders = permutations(rollout, "criteria", count, seed=seed, kind=kind)
    assert orders == permutations(rollout, "criteria", count, seed=seed, kind=kind)
    runs = [
        [ids[place] for place, _ in run] for _, run in groupby(zip(movable, sentences, strict=True), lambda x: x[1])
    ]
    if not orders:
        moved = [ids[place] for place in movable]
        possible = {
            "uniform": len(set(moved)) > 1,
            "sentence": any(len(set(run)) > 1 for run in runs),
            "block": len(moved) > BLOCK_TOKENS and len(set(moved)) > 1,
        }
        # A block can equal another; only then a rollout of several blocks may have no other order.
        assert not possible[kind] or (kind == "block" and len(moved) <= 2 * BLOCK_TOKENS)
    for permuted in orders:
        found = criteria_of(permuted)
        assert found != ids
        assert Counter(found) == Counter(ids)
        assert [found[place] for place in range(len(ids)) if place not in movable] == [
            ids[place] for place in range(len(ids)) if place not in movable
        ]
        assert permuted.prompt_ids == rollout.prompt_ids
        assert len(permuted.completion_ids) == len(rollout.completion_ids)
        assert permuted.completion_ids[0] == 60
        assert permuted.completion_ids[-2:] == (61, 62)
        assert permuted.spans == rollout.spans
        if kind == "sentence":
            start = 0
            for run in runs:
                places = movable[start : start + len(run)]
                assert Counter(found[place] for place in places) == Counter(run)
                start += len(run)


def test_no_order_comes_twice_and_a_smaller_count_gives_the_first() -> None:
    """Three tokens have five other orders; an order that counted twice would weigh twice in the nuisance subspace."""
    found = permutations(rollout_of([1, 2, 3]), "criteria", 40, seed=0)
    assert len(found) == len({one.token_ids for one in found}) == 5
    assert permutations(rollout_of([1, 2, 3]), "criteria", 2, seed=0) == found[:2]
    assert len(permutations(rollout_of([1, 2]), "criteria", 8, seed=0)) == 1
    assert permutations(rollout_of([1, 1]), "criteria", 8, seed=0) == ()


def test_prompt_span_permutes_in_the_prompt() -> None:
    """A source in the prompt changes the prompt's ids and leaves the completion."""
    rollout = rollout_of([1, 2, 3], prompt=(50, 51, 52, 53))
    (permuted,) = permutations(rollout, "prompt", 1, seed=0)
    assert permuted.completion_ids == rollout.completion_ids
    assert permuted.prompt_ids != rollout.prompt_ids
    assert sorted(permuted.prompt_ids) == [50, 51, 52, 53]


@pytest.mark.parametrize("kind", KINDS)
def test_depends_on_seed_kind_ids_and_index_alone(kind: str) -> None:
    """The same span in another prompt, at another place, is put in the same order; other seeds and indices differ."""
    ids, sentences = list(range(10, 40)), [number // 10 for number in range(30)]
    here = rollout_of(ids, sentences=sentences)
    there = rollout_of(ids, prompt=(1, 2, 3, 4, 5, 6, 7), sentences=sentences)
    there = replace(there, completion_ids=(*there.completion_ids, 9, 9))

    def orders(rollout: Rollout, seed: int) -> list[tuple[int, ...]]:
        return [tuple(criteria_of(one)) for one in permutations(rollout, "criteria", 4, seed=seed, kind=kind)]

    for seed in range(3):
        assert orders(here, seed) == orders(there, seed)
    # four blocks have 23 orders, so a few of different seeds may coincide
    assert len({order for seed in range(3) for order in orders(here, seed)}) >= 9
    other = rollout_of([*ids[:-1], 99], sentences=sentences)
    changed = tuple(99 if token == 39 else token for token in orders(here, 0)[0])
    assert orders(other, 0)[0] != changed


def test_kinds_differ() -> None:
    """Each kind is its own experiment."""
    rollout = rollout_of(list(range(10, 40)), sentences=[number // 10 for number in range(30)])
    found = {
        tuple(criteria_of(one)) for kind in KINDS for one in permutations(rollout, "criteria", 1, seed=0, kind=kind)
    }
    assert len(found) == 3


def test_golden_permutations() -> None:
    """A reward is reproducible across releases: these orders must not change without a CHANGELOG entry."""
    rollout = rollout_of([10, 11, 12, 13, 14])
    again = [criteria_of(one) for one in permutations(rollout, "criteria", 3, seed=0)]
    assert again == [[10, 14, 11, 12, 13], [12, 11, 10, 13, 14], [12, 14, 10, 13, 11]]


@pytest.mark.parametrize("seed", range(20))
def test_two_tokens_always_swap(seed: int) -> None:
    """A draw that changes nothing is drawn again: of two tokens there is one other order, and it always comes."""
    found = permutations(rollout_of([7, 8]), "criteria", 4, seed=seed)
    assert [criteria_of(one) for one in found] == [[8, 7]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ids", "movable"), [([7], None), ([7, 7, 7, 7] * 5, None), ([7, 8, 9], [1]), ([7, 8], [])])
def test_no_other_order(kind: str, ids: list[int], movable: list[int] | None) -> None:
    """Where no order differs there is no counterfactual, and no endless search."""
    assert permutations(rollout_of(ids, movable=movable), "criteria", 1, seed=0, kind=kind) == ()


def test_sentence_kind_without_a_sentence_of_two() -> None:
    """Tokens of one-token sentences have nowhere to go."""
    rollout = rollout_of([1, 2, 3], sentences=[0, 1, 2])
    assert permutations(rollout, "criteria", 1, seed=0, kind="sentence") == ()
    assert len(permutations(rollout, "criteria", 1, seed=0, kind="uniform")) == 1


@pytest.mark.parametrize("length", [9, 16, 20, 33])
def test_blocks_stay_whole(length: int) -> None:
    """Runs of eight tokens change places and keep their inside; a lone block has no other order."""
    ids = list(range(100, 100 + length))
    blocks = [tuple(ids[start : start + BLOCK_TOKENS]) for start in range(0, length, BLOCK_TOKENS)]
    for permuted in permutations(rollout_of(ids), "criteria", 5, seed=1, kind="block"):
        found = criteria_of(permuted)
        rest = found
        while rest:
            block = next(block for block in blocks if tuple(rest[: len(block)]) == block)
            rest = rest[len(block) :]
        assert found != ids
    assert permutations(rollout_of(ids[:BLOCK_TOKENS]), "criteria", 1, seed=1, kind="block") == ()


def test_every_order_can_come() -> None:
    """The uniform kind reaches all five other orders of three tokens, each about as often."""
    rollout = rollout_of([1, 2, 3])
    firsts = [permutations(rollout, "criteria", 1, seed=seed)[0] for seed in range(1000)]
    counts = Counter(tuple(criteria_of(one)) for one in firsts)
    assert len(counts) == 5
    assert (1, 2, 3) not in counts
    assert min(counts.values()) > 140  # 200 expected, standard deviation 13


def test_unknown_kind() -> None:
    """A kind that does not exist is refused by name, before anything else."""
    with pytest.raises(ValueError, match="permutation is 'random'"):
        check_permutation("random")
    with pytest.raises(ValueError, match="uniform, sentence, block"):
        permutations(rollout_of([1, 2]), "criteria", 1, seed=0, kind="random")


def matrix(rows: int, columns: int, seed: int = 0, *, decay: float = 1.0) -> Tensor:
    """Return a float64 matrix with a falling spectrum."""
    noise_ND = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise_ND * torch.arange(1, columns + 1, dtype=torch.float64) ** -decay


def projector(basis_RD: Tensor) -> Tensor:
    """Return V V^T, which does not depend on signs and rotations of the basis."""
    return basis_RD.T @ basis_RD


def right_vectors(stack_ND: Tensor, rank: int) -> Tensor:
    """Return the first right singular vectors by a full SVD."""
    return torch.linalg.svd(stack_ND.double(), full_matrices=False).Vh[:rank]


def nuisance_basis(jacs_SD: Sequence[Tensor], **options: Any) -> Tensor:
    """Return the nuisance subspace of one stack."""
    (basis_RD,) = nuisance_bases([jacs_SD], **options)
    return basis_RD


def own_angles(basis_RD: Tensor, jac_SD: Tensor) -> list[float]:
    """Return the angles between a subspace and the Jacobian's own top subspace of equal rank."""
    return angles_between(basis_RD, nuisance_basis([jac_SD], rank=len(basis_RD)))


SHAPES = {"wide": (4, 3, 40), "tall": (4, 30, 6), "square": (2, 4, 8), "one": (1, 1, 5)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_basis_equals_svd(shape: str, rank: int, dtype: torch.dtype) -> None:
    """V spans the top right singular vectors of the stack, with orthonormal rows, in float64."""
    count, rows, columns = SHAPES[shape]
    jacs_SD = [matrix(rows, columns, seed).to(dtype) for seed in range(count)]
    basis_RD = nuisance_basis(jacs_SD, rank=rank)
    expected = min(rank, columns, count * rows)
    assert basis_RD.shape == (expected, columns)
    assert basis_RD.dtype == torch.float64
    assert torch.allclose(basis_RD @ basis_RD.T, torch.eye(expected, dtype=torch.float64), atol=1e-13)
    exact_RD = right_vectors(torch.cat(jacs_SD), expected)
    assert torch.allclose(projector(basis_RD), projector(exact_RD), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", ["wide", "tall"])
@pytest.mark.parametrize("energy", [0.1, 0.5, 0.8, 0.9, 0.99, 1.0])
def test_energy_takes_the_smallest_rank(shape: str, energy: float) -> None:
    """tau picks the fewest directions that hold the share, never one more."""
    count, rows, columns = SHAPES[shape]
    jacs_SD = [matrix(rows, columns, seed) for seed in range(count)]
    sigma_N = torch.linalg.svdvals(torch.cat(jacs_SD))
    held = (sigma_N**2).cumsum(0) / (sigma_N**2).sum()
    expected = next(index + 1 for index, share in enumerate(held.tolist()) if share >= energy - 1e-12)
    basis_RD = nuisance_basis(jacs_SD, energy=energy)
    assert len(basis_RD) == expected
    assert torch.allclose(projector(basis_RD), projector(right_vectors(torch.cat(jacs_SD), expected)), atol=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_energy_of_jacobians_whose_squares_vanish_or_overflow(scale: float) -> None:
    """A share of energy is of no unit: a saturated model's Jacobian was removed whole, a huge one ended the run."""
    jac_SD = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted_RD, found_RD = (nuisance_basis([jac_SD * factor], energy=0.5) for factor in (1.0, scale))
    assert found_RD.shape == wanted_RD.shape
    assert torch.allclose(found_RD.T @ found_RD, wanted_RD.T @ wanted_RD, atol=1e-9)


def test_energy_exactly_on_a_share() -> None:
    """A share that is met to the last bit is met."""
    stack_SD = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    assert len(nuisance_basis([stack_SD], energy=0.5)) == 1
    assert len(nuisance_basis([stack_SD], energy=0.500001)) == 2


@pytest.mark.parametrize("columns", [5, 60])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rank_deficient_stacks(columns: int, scale: float) -> None:
    """Copies of a rank-2 matrix hold two directions, however many are asked for, at any scale."""
    jac_SD = scale * matrix(6, 2) @ matrix(2, columns, 1, decay=0.0)
    for options in ({"rank": 4}, {"energy": 1.0}):
        basis_RD = nuisance_basis([jac_SD, jac_SD.flip(0), -2 * jac_SD], **options)
        assert len(basis_RD) == 2
        assert torch.allclose(projector(basis_RD), projector(right_vectors(jac_SD, 2)), atol=1e-8)
        assert remove_nuisance(jac_SD, basis_RD).norm() < 1e-12 * jac_SD.norm()


def test_nothing_to_remove() -> None:
    """No counterfactuals, or zero ones, give an empty basis, and an empty basis leaves J as it is."""
    jac_SD = matrix(3, 5)
    for jacs_SD in ([], [torch.zeros(3, 5), torch.zeros(3, 5)]):
        for options in ({"rank": 2}, {"energy": 0.9}):
            basis_RD = nuisance_basis(jacs_SD, **options)
            assert len(basis_RD) == 0
            assert torch.equal(remove_nuisance(jac_SD, basis_RD), jac_SD)
            assert own_angles(basis_RD, jac_SD) == []
    assert torch.equal(remove_nuisance(jac_SD, nuisance_basis([jac_SD], rank=0)), jac_SD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "columns", "inner", "options"),
    [(1, 8, 8, {"rank": 8}), (40, 32, 32, {"energy": 1.0}), (90, 96, 2, {"rank": 4}), (10, 64, 2, {"energy": 1.0})],
)
def test_a_jacobian_inside_the_nuisance_subspace_scores_0(
    rows: int, columns: int, inner: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Nothing is left but rounding, whose phi is anything up to 1 (always 1 for a span of one token)."""
    row_space_RD = matrix(inner, columns, 50, decay=0.0)
    for scale in (1.0, 1e-30):
        jac_SD, *others_SD = (
            (scale * matrix(rows, inner, seed, decay=0.0) @ row_space_RD).to(dtype) for seed in range(9)
        )
        residual_SD = remove_nuisance(jac_SD, nuisance_basis(others_SD, **options))
        assert spectral_shares([residual_SD])[0].value == 0.0
        assert residual_SD.dtype == dtype
        mean_SD = torch.stack(others_SD).double().mean(0)
        assert not remove_mean((0.3 * mean_SD).to(dtype), others_SD).any()
    # What is more than rounding stays.
    rest_SD = matrix(rows, columns, 60)
    rest_SD -= rest_SD @ projector(nuisance_basis([row_space_RD], rank=inner))
    if inner < columns:
        outside_SD = (jac_SD.double() + 1e-3 * jac_SD.abs().max() * rest_SD).to(dtype)
        left = remove_nuisance(outside_SD, nuisance_basis(others_SD, **options)).norm()
        assert float(left) == pytest.approx(1e-3 * float(jac_SD.abs().max() * rest_SD.norm()), rel=1e-2)


@pytest.mark.parametrize("rank", [1, 3])
def test_residual_and_removed_make_up_j(rank: int) -> None:
    """J splits into two orthogonal parts: what lies in the nuisance subspace, and the residual."""
    jac_SD = matrix(4, 9, 7)
    basis_RD = nuisance_basis([matrix(4, 9, seed) for seed in range(3)], rank=rank)
    residual_SD = remove_nuisance(jac_SD, basis_RD)
    assert float((residual_SD @ basis_RD.T).abs().max()) < 1e-15
    removed_SD = jac_SD @ projector(basis_RD)
    assert torch.allclose(residual_SD + removed_SD, jac_SD, rtol=0, atol=1e-14)
    assert float(residual_SD.square().sum() + removed_SD.square().sum()) == pytest.approx(float(jac_SD.square().sum()))
    assert removed_SD.norm() > 0.1
    single_SD = remove_nuisance(jac_SD.float(), basis_RD)
    assert single_SD.dtype == torch.float32
    assert float((single_SD.double() @ basis_RD.T).abs().max()) < 1e-6
    # Hardened against itself, nothing is left.
    assert remove_nuisance(jac_SD, nuisance_basis([jac_SD], rank=4)).norm() < 1e-14


def test_remove_mean() -> None:
    """The named alternative removes the Frobenius component along the mean counterfactual, and that alone."""
    jac_SD, others_SD = matrix(3, 4), [matrix(3, 4, seed) for seed in (1, 2)]
    mean_SD = (others_SD[0] + others_SD[1]) / 2
    residual_SD = remove_mean(jac_SD, others_SD)
    assert abs(float((residual_SD * mean_SD).sum())) < 1e-14
    part_SD = jac_SD - residual_SD
    assert torch.allclose(part_SD, mean_SD * float((jac_SD * mean_SD).sum() / mean_SD.square().sum()))
    assert part_SD.norm() > 0.01
    assert torch.equal(remove_mean(jac_SD, []), jac_SD)
    assert torch.equal(remove_mean(jac_SD, [mean_SD, -mean_SD]), jac_SD)
    assert remove_mean(jac_SD, [3 * jac_SD]).norm() < 1e-14
    assert remove_mean(jac_SD.float(), others_SD).dtype == torch.float32


def test_principal_angles() -> None:
    """A subspace makes 0 degrees with itself, 90 with its complement, and the angle of its rotation otherwise."""
    unit_DD = torch.eye(6, dtype=torch.float64)
    jac_SD = torch.stack([3 * unit_DD[0], 2 * unit_DD[1]])
    assert own_angles(unit_DD[:2], jac_SD) == pytest.approx([0.0, 0.0], abs=1e-6)
    assert own_angles(unit_DD[2:4], jac_SD) == pytest.approx([90.0, 90.0])
    turned_D = (unit_DD[0] + unit_DD[2]) / 2**0.5
    assert own_angles(torch.stack([turned_D, unit_DD[3]]), jac_SD) == pytest.approx([45.0, 90.0])
    # As many angles as the smaller of the two subspaces has directions.
    assert own_angles(unit_DD[:3], jac_SD.float()) == pytest.approx([0.0, 0.0], abs=1e-5)
    assert own_angles(unit_DD[1:2], jac_SD) == pytest.approx([90.0])  # J's own top direction is the first
    assert own_angles(unit_DD[:2], torch.zeros(2, 6)) == []


@pytest.mark.parametrize(
    ("rank", "energy", "message"),
    [
        (None, None, "exactly one"),
        (2, 0.9, "exactly one"),
        (-1, None, "rank is -1"),
        (1.5, None, "rank is 1.5"),
        (True, None, "rank is True"),
        (None, 0.0, "energy is 0.0"),
        (None, 1.01, "energy is 1.01"),
        (None, float("nan"), "energy is nan"),
    ],
)
def test_bad_rank(rank: int | None, energy: float | None, message: str) -> None:
    """Rank and energy are refused by name."""
    with pytest.raises(ValueError, match=message):
        check_rank(rank, energy)
    with pytest.raises(ValueError, match=message):
        nuisance_basis([matrix(2, 3)], rank=rank, energy=energy)
