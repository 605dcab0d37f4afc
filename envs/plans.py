"""Tasks that change rows of a database: what is asked, what must have changed, and to which split it belongs.

Owns how a task of an index is drawn; knows no room's tables. A task belongs to a split by the hash of its instruction,
so no instruction is in two splits. Draws are seeded with text, so they are the same on every machine.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envs.interface import Split
from envs.rows import Change, Rows, applied


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked, what must be changed, and the facts of the question for the reference policy (nothing hidden)."""

    instruction: str
    changes: tuple[Change, ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of tasks. draw: a task on these rows, None where they have none; it may add to the rows first."""

    name: str
    level: int
    draw: Callable[[random.Random, Rows], Plan | None]


@dataclass(frozen=True, slots=True)
class Problem:
    """One task with the rows before and after."""

    kind: Kind
    plan: Plan
    rows: Rows
    expected: Rows


def split_of(instruction: str) -> Split:
    """The split that an instruction belongs to, by its content alone."""
    return "train" if hashlib.blake2b(instruction.encode()).digest()[0] % 2 else "heldout"


def draw_problem(
    room: str, make_rows: Callable[[random.Random, int], Rows], kinds: Sequence[Kind], split: Split, index: int
) -> Problem:
    """The task of this split and index of a room; kinds take turns. make_rows: of a source and a kind's level."""
    kind = kinds[index % len(kinds)]
    attempt = 0
    while True:  # half of all draws are of each split
        source = random.Random(f"{room}|{split}|{index}|{attempt}")
        rows = make_rows(source, kind.level)
        plan = kind.draw(source, rows)
        if plan is not None and split_of(plan.instruction) == split:
            return Problem(kind, plan, rows, applied(rows, plan.changes))
        attempt += 1
