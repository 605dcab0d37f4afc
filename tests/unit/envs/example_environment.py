"""A complete environment with one tool: count the letters of a word."""

from collections.abc import Sequence

from envs.interface import Action, Environment, Message, ReferencePolicy, Reward, Split, Task, ToolCall
from envs.tools import ToolEpisode, ToolSet

WORDS = {"train": ["plate", "lamp", "window"], "heldout": ["cup", "chair"]}


def count_letters(episode: ToolEpisode, word: str) -> str:
    """How many letters a word has."""
    return str(len(word))


class LettersEpisode(ToolEpisode):
    async def grade(self) -> Reward:
        return Reward(float(self.final_text == self.task.secret["answer"]))


class LettersReference(ReferencePolicy):
    def act(self, messages: Sequence[Message]) -> Action:
        if messages[-1].role == "tool":
            return Action(messages[-1].content)
        return Action("", (ToolCall("count_letters", {"word": messages[0].content.split()[-1]}),))


class LettersEnvironment(Environment):
    name = "letters"
    toolset = ToolSet(count_letters)
    tools = toolset.tools

    def task(self, split: Split, index: int) -> Task:
        word = WORDS[split][index % len(WORDS[split])]
        question = Message("user", f"How many letters are in the word {word}")
        return Task(self.name, split, index, "letters", (question,), {"answer": str(len(word))})

    def episode(self, task: Task) -> LettersEpisode:
        return LettersEpisode(task, self.toolset)

    def reference(self, task: Task) -> LettersReference:
        return LettersReference()
