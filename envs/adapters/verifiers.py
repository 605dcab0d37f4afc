"""Environments of the `verifiers` library: their rollouts ask the policy through the gateway, as any program does.

They run in a process of their own, by a Python that has the library and the environment, each episode and its scoring
in a fork. What the library asks is rendered and recorded token by token; its own rubrics give the reward. Knows no
particular environment. Versions of the library before its 1.0 interface (`run_rollout`, 0.1.9 to 0.1.14).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from envs.adapters.process import ForeignProcess
from envs.interface import (
    Endpoint,
    Environment,
    EnvironmentFailureError,
    ErgonEnvError,
    Message,
    ReferencePolicy,
    Reward,
    SelfDrivenEpisode,
    Split,
    Task,
    Tool,
)


class RolloutEpisode(SelfDrivenEpisode):
    """One rollout of the library's."""

    def __init__(self, task: Task, process: ForeignProcess) -> None:
        self._task = task
        self._process = process
        self._answer: dict[str, Any] | None = None

    async def run(self, endpoint: Endpoint) -> None:
        """Let the library roll out. Raises TimeoutError, EnvironmentFailureError, SandboxError."""
        sizes = await self._process.start()
        session = await self._process.session()
        try:
            request = {
                **_row(sizes, self._task.split, self._task.index),
                "url": endpoint.url,
                "key": endpoint.key,
                "model": endpoint.model,
            }
            self._answer = await session.ask(request, timeout_s=max(0.0, endpoint.deadline - time.monotonic()))
        finally:
            await session.close()
        if "error" in self._answer:
            raise EnvironmentFailureError(f"the rollout failed: {self._answer['error']}")

    async def grade(self) -> Reward:
        """What the environment's rubrics gave, and its metrics; 0 where the rollout was cut short.

        Raises EnvironmentFailureError for a reward that is no number.
        """
        if self._answer is None:
            return Reward(0.0, {"unfinished": 1.0})
        metrics = {name: float(value) for name, value in self._answer.get("metrics", {}).items() if _is_number(value)}
        reward = self._answer.get("reward")
        if not _is_number(reward):
            raise EnvironmentFailureError(f"the environment gave the reward {reward!r}, which is no number")
        assert isinstance(reward, int | float)
        return Reward(float(reward), metrics)

    async def close(self) -> None:
        """Nothing is left running."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _row(sizes: Mapping[str, Any], split: Split, index: int) -> dict[str, Any]:
    """Which row of which of its data sets. One without a data set for evaluation lends every second row to it.

    Raises EnvironmentFailureError where there are too few rows.
    """
    train, heldout = int(sizes["train"]), int(sizes["heldout"])
    if train and heldout:
        return {"split": split, "row": index % int(sizes[split])}
    only, size = ("train", train) if train else ("heldout", heldout)
    if size < 2:
        raise EnvironmentFailureError(f"the environment has {size} tasks, which are too few for two splits")
    first = split == "heldout"
    return {"split": only, "row": 2 * (index % ((size + 1 - first) // 2)) + first}


class VerifiersEnvironment(Environment):
    """An environment of the `verifiers` library.

    id: the name of an installed environment, or `module:Class`. options: what it is made with. python: the interpreter
    that has them. timeout_s: for what is no rollout. Raises EnvironmentOptionsError and ValueError.
    """

    name = "verifiers"
    self_driven = True

    def __init__(
        self,
        id: str,  # noqa: A002  the library's own word
        options: Mapping[str, Any] | None = None,
        python: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self._id = id
        made = {"id": id, "options": dict(options or {})}
        self._process = ForeignProcess(python, "rollouts", "verifiers", made, timeout_s)

    @property
    def tools(self) -> Sequence[Tool]:
        """None: the library brings its own."""
        return ()

    def task(self, split: Split, index: int) -> Task:
        """The row of this split and index; they begin again after the last. Raises ValueError."""
        if split not in ("train", "heldout") or index < 0:
            raise ValueError(f"{self._id} has the splits train and heldout from index 0, not {split!r} {index}")
        return Task(self.name, split, index, self._id, (Message("user", f"{self._id}, {split} {index}"),))

    def episode(self, task: Task) -> RolloutEpisode:
        """A fresh rollout."""
        return RolloutEpisode(task, self._process)

    def reference(self, task: Task) -> ReferencePolicy:
        """There is none. Raises ErgonEnvError."""
        raise ErgonEnvError(f"{self._id} has no reference policy: environments of verifiers bring none")

    async def prepare(self) -> None:
        """Start the process. Raises EnvironmentOptionsError where the environment cannot be loaded."""
        await self._process.start()

    async def close(self) -> None:
        """End the process."""
        await self._process.close()
