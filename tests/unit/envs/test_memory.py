"""Memory: bounded, forgotten by everybody but the tools, and graded on what holds on the last day."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import pytest

from envs.interface import Action, EnvironmentFailureError, Message, ReferencePolicy, ToolCall
from envs.memory import MemoryEnvironment
from envs.memory.environment import parse_answer
from envs.memory.tales import KINDS, tale
from envs.play import play
from envs.tools import ToolError
from envs.tools.memory import Memory


def test_the_memory_is_bounded_and_says_how_much_is_left() -> None:
    memory = Memory(240)
    assert memory.write("a", "x" * 150) == "stored; 89 characters are left"
    with pytest.raises(ToolError, match="full: 89 characters"):
        memory.write("b", "x" * 89)
    assert memory.write("a", "y") == "stored; 238 characters are left"  # replaced
    for key, text in (("", "x"), ("k" * 41, "x"), ("k", ""), ("k", "x" * 201), ("k", "two\nlines")):
        with pytest.raises(ToolError, match="1 to"):
            memory.write(key, text)
    with pytest.raises(ToolError, match="no key 'z'"):
        memory.delete("z")
    assert memory.delete("a") == "deleted"
    assert (memory.keys(), memory.search("a")) == ("the memory is empty", "nothing found")
    with pytest.raises(ValueError, match="240 or more"):
        Memory(239)


def test_search_puts_what_shares_most_words_first() -> None:
    memory = Memory(1000)
    for key, text in (("Ada desk", "12"), ("Ada locker", "7"), ("Ben locker", "9 (was 8)"), ("lunch", "none")):
        memory.write(key, text)
    assert memory.search("the locker of Ben") == "Ben locker: 9 (was 8)\nAda locker: 7"
    assert memory.search("8?") == "Ben locker: 9 (was 8)"
    assert memory.keys().splitlines() == ["Ada desk", "Ada locker", "Ben locker", "lunch"]


@pytest.mark.parametrize("split", ["train", "heldout"])
async def test_the_reference_answers_every_kind(split: str) -> None:
    environment = MemoryEnvironment()
    rewards = Counter[tuple[str, float]]()
    for index in range(40):
        task = environment.task(split, index)  # type: ignore[arg-type]
        rewards[task.kind, (await play(environment, task, environment.reference(task))).reward.total] += 1
    assert rewards == {(kind.name, 1.0): 10 for kind in KINDS}


async def test_what_was_not_stored_is_gone() -> None:
    environment = MemoryEnvironment(kinds=["told"])
    for index in range(10):
        task = environment.task("train", index)
        episode = environment.episode(task)
        messages: Sequence[Message] = await episode.start()
        for _ in range(2):
            observation = await episode.step(Action("I shall remember " + messages[-1].content))
            assert observation.history == task.prompt[:1]
            messages = [*(observation.history or ()), *observation.messages]
        assert "What is" in messages[-1].content
        assert task.secret["answer"] not in "".join(message.content for message in messages)
        assert not (await episode.step(Action("", (ToolCall("memory_list", {}),)))).history
        assert (await episode.step(Action(f"<answer>{task.secret['answer']}</answer>"))).done
        assert (await episode.grade()).total == 1.0
        with pytest.raises(EnvironmentFailureError, match="over"):
            await episode.step(Action("more"))


async def test_a_malformed_turn_ends_no_session() -> None:
    environment = MemoryEnvironment()
    episode = environment.episode(environment.task("train", 0))
    observation = await episode.step(Action("<tool>", malformed="not closed"))
    assert (observation.history, observation.messages) == (None, (Message("tool", "error: not closed"),))
    assert (await episode.grade()).components == {"correct": 0.0, "last_session": 0.0}


def test_corrections_and_expiry_decide_the_answer() -> None:
    environment = MemoryEnvironment(kinds=["corrected", "expired"])
    stale = Counter[str]()
    for index in range(40):
        task = environment.task("train", index)
        told = " ".join(task.secret["sessions"])
        answer = task.secret["answer"]
        if task.kind == "corrected":
            assert re.search(rf"Correction: [\w ']+ is {answer}, not \w+\.", told)
        else:
            stale["old" if re.search(rf"is {answer}; from", told) else "new"] += 1
    assert min(stale["old"], stale["new"]) >= 3  # neither "the first" nor "the last" is always right


class Guess(ReferencePolicy):
    """Answers with a value of the right shape at once, in every session."""

    def act(self, messages: Sequence[Message]) -> Action:
        return Action("<answer>500</answer>")


async def test_a_guess_earns_nothing() -> None:
    environment = MemoryEnvironment()
    rewards = [
        (await play(environment, environment.task("train", index), Guess())).reward.total for index in range(100)
    ]
    assert sum(rewards) <= 2


def test_tasks_are_distinct_and_splits_share_none() -> None:
    told = [tale(KINDS, split, index).sessions for split in ("train", "heldout") for index in range(300)]
    assert len(set(told)) == 600


@pytest.mark.parametrize("text", [None, "", "500", "<answer></answer>", "<answer>1</answer><answer>2", "<answer>1"])
def test_only_one_tagged_answer_is_an_answer(text: str | None) -> None:
    assert parse_answer(text) is None


def test_options_are_checked() -> None:
    for options in ({"kinds": []}, {"kinds": ["x"]}, {"capacity": 3}):
        with pytest.raises(ValueError):
            MemoryEnvironment(**options)  # type: ignore[arg-type]
