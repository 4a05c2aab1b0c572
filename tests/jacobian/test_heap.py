"""Protects what memory plans count on: what an engine frees on a CPU goes back to the system; nothing else changes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from cepo.jacobian.heap import return_freed, returning_blocks

MIB = 2**20


class Info(ctypes.Structure):
    """glibc's struct mallinfo2; `hblks` counts the blocks that are mapped one by one."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "top",
        )
    ]


mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
if mallinfo is None:
    pytest.skip("needs glibc 2.33", allow_module_level=True)
mallinfo.restype = Info


def is_mapped(mebibytes: int) -> bool:
    """Tell whether a block of that size is mapped by itself."""
    before = mallinfo().hblks
    block = torch.empty(mebibytes * MIB, dtype=torch.uint8)
    mapped: bool = mallinfo().hblks == before + 1
    del block
    return mapped


def test_blocks_of_sixteen_mebibytes_are_returned_meanwhile() -> None:
    """Also after a block was freed, from when on glibc would keep its like; afterwards it keeps them as it would."""
    with returning_blocks():
        assert [is_mapped(17) for _ in range(3)] == [True] * 3
        assert not is_mapped(8)
    assert not is_mapped(17)
    assert is_mapped(33)
    with pytest.raises(KeyError), returning_blocks():
        raise KeyError
    assert not is_mapped(17)


def test_a_threshold_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc reads it from the environment when the process starts."""
    with returning_blocks():
        pass
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(32 * MIB))
    with returning_blocks():
        assert not is_mapped(17)


def test_small_blocks_are_returned() -> None:
    """Those below a block that is still there, which glibc keeps."""
    blocks = [torch.ones(MIB, dtype=torch.uint8) for _ in range(128)]
    kept = blocks[::32]
    del blocks
    before = resident()
    return_freed()
    assert before - resident() > 64 * MIB
    assert all(bool(block.all()) for block in kept)


def resident() -> int:
    """Return the bytes of the process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
