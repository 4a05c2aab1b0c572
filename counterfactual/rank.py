"""Check the rank of a nuisance subspace; without torch, so that bad settings are refused before it is imported."""

from __future__ import annotations


def check_rank(rank: int | None, energy: float | None) -> None:
    """Raise ValueError unless exactly one of rank (an integer >= 0) and energy (in (0, 1]) is given."""
    if (rank is None) == (energy is None):
        raise ValueError(
            f"rank is {rank} and energy is {energy}; expected exactly one of them. On the command line, leave the "
            "other option out; in a recipe, set it to null; in Python, to None"
        )
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 0):
        raise ValueError(f"rank is {rank!r}; expected an integer >= 0")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"energy is {energy}; expected a fraction in (0, 1]")
