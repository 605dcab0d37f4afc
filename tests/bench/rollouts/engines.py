"""The engine as the benchmark uses it: turns of given lengths, and for the synchronous side, all at a time.

An untrained model does not end its turns, so their lengths are drawn, from the request's name, and the last token of
each is made the one that ends a turn. No vLLM here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from actors.engine import Engine, EngineLoad, Sample
from broker.protocol.trajectory import PolicyVersion, Sampling

TURN_TOKENS: Final = (16, 32)  # each length in between is as likely


class GivenLengths(Engine):
    """Another engine, whose turns end where they are to."""

    def __init__(self, engine: Engine, stop_token_id: int) -> None:
        self._engine, self._stop_token_id = engine, stop_token_id

    @property
    def policy_version(self) -> PolicyVersion:
        return self._engine.policy_version

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
        priority: int = 0,
    ) -> Sample:
        num_tokens = min(max_tokens, random.Random(request_id).randint(*TURN_TOKENS))
        sample = await self._engine.generate(prompt_ids, sampling, num_tokens, (), request_id, priority)
        token_ids_N = sample.token_ids_N.copy()
        token_ids_N[-1:] = self._stop_token_id
        return dataclasses.replace(sample, token_ids_N=token_ids_N, finish="stop")

    async def abort(self, request_id: str) -> None:
        await self._engine.abort(request_id)

    def check(self) -> None:
        self._engine.check()

    def load(self) -> EngineLoad:
        return self._engine.load()

    async def adopt(self, version: PolicyVersion, weights: Path, digest: str) -> float:
        return await self._engine.adopt(version, weights, digest)

    async def close(self) -> None:
        await self._engine.close()


class InRounds(GivenLengths):
    """Generates for all episodes, when all have asked, and answers none of them before it has generated for all: the
    loop of a synchronous trainer (generate all, run all tools, generate all). `on_start` is called at each start."""

    def __init__(self, engine: Engine, stop_token_id: int, num_episodes: int, on_start: Callable[[], None]) -> None:
        super().__init__(engine, stop_token_id)
        self._asked, self._answered = asyncio.Barrier(num_episodes), asyncio.Barrier(num_episodes)
        self._on_start = on_start

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
        priority: int = 0,
    ) -> Sample:
        async with self._asked as position:
            if position == 0:
                self._on_start()
        sample = await super().generate(prompt_ids, sampling, max_tokens, stop_token_ids, request_id, priority)
        async with self._answered:
            return sample
