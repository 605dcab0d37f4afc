"""Which coding problem stands behind which index, and whether results are right. Runs only the families' own source.

Problem `i` of a split is the first of its numbered drafts whose family and facts a hash assigns to that split. So no
problem is in two splits. Hidden inputs follow from the draft too, so every process grades alike.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from envs.code.families import Family, Inputs
from envs.interface import Split

FUNCTION = "solve"
NUM_VISIBLE = 2
NUM_HIDDEN = 12
MAX_DRAFTS = 64


@dataclass(frozen=True, slots=True)
class Problem:
    """One function to write. `hidden` and `expected` belong together; `source` is a right solution."""

    family: str
    question: str
    source: str
    hidden: Sequence[Inputs]
    expected: Sequence[Any]


def _split(content: str) -> Split:
    return "train" if hashlib.blake2b(content.encode(), digest_size=1).digest()[0] % 2 else "heldout"


def problem(family: Family, split: Split, number: int) -> Problem:
    """The problem of this number. Raises LookupError where none of the drafts is of the split, which no number has."""
    for attempt in range(MAX_DRAFTS):
        draw = random.Random(f"code/{family.name}/{number}/{attempt}")
        facts = family.facts(draw)
        question = family.filled(family.question, facts)
        if _split(question) == split:
            return _complete(family, question, family.filled(family.source, facts), draw, facts)
    raise LookupError(f"there is no {split} problem {number} of family {family.name}")


def _complete(family: Family, question: str, source: str, draw: random.Random, facts: Any) -> Problem:
    """Add inputs. The first two hidden expectations differ, so that no constant is right everywhere."""
    space: dict[str, Any] = {}
    exec(source, space)
    solve = space[FUNCTION]

    def expected(inputs: Inputs) -> Any:
        return json.loads(json.dumps(solve(*json.loads(json.dumps(inputs)))))

    visible = [family.inputs(draw, facts) for _ in range(NUM_VISIBLE)]
    hidden = [family.inputs(draw, facts) for _ in range(NUM_HIDDEN)]
    while all(expected(inputs) == expected(hidden[0]) for inputs in hidden):
        hidden[-1] = family.inputs(draw, facts)
    examples = "\n".join(f"{FUNCTION}({', '.join(map(repr, inputs))}) == {expected(inputs)!r}" for inputs in visible)
    asked = f"Write a Python function `{FUNCTION}` that {question}\n\nExamples:\n{examples}"
    return Problem(family.name, asked, source, hidden, [expected(inputs) for inputs in hidden])


def same(left: Any, right: Any) -> bool:
    """Equality of JSON values with their types: 1, 1.0 and true are three."""
    if type(left) is not type(right):
        return False
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def results(output: bytes, nonce: str, count: int) -> dict[int, Any] | None:
    """Number -> value of the records; None where anything but at most one sound record a call is there."""
    found: dict[int, Any] = {}
    for line in output.split(b"\n")[:-1]:
        word, _, rest = line.partition(b" ")
        number, _, value = rest.partition(b" ")
        if word != nonce.encode() or not number.isdigit() or int(number) >= count or int(number) in found:
            return None
        try:
            found[int(number)] = json.loads(value, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return None
    return found if output.endswith(b"\n") or not output else None
