"""Plays one episode without a model: for tests, for trying out an environment, for certificates. Samples nothing."""

from __future__ import annotations

from dataclasses import dataclass

from envs.interface import Environment, Message, ReferencePolicy, Reward, Task, ToolCall


@dataclass(frozen=True, slots=True)
class Played:
    """What an episode came to: the conversation as it stands at the end, all tool calls in order, the grade, and
    whether it ended by itself."""

    messages: tuple[Message, ...]
    tool_calls: tuple[ToolCall, ...]
    reward: Reward
    done: bool


async def play(environment: Environment, task: Task, policy: ReferencePolicy, max_turns: int = 8) -> Played:
    """Let a policy act on a task until it is done or has had its turns; the episode is always closed.

    Raises what the episode raises: EnvironmentFailureError, SandboxError.
    """
    episode = environment.episode(task)
    calls: list[ToolCall] = []
    done = False
    try:
        messages: list[Message] = list(await episode.start())
        for _ in range(max_turns):
            action = policy.act(tuple(messages))
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
