"""The tables that the shop's problems are made of: kinds, numbers, names, items. The one place to change a question.

Any change here changes the tasks behind every index. Three things must hold, and tests hold them: a kind's answer is
positive for all its numbers; its formula and its answer agree; it has problems enough (see problems.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

NAMES = (
    "Anna", "Ben", "Eva", "Ida", "Jan", "Karl", "Lena", "Leo", "Max", "Mia", "Nina", "Paul", "Rosa", "Sam", "Tina",
    "Tom",
)  # fmt: skip

# singular: plural
ITEMS = {
    "bag": "bags", "book": "books", "bowl": "bowls", "chair": "chairs", "clock": "clocks", "cup": "cups", "hat": "hats",
    "jar": "jars", "key": "keys", "lamp": "lamps", "mat": "mats", "pen": "pens", "plate": "plates", "rug": "rugs",
    "shirt": "shirts", "spoon": "spoons",
}  # fmt: skip

PRICES = range(11, 100)
"""Coins that one item may cost: `p`, which only the price tool tells."""

QUANTITIES = range(3, 20)
"""How many items are bought: `a`."""

COINS = range(3, 50)
"""Discounts and fees: `c`."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of problems.

    `question` is filled with name, items and the numbers; it must not show `p`. `formula` is what the calc tool is
    asked, filled with the numbers and `p`. `answer` says the same in Python. `numbers` are the values each may take;
    `derived` follow from them. `slips` are wrong formulas, as a careless clerk would calculate: one adds where it
    should multiply, one forgets a part.
    """

    name: str
    question: str
    formula: str
    answer: Callable[[Mapping[str, int]], int]
    numbers: Mapping[str, Sequence[int]]
    slips: tuple[str, str]
    derived: Mapping[str, Callable[[Mapping[str, int]], int]] = field(default_factory=dict)

    def shown(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """All numbers that the question and the formulas may use, without the hidden price."""
        shown = {key: value for key, value in numbers.items() if key != "p"}
        return shown | {key: derive(numbers) for key, derive in self.derived.items()}


# The numbers stand in the question in the order of the formula, which a small model finds easier.
KINDS = (
    Kind(
        name="discount",
        question="{name} buys {a} {items} with a {c} coin discount. What is the bill?",
        formula="{a}*{p}-{c}",
        answer=lambda n: n["a"] * n["p"] - n["c"],
        numbers={"a": QUANTITIES, "p": PRICES, "c": range(3, 33)},
        slips=("{a}+{p}-{c}", "{a}*{p}"),
    ),
    Kind(
        name="shipping",
        question="{name} orders {a} {items} plus {c} coins shipping. What is the total?",
        formula="{a}*{p}+{c}",
        answer=lambda n: n["a"] * n["p"] + n["c"],
        numbers={"a": QUANTITIES, "p": PRICES, "c": COINS},
        slips=("{a}+{p}+{c}", "{a}*{p}"),
    ),
    Kind(
        name="change",
        question="{name} pays {e} coins for {a} {items}. What is the change?",
        formula="{e}-{a}*{p}",
        answer=lambda n: n["r"],
        numbers={"a": QUANTITIES, "p": PRICES, "r": range(5, 100)},
        slips=("{e}-{a}+{p}", "{a}*{p}"),
        derived={"e": lambda n: n["a"] * n["p"] + n["r"]},
    ),
    Kind(
        name="boxes",
        question="{name} needs {a} boxes of {b} {items}. What is the cost?",
        formula="{a}*{b}*{p}",
        answer=lambda n: n["a"] * n["b"] * n["p"],
        numbers={"a": range(3, 10), "b": range(3, 10), "p": PRICES},
        slips=("{a}*{b}+{p}", "{a}*{p}"),
    ),
)
