"""Plays one episode without a model: for tests, for trying out an environment, for certificates. Samples nothing."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from envs.interface import Action, Environment, Episode, ErgonEnvError, Message, Reward, Task, ToolCall


class Acting(Protocol):
    """A reference policy, or anything else that acts like one, at once or after a while."""

    def act(self, messages: Sequence[Message], /) -> Action | Awaitable[Action]:
        """The next action."""


@dataclass(frozen=True, slots=True)
class Played:
    """What an episode came to: the conversation as it stands at the end, all tool calls in order, the grade, and
    whether it ended by itself."""

    messages: tuple[Message, ...]
    tool_calls: tuple[ToolCall, ...]
    reward: Reward
    done: bool


async def play(environment: Environment, task: Task, policy: Acting, max_turns: int | None = None) -> Played:
    """Let a policy act on a task until it is done or has had its turns; the episode is always closed.

    max_turns: the environment's own by default.
    Raises what the episode raises: EnvironmentFailureError, SandboxError. Raises ErgonEnvError for a self-driven one.
    """
    episode = environment.episode(task)
    if not isinstance(episode, Episode):
        raise ErgonEnvError(f"episodes of {environment.name!r} drive themselves; only an actor's gateway can run them")
    calls: list[ToolCall] = []
    done = False
    try:
        messages: list[Message] = list(await episode.start())
        for _ in range(environment.max_turns if max_turns is None else max_turns):
            answer = policy.act(tuple(messages))
            action = await answer if inspect.isawaitable(answer) else answer
            calls += action.tool_calls
            observation = await episode.step(action)
            said = Message("assistant", action.text)
            messages = [*messages, said] if observation.history is None else list(observation.history)
            messages += observation.messages
            done = observation.done
            if done:
                break
        return Played(tuple(messages), tuple(calls), await episode.grade(), done)
    finally:
        await episode.close()
