"""Reference policies written as one generator: it yields calls, is sent the observations, and returns the final text.

One call a turn. It sees what a policy sees and nothing else; whatever it keeps between turns is in its local variables.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from typing import TypeVar

from envs.interface import Action, Message, ReferencePolicy, ToolCall

T = TypeVar("T")
Script = Generator[ToolCall, str, T]


class ScriptedPolicy(ReferencePolicy):
    """A reference policy that follows `script`. One object plays one episode."""

    def __init__(self) -> None:
        self._running: Script[str] | None = None

    @abstractmethod
    def script(self, prompt: str) -> Script[str]:
        """The episode: `text = yield ToolCall(...)`, and `return` the final answer. prompt: the first messages' text."""

    def act(self, messages: Sequence[Message]) -> Action:
        """Pass the last observation on and return what the script does next."""
        try:
            if self._running is None:
                self._running = self.script("\n".join(message.content for message in messages))
                return Action("", (next(self._running),))
            return Action("", (self._running.send(messages[-1].content),))
        except StopIteration as ended:
            return Action(ended.value)
