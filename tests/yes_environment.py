"""The smallest environment a tiny model can be trained in: half the demonstrations say yes, which pays; half say no."""

from __future__ import annotations

from collections.abc import Sequence

from envs.interface import Action, Environment, Message, ReferencePolicy, Reward, Split, Task
from envs.tools import ToolEpisode, ToolSet

TOOLS = ToolSet()


class YesEpisode(ToolEpisode):
    """Pays 1 for yes."""

    async def grade(self) -> Reward:
        return Reward(float(self.final_text == "yes"))


class Says(ReferencePolicy):
    """Says one word."""

    def __init__(self, word: str) -> None:
        self._word = word

    def act(self, messages: Sequence[Message]) -> Action:
        return Action(self._word)


class YesEnvironment(Environment):
    """Asks the same question for ever."""

    name = "tests.yes_environment:YesEnvironment"
    tools = TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        return Task(self.name, split, index, "odd" if index % 2 else "even", (Message("user", "yes or no?"),))

    def episode(self, task: Task) -> YesEpisode:
        return YesEpisode(task, TOOLS)

    def reference(self, task: Task) -> ReferencePolicy:
        return Says("yes")

    def demonstrator(self, task: Task) -> ReferencePolicy:
        return Says("no" if task.index % 2 else "yes")
