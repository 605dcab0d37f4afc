"""What processes that tests start get of this one's environment."""

from __future__ import annotations

import os

LAUNCHER = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})


def environment(**more: str) -> dict[str, str]:
    """For a process that is no rank of this one's group: without what an engine made here leaves for other ranks."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER} | more
