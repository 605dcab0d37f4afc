"""Reasoning as an environment: one question, one turn, no tools; a typed answer checked by its family's verifier."""

from __future__ import annotations

from collections.abc import Sequence

from envs.interface import Action, Environment, Episode, Message, ReferencePolicy, Reward, Split, Task, Tool
from envs.reason.answers import parse
from envs.reason.families import FAMILIES, Family, question
from envs.tools import ToolEpisode, ToolSet

TOOLS = ToolSet()
FORMATS = {
    "integer": "<answer>INTEGER</answer>",
    "integers": "<answer>INTEGER, INTEGER, ...</answer>",
    "word": "<answer>word</answer>",
    "words": "<answer>Word, Word, ...</answer>",
}


class Answering(ReferencePolicy):
    """Gives one answer, at once."""

    def __init__(self, text: str) -> None:
        self._text = text

    def act(self, messages: Sequence[Message]) -> Action:
        """The answer."""
        return Action(self._text)


class ReasonEpisode(ToolEpisode):
    """One question."""

    def __init__(self, task: Task, family: Family) -> None:
        super().__init__(task, TOOLS)
        self._family = family

    async def grade(self) -> Reward:
        """1 for a right answer, else 0. parsed: whether there was an answer of the right type."""
        secret = self.task.secret
        given = parse(secret["answer_type"], self.final_text)
        correct = float(given is not None and self._family.verify(given, secret["answer"], secret["facts"]))
        return Reward(correct, {"correct": correct, "parsed": float(given is not None)})


class ReasonEnvironment(Environment):
    """Procedural questions: arithmetic, sorting, logic, graph and string, which take turns.

    families: which of them, all by default. levels: which of the levels 1 (easy) to 3. Raises ValueError.
    """

    name = "reason"
    max_turns = 2
    snapshots = True

    def __init__(self, families: Sequence[str] | None = None, levels: Sequence[int] = (1, 2, 3)) -> None:
        known = {family.name: family for family in FAMILIES}
        wanted = tuple(known) if families is None else tuple(families)
        if not wanted or not set(wanted) <= set(known):
            raise ValueError(f"families is {list(wanted)}; choose one or more of {', '.join(known)}")
        if not levels or not set(levels) <= {1, 2, 3}:
            raise ValueError(f"levels is {list(levels)}; choose one or more of 1, 2, 3")
        self._families = {each: known[each] for each in wanted}
        self._levels = tuple(levels)

    @property
    def tools(self) -> Sequence[Tool]:
        """None."""
        return TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        """The question of this split and index. Raises ValueError for a split or index that does not exist."""
        if split not in ("train", "heldout") or index < 0:
            raise ValueError(f"reason has the splits train and heldout from index 0, not {split!r} {index}")
        turn, which = divmod(index, len(self._families))
        family = tuple(self._families.values())[which]
        found = question(family, self._levels, split, turn)
        prompt = (Message("user", f"{found.text}\nAnswer with {FORMATS[found.answer_type]}"),)
        secret = {"answer_type": found.answer_type, "answer": found.answer, "facts": found.facts}
        return Task(self.name, split, index, family.name, prompt, secret)

    def episode(self, task: Task) -> ReasonEpisode:
        """A fresh attempt."""
        return ReasonEpisode(task, self._families[task.kind])

    async def restore(self, task: Task, snapshot: bytes) -> Episode:
        """See Environment."""
        return self.episode(task).restored(snapshot)

    def reference(self, task: Task) -> Answering:
        """Gives the right answer."""
        answer = task.secret["answer"]
        shown = ", ".join(map(str, answer)) if isinstance(answer, tuple) else str(answer)
        return Answering(f"<answer>{shown}</answer>")
