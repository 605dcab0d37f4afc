"""Which problem stands behind which index. Pure arithmetic, the same on every machine; draws nothing at random.

All problems of a kind (every choice of name, item and numbers) are counted from 0 and shuffled by a keyed permutation,
a Feistel network over the count with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
A hash of its content assigns each whole problem to a split, about half to each. Index i of a split is the first problem
of that split among the SLOT shuffled ones of slot i. So no problem is in two splits, and two indices never share one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from envs.interface import Split
from envs.shop.kinds import ITEMS, NAMES, PRICES, Kind

SLOT = 32  # the chance that a slot holds no problem of a split is 2 to the power of -32
ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with all its facts. `numbers` includes the hidden price `p`."""

    kind: Kind
    name: str
    item: str
    numbers: Mapping[str, int]

    @property
    def content(self) -> str:
        """All that makes this problem itself, in one line."""
        numbers = ",".join(f"{key}={value}" for key, value in sorted(self.numbers.items()))
        return f"{self.kind.name}|{self.name}|{self.item}|{numbers}"

    @property
    def split(self) -> Split:
        """The split that this problem belongs to, whatever its index."""
        return "train" if _digest("split", self.content) % 2 else "heldout"

    @property
    def question(self) -> str:
        """What the policy is asked; the price is not in it."""
        shown = self.kind.shown(self.numbers)
        return self.kind.question.format(name=self.name, items=ITEMS[self.item], item=self.item, **shown)

    @property
    def answer(self) -> int:
        """The expected answer."""
        return self.kind.answer(self.numbers)

    @property
    def formula(self) -> str:
        """What to ask the calculator, with `{p}` where the price goes."""
        return self.kind.formula.format(p="{p}", **self.kind.shown(self.numbers))

    @property
    def slips(self) -> tuple[str, ...]:
        """Wrong formulas, likewise."""
        return tuple(slip.format(p="{p}", **self.kind.shown(self.numbers)) for slip in self.kind.slips)

    @property
    def prices(self) -> dict[str, int]:
        """The price of every item; the other items' prices follow from the problem's content."""
        prices = {item: PRICES[_digest(self.content, item) % len(PRICES)] for item in ITEMS}
        return prices | {self.item: self.numbers["p"]}


def _digest(*parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")


def num_problems(kind: Kind) -> int:
    """All problems of a kind, in both splits."""
    return len(NAMES) * len(ITEMS) * math.prod(map(len, kind.numbers.values()))


def num_slots(kind: Kind) -> int:
    """How many distinct problems of a kind each split offers."""
    return num_problems(kind) // SLOT


def _shuffled(key: str, position: int, size: int) -> int:
    """A permutation of range(size): a Feistel network on an even number of bits, walked until in range."""
    half = (max(2, (size - 1).bit_length()) + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (_digest(key, str(number), str(right)) & mask)
        position = (left << half) | right
        if position < size:
            return position


def _decode(kind: Kind, count: int) -> Problem:
    """The problem of this count, as mixed-radix digits."""
    count, name = divmod(count, len(NAMES))
    count, item = divmod(count, len(ITEMS))
    numbers = {}
    for key, values in kind.numbers.items():
        count, digit = divmod(count, len(values))
        numbers[key] = values[digit]
    return Problem(kind, NAMES[name], tuple(ITEMS)[item], numbers)


def problem(kinds: Sequence[Kind], split: Split, index: int) -> Problem:
    """The problem of this split and index; kinds take turns. Indices beyond all slots begin again from the first.

    Raises LookupError for a slot without a problem of the split, which no index of the present tables has.
    """
    kind = kinds[index % len(kinds)]
    slot = index // len(kinds) % num_slots(kind)
    size = num_problems(kind)
    for position in range(slot * SLOT, (slot + 1) * SLOT):
        found = _decode(kind, _shuffled(kind.name, position, size))
        if found.split == split:
            return found
    raise LookupError(f"the shop has no {split} problem at index {index}")
