"""What is told in which session, and what is asked at the end. Pure; draws are seeded with text.

Facts are numbers or code words of people and their things. Between them stand chatter and hearsay that must not be
believed. A task belongs to a split by the hash of all it tells, so the splits share none.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from envs.interface import Split

NAMES = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Finn", "Gita", "Hugo", "Ines", "Jon", "Kira", "Liam", "Mona", "Nils")
THINGS = ("locker number", "desk number", "badge", "phone extension", "room", "code word", "parking space", "user name")
SYLLABLES = ("ba", "do", "fi", "gu", "ka", "lo", "mi", "nu", "pe", "ra", "so", "ti", "vu", "ze")
TELL = ("{name}'s {thing} is {value}.", "The {thing} of {name} is {value}.")
CORRECT = "Correction: {name}'s {thing} is {value}, not {old}."
EXPIRE = "Until day {day} {name}'s {thing} is {old}; from day {next} on it is {value}."
CHATTER = (
    "The bus was {number} minutes late today.",
    "Lunch cost {number} coins.",
    "{name} was at the dentist's.",
    "It rained on {number} days of the last month.",
    "Somebody said that {name}'s {thing} is {value}, but that was a mistake.",
    "{name} asked who needs a {thing} at all.",
)


@dataclass(frozen=True, slots=True)
class Size:
    """How many sessions tell something, how many facts and how many other sentences each."""

    sessions: int
    facts: int
    chatter: int


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of questions. asked: how many facts the question is about. turn: what became of them meanwhile."""

    name: str
    size: Size
    asked: int = 1
    turn: str = "told"


KINDS = (
    Kind("told", Size(2, 2, 2)),
    Kind("corrected", Size(3, 2, 3), turn="corrected"),
    Kind("expired", Size(3, 3, 3), turn="expired"),
    Kind("several", Size(4, 4, 5), asked=3, turn="mixed"),
)


@dataclass(frozen=True, slots=True)
class Tale:
    """A whole task: the sessions' texts, the question being in the last, and the expected answer."""

    kind: Kind
    sessions: tuple[str, ...]
    answer: str


def _value(source: random.Random, thing: str) -> str:
    if thing in ("code word", "user name"):
        return "".join(source.choice(SYLLABLES) for _ in range(3))
    return str(source.randrange(100, 1000))


def _told(
    source: random.Random, kind: Kind, days: Sequence[int]
) -> tuple[list[list[str]], Mapping[tuple[str, str], str]]:
    """Sentences by session, and what holds at the end of the facts that may be asked about."""
    subjects = source.sample(
        [(name, thing) for name in NAMES for thing in THINGS], kind.size.sessions * kind.size.facts
    )
    sentences: list[list[str]] = [[] for _ in range(kind.size.sessions)]
    holds: dict[tuple[str, str], str] = {}
    for number, (name, thing) in enumerate(subjects):
        session = number % kind.size.sessions
        turn = source.choice(("told", "corrected", "expired")) if kind.turn == "mixed" else kind.turn
        if turn == "corrected" and session == kind.size.sessions - 1:
            turn = "told"  # there is no later session to correct it in
        old, value = _value(source, thing), _value(source, thing)
        facts = {"name": name, "thing": thing, "old": old, "value": value}
        if turn == "told":
            sentences[session].append(source.choice(TELL).format(**facts))
        elif turn == "corrected":
            sentences[session].append(source.choice(TELL).format(**facts | {"value": old}))
            sentences[source.randrange(session + 1, kind.size.sessions)].append(CORRECT.format(**facts))
        else:
            day = source.randrange(days[session], days[-1] + 3)
            sentences[session].append(EXPIRE.format(**facts, day=day, next=day + 1))
            value = old if days[-1] <= day else value
        if kind.turn in (turn, "mixed"):
            holds[name, thing] = value
    return sentences, holds


def _chatter(source: random.Random, num: int) -> list[str]:
    found = []
    for _ in range(num):
        thing = source.choice(THINGS)
        facts = {"name": source.choice(NAMES), "thing": thing, "value": _value(source, thing)}
        found.append(source.choice(CHATTER).format(**facts, number=source.randrange(100, 1000)))
    return found


def _draw(source: random.Random, kind: Kind) -> Tale:
    days = [source.randrange(1, 4)]
    for _ in range(kind.size.sessions):
        days.append(days[-1] + source.randrange(1, 5))
    sentences, holds = _told(source, kind, days)
    texts = []
    for number, told in enumerate(sentences):
        mixed = [*told, *_chatter(source, kind.size.chatter)]
        source.shuffle(mixed)
        texts.append(f"Session {number + 1} of {len(days)}, day {days[number]}. {' '.join(mixed)}")
    asked = source.sample(sorted(holds), kind.asked)
    questions = " ".join(f"What is {name}'s {thing} today?" for name, thing in asked)
    texts.append(f"Session {len(days)} of {len(days)}, day {days[-1]}. {questions}")
    return Tale(kind, tuple(texts), ", ".join(holds[each] for each in asked))


def split_of(sessions: Sequence[str]) -> Split:
    """The split of a task, by what it tells and asks."""
    return "train" if hashlib.blake2b("\n".join(sessions).encode()).digest()[0] % 2 else "heldout"


def tale(kinds: Sequence[Kind], split: Split, index: int) -> Tale:
    """The task of this split and index; kinds take turns."""
    kind = kinds[index % len(kinds)]
    attempt = 0
    while True:  # half of all draws are of each split
        found = _draw(random.Random(f"memory|{index}|{attempt}"), kind)
        if split_of(found.sessions) == split:
            return found
        attempt += 1
