"""MiniWoB++'s pages in a real Chromium: solved by what they show, and by nothing else; one attempt each."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio

from envs.browser.miniwob import MiniwobEnvironment
from envs.browser.miniwob.environment import PAGES, MiniwobEpisode
from envs.degenerate import DEGENERATE
from envs.interface import Action, EnvironmentFailureError, Message, ReferencePolicy, ToolCall
from envs.play import Played, play

pytestmark = pytest.mark.asyncio(loop_scope="module")
FULL = os.environ.get("ERGON_ENVS_FULL") == "1"
SEEDS = 8 if FULL else 1
AT_ONCE = 4


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def environment() -> AsyncIterator[MiniwobEnvironment]:
    running = MiniwobEnvironment()
    await running.prepare()
    yield running
    await running.close()


async def played(environment: MiniwobEnvironment, indices: Sequence[int], policy: str = "") -> list[Played]:
    """The episodes of these indices, by the reference policy or a degenerate one."""
    free = asyncio.Semaphore(AT_ONCE)

    async def one(index: int) -> Played:
        task = environment.task("heldout", index)
        acting = DEGENERATE[policy](environment) if policy else environment.reference(task)
        async with free:
            return await play(environment, task, acting)

    return await asyncio.gather(*map(one, indices))


def ref(shown: str, element: str) -> int:
    """The number of an element, given as it is shown behind its number."""
    return int(shown.split(f" {element}")[0].rsplit("[", 1)[1])


async def test_every_page_is_solved_by_what_it_shows(environment: MiniwobEnvironment) -> None:
    indices = range(SEEDS * len(PAGES))
    found = await played(environment, indices)
    failed = [PAGES[index % len(PAGES)] for index, each in zip(indices, found, strict=True) if each.reward.total != 1.0]
    assert failed == []
    assert all(each.messages[-1].content == "It is over." for each in found)


@pytest.mark.parametrize("policy", sorted(DEGENERATE))
async def test_knowing_nothing_earns_nothing(environment: MiniwobEnvironment, policy: str) -> None:
    num = SEEDS * len(PAGES) if FULL else len(PAGES) // 2
    found = await played(environment, range(num), policy)
    assert sum(each.reward.total for each in found) / num <= 0.02


async def started(environment: MiniwobEnvironment, page: str) -> tuple[MiniwobEpisode, str]:
    episode = environment.episode(environment.task("train", PAGES.index(page)))
    return episode, (await episode.start())[-1].content


async def do(episode: MiniwobEpisode, *calls: ToolCall) -> list[str]:
    return [message.content for message in (await episode.step(Action("", calls))).messages]


async def test_the_first_end_is_the_end(environment: MiniwobEnvironment) -> None:
    episode, shown = await started(environment, "enter-text")
    try:
        submit = ToolCall("click", {"ref": ref(shown, 'button "Submit"')})
        observation = await episode.step(Action("", (submit, submit)))
        assert observation.done
        assert [message.content for message in observation.messages] == ["It is over.", "error: it is over"]
        assert dict((await episode.grade()).components) == {"solved": 0.0, "raw": -1.0, "ended": 1.0}
        assert json.loads(episode.artifact()) == {"ended": True, "raw": -1.0}
    finally:
        await episode.close()
    with pytest.raises(EnvironmentFailureError, match="closed"):
        await episode.grade()


async def test_saying_that_it_is_done_is_not_doing_it(environment: MiniwobEnvironment) -> None:
    class Talks(ReferencePolicy):
        def act(self, messages: Sequence[Message]) -> Action:
            return Action("done, reward 1.0, core.endEpisode(1.0)")

    found = await play(environment, environment.task("train", 0), Talks())
    assert (found.reward.total, found.done) == (0.0, True)


async def test_there_is_no_way_to_scripts_another_page_or_a_second_try(environment: MiniwobEnvironment) -> None:
    assert {tool.name for tool in environment.tools} == {"click", "type", "select", "press", "scroll", "read"}
    episode, shown = await started(environment, "enter-text")
    try:
        assert "START" not in shown
        assert "reward" not in shown.lower()
        field = ref(shown, "textbox")
        for call in (
            ToolCall("open", {"path": "/miniwob/click-test.html"}),
            ToolCall("back", {}),
            ToolCall("type", {"ref": field, "text": "<script>core.endEpisode(1.0)</script>"}),
            ToolCall("type", {"ref": field, "text": "javascript:core.endEpisode(1.0)"}),
        ):
            await do(episode, call)
            assert (await episode.grade()).total == 0.0
        # A page that goes away, as if it were loaded again, is over.
        await episode.page.goto(episode.start_target)
        assert await do(episode, ToolCall("read", {})) == ["It is over."]
        assert (await episode.grade()).total == 0.0
    finally:
        await episode.close()


async def test_the_same_actions_give_the_same_episode_in_another_process() -> None:
    program = """
import asyncio
from envs.browser.miniwob import MiniwobEnvironment
from envs.play import play
async def main():
    environment = MiniwobEnvironment()
    for index in (2, 11, 23):
        task = environment.task("train", index)
        print((await play(environment, task, environment.reference(task))).messages)
    await environment.close()
asyncio.run(main())
"""
    command = (sys.executable, "-c", program)
    running = [await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [(await each.communicate())[0] for each in running]
    assert [each.returncode for each in running] == [0, 0]
    assert outputs[0].count(b"\n") == 3
    assert outputs[0] == outputs[1]
