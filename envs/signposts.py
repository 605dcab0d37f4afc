"""Signposts: follow some of them from town to town and say where you are. No tools: what helps is thinking.

Each town's signpost names one other town, and all of them together make one round trip. A policy that writes the steps
down looks up one signpost after the other; one that must answer at once has to follow them all in its head.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence

from envs.interface import Action, Environment, Episode, Message, ReferencePolicy, Reward, Split, Task
from envs.tools import ToolEpisode, ToolSet

TOWNS = (
    *("Oslo", "Lima", "Rome", "Bonn", "Cairo", "Paris", "Delhi", "Tokyo", "Berlin", "Madrid", "Vienna", "Athens"),
    *("Boston", "Dallas", "Geneva", "Seoul", "Milan", "York", "Kiev", "Lyon"),
)
ANSWER = re.compile(r"You are in ([A-Z][a-z]+)\.")
NO_TOOLS = ToolSet()


class SignpostsEpisode(ToolEpisode):
    """One walk. closing: the tag that ends thinking, where whoever acts leaves its thinking in its answer."""

    def __init__(self, task: Task, closing: str) -> None:
        super().__init__(task, NO_TOOLS)
        self._closing = closing

    async def grade(self) -> Reward:
        """1 where the final answer is `You are in TOWN.` with the right town, else 0."""
        match = ANSWER.fullmatch((self.final_text or "").rpartition(self._closing)[2].strip())
        correct = float(match is not None and match[1] == self.task.secret["route"][-1])
        return Reward(correct, {"correct": correct})


class SignpostsReference(ReferencePolicy):
    """Writes every step down between the tags, then answers."""

    def __init__(self, route: Sequence[str], tags: tuple[str, str]) -> None:
        self._route = route
        self._tags = tags

    def act(self, messages: Sequence[Message]) -> Action:
        """The only turn."""
        steps = ", ".join(f"{here} to {there}" for here, there in zip(self._route, self._route[1:], strict=False))
        opening, closing = self._tags
        return Action(f"{opening}{steps}{closing}\n\nYou are in {self._route[-1]}.")


class SignpostsEnvironment(Environment):
    """Walks over a round trip of towns.

    towns: how many there are. steps: fewest and most signposts to follow; a task's kind is their number. tags: what the
    reference writes its steps between, `thinking.tags` of the run. Raises ValueError.
    """

    name = "signposts"
    snapshots = True
    tools = NO_TOOLS.tools

    def __init__(
        self, towns: int = 7, steps: tuple[int, int] = (2, 5), tags: tuple[str, str] = ("<think>", "</think>")
    ) -> None:
        low, high = steps
        if not 3 <= towns <= len(TOWNS) or not 1 <= low <= high < towns:
            raise ValueError(
                f"towns is {towns} and steps {list(steps)}; there are 3 to {len(TOWNS)} towns, and 1 or more steps, "
                "fewer than towns"
            )
        self._towns = towns
        self._steps = range(low, high + 1)
        self._tags = (tags[0], tags[1])

    def task(self, split: Split, index: int) -> Task:
        """The walk of this split and index: numbers of steps take turns. Raises ValueError for what does not exist."""
        if split not in ("train", "heldout") or index < 0:
            raise ValueError(f"signposts has the splits train and heldout from index 0, not {split!r} {index}")
        steps = self._steps[index % len(self._steps)]
        rng = random.Random(f"signposts {split} {index}")
        trip = rng.sample(TOWNS, self._towns)
        while _split(trip) != split:
            trip = rng.sample(TOWNS, self._towns)
        signs = list(zip(trip, [*trip[1:], trip[0]], strict=True))
        rng.shuffle(signs)
        listed = ", ".join(f"{here} to {there}" for here, there in signs)
        question = f"Signposts: {listed}. You start in {trip[0]} and follow {steps} of them. Where are you?"
        route = tuple(trip[: steps + 1])
        return Task(self.name, split, index, f"{steps} steps", (Message("user", question),), {"route": route})

    def episode(self, task: Task) -> SignpostsEpisode:
        """A fresh attempt."""
        return SignpostsEpisode(task, self._tags[1])

    async def restore(self, task: Task, snapshot: bytes) -> Episode:
        """See Environment."""
        return self.episode(task).restored(snapshot)

    def reference(self, task: Task) -> ReferencePolicy:
        """Solves the task by thinking."""
        return SignpostsReference(task.secret["route"], self._tags)


def _split(trip: Sequence[str]) -> Split:
    """The split that a round trip belongs to, wherever one starts, so that no walk is in two."""
    first = trip.index(min(trip))
    whole = ",".join([*trip[first:], *trip[:first]])
    return "train" if hashlib.blake2b(whole.encode(), digest_size=1).digest()[0] % 2 else "heldout"
