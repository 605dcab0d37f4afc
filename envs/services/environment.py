"""Services as an environment: three tools (docs, http, wait) on one world per episode, graded on the database's state.

The policy's requests stay in this process; the same world behind a real socket is in serve.py. Every episode's database
lives in memory, so nothing is left of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec.structs import replace

from envs.faults import check_profile, profile_of
from envs.interface import (
    Environment,
    EnvironmentFailureError,
    Episode,
    Message,
    Reward,
    SnapshotError,
    Split,
    Task,
    Tool,
)
from envs.plans import Kind
from envs.rows import compared
from envs.services.api import document
from envs.services.reference import ServicesReference
from envs.services.tasks import KINDS, problem
from envs.services.world import USER, Clock, World, WorldState
from envs.snapshots import State
from envs.tools import ToolEpisode, ToolError, ToolSet

MAX_WAIT_S = 120
PROMPT = (
    "An office's services (shop, calendar, tickets, files) have an HTTP API, which you reach with the tool http. Its "
    "documentation is told by the tool docs. Your user is {user}, your password {password}. Change what the task asks "
    "for and nothing else; answer with the word done afterwards.\n\nTask: {instruction}"
)


def docs(
    episode: ServicesEpisode,
    service: Annotated[Literal["overview", "shop", "calendar", "tickets", "files"], "what to read about"] = "overview",
) -> str:
    """Read the API's documentation: the overview first, then that of a service."""
    return document(service)


def http(
    episode: ServicesEpisode,
    method: Annotated[Literal["GET", "POST", "PATCH", "DELETE"], "the method"],
    path: Annotated[str, "the path with its query, for example /files?page=2"],
    body: Annotated[dict[str, Any] | None, "the JSON body"] = None,
    token: Annotated[str, "the token from /auth/token"] = "",
) -> str:
    """Send one request to the API; answers with the status, the number of bytes sent, and the body that arrived."""
    if len(path) > 300 or len(repr(body)) > 8192:
        raise ToolError("the request is too long")
    answer = episode.world.request(method, path, body, token)
    return f"HTTP {answer.status}, {answer.num_bytes} bytes\n{answer.text}"


def wait(episode: ServicesEpisode, seconds: Annotated[int, f"1 to {MAX_WAIT_S}"]) -> str:
    """Let time pass, for example until requests are allowed again."""
    if not 1 <= seconds <= MAX_WAIT_S:
        raise ToolError(f"seconds must be 1 to {MAX_WAIT_S}")
    episode.world.wait(seconds)
    return f"{seconds} seconds later"


TOOLS = ToolSet(docs, http, wait)


def make_world(task: Task, clock: Clock | None = None) -> World:
    """The world that a task begins with."""
    secret = task.secret
    return World(
        secret["rows"], secret["seed"], secret["password"], profile_of(secret["faults"], secret["seed"]), clock=clock
    )


def grade(task: Task, world: World) -> Reward:
    """1 if exactly what was asked for has changed, else 0. finished: all of that; untouched: nothing else."""
    marks = compared(task.secret["rows"], task.secret["expected"], world.rows())
    return Reward(marks["correct"], marks)


class ServicesState(State, kw_only=True):
    """Beside the counts: the world, None while nobody has asked for it."""

    world: WorldState | None = None


class ServicesEpisode(ToolEpisode):
    """One task in one world."""

    state_type = ServicesState

    def __init__(self, task: Task) -> None:
        super().__init__(task, TOOLS)
        self._world: World | None = None
        self._closed = False

    @property
    def world(self) -> World:
        """The world, made when it is first needed. Raises EnvironmentFailureError after `close`."""
        if self._closed:
            raise EnvironmentFailureError("the episode is closed")
        if self._world is None:
            self._world = make_world(self.task)
        return self._world

    def state(self) -> State:
        """See ToolEpisode."""
        return replace(super().state(), world=None if self._world is None else self._world.state())

    def set_state(self, state: ServicesState) -> None:
        """See ToolEpisode."""
        super().set_state(state)
        if state.world is not None:
            try:
                self.world.set_state(state.world)
            except ValueError as error:
                raise SnapshotError(f"its world cannot be: {error}") from error

    async def grade(self) -> Reward:
        """Of the state reached, whatever the policy says about it."""
        return grade(self.task, self.world)

    async def close(self) -> None:
        """Forget the world."""
        self._closed = True
        if self._world is not None:
            self._world.close()


class ServicesEnvironment(Environment):
    """Office work over an HTTP-like API with pages, tokens, rate limits and faults.

    levels: which levels of difficulty to ask, of 1 (one change, small tables) to 3 (several services, 40 rows a table).
    faults: none, mild, rough or hostile, or mixed, one of these for each task. Raises ValueError.
    """

    name = "services"
    max_turns = 60
    snapshots = True

    def __init__(self, levels: Sequence[int] = (1, 2, 3), faults: str = "mild") -> None:
        if not levels or not set(levels) <= {1, 2, 3}:
            raise ValueError(f"levels is {list(levels)}; choose one or more of 1, 2, 3")
        self._kinds: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind.level in levels)
        self._faults = check_profile(faults)

    @property
    def tools(self) -> Sequence[Tool]:
        """`docs`, `http` and `wait`."""
        return TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        """The task of this split and index. Raises ValueError for a split or index that does not exist."""
        if split not in ("train", "heldout") or index < 0:
            raise ValueError(f"services has the splits train and heldout from index 0, not {split!r} {index}")
        found = problem(self._kinds, split, index)
        seed = f"{split}|{index}"
        password = f"{random.Random(f'password|{seed}').randrange(16**8):08x}"
        text = PROMPT.format(user=USER, password=password, instruction=found.plan.instruction)
        secret = {
            "rows": found.rows,
            "expected": found.expected,
            "facts": found.plan.facts,
            "seed": seed,
            "password": password,
            "faults": self._faults,
        }
        return Task(self.name, split, index, found.kind.name, (Message("user", text),), secret)

    def episode(self, task: Task) -> ServicesEpisode:
        """A fresh attempt."""
        return ServicesEpisode(task)

    async def restore(self, task: Task, snapshot: bytes) -> Episode:
        """See Environment."""
        return self.episode(task).restored(snapshot)

    def reference(self, task: Task) -> ServicesReference:
        """Solves the task through the tools."""
        return ServicesReference(task.kind, task.secret["facts"])
