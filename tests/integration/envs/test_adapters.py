"""Gymnasium's own environments and MCP servers from PyPI, none written here, as environments of Ergon."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from envs.adapters.gymnasium import GymnasiumEnvironment, as_text
from envs.adapters.mcp import McpEnvironment, McpServer
from envs.interface import Action, EnvironmentFailureError, ErgonEnvError, ReferencePolicy, SandboxError, ToolCall
from envs.play import play
from envs.registry import create_environment
from tests.integration.envs.support import children


@cache
def table(name: str) -> Any:
    """The transitions of one of Gymnasium's tabular environments."""
    import gymnasium

    options = {"is_slippery": False} if name == "FrozenLake-v1" else {}
    return gymnasium.make(name, **options).unwrapped.P  # type: ignore[attr-defined]


def next_action(name: str, text: str) -> str:
    """The first action of a shortest way to the end that pays best, from the observation that a message shows."""
    observation = re.search(r"observation: (\d+)", text)
    assert observation
    steps = table(name)
    ends = [reward for actions in steps.values() for ((_, _, reward, ended),) in actions.values() if ended]
    start = int(observation[1])
    waiting, seen = deque([(start, "")]), {start}
    while waiting:
        state, first = waiting.popleft()
        for action, ((_, after, reward, ended),) in steps[state].items():
            if ended and reward == max(ends):
                return first or str(action)
            if not ended and after not in seen:
                seen.add(after)
                waiting.append((after, first or str(action)))
    raise AssertionError(text)


def frozen_lake(text: str) -> str:
    return next_action("FrozenLake-v1", text)


def taxi(text: str) -> str:
    return next_action("Taxi-v4", text)


def cliff(text: str) -> str:
    return next_action("CliffWalking-v1", text)


def blackjack(text: str) -> str:
    match = re.search(r"observation: \((\d+),", text)
    assert match
    return "hit" if int(match[1]) < 17 else "stick"


MOVES = ["left", "down", "right", "up"]
FROZEN_LAKE = {
    "id": "FrozenLake-v1",
    "options": {"is_slippery": False},
    "actions": MOVES,
    "solved_at": 1.0,
    "solver": f"{__name__}:frozen_lake",
}


@pytest.mark.parametrize(
    "options",
    [
        FROZEN_LAKE,
        {"id": "Taxi-v4", "solved_at": 1.0, "solver": f"{__name__}:taxi"},
        {"id": "CliffWalking-v1", "solved_at": -13.0, "solver": f"{__name__}:cliff"},
    ],
    ids=lambda options: options["id"],
)
async def test_a_solver_solves_it_through_the_tool(options: dict[str, Any]) -> None:
    environment = create_environment("gymnasium", options)
    for index in range(5):
        task = environment.task("train", index)
        played = await play(environment, task, environment.reference(task))
        assert (played.done, played.reward.total) == (True, 1.0)
        assert played.messages[-1].content.endswith("It is over.")


async def test_returns_are_the_reward_without_a_threshold() -> None:
    environment = create_environment(
        "gymnasium", {"id": "Blackjack-v1", "actions": ["stick", "hit"], "solver": f"{__name__}:blackjack"}
    )
    totals = set()
    for index in range(30):
        task = environment.task("heldout", index)
        totals.add((await play(environment, task, environment.reference(task))).reward.total)
    assert totals <= {-1.0, 0.0, 1.0}
    assert {-1.0, 1.0} <= totals


class Give(ReferencePolicy):
    """The same turn every time."""

    def __init__(self, action: Action) -> None:
        self._action = action

    def act(self, messages: object) -> Action:
        return self._action


async def test_doing_nothing_solves_nothing_and_a_wrong_action_changes_nothing() -> None:
    environment = create_environment("gymnasium", FROZEN_LAKE)
    task = environment.task("train", 0)
    assert (await play(environment, task, Give(Action("up")))).reward.components == {"return": 0.0, "ended": 0.0}
    episode = environment.episode(task)
    first = (await episode.start())[0].content
    assert "The actions are: left, down, right, up." in first
    assert "observation: 0\n{S red}FFF" in first
    for wrong in ("4", "-1", "north", "", "²"):
        observation = await episode.step(Action("", (ToolCall("act", {"action": wrong}),)))
        assert observation.messages[0].content.startswith("error: no action")
    observation = await episode.step(Action("", (ToolCall("act", {"action": "Right"}),)))
    assert "observation: 1\n" in observation.messages[0].content
    await episode.close()
    await episode.close()
    with pytest.raises(EnvironmentFailureError, match="closed"):
        await episode.start()


