"""An actor's engine that generates for all episodes at once, turn by turn, as synchronous trainers do. No torch here.

Episodes wait until every one that is not over has asked; then one call generates for all of them. So the rules of an
episode are the actor's own, whoever generates.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from actors.engine import EngineLoad, Sample
from broker.protocol.trajectory import PolicyVersion, Sampling, VersionRun

Generate = Callable[[list[list[int]]], list[list[int]]]
"""Prompts to completions, each up to its end-of-turn token (included) or the generator's own limit."""


class _Request(NamedTuple):
    prompt_ids: list[int]
    max_tokens: int
    stop_token_ids: frozenset[int]
    sample: asyncio.Future[Sample]


class LockStepEngine:
    """What a rollout asks of an `actors.engine.Engine`, without log-probs and versions, not needed on policy."""

    def __init__(self, generate: Generate, num_episodes: int) -> None:
        self._generate = generate
        self._num_live = num_episodes
        self._waiting: list[_Request] = []

    @property
    def policy_version(self) -> PolicyVersion:
        """There is one."""
        return PolicyVersion(0, 0)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
        priority: int = 0,
    ) -> Sample:
        """See Engine. Temperature and the like are the generator's."""
        future: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(list(prompt_ids), max_tokens, frozenset(stop_token_ids), future))
        self._generate_if_complete()
        return await future

    def leave(self) -> None:
        """An episode is over: nobody waits for it any more."""
        self._num_live -= 1
        self._generate_if_complete()

    async def abort(self, request_id: str) -> None:
        """Deadlines are generous; nothing is aborted."""

    def check(self) -> None:
        """Always well."""

    def load(self) -> EngineLoad:
        """Nobody asks."""
        return EngineLoad()

    async def close(self) -> None:
        """Nothing to close."""

    def _generate_if_complete(self) -> None:
        if not self._waiting or len(self._waiting) < self._num_live:
            return
        requests, self._waiting = self._waiting, []
        completions = self._generate([request.prompt_ids for request in requests])
        for request, ids in zip(requests, completions, strict=True):
            request.sample.set_result(cut(ids, request.max_tokens, request.stop_token_ids))


def cut(ids: Sequence[int], max_tokens: int, stop_token_ids: frozenset[int]) -> Sample:
    """A completion within an episode's room; it ended by itself where its last token says so."""
    kept = list(ids[:max_tokens])
    finish = "stop" if kept and kept[-1] in stop_token_ids else "length"
    runs = (VersionRun(0, 0, len(kept)),)
    return Sample(np.asarray(kept, np.int32), np.zeros(len(kept), np.float32), runs, finish)  # type: ignore[arg-type]
