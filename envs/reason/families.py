"""The families of questions, each with the verifier of its answers. Pure; draws are seeded with text.

A question belongs to a split by the hash of its text, so no question is in two splits.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from envs.interface import Split

NAMES = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Finn", "Gita", "Hugo")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the type of its answer (see answers.py), an answer that is right, and what the verifier needs."""

    text: str
    answer_type: str
    answer: Any
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def split(self) -> Split:
        """The split that this question belongs to."""
        return "train" if hashlib.blake2b(self.text.encode()).digest()[0] % 2 else "heldout"


@dataclass(frozen=True, slots=True)
class Family:
    """draw: a question of a level from 1 to 3, or None where the draw came to nothing. verify: is this answer right?"""

    name: str
    draw: Callable[[random.Random, int], Question | None]
    verify: Callable[[Any, Any, Mapping[str, Any]], bool] = lambda given, answer, _facts: bool(given == answer)


def _arithmetic(source: random.Random, level: int) -> Question:
    """A sum of products and brackets, computed while it is written."""

    def term(depth: int) -> tuple[str, int]:
        if depth == 0:
            number = source.randrange(2, 30)
            return str(number), number
        (left, a), (right, b) = term(depth - 1), term(source.randrange(depth))
        sign = source.choice("+-*")
        value = a + b if sign == "+" else a - b if sign == "-" else a * b
        return f"({left} {sign} {right})", value

    (left, a), (right, b) = term(level), term(level)
    return Question(f"What is {left} + {right}?", "integer", a + b)


def _sorting(source: random.Random, level: int) -> Question:
    numbers = source.sample(range(-99, 100), 4 + 3 * level)
    descending = source.random() < 0.5
    order = "descending" if descending else "ascending"
    shown = ", ".join(map(str, numbers))
    key = source.choice(("value", "digit sum"))
    if key == "value":
        return Question(f"Sort in {order} order: {shown}", "integers", tuple(sorted(numbers, reverse=descending)))
    ordered = sorted(numbers, key=lambda number: (_digit_sum(number), number), reverse=descending)
    return Question(
        f"Sort by the sum of the digits (the sign does not count), where equal by value, in {order} order: {shown}",
        "integers",
        tuple(ordered),
    )


def _digit_sum(number: int) -> int:
    return sum(map(int, str(abs(number))))


def _logic(source: random.Random, level: int) -> Question | None:
    """Knights tell the truth, knaves lie; drawn until one assignment alone fits."""
    people = NAMES[: 5 + level]
    knights = {name: source.random() < 0.5 for name in people}
    if not any(knights.values()):
        return None
    claims = []
    for speaker in people:
        for _ in range(2):
            about, other = source.sample([name for name in people if name != speaker], 2)
            alike = knights[about] == knights[other]
            claims.append((speaker, about, other, alike == knights[speaker]))
    # One statement about a single person fixes which of the two mirrored assignments it is.
    first, about = source.sample(people, 2)
    says = knights[about] == knights[first]
    sentences = [f"{first} says: {about} is a {'knight' if says else 'knave'}."]
    sentences += [
        f"{speaker} says: {a} and {b} are {'of the same kind' if same else 'of different kinds'}."
        for speaker, a, b, same in claims
    ]

    def fits(guess: Mapping[str, bool]) -> bool:
        if (guess[about] == says) != guess[first]:
            return False
        return all(((guess[a] == guess[b]) == same) == guess[speaker] for speaker, a, b, same in claims)

    guesses = (dict(zip(people, kinds, strict=True)) for kinds in itertools.product((True, False), repeat=len(people)))
    if sum(map(fits, guesses)) != 1:
        return None
    return Question(
        "Knights always tell the truth, knaves always lie; everybody is one of them. "
        f"{' '.join(sentences)} Who are the knights?",
        "words",
        tuple(name for name in people if knights[name]),
    )


def _same_people(given: tuple[str, ...], answer: tuple[str, ...], _facts: Mapping[str, Any]) -> bool:
    return len(given) == len(answer) and set(given) == set(answer)


def _graph(source: random.Random, level: int) -> Question | None:
    nodes = LETTERS[: 6 + 2 * level].upper()
    edges = sorted({tuple(sorted(source.sample(nodes, 2))) for _ in range(len(nodes) + 2)})
    neighbours: dict[str, list[str]] = {node: [] for node in nodes}
    for a, b in edges:
        neighbours[a].append(b)
        neighbours[b].append(a)
    start, end = source.sample(nodes, 2)
    path = _shortest(neighbours, start, end)
    if path is None or len(path) < 3 + level // 2:
        return None
    shown = ", ".join("-".join(edge) for edge in edges)
    return Question(
        f"A graph has the edges {shown}. Name the nodes of a shortest path from {start} to {end}, both included.",
        "words",
        path,
        {"edges": edges},
    )


def _shortest(neighbours: Mapping[str, Sequence[str]], start: str, end: str) -> tuple[str, ...] | None:
    paths: list[tuple[str, ...]] = [(start,)]
    seen = {start}
    for path in paths:  # grows while it is walked: breadth first
        if path[-1] == end:
            return path
        for node in neighbours[path[-1]]:
            if node not in seen:
                seen.add(node)
                paths.append((*path, node))
    return None


def _is_shortest(given: tuple[str, ...], answer: tuple[str, ...], facts: Mapping[str, Any]) -> bool:
    """Any path along the edges that is as short as the known one, with the same ends."""
    if len(given) != len(answer) or (given[0], given[-1]) != (answer[0], answer[-1]):
        return False
    return all(tuple(sorted(step)) in facts["edges"] for step in itertools.pairwise(given))


STRING_STEPS: Mapping[str, Callable[[str], str]] = {
    "reverse it": lambda text: text[::-1],
    "move its first letter to the end": lambda text: text[1:] + text[0],
    "remove every vowel (a, e, i, o, u)": lambda text: "".join(each for each in text if each not in "aeiou"),
    "write every letter twice": lambda text: "".join(2 * each for each in text),
    "replace every letter by the next one of the alphabet (z by a)": lambda text: "".join(
        LETTERS[(LETTERS.index(each) + 1) % 26] for each in text
    ),
    "sort its letters alphabetically": lambda text: "".join(sorted(text)),
}


def _string(source: random.Random, level: int) -> Question | None:
    start = text = "".join(source.choice(LETTERS) for _ in range(5 + level))
    steps = source.sample(list(STRING_STEPS), 1 + level)
    for step in steps:
        text = STRING_STEPS[step](text) if text else ""
    if not text or text == start:
        return None
    return Question(f"Take the word {start}. Then {'; then '.join(steps)}. What is the result?", "word", text)


FAMILIES = (
    Family("arithmetic", _arithmetic),
    Family("sorting", _sorting),
    Family("logic", _logic, _same_people),
    Family("graph", _graph, _is_shortest),
    Family("string", _string),
)


def question(family: Family, levels: Sequence[int], split: Split, index: int) -> Question:
    """The question of this family, split and index; levels take turns."""
    attempt = 0
    while True:  # at least a few draws in a hundred are a question of the split
        source = random.Random(f"reason|{family.name}|{index}|{attempt}")
        found = family.draw(source, levels[index % len(levels)])
        if found is not None and found.split == split:
            return found
        attempt += 1
