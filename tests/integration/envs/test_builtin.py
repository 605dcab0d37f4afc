"""What every built-in environment must keep, whoever wrote it; a new one in the registry is covered by itself.

`make test-envs` runs the same with the full numbers.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from envs.degenerate import DEGENERATE
from envs.interface import Environment, Split
from envs.play import Played, play
from envs.registry import BUILT_IN, create_environment
from tests.integration.envs.support import children, files_of_sandboxes, more_descriptors, open_descriptors

FULL = os.environ.get("ERGON_ENVS_FULL") == "1"
NUM_TASKS = 200 if FULL else 12
NUM_RESETS = 1000 if FULL else 12
AT_ONCE = 64 if FULL else 8
MAX_TURNS = 40
# `program` needs a folder of tasks, and its episodes drive themselves: tests/integration/gateway.
NAMES = sorted(set(BUILT_IN) - {"program"})


@pytest_asyncio.fixture(params=NAMES)
async def environment(request: pytest.FixtureRequest) -> AsyncIterator[Environment]:
    made = create_environment(request.param)
    await made.prepare()
    yield made
    await made.close()


async def gathered(count: int, at_once: int, one: Callable[[int], Awaitable[Played]]) -> Sequence[Played]:
    """The episodes of the first `count` indices, so many at once."""
    in_flight = asyncio.Semaphore(at_once)

    async def bounded(index: int) -> Played:
        async with in_flight:
            return await one(index)

    return await asyncio.gather(*(bounded(index) for index in range(count)))


@pytest.mark.parametrize("split", ["train", "heldout"])
async def test_the_reference_policy_gets_full_marks(environment: Environment, split: Split) -> None:
    async def one(index: int) -> Played:
        task = environment.task(split, index)
        return await play(environment, task, environment.reference(task), MAX_TURNS)

    played = await gathered(NUM_TASKS, AT_ONCE, one)
    assert [each.reward.total for each in played] == [1.0] * NUM_TASKS
    assert all(each.done for each in played)


@pytest.mark.parametrize("policy", sorted(DEGENERATE))
async def test_knowing_nothing_earns_nothing(environment: Environment, policy: str) -> None:
    async def one(index: int) -> Played:
        return await play(environment, environment.task("heldout", index), DEGENERATE[policy](environment), MAX_TURNS)

    played = await gathered(NUM_TASKS, AT_ONCE, one)
    assert sum(each.reward.total for each in played) / NUM_TASKS <= 0.02


def test_no_problem_is_in_two_splits_or_asked_twice(environment: Environment) -> None:
    seen = {
        (split, index): repr((task.prompt, task.secret))
        for split in ("train", "heldout")
        for index in range(300)
        for task in (environment.task(split, index),)
    }
    train, heldout = ({text for (split, _), text in seen.items() if split == which} for which in ("train", "heldout"))
    assert not train & heldout
    assert min(len(train), len(heldout)) > 250


@pytest.mark.parametrize("name", NAMES)
def test_the_same_actions_give_the_same_episode_in_another_process(name: str) -> None:
    program = f"""
import asyncio
from envs.degenerate import DEGENERATE
from envs.play import play
from envs.registry import create_environment
async def main():
    environment = create_environment({name!r})
    for split, index in (("train", 3), ("heldout", 9), ("heldout", 14)):
        task = environment.task(split, index)
        for policy in environment.reference(task), DEGENERATE["random calls"](environment):
            played = await play(environment, task, policy, {MAX_TURNS})
            print(played.messages, played.reward, task.kind)
    await environment.close()
asyncio.run(main())
"""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]
    outputs = [each.communicate(timeout=120)[0] for each in running]
    assert [each.returncode for each in running] == [0, 0]
    assert outputs[0].count(b"\n") == 6
    assert hashlib.sha256(outputs[0]).hexdigest() == hashlib.sha256(outputs[1]).hexdigest(), outputs


async def test_resets_leave_nothing_behind(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    await environment.close()  # this one's pool would make sandboxes whenever it likes
    fresh = create_environment(environment.name)

    def seen() -> tuple[object, ...]:
        mounts = Path("/proc/self/mountinfo").read_text()
        return children(), mounts, files_of_sandboxes(), list(tmp_path.iterdir())

    before, descriptors = seen(), open_descriptors()

    async def one(index: int) -> None:
        episode = fresh.episode(fresh.task("train", index))
        await episode.start()
        await episode.close()
        await episode.close()

    for first in range(0, NUM_RESETS, AT_ONCE):
        await asyncio.gather(*(one(index) for index in range(first, min(first + AT_ONCE, NUM_RESETS))))
    await fresh.close()
    assert seen() == before
    assert await more_descriptors(descriptors) == 0
