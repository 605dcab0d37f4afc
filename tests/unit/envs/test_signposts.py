"""Signposts: walks are solvable from what is asked, splits share none, only the right town pays."""

from __future__ import annotations

import re

import pytest

from envs.interface import Action, Message, ReferencePolicy
from envs.play import play
from envs.registry import create_environment
from envs.signposts import TOWNS, SignpostsEnvironment

ENVIRONMENT = SignpostsEnvironment()
NUM = 200


class Says(ReferencePolicy):
    def __init__(self, text: str) -> None:
        self._text = text

    def act(self, messages: list[Message]) -> Action:  # type: ignore[override]
        return Action(self._text)


def solve(question: str) -> str:
    """Follow the signposts as they are written."""
    signs = dict(re.findall(r"([A-Z]\w+) to ([A-Z]\w+)", question))
    found = re.search(r"You start in (\w+) and follow (\d+) of them", question)
    assert found
    here = found[1]
    for _ in range(int(found[2])):
        here = signs[here]
    return here


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_question_has_the_answer_that_following_the_signposts_gives(split: str) -> None:
    for index in range(NUM):
        task = ENVIRONMENT.task(split, index)  # type: ignore[arg-type]
        assert solve(task.prompt[0].content) == task.secret["route"][-1]
        assert task.kind == f"{len(task.secret['route']) - 1} steps"
        assert len(set(task.secret["route"])) == len(task.secret["route"])


def trips(split: str) -> set[frozenset[tuple[str, ...]]]:
    found = set()
    for index in range(NUM):
        text = ENVIRONMENT.task(split, index).prompt[0].content  # type: ignore[arg-type]
        found.add(frozenset(re.findall(r"([A-Z]\w+) to ([A-Z]\w+)", text)))
    return found


def test_splits_share_no_round_trip() -> None:
    train, heldout = trips("train"), trips("heldout")
    assert len(train) == len(heldout) == NUM
    assert not train & heldout


def test_tasks_are_the_same_for_every_instance_and_kinds_take_turns() -> None:
    other = SignpostsEnvironment()
    assert [ENVIRONMENT.task("train", i).prompt for i in range(8)] == [other.task("train", i).prompt for i in range(8)]
    assert [ENVIRONMENT.task("train", i).kind for i in range(5)] == [f"{n} steps" for n in (2, 3, 4, 5, 2)]


async def test_the_reference_solves_it_and_its_thinking_is_not_the_answer() -> None:
    task = ENVIRONMENT.task("train", 3)
    text = ENVIRONMENT.reference(task).act(()).text
    thought, _, answer = text.partition("</think>")
    assert thought.startswith("<think>")
    assert thought.count(" to ") == 5
    assert (await play(ENVIRONMENT, task, Says(answer))).reward.total == 1.0


@pytest.mark.parametrize(
    "answer", ["", "{}", "You are in {}", "You are in {}. Or in Rome.", "I am in {}.", "You are in X."]
)
async def test_nothing_else_pays(answer: str) -> None:
    task = ENVIRONMENT.task("train", 0)
    assert (await play(ENVIRONMENT, task, Says(answer.format(task.secret["route"][-1])))).reward.total == 0.0


@pytest.mark.parametrize(
    "options", [{"towns": 2}, {"towns": 99}, {"steps": [0, 2]}, {"steps": [3, 2]}, {"steps": [2, 7]}]
)
def test_options_that_cannot_be_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(Exception, match="fewer than towns"):
        create_environment("signposts", options)


def test_there_is_no_task_of_another_split() -> None:
    with pytest.raises(ValueError, match="train and heldout"):
        ENVIRONMENT.task("test", 0)  # type: ignore[arg-type]


def test_towns_are_told_apart() -> None:
    assert len(set(TOWNS)) == len(TOWNS)
