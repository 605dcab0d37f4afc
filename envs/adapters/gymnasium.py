"""Any Gymnasium environment with discrete actions as an environment of text: one tool, `act`; observations as text.

What is shown is the observation and, where the environment renders text (`ansi`), the picture, its colours in words.
Knows no particular environment. The package is the optional extra `gymnasium`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from envs.adapters.seeds import seed_of
from envs.adapters.thread import OwnThread
from envs.interface import (
    Action,
    Environment,
    EnvironmentFailureError,
    EnvironmentOptionsError,
    ErgonEnvError,
    Message,
    Observation,
    ReferencePolicy,
    Reward,
    Split,
    Task,
    Tool,
    ToolCall,
)
from envs.tools import ToolEpisode, ToolError, ToolSet

COLOURS = {"1": "red", "2": "green", "3": "yellow", "4": "blue", "5": "magenta", "6": "cyan"}
MAX_SHOWN = 2000
_COLOURED = re.compile(r"\x1b\[([0-9;]*)m(.*?)\x1b\[0m", re.DOTALL)


async def act(episode: GymnasiumEpisode, action: Annotated[str, "the action's name or number"]) -> str:
    """Take one action."""
    return await episode.take(action)


TOOLS = ToolSet(act)


def as_text(observation: Any, picture: Any) -> str:
    """What the policy sees of a state."""
    parts = [f"observation: {_plain(observation)}"]
    if isinstance(picture, str) and picture.strip():
        parts.append(_COLOURED.sub(_in_words, picture).strip("\n"))
    return "\n".join(parts)[:MAX_SHOWN]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(each) for each in value)
    return value.tolist() if hasattr(value, "tolist") else value


def _in_words(match: re.Match[str]) -> str:
    """`{X red}` for a coloured X; a coloured background counts as a colour."""
    codes = [code for code in match[1].split(";") if len(code) == 2 and code[1] in COLOURS]
    return f"{{{match[2]} {COLOURS[codes[0][1]]}}}" if codes else match[2]


class GymnasiumEpisode(ToolEpisode):
    """One episode of the wrapped environment. A turn without a call gives up."""

    def __init__(self, task: Task, make: Callable[[], Any], actions: Sequence[str], solved_at: float | None) -> None:
        super().__init__(task, TOOLS)
        self._make = make
        self._actions = actions
        self._solved_at = solved_at
        self._env: Any = None
        self._thread = OwnThread("gymnasium-episode")
        self._return = 0.0
        self._ended = False
        self._closed = False

    async def start(self) -> Sequence[Message]:
        """Reset the wrapped environment with the task's seed. Raises EnvironmentFailureError."""
        if self._closed:
            raise EnvironmentFailureError("the episode is closed")
        shown = await self._thread.run(self._reset)
        first = self.task.prompt[0]
        return (Message(first.role, f"{first.content}\n\n{shown}"),)

    def _reset(self) -> str:
        try:
            self._env = self._make()
            observation, _ = self._env.reset(seed=self.task.secret["seed"])
            return as_text(observation, self._picture())
        except Exception as error:
            raise EnvironmentFailureError(f"it cannot be reset: {type(error).__name__}: {error}") from error

    def _picture(self) -> Any:
        return self._env.render() if self._env.render_mode == "ansi" else None

    async def take(self, action: str) -> str:
        """One step. Raises ToolError for an action that there is not, or after the end."""
        if self._ended:
            raise ToolError("it is over")
        name = action.strip().lower()
        if name in self._actions:
            number = self._actions.index(name)
        elif name.isascii() and name.isdecimal() and int(name) < len(self._actions):
            number = int(name)
        else:
            raise ToolError(f"no action {action[:40]!r}; the actions are: {', '.join(self._actions)}")
        return await self._thread.run(self._step, number)

    def _step(self, number: int) -> str:
        observation, reward, terminated, truncated, _ = self._env.step(number + int(self._env.action_space.start))
        self._return += float(reward)
        self._ended = bool(terminated or truncated)
        ended = "\nIt is over." if self._ended else ""
        return f"{as_text(observation, self._picture())}\nreward: {float(reward):g}{ended}"

    async def step(self, action: Action) -> Observation:
        """As any tool episode, but the end of the wrapped environment ends it too."""
        if self._env is None:
            raise EnvironmentFailureError("the episode was not started")
        observation = await super().step(action)
        return Observation(observation.messages, observation.done or self._ended)

    async def grade(self) -> Reward:
        """The return, the sum of all rewards; with `solved_at`, 1 for as much and 0 for less."""
        total = self._return if self._solved_at is None else float(self._ended and self._return >= self._solved_at)
        return Reward(total, {"return": self._return, "ended": float(self._ended)})

    async def close(self) -> None:
        """Close the wrapped environment; idempotent."""
        self._closed = True
        env, self._env = self._env, None
        await self._thread.close(env.close if env is not None else None)


