"""Reference policies written as one generator: it yields turns, is sent the observations, and returns the final text.

A turn is one tool call, or a text without a call. The script sees what a policy sees and nothing else; what it keeps
between turns is in its local variables.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from typing import TypeVar

from envs.interface import Action, Message, ReferencePolicy, ToolCall

T = TypeVar("T")
Script = Generator[ToolCall | str, str, T]


class ScriptedPolicy(ReferencePolicy):
    """A reference policy that follows `script`. One object plays one episode."""

    def __init__(self) -> None:
        self._running: Script[str] | None = None

    @abstractmethod
    def script(self, prompt: str) -> Script[str]:
        """The episode: `text = yield ToolCall(...)`, and `return` the final answer. prompt: the first messages."""

    def act(self, messages: Sequence[Message]) -> Action:
        """Pass the last observation on and return what the script does next."""
        try:
            if self._running is None:
                self._running = self.script("\n".join(message.content for message in messages))
                turn = next(self._running)
            else:
                turn = self._running.send(messages[-1].content)
        except StopIteration as ended:
            return Action(ended.value)
        return Action(turn) if isinstance(turn, str) else Action("", (turn,))
