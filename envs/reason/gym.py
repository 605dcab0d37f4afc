"""reasoning-gym's data sets as an environment: entries and scores come from another process; only sound ones get in.

Sound means: its scorer evaluates no text, and no constant answer earns more than a few points in a hundred. Full marks
are paid for a score of 1 only, never a part of them. The package is the optional extra `reasoning-gym`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

from envs.interface import Environment, Message, Reward, Split, Task, Tool
from envs.reason.answers import tagged
from envs.reason.environment import TOOLS, Answering
from envs.reason.worker import ScoringWorker
from envs.tools import ToolEpisode

# Each compares the whole answer with the expected one, and its answers are as good as never the same twice.
SOUND = (
    "arc_1d",
    "base_conversion",
    "bf",
    "caesar_cipher",
    "count_primes",
    "decimal_chain_sum",
    "leg_counting",
    "number_filtering",
    "rotate_matrix",
    "spell_backward",
    "string_manipulation",
    "word_sequence_reversal",
    "word_sorting",
)
MAX_ANSWER = 4000
SEED = 1


class GymEpisode(ToolEpisode):
    """One entry."""

    def __init__(self, task: Task, worker: ScoringWorker) -> None:
        super().__init__(task, TOOLS)
        self._worker = worker

    async def grade(self) -> Reward:
        """1 where the data set's scorer says 1, else 0. Raises EnvironmentFailureError where it cannot be started."""
        answer, secret = self._given(), self.task.secret
        if answer is None:
            return Reward(0.0, {"correct": 0.0, "parsed": 0.0})
        score = await asyncio.to_thread(self._worker.score, self.task.kind, SEED, secret["entry"], answer)
        correct = float(score == 1.0)
        return Reward(correct, {"correct": correct, "parsed": 1.0})

    def _given(self) -> str | None:
        if self.final_text is None or len(self.final_text) > MAX_ANSWER:
            return None
        if "<answer>" not in self.final_text:
            return None
        inner = tagged(self.final_text)
        if inner is not None:
            return inner.strip()
        # Answers with angle brackets of their own or of some length: what stands between the only two tags.
        if self.final_text.count("<answer>") != 1 or self.final_text.count("</answer>") != 1:
            return None
        return self.final_text.split("<answer>")[1].split("</answer>")[0].strip()


class ReasoningGymEnvironment(Environment):
    """Entries of reasoning-gym's sound data sets, which take turns.

    datasets: which of SOUND, all by default. timeout_s: seconds of one scoring. python: the interpreter that has the
    package, this one by default. Raises ValueError, and EnvironmentOptionsError for an interpreter that is none.
    """

    name = "reasoning-gym"
    max_turns = 2

    def __init__(
        self, datasets: Sequence[str] | None = None, timeout_s: float = 10.0, python: str | None = None
    ) -> None:
        wanted = SOUND if datasets is None else tuple(datasets)
        if not wanted or not set(wanted) <= set(SOUND):
            raise ValueError(
                f"datasets is {list(wanted)}; choose of {', '.join(SOUND)}: the others' scorers evaluate text, or pay "
                "for answers that are always the same"
            )
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s}; it must be greater than 0")
        self._datasets = wanted
        self._worker = ScoringWorker(timeout_s, python)

    @property
    def tools(self) -> Sequence[Tool]:
        """None."""
        return TOOLS.tools

    def task(self, split: Split, index: int) -> Task:
        """The entry of this split and index. Raises ValueError, EnvironmentOptionsError, EnvironmentFailureError."""
        if split not in ("train", "heldout") or index < 0:
            raise ValueError(f"reasoning-gym has the splits train and heldout from index 0, not {split!r} {index}")
        turn, which = divmod(index, len(self._datasets))
        dataset, number = self._datasets[which], 16 * turn
        while True:  # a block of 16 entries has one of each split, but for one in 65,536 blocks, which borrows
            question, answer = self._worker.entry(dataset, SEED, number)
            if ("train" if hashlib.blake2b(question.encode()).digest()[0] % 2 else "heldout") == split:
                break
            number += 1
        prompt = (Message("user", f"{question}\nAnswer with <answer>...</answer>"),)
        return Task(self.name, split, index, dataset, prompt, {"entry": number, "answer": answer})

    def episode(self, task: Task) -> GymEpisode:
        """A fresh attempt."""
        return GymEpisode(task, self._worker)

    def reference(self, task: Task) -> Answering:
        """Gives the right answer."""
        return Answering(f"<answer>{task.secret['answer']}</answer>")

    async def prepare(self) -> None:
        """Start the scoring process. Raises EnvironmentOptionsError without the package."""
        await asyncio.to_thread(self._worker.start)

    async def close(self) -> None:
        """Kill the scoring process."""
        await asyncio.to_thread(self._worker.close)
