"""The families of coding problems: what is asked, a right solution, and inputs. Any change changes the problems.

A family draws its facts (numbers and letters that make two of its problems different), puts them into the question and
into the source of the solution, and makes inputs. The source is ours and trusted: the parent runs it for what is
expected; the sandbox never sees it, except as the reference policy's answer.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Facts = Mapping[str, Any]
Inputs = list[Any]


@dataclass(frozen=True, slots=True)
class Family:
    """`question` and `source` are filled with the facts as `<<name>>`; `inputs` makes the arguments of one call."""

    name: str
    question: str
    source: str
    facts: Callable[[random.Random], Facts]
    inputs: Callable[[random.Random, Facts], Inputs]

    def filled(self, text: str, facts: Facts) -> str:
        """The text with the facts in it."""
        for key, value in facts.items():
            text = text.replace(f"<<{key}>>", str(value))
        return text


def _integers(draw: random.Random, low: int = -50, high: int = 200, most: int = 14) -> list[int]:
    return [draw.randrange(low, high) for _ in range(draw.randrange(3, most))]


def _words(draw: random.Random) -> list[str]:
    pool = ["".join(draw.choices("abcde", k=draw.randrange(1, 4))) for _ in range(6)]
    return draw.choices(pool, k=draw.randrange(6, 20))


def _matched(draw: random.Random, facts: Facts) -> Inputs:
    """A text of brackets, balanced about half of the time."""
    pairs = [(facts["a"], facts["b"]), (facts["c"], facts["d"])]
    text = ""
    for _ in range(draw.randrange(1, 6)):
        left, right = draw.choice(pairs)
        text = draw.choice((f"{left}{text}{right}", f"{text}{left}{right}", f"{left}{right}{text}x"))
    if draw.random() < 0.5:
        place = draw.randrange(len(text))
        text = text[:place] + draw.choice(pairs)[1] + text[place + 1 :]
    return [text]


def _four(draw: random.Random) -> Facts:
    return dict(zip("abcd", draw.sample("()[]{}<>/\\!?#%&*+-=:;", 4), strict=True))


FAMILIES = (
    Family(
        "affine",
        "takes a list of integers and returns a list: for each number that is divisible by <<k>>, in order, the number "
        "times <<m>> plus <<c>>.",
        "def solve(numbers):\n    return [n * <<m>> + <<c>> for n in numbers if n % <<k>> == 0]\n",
        lambda draw: {"k": draw.randrange(2, 6), "m": draw.randrange(2, 60), "c": draw.randrange(1, 90)},
        lambda draw, facts: [[facts["k"] * draw.randrange(30), *_integers(draw)]],
    ),
    Family(
        "window",
        "takes a list of integers and returns the largest sum of <<k>> neighbours in it, where each number greater "
        "than <<c>> counts <<m>> times. If there are fewer than <<k>> numbers, it returns <<d>>.",
        "def solve(numbers):\n"
        "    v = [n * <<m>> if n > <<c>> else n for n in numbers]\n"
        "    return max((sum(v[i : i + <<k>>]) for i in range(len(v) - <<k>> + 1)), default=<<d>>)\n",
        lambda draw: {
            "k": draw.randrange(2, 6),
            "c": draw.randrange(10, 90),
            "m": draw.randrange(2, 9),
            "d": -draw.randrange(99),
        },
        lambda draw, _: [_integers(draw)],
    ),
    Family(
        "shift",
        "takes a text and returns it with each lower-case letter moved <<k>> places forward in the alphabet and each "
        "upper-case letter <<m>> places, both wrapping around; every digit becomes `<<s>>`; all else stays.",
        "def solve(text):\n"
        "    out = ''\n"
        "    for ch in text:\n"
        "        if 'a' <= ch <= 'z':\n"
        "            ch = chr((ord(ch) - 97 + <<k>>) % 26 + 97)\n"
        "        elif 'A' <= ch <= 'Z':\n"
        "            ch = chr((ord(ch) - 65 + <<m>>) % 26 + 65)\n"
        "        elif '0' <= ch <= '9':\n"
        "            ch = '<<s>>'\n"
        "        out += ch\n"
        "    return out\n",
        lambda draw: {"k": draw.randrange(1, 26), "m": draw.randrange(1, 26), "s": draw.choice("#%&*+-=_")},
        lambda draw, _: ["".join(draw.choices(string.ascii_letters + string.digits + " .,!", k=24))],
    ),
    Family(
        "runs",
        "takes a text and returns its run-length form: for each run of equal characters the character, then `<<s>>` "
        "and the run's length if that is at least <<k>>, else the run as it is. Runs are joined by `<<t>>`.",
        "def solve(text):\n"
        "    from itertools import groupby\n"
        "    runs = [(ch, len(list(group))) for ch, group in groupby(text)]\n"
        "    return '<<t>>'.join(ch + '<<s>>' + str(n) if n >= <<k>> else ch * n for ch, n in runs)\n",
        lambda draw: {"k": draw.randrange(2, 7), **dict(zip("st", draw.sample("#%&*+-=_:;,.!?/|~^", 2), strict=True))},
        lambda draw, _: ["".join(ch * draw.randrange(1, 9) for ch in draw.choices("abxy", k=draw.randrange(3, 9)))],
    ),
    Family(
        "digits",
        "takes an integer n, at least 0, and returns the sum of its digits in base <<b>>, plus <<m>> times the number "
        "of digits equal to <<d>>, modulo <<c>>. The only digit of 0 is 0.",
        "def solve(n):\n"
        "    digits = []\n"
        "    while n or not digits:\n"
        "        n, digit = divmod(n, <<b>>)\n"
        "        digits.append(digit)\n"
        "    return (sum(digits) + <<m>> * digits.count(<<d>>)) % <<c>>\n",
        lambda draw: {
            "b": draw.randrange(3, 17),
            "m": draw.randrange(3, 50),
            "d": draw.randrange(3),
            "c": draw.randrange(20, 99),
        },
        lambda draw, _: [draw.choice((0, draw.randrange(100), draw.randrange(10**9)))],
    ),
    Family(
        "brackets",
        "takes a text and returns whether its brackets are balanced and rightly nested. The brackets are `<<a>>`, "
        "closed by `<<b>>`, and `<<c>>`, closed by `<<d>>`; all other characters do not matter.",
        "def solve(text):\n"
        "    closes = {<<b!r>>: <<a!r>>, <<d!r>>: <<c!r>>}\n"
        "    open_ = []\n"
        "    for ch in text:\n"
        "        if ch in closes.values():\n"
        "            open_.append(ch)\n"
        "        elif ch in closes and (not open_ or open_.pop() != closes[ch]):\n"
        "            return False\n"
        "    return not open_\n",
        lambda draw: (four := _four(draw)) and {**four, **{f"{key}!r": repr(value) for key, value in four.items()}},
        _matched,
    ),
    Family(
        "intervals",
        "takes a list of intervals [start, end] and returns them merged and sorted: two intervals become one where "
        "they overlap or where the gap between them is at most <<g>>. Intervals shorter than <<k>> after merging "
        "(end minus start) are left out.",
        "def solve(intervals):\n"
        "    merged = []\n"
        "    for start, end in sorted(intervals):\n"
        "        if merged and start - merged[-1][1] <= <<g>>:\n"
        "            merged[-1][1] = max(merged[-1][1], end)\n"
        "        else:\n"
        "            merged.append([start, end])\n"
        "    return [each for each in merged if each[1] - each[0] >= <<k>>]\n",
        lambda draw: {"g": draw.randrange(1, 40), "k": draw.randrange(1, 40)},
        lambda draw, _: [[[start, start + draw.randrange(1, 60)] for start in (draw.randrange(500) for _ in range(9))]],
    ),
    Family(
        "ranking",
        "takes a list of words and returns the <<k>> best as a list, best first. A word's points are <<m>> times the "
        "number of its occurrences plus <<c>> times its length; equal ones are in alphabetical order.",
        "def solve(words):\n"
        "    points = {w: <<m>> * words.count(w) + <<c>> * len(w) for w in words}\n"
        "    return sorted(points, key=lambda w: (-points[w], w))[:<<k>>]\n",
        lambda draw: {"k": draw.randrange(2, 5), "m": draw.randrange(1, 40), "c": draw.randrange(1, 40)},
        lambda draw, _: [_words(draw)],
    ),
    Family(
        "grid",
        "takes a grid (a list of rows of integers) and returns a list [row, column] of the first cell, row by row, "
        "whose value plus those of its up to four direct neighbours is divisible by <<k>> and greater than <<c>>; "
        "[<<d>>, <<d>>] if there is none.",
        "def solve(grid):\n"
        "    def at(r, c):\n"
        "        return grid[r][c] if 0 <= r < len(grid) and 0 <= c < len(grid[0]) else 0\n"
        "    for r, row in enumerate(grid):\n"
        "        for c in range(len(row)):\n"
        "            total = at(r, c) + at(r - 1, c) + at(r + 1, c) + at(r, c - 1) + at(r, c + 1)\n"
        "            if total % <<k>> == 0 and total > <<c>>:\n"
        "                return [r, c]\n"
        "    return [<<d>>, <<d>>]\n",
        lambda draw: {"k": draw.randrange(3, 10), "c": draw.randrange(5, 40), "d": -draw.randrange(1, 30)},
        lambda draw, _: [[[draw.randrange(12) for _ in range(6)] for _ in range(6)]],
    ),
    Family(
        "register",
        "takes a list of commands, each [name, number], for a register that begins at <<a>>: `add` adds the number, "
        "`mul` multiplies by it, `swap` sets the register to the number minus the register. After each command it is "
        "taken modulo <<c>>. Returns the list of its values after each command.",
        "def solve(commands):\n"
        "    value, values = <<a>>, []\n"
        "    for name, number in commands:\n"
        "        if name == 'add':\n"
        "            value += number\n"
        "        elif name == 'mul':\n"
        "            value *= number\n"
        "        else:\n"
        "            value = number - value\n"
        "        value %= <<c>>\n"
        "        values.append(value)\n"
        "    return values\n",
        lambda draw: {"a": draw.randrange(100), "c": draw.randrange(100, 999)},
        lambda draw, _: [[[draw.choice(("add", "mul", "swap")), draw.randrange(1, 60)] for _ in range(7)]],
    ),
)