async def test_the_same_seed_is_the_same_episode_and_splits_have_their_own() -> None:
    environment = GymnasiumEnvironment("Taxi-v4")
    task = environment.task("train", 3)
    policy = Give(Action("", tuple(ToolCall("act", {"action": str(number)}) for number in (0, 1, 2, 3))))
    one, two = [await play(environment, task, policy, max_turns=5) for _ in range(2)]
    assert one.messages == two.messages
    seeds = {split: {environment.task(split, n).secret["seed"] for n in range(50)} for split in ("train", "heldout")}  # type: ignore[arg-type]
    assert not seeds["train"] & seeds["heldout"]


def test_pictures_are_text_with_colours_in_words() -> None:
    assert as_text((1, 2), "\n\x1b[41mS\x1b[0mF\x1b[34;1mB\x1b[0m\n") == "observation: (1, 2)\n{S red}F{B blue}"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"id": "NoSuch-v0"}, "NoSuch"),
        ({"id": "Pendulum-v1"}, "only discrete ones"),
        ({"id": "FrozenLake-v1", "options": {"size": 3}}, "size"),
        ({"id": "FrozenLake-v1", "actions": ["left"]}, "has 4 of them"),
        ({"id": "FrozenLake-v1", "solver": "nowhere"}, "solver is 'nowhere'"),
        ({"id": "FrozenLake-v1", "solver": "no_such_module:f"}, "no_such_module"),
    ],
)
def test_wrong_options_of_gymnasium_are_named(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ErgonEnvError, match=sentence):
        create_environment("gymnasium", options)


def server(name: str) -> str:
    """The program of an MCP server that is installed beside this Python."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is missing: make setup"
    return found


def tasks_file(folder: Path, *tasks: dict[str, Any]) -> str:
    path = folder / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, tasks)))
    return str(path)


async def test_a_server_of_times_is_a_set_of_tools() -> None:
    before = children()
    running = McpServer([server("mcp-server-time"), "--local-timezone", "UTC"], timeout_s=30)
    tools = {tool.name: tool for tool in await running.start()}
    assert set(tools) == {"get_current_time", "convert_time"}
    assert "source_timezone" in tools["convert_time"].parameters["properties"]
    arguments = {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"}
    right = await running.call("convert_time", arguments)
    assert (right.error, "T21:00:00+09:00" in right.text) == (False, True)
    wrong = await running.call("convert_time", {"time": "noon"})
    assert (wrong.error, wrong.text[:7]) == (True, "error: ")
    await running.close()
    await running.close()
    with pytest.raises(SandboxError, match="not running"):
        await running.call("convert_time", arguments)
    assert children() == before  # the server has ended


async def test_a_server_of_git_sees_a_real_repository(tmp_path: Path) -> None:
    repository = str(tmp_path / "r")
    for command in (["init", "-q", "-b", "pear", repository], ["-C", repository, "status", "--short"]):
        subprocess.run(["git", *command], check=True)
    task = {
        "prompt": "Which branch is checked out?",
        "answer": "pear",
        "split": "heldout",
        "calls": [{"name": "git_status", "arguments": {"repo_path": repository}}],
    }
    environment = McpEnvironment([server("mcp-server-git"), "--repository", repository], tasks_file(tmp_path, task))
    asked = environment.task("heldout", 0)
    episode, reference = environment.episode(asked), environment.reference(asked)
    messages = list(await episode.start())
    observation = await episode.step(reference.act(messages))
    assert "On branch pear" in observation.messages[0].content
    observation = await episode.step(Action("", (ToolCall("fly", {}),)))
    assert observation.messages[0].content.startswith("error: unknown tool fly; the tools are: git_status")
    assert (await episode.grade()).total == 0.0
    assert (await episode.step(reference.act([*messages, *observation.messages]))).done
    assert (await episode.grade()).total == 1.0
    await episode.close()
    await episode.close()
    with pytest.raises(ValueError, match="has 0 of the split 'train'"):
        environment.task("train", 0)


async def test_a_server_that_does_not_start_is_infrastructure(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="did not start"):
        McpEnvironment([sys.executable, "-c", "pass"], tasks_file(tmp_path, {"prompt": "p", "answer": "a"}))


@pytest.mark.parametrize("line", ['{"prompt": "p"}', "[]", "{", '{"prompt": 1, "answer": "a"}'])
def test_a_wrong_file_of_tasks_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(line)
    with pytest.raises(ErgonEnvError, match=r"tasks is '.*tasks\.jsonl'"):
        McpEnvironment(["x"], str(path))
