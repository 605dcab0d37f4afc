"""An episode that is put into bytes and made again goes on as if nothing had happened; no bytes do anything else.

Each environment that says it has snapshots is played by its reference twice, with the same actions: once in one piece,
and once made anew, in another environment object, between any two turns.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgpack
import pytest

from envs.interface import Action, Environment, Episode, Observation, SnapshotError
from envs.memory.environment import MemoryEnvironment
from envs.reason.environment import ReasonEnvironment
from envs.registry import BUILT_IN, create_environment
from envs.services.environment import ServicesEnvironment, ServicesEpisode
from envs.signposts import SignpostsEnvironment
from envs.snapshots import FORMAT

HERE = {  # those whose tools need no sandbox; the others are in tests/integration/envs
    "memory": lambda: MemoryEnvironment(),
    "services": lambda: ServicesEnvironment(faults="hostile"),
    "signposts": lambda: SignpostsEnvironment(),
    "reason": lambda: ReasonEnvironment(),
}
NUM_TASKS = 6


async def actions_of(environment: Environment, index: int) -> list[Action]:
    """What the reference does in the task, turn after turn."""
    task = environment.task("heldout", index)
    episode, policy = environment.episode(task), environment.reference(task)
    assert isinstance(episode, Episode)
    messages, actions, done = list(await episode.start()), list[Action](), False
    while not done:
        actions.append(policy.act(messages))
        observation = await episode.step(actions[-1])
        messages = [*(observation.history or messages), *observation.messages]
        done = observation.done
    await episode.close()
    return actions


async def play(environment: Environment, index: int, actions: Sequence[Action], cut: frozenset[int]) -> Any:
    """Every observation and the grade, of an episode that is made anew before the turns in `cut`."""
    task = environment.task("heldout", index)
    episode = environment.episode(task)
    assert isinstance(episode, Episode)
    seen: list[Observation] = []
    await episode.start()
    for turn, action in enumerate(actions):
        if turn in cut:
            snapshot = await episode.snapshot()
            assert await episode.snapshot() == snapshot, "it has changed something"
            await episode.close()
            episode = await HERE[environment.name]().restore(task, snapshot)
        seen.append(await episode.step(action))
    reward = await episode.grade()
    await episode.close()
    return seen, reward


@pytest.mark.parametrize("name", HERE)
async def test_an_episode_goes_on_as_if_nothing_had_happened(name: str) -> None:
    environment = HERE[name]()
    assert environment.snapshots
    for index in range(NUM_TASKS):
        actions = await actions_of(environment, index)
        whole = await play(environment, index, actions, frozenset())
        assert whole[1].total == 1.0
        assert await play(environment, index, actions, frozenset(range(len(actions)))) == whole
        once = random.Random(index).randrange(len(actions))
        assert await play(environment, index, actions, frozenset({once})) == whole


async def test_nothing_of_a_world_is_forgotten() -> None:
    """Ids that were given and are free again, requests that are kept for their keys, tokens, the window, the clock."""
    environment = ServicesEnvironment(faults="none")
    task = environment.task("train", 0)
    one = environment.episode(task)
    two: ServicesEpisode | None = None

    def ask(method: str, path: str, body: dict[str, Any] | None = None) -> list[Any]:
        answers = [each.world.request(method, path, body, token) for each in (one, two) if each is not None]
        return [(answer.status, answer.text) for answer in answers]

    token = ""
    password = task.secret["password"]
    token = one.world.request("POST", "/auth/token", {"user": "agent", "password": password}, "").text[11:23]
    note = {"path": "/notes/a", "owner": "Ada", "content": "x", "idempotency_key": "k"}
    ((status, made),) = ask("POST", "/files", note)
    assert status == 201
    number = id_in(made)
    assert ask("DELETE", f"/files/{number}")[0][0] == 200
    two = await environment.restore(task, await one.snapshot())  # type: ignore[assignment]
    for request in [
        ("POST", "/files", note),  # was carried out once
        ("POST", "/files", {**note, "path": "/notes/b", "idempotency_key": "l"}),  # has a new id
        ("POST", "/files", {**note, "path": "/notes/c"}),  # another request under the old key
        *[("GET", f"/files?page={page}", None) for page in range(1, 5)] * 9,  # until the window is full
        ("POST", "/auth/token", {"user": "agent", "password": password}),
    ]:
        first, second = ask(*request)
        assert first == second
    assert one.world.rows() == two.world.rows()  # type: ignore[union-attr]


def id_in(text: str) -> int:
    return int(text.split('"id": ')[1].split(",")[0])


async def bytes_of(name: str) -> tuple[Environment, Any, bytes]:
    environment = HERE[name]()
    task = environment.task("heldout", 1)
    episode = environment.episode(task)
    assert isinstance(episode, Episode)
    await episode.start()
    for action in (await actions_of(environment, 1))[:-1]:
        await episode.step(action)
    snapshot = await episode.snapshot()
    await episode.close()
    return environment, task, snapshot


@pytest.mark.parametrize("name", HERE)
async def test_bytes_that_are_no_state_of_this_task_are_refused(name: str) -> None:
    environment, task, snapshot = await bytes_of(name)
    for bad in (
        b"",
        b"\x80",
        snapshot[:-1],
        snapshot + b"\0",
        b"\x81" * 5000,
        snapshot.replace(b"heldout", b"heldin!"),
    ):
        with pytest.raises(SnapshotError):
            await environment.restore(task, bad)
    with pytest.raises(SnapshotError, match="heldout 2"):
        await environment.restore(environment.task("heldout", 2), snapshot)
    rng = random.Random(name)
    for _ in range(400):
        damaged = bytearray(snapshot)
        for _ in range(rng.choice((1, 1, 3))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            episode = await environment.restore(task, bytes(damaged))
        except SnapshotError:
            continue
        await episode.close()


def changed(snapshot: bytes, **change: Any) -> bytes:
    *head, state = msgpack.unpackb(snapshot)
    assert head[0] == FORMAT
    return msgpack.packb([*head, {**state, **change}])


async def test_what_could_not_have_been_is_refused_by_name() -> None:
    environment, task, snapshot = await bytes_of("memory")
    for change, text in [
        ({"session": 99}, "it is in session 99"),
        ({"session": -1}, "session"),
        ({"entries": {"k": "x" * 500}}, "its memory cannot be"),
        ({"entries": {f"{n}": "x" * 200 for n in range(9)}}, "the memory is full"),
        ({"num_tool_calls": "7"}, "num_tool_calls"),
        ({"colour": "red"}, "unknown field `colour`"),
    ]:
        with pytest.raises(SnapshotError, match=text):
            await environment.restore(task, changed(snapshot, **change))
    environment, task, snapshot = await bytes_of("services")
    world = msgpack.unpackb(snapshot)[-1]["world"]
    event = [1, "review", "Ada", 1, 9]
    for part, text in [
        ({"rows": {"secrets": [[1]]}}, "no rows of a table secrets"),
        ({"rows": {"comments": [[1, "2", "text"]]}}, "no rows of a table comments"),
        ({"rows": {"events": [event, [2, *event[1:]]]}}, "UNIQUE"),
        ({"rows": {"comments": [[2**63, 1, "text"]]}}, "world"),
        ({"last_ids": {"secrets": 1}}, "ids of unknown tables"),
        ({"num_drawn": 10**9}, "num_drawn"),
    ]:
        with pytest.raises(SnapshotError, match=text):
            await environment.restore(task, changed(snapshot, world={**world, **part}))


async def test_an_episode_that_is_over_and_one_without_snapshots_say_so() -> None:
    environment = SignpostsEnvironment()
    episode = environment.episode(environment.task("train", 0))
    await episode.step(Action("You are in Rome."))
    with pytest.raises(SnapshotError, match="the episode is over"):
        await episode.snapshot()


def test_who_says_that_it_has_snapshots_has_them() -> None:
    for name in BUILT_IN:
        if name != "program":
            environment = create_environment(name, {})
            assert environment.snapshots == (type(environment).restore is not Environment.restore)
