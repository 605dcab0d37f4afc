"""Grades what an episode left: the office's final state as bytes. Needs no browser, no site and no episode.

So it can run anywhere and at any time: `verify(task.secret, artifact)`. Nothing that the policy said counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from envs.interface import Reward
from envs.rows import compared

MAX_ARTIFACT = 1 << 20


def verify(secret: Mapping[str, Any], artifact: bytes) -> Reward:
    """1 if exactly what was asked for has changed, else 0. finished: all of that; untouched: nothing else.

    readable: 0 for an artifact that is no state of an office, whose reward is 0.
    """
    found = _state(artifact)
    if found is None:
        return Reward(0.0, {"correct": 0.0, "finished": 0.0, "untouched": 0.0, "readable": 0.0})
    marks = compared(secret["rows"], secret["expected"], found)
    return Reward(marks["correct"], {**marks, "readable": 1.0})


def _state(artifact: bytes) -> dict[str, list[dict[str, Any]]] | None:
    if len(artifact) > MAX_ARTIFACT:
        return None
    try:
        found = json.loads(artifact)
    except (ValueError, RecursionError):
        return None
    readable = isinstance(found, dict) and all(
        isinstance(rows, list) and all(isinstance(row, dict) and type(row.get("id")) is int for row in rows)
        for rows in found.values()
    )
    return found if readable else None
