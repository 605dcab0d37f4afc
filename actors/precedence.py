"""Who goes first in the engine's queue: episodes that have begun before fresh ones, so that groups get finished.

    evaluations, retried and continued tickets  <  groups by when their first ticket came  <  fewer turns played

An evaluation, or what is left of a group that had a failure, is waited for. Of the others the oldest group comes first,
all its tickets with it, and within it who is furthest; what is younger waits, which costs it nothing that the others
would not have waited. Nobody waits for ever: no new ticket is older. Owns the order; samples nothing itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from actors.engine import Engine, EngineLoad, Sample
from broker.protocol.trajectory import Mode, PolicyVersion, Sampling, Ticket

TURNS: Final = 1 << 10  # told apart within a group
GROUPS: Final = 1 << 50


class Precedence:
    """The groups that an actor has episodes of, by age."""

    def __init__(self) -> None:
        self._ages = itertools.count()
        self._groups: dict[str, tuple[int, int]] = {}  # of groups with episodes here: (age, number of episodes)

    @contextmanager
    def of(self, ticket: Ticket, engine: Engine, is_begun: bool = False) -> Iterator[Engine]:
        """The engine as this ticket's episode is to use it, while that runs. is_begun: by another actor."""
        age, num = self._groups.get(ticket.group_id) or (next(self._ages), 0)
        self._groups[ticket.group_id] = age, num + 1
        urgent = ticket.mode is Mode.EVAL or ticket.attempt > 0 or is_begun
        try:
            yield _Queued(engine, (age - GROUPS if urgent else age) * TURNS)
        finally:
            age, num = self._groups.pop(ticket.group_id)
            if num > 1:
                self._groups[ticket.group_id] = age, num - 1

    def __len__(self) -> int:
        """Groups with episodes here."""
        return len(self._groups)


class _Queued(Engine):
    """An engine whose requests take the place of one episode in its queue, a better one with every turn."""

    def __init__(self, engine: Engine, place: int) -> None:
        self._engine, self._place, self._turn = engine, place, 0

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
        """See Engine; `priority` comes on top of the episode's own."""
        self._turn = min(self._turn + 1, TURNS)
        priority += self._place + TURNS - self._turn
        return await self._engine.generate(prompt_ids, sampling, max_tokens, stop_token_ids, request_id, priority)

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
