"""Ragged rollouts, and answers of engines that must be the same: what tests of the group engine share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cepo.jacobian.records import LinkJacobian, Rollout
from tests.jacobian.test_autograd import link
from tests.models import FAMILIES, VOCABULARY, span

SERVED = [family for family in FAMILIES if family not in ("gemma2", "mistral-sliding")]
PAPER = tuple(link(text) for text in ("Z->X", "X->Y", "Z->Y"))


def ragged_rollout(seed: int, *, prompt: Sequence[int] | None = None, lead: int = 0) -> Rollout:
    """Return a judge's rollout of a prompt of 11 tokens, with spans and gaps of lengths that the seed draws."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    ids = list(prompt) if prompt is not None else [(5 * place + 3) % VOCABULARY for place in range(11)]
    split = len(ids)
    spans = {"prompt": span("prompt", range(2 + lead, split - 1))}
    for name, (low, high) in {"criteria": (1, 7), "analysis": (1, 6), "scores": (1, 4)}.items():
        ids += torch.randint(3, VOCABULARY, (draw(0, 3),), generator=generator).tolist()
        start = len(ids)
        ids += torch.randint(3, VOCABULARY, (draw(low, high),), generator=generator).tolist()
        spans[name] = span(name, range(start, len(ids)))
    ids += torch.randint(3, VOCABULARY, (draw(0, 4),), generator=generator).tolist()
    return Rollout(tuple(ids[:split]), tuple(ids[split:]), spans)


def assert_same(found: Any, wanted: Any, tolerance: float) -> None:
    """Compare answers: names, positions, matrices and energies, relative to the oracle's norm."""
    assert len(found) == len(wanted)
    for records, oracles in zip(found, wanted, strict=True):
        assert list(records) == list(oracles)
        for name, oracle in oracles.items():
            record: LinkJacobian = records[name]
            assert (record.link, record.source_positions, record.target_positions) == (
                oracle.link,
                oracle.source_positions,
                oracle.target_positions,
            )
            assert record.jac_SD.dtype == oracle.jac_SD.dtype
            assert not record.jac_SD.requires_grad
            scale = oracle.jac_SD.norm()
            assert scale > 0 or record.jac_SD.norm() == 0
            assert (record.jac_SD - oracle.jac_SD).norm() <= tolerance * scale, name
            if oracle.context_energy is None:
                assert record.context_energy is None
            else:
                assert record.context_energy == pytest.approx(oracle.context_energy, rel=10 * tolerance)
