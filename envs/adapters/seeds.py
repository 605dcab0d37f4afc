"""The tasks of environments that know seeds and no splits. Owns which seeds belong to which split, for all adapters."""

from __future__ import annotations

from envs.interface import Split


def seed_of(name: str, split: Split, index: int) -> int:
    """The seed of this split and index of the environment called `name`: even ones train, odd ones are held out.

    Raises ValueError for another split, or an index below 0.
    """
    if split not in ("train", "heldout") or index < 0:
        raise ValueError(f"{name} has the splits train and heldout from index 0, not {split!r} {index}")
    return 2 * index + (split == "heldout")
