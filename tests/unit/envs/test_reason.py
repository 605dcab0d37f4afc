"""Reasoning: typed answers, verifiers that agree with an independent solution, nothing for who knows nothing."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

import pytest

from envs.interface import Action, Task
from envs.play import play
from envs.reason import ReasonEnvironment
from envs.reason.answers import parse
from envs.reason.environment import Answering
from envs.reason.families import FAMILIES, Question, question


@pytest.mark.parametrize(
    ("kind", "body", "value"),
    [
        ("integer", "-12", -12),
        ("integer", "0", 0),
        ("integers", "3, -1,4", (3, -1, 4)),
        ("word", "abC", "abC"),
        ("words", "Ada, Ben", ("Ada", "Ben")),
        ("words", "Ada", ("Ada",)),
    ],
)
def test_answers_are_read_by_type(kind: str, body: str, value: Any) -> None:
    assert parse(kind, f"So: <answer>{body}</answer>") == value


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("integer", body)
        for body in (
            "",
            "+1",
            "1.0",
            "1e3",
            "0x1",
            "1_0",
            " 1",
            "1\n",
            "١",
            "1+1",
            "9" * 19,
            "__import__('os')",
            "True",
        )
    ]
    + [("integers", body) for body in ("", "1,", "1;2", "[1, 2]", "1 2", "range(3)", "1,\n2")]
    + [("word", body) for body in ("", "a b", "a1", "é", "x" * 61)]
    + [("words", body) for body in ("", "Ada,", "Ada; Ben", "('Ada',)")],
)
def test_anything_else_is_none(kind: str, body: str) -> None:
    assert parse(kind, f"<answer>{body}</answer>") is None


@pytest.mark.parametrize(
    "text", [None, "", "12", "<answer>12", "<answer>1</answer><answer>2</answer>", "</answer>1<answer>"]
)
def test_there_must_be_one_pair_of_tags(text: str | None) -> None:
    assert parse("integer", text) is None


def _brute_force(name: str, text: str) -> Any:
    """The answer once more, from the question's text alone."""
    if name == "arithmetic":
        return eval(text.removeprefix("What is ").removesuffix("?"), {"__builtins__": {}})
    if name == "sorting":
        numbers = [int(part) for part in text.rpartition(": ")[2].split(", ")]
        numbers.sort(reverse="descending" in text)
        if "digits" in text:
            by_digits = lambda number: sum(int(each) for each in str(number).strip("-"))  # noqa: E731
            numbers.sort(key=by_digits, reverse="descending" in text)
        return tuple(numbers)
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["arithmetic", "sorting"])
def test_numbers_agree_with_python(name: str) -> None:
    family = next(each for each in FAMILIES if each.name == name)
    for index in range(60):
        found = question(family, (1, 2, 3), "train", index)
        assert found.answer == _brute_force(name, found.text), found.text


def _drawn(name: str, num: int) -> list[Question]:
    family = next(each for each in FAMILIES if each.name == name)
    return [question(family, (1, 2, 3), "heldout", index) for index in range(num)]


def test_the_named_knights_are_the_only_ones_that_fit() -> None:
    for found in _drawn("logic", 15):
        people = sorted(set(re.findall(r"(\w+) says", found.text)))
        same = re.findall(r"(\w+) says: (\w+) and (\w+) are of (the same kind|different kinds)", found.text)
        one = re.findall(r"(\w+) says: (\w+) is a (knight|knave)", found.text)
        fitting = []
        for size in range(len(people) + 1):
            for knights in itertools.combinations(people, size):
                told = [(who, ((a in knights) == (b in knights)) == kind.startswith("the")) for who, a, b, kind in same]
                told += [(who, (a in knights) == (kind == "knight")) for who, a, kind in one]
                if all(true == (who in knights) for who, true in told):
                    fitting.append(set(knights))
        assert fitting == [set(found.answer)], found.text


def test_every_shortest_path_is_right_and_nothing_longer_or_invented() -> None:
    family = next(each for each in FAMILIES if each.name == "graph")
    for found in _drawn("graph", 15):
        edges = {frozenset(edge) for edge in found.facts["edges"]}
        nodes = sorted({node for edge in edges for node in edge})
        right = 0
        for middle in itertools.permutations(nodes, min(len(found.answer) - 2, 3)):
            given = (found.answer[0], *middle, found.answer[-1])
            real = len(given) == len(found.answer) and all(frozenset(p) in edges for p in itertools.pairwise(given))
            assert family.verify(given, found.answer, found.facts) == real
            right += real
        assert right >= 1 or len(found.answer) > 5
        for shorter in range(1, len(found.answer) - 1):  # there is no shorter way
            if shorter > 3:
                break
            for middle in itertools.permutations(nodes, shorter - 1):
                given = (found.answer[0], *middle, found.answer[-1])
                assert not all(frozenset(pair) in edges for pair in itertools.pairwise(given))


def test_strings_go_through_their_steps_in_order() -> None:
    assert any("reverse it" in found.text for found in _drawn("string", 30))
    for found in _drawn("string", 30):
        if "Then reverse it. What" in found.text:
            assert found.answer == found.text.split()[3].strip(".")[::-1]


def test_questions_are_distinct_and_no_question_is_in_two_splits() -> None:
    environment = ReasonEnvironment()
    asked = {
        split: {environment.task(split, n).prompt[0].content for n in range(200)} for split in ("train", "heldout")
    }  # type: ignore[arg-type]
    assert not asked["train"] & asked["heldout"]
    assert min(map(len, asked.values())) >= 198


async def test_the_reference_is_right_and_other_answers_are_not() -> None:
    environment = ReasonEnvironment()
    rewards = Counter[tuple[str, float]]()

    async def total(task: Task, text: str) -> float:
        return (await play(environment, task, Answering(text))).reward.total

    constants = ("", "<answer>0</answer>", "<answer>1</answer>", "<answer>Ada</answer>", "<answer>a</answer>")
    for index in range(50):
        task = environment.task("train", index)
        rewards[task.kind, (await play(environment, task, environment.reference(task))).reward.total] += 1
        echo = f"<answer>{task.prompt[0].content.split(': ')[-1].splitlines()[0]}</answer>"
        assert [await total(task, text) for text in (*constants, echo)] == [0.0] * 6
    assert rewards == {(family.name, 1.0): 10 for family in FAMILIES}


async def test_an_answer_of_the_wrong_type_counts_as_none() -> None:
    environment = ReasonEnvironment(families=["arithmetic"])
    episode = environment.episode(environment.task("train", 0))
    await episode.step(Action("<answer>many</answer>"))
    assert (await episode.grade()).components == {"correct": 0.0, "parsed": 0.0}


def test_options_are_checked() -> None:
    for options in ({"families": []}, {"families": ["x"]}, {"levels": []}, {"levels": [0]}):
        with pytest.raises(ValueError):
            ReasonEnvironment(**options)  # type: ignore[arg-type]
