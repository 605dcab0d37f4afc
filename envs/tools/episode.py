"""The usual episode: tool calls are answered in order, a turn without any is the final answer. Grades nothing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from envs.interface import (
    Action,
    EnvironmentFailureError,
    Episode,
    Message,
    Observation,
    Reward,
    SnapshotError,
    Task,
    ToolCall,
)
from envs.snapshots import State, pack, unpack
from envs.tools.typed import ERROR_PREFIX, ToolOutput, ToolSet

MAX_CALLS_PER_TURN = 8


class ToolEpisode(Episode):
    """An episode whose policy acts through a `ToolSet`. Subclasses grade, and may prepare and release.

    One that can be handed over (`Environment.snapshots`) holds what `state` says and nothing else: where there is more
    than the counts, it extends `state` and `set_state`, and names its `state_type`. Its environment's `restore` is
    `self.episode(task).restored(snapshot)`.

    `final_text`: the final answer, None until there is one. `num_tool_errors`: calls answered with an error so far,
    those that ran out of time included, which are `num_tool_timeouts`.
    """

    state_type: ClassVar[type[State]] = State

    def __init__(self, task: Task, tools: ToolSet) -> None:
        self.task = task
        self.final_text: str | None = None
        self.num_tool_calls = 0
        self.num_tool_errors = 0
        self.num_tool_timeouts = 0
        self._tools = tools

    async def start(self) -> Sequence[Message]:
        """Nothing to prepare: the task's prompt."""
        return self.task.prompt

    async def step(self, action: Action) -> Observation:
        """Answer a turn. Raises EnvironmentFailureError after the final answer, and SandboxError."""
        if self.final_text is not None:
            raise EnvironmentFailureError("the episode is over: it had its final answer already")
        if action.malformed is not None:
            self.num_tool_errors += 1
            return Observation((Message("tool", ERROR_PREFIX + action.malformed),))
        if not action.tool_calls:
            self.final_text = action.text
            return Observation(done=True)
        outputs = [await self._answer(number, call) for number, call in enumerate(action.tool_calls)]
        self.num_tool_errors += sum(output.error for output in outputs)
        num_timeouts = sum(output.timed_out for output in outputs)
        self.num_tool_timeouts += num_timeouts
        return Observation(tuple(Message("tool", output.text) for output in outputs), num_timeouts=num_timeouts)

    async def _answer(self, number: int, call: ToolCall) -> ToolOutput:
        if number >= MAX_CALLS_PER_TURN:
            return ToolOutput(f"{ERROR_PREFIX}at most {MAX_CALLS_PER_TURN} calls in one turn", error=True)
        self.num_tool_calls += 1
        return await self._tools.call(self, call, self.process_state)

    def process_state(self) -> Any:
        """What a tool that runs in a process of its own gets as its first argument, in place of the episode: something
        that pickles. What the tool changes in it is lost."""
        return self.task

    @abstractmethod
    async def grade(self) -> Reward:
        """Grade what was reached; `final_text` is None where the episode was cut short."""

    async def close(self) -> None:
        """Nothing to release."""

    def state(self) -> State:
        """What there is to know of the episode between two turns. Raises SnapshotError where that cannot be said."""
        return self.state_type(
            num_tool_calls=self.num_tool_calls,
            num_tool_errors=self.num_tool_errors,
            num_tool_timeouts=self.num_tool_timeouts,
        )

    def set_state(self, state: Any) -> None:
        """Become the episode of this state, which is a `state_type`. Raises SnapshotError where it cannot be."""
        self.num_tool_calls = state.num_tool_calls
        self.num_tool_errors = state.num_tool_errors
        self.num_tool_timeouts = state.num_tool_timeouts

    async def snapshot(self) -> bytes:
        """See Episode."""
        if self.final_text is not None:
            raise SnapshotError("the episode is over")
        return pack(self.task, self.state())

    def restored(self, snapshot: bytes) -> Self:
        """Itself, which is fresh, with the state in these bytes. Raises SnapshotError."""
        self.set_state(unpack(self.task, snapshot, self.state_type))
        return self
