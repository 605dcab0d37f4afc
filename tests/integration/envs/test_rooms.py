"""What holds for services, memory and reason alike: nothing for who knows nothing, the same everywhere, no traces."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from envs.interface import Action, Environment, Message, ReferencePolicy, ToolCall
from envs.play import play
from envs.registry import create_environment
from tests.integration.envs.support import children, more_descriptors, open_descriptors

ROOMS = ("services", "memory", "reason")


class NoOp(ReferencePolicy):
    """Says nothing."""

    def act(self, messages: Sequence[Message]) -> Action:
        return Action("")


class Echo(ReferencePolicy):
    """Answers with the last line it saw."""

    def act(self, messages: Sequence[Message]) -> Action:
        return Action(f"<answer>{messages[-1].content.splitlines()[-1]}</answer>")


class LastWords(ReferencePolicy):
    """Answers with the last word of the last session or question that looks like a value."""

    def act(self, messages: Sequence[Message]) -> Action:
        words = [word.strip(".,?()") for word in messages[-1].content.split()]
        return Action(f"<answer>{[word for word in words if word.isalnum()][-1]}</answer>")


class Constant(ReferencePolicy):
    """The same answer every time."""

    def act(self, messages: Sequence[Message]) -> Action:
        return Action("done <answer>7</answer>")


class RandomCalls(ReferencePolicy):
    """Random tools with random arguments, among them paths and bodies that exist."""

    WORDS = (
        "/files",
        "/files/1",
        "/shop/orders/1/cancel",
        "/tickets/2",
        "overview",
        "GET",
        "POST",
        "DELETE",
        "Ada",
        "x",
    )

    def __init__(self, tools: Sequence[Any]) -> None:
        self._tools = tools
        self._random = random.Random(0)

    def act(self, messages: Sequence[Message]) -> Action:
        if not self._tools or self._random.random() < 0.1:
            return Action(f"<answer>{self._random.randrange(1000)}</answer>")
        tool = self._random.choice(list(self._tools))
        values = {name: self._value(schema) for name, schema in tool.parameters.get("properties", {}).items()}
        return Action("", (ToolCall(tool.name, values),))

    def _value(self, schema: dict[str, Any]) -> Any:
        if "enum" in schema:
            return self._random.choice(schema["enum"])
        if schema.get("type") == "integer":
            return self._random.randrange(1, 60)
        return self._random.choice(self.WORDS) if schema.get("type") == "string" else {"status": "closed"}


async def mean_reward(environment: Environment, policy: ReferencePolicy, num_tasks: int) -> float:
    rewards = [
        (await play(environment, environment.task("heldout", index), policy, max_turns=12)).reward.total
        for index in range(num_tasks)
    ]
    return sum(rewards) / num_tasks


@pytest.mark.parametrize("name", ROOMS)
async def test_degenerate_policies_earn_nothing(name: str) -> None:
    environment = create_environment(name)
    for policy in (NoOp(), Echo(), LastWords(), Constant(), RandomCalls(environment.tools)):
        assert await mean_reward(environment, policy, 50) <= 0.02, type(policy).__name__


def test_the_same_task_gives_the_same_conversation_in_another_process() -> None:
    program = f"""
import asyncio
from envs.play import play
from envs.registry import create_environment
async def main():
    for environment in map(create_environment, {ROOMS!r}):
        for split, index in (("train", 3), ("heldout", 8), ("train", 14)):
            task = environment.task(split, index)
            played = await play(environment, task, environment.reference(task))
            print(played.messages, played.tool_calls, played.reward, task.secret)
asyncio.run(main())
"""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
        )
        for seed in ("1", "2")
    ]
    outputs = [each.communicate()[0] for each in running]
    assert [each.returncode for each in running] == [0, 0]
    assert outputs[0].count(b"\n") == 9
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("name", ROOMS)
async def test_a_hundred_resets_leave_no_trace(name: str) -> None:
    environment = create_environment(name)
    tasks = [environment.task("train", index) for index in range(10)]

    async def reset(number: int) -> None:
        episode = environment.episode(tasks[number % 10])
        await episode.start()
        await episode.grade()
        await episode.close()
        await episode.close()

    for number in range(20):
        await reset(number)
    descriptors, before, num_objects = open_descriptors(), children(), len(gc.get_objects())
    for number in range(100):
        await reset(number)
    assert await more_descriptors(descriptors) == 0
    assert children() == before
    assert len(gc.get_objects()) < num_objects + 50