class Solver(ReferencePolicy):
    """Acts by a function from the last message's text to what a tool's argument is next."""

    def __init__(self, function: Callable[[str], str], tool: str = "act", argument: str = "action") -> None:
        self._function = function
        self._tool, self._argument = tool, argument

    def act(self, messages: Sequence[Message]) -> Action:
        """The function's action."""
        return Action("", (ToolCall(self._tool, {self._argument: self._function(messages[-1].content)}),))


class GymnasiumEnvironment(Environment):
    """A Gymnasium environment with discrete actions.

    id: its id, for example FrozenLake-v1. options: what `gymnasium.make` is given besides. actions: their names
    in their order, numbers by default. goal: what the policy is told. solved_at: the return from which on an episode
    counts as solved, reward 1 instead of the return. solver: `module:function`, from a message's text to an action, for
    the reference policy. max_turns: turns that an episode may have. Raises EnvironmentOptionsError and ValueError.
    """

    name = "gymnasium"

    def __init__(
        self,
        id: str,  # noqa: A002  Gymnasium's own word
        options: Mapping[str, Any] | None = None,
        actions: Sequence[str] | None = None,
        goal: str = "Earn as much reward as you can.",
        solved_at: float | None = None,
        solver: str | None = None,
        max_turns: int = 100,
    ) -> None:
        self._id = id
        self._options = dict(options or {})
        self._goal = goal
        self._solved_at = solved_at
        self._solver = solver_of(solver) if solver else None
        self.max_turns = max_turns
        self._mode: str | None = None
        self._actions = self._inspected(actions)

    def _inspected(self, names: Sequence[str] | None) -> tuple[str, ...]:
        """The names of the actions, from one instance, which also tells whether it renders text."""
        try:
            import gymnasium
        except ImportError as error:
            raise EnvironmentOptionsError(
                "a Gymnasium environment needs the package gymnasium: type `pip install ergon[gymnasium]`"
            ) from error
        try:
            env = gymnasium.make(self._id, **self._options)
        except (gymnasium.error.Error, TypeError) as error:
            raise EnvironmentOptionsError(f"id is {self._id!r}: {error}") from error
        space, modes = env.action_space, env.metadata.get("render_modes", ())
        env.close()
        if not isinstance(space, gymnasium.spaces.Discrete):
            raise EnvironmentOptionsError(f"id is {self._id!r}: its actions are {space}; only discrete ones have names")
        self._mode = "ansi" if "ansi" in modes else None
        if names is None:
            return tuple(str(number) for number in range(int(space.n)))
        if len(names) != int(space.n):
            raise ValueError(f"actions is {list(names)}; {self._id} has {int(space.n)} of them")
        return tuple(each.lower() for each in names)

    def _make(self) -> Any:
        import gymnasium

        return gymnasium.make(self._id, render_mode=self._mode, **self._options)

    @property
    def tools(self) -> Sequence[Tool]:
        """`act`."""
        return TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        """The seed of this split and index: even ones train, odd ones are held out. Raises ValueError."""
        seed = seed_of(self._id, split, index)
        text = f"{self._goal} The actions are: {', '.join(self._actions)}."
        return Task(self.name, split, index, self._id, (Message("user", text),), {"seed": seed})

    def episode(self, task: Task) -> GymnasiumEpisode:
        """A fresh instance of the wrapped environment."""
        return GymnasiumEpisode(task, self._make, self._actions, self._solved_at)

    def reference(self, task: Task) -> ReferencePolicy:
        """The solver's policy. Raises ErgonEnvError without a solver."""
        if self._solver is None:
            raise ErgonEnvError(f"{self._id} has no reference policy: give the option solver, `module:function`")
        return Solver(self._solver)


def solver_of(name: str) -> Callable[[str], str]:
    """The function of this name, `module:function`. Raises EnvironmentOptionsError."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (ImportError, ValueError) as error:
        raise EnvironmentOptionsError(f"solver is {name!r}: {error}") from error
    if not callable(found):
        raise EnvironmentOptionsError(f"solver is {name!r}; it must be `module:function`")
    return found  # type: ignore[no-any-return]
