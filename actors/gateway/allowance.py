"""How much one episode's calls may think: the ticket's thinking budget, and less where a program asks for less.

A budget of a turn is every reply's own. One of the episode is shared, so replies in parallel reserve what they may
think at most; one that would have to think less only because of what others have reserved waits until they are done.
Samples nothing and ends no thinking (actors/sampler.py does).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from actors.sampler import Account
from broker.process.thinking_settings import Budget, ThinkingSection
from broker.protocol.trajectory import Ticket

EFFORTS: Final[Mapping[str, float]] = {
    "none": 0.0,
    "minimal": 0.125,
    "low": 0.25,
    "medium": 0.5,
    "high": 1.0,
    "xhigh": 1.0,
    "max": 1.0,
}
"""Share of the ticket's budget that a reply of this effort may think at most."""


class Allowance:
    """Of one episode. account: what its replies have thought."""

    def __init__(self, ticket: Ticket, settings: ThinkingSection) -> None:
        self.account = Account()
        self._budget = ticket.thinking_budget
        self._per = settings.per
        self._limit = settings.limit(ticket.thinking_budget) if settings.per == "episode" else None
        self._max_turn_tokens = ticket.sampling.max_turn_tokens
        self._num_reserved = 0  # tokens
        self._freed = asyncio.Event()

    def cap(self, effort: str | None) -> Budget:
        """Thinking tokens that this effort leaves a reply, kept strictly; None where it takes nothing away.

        A share of the ticket's budget; where that is unlimited, of the tokens that a turn may have. One token at least,
        but for the effort `none` and a budget of 0.
        """
        share = 1.0 if effort is None else EFFORTS[effort]
        if share == 1.0:
            return None
        whole = self._max_turn_tokens if self._budget is None else self._budget
        return min(whole, max(1, int(share * whole))) if share else 0

    def told(self, effort: str | None) -> Budget:
        """The budget that the policy is told: that of the reply, which is the ticket's unless the effort takes less."""
        cap = self.cap(effort)
        return self._budget if cap is None else cap

    @asynccontextmanager
    async def reserve(self, num_replies: int, cap: Budget, room: int) -> AsyncIterator[Budget]:
        """Thinking tokens that each of so many replies, of `room` tokens at most, may have; None for any number."""
        if self._limit is None:
            yield cap
            return
        wanted = room if cap is None else min(room, cap)
        while True:
            free = max(0, self._limit - self.account.num_thinking_tokens - self._num_reserved)
            if free >= num_replies * wanted or not self._num_reserved:
                break
            await self._freed.wait()
        most = min(wanted, free // num_replies)
        self._num_reserved += num_replies * most
        try:
            yield most
        finally:
            self._num_reserved -= num_replies * most
            self._freed.set()
            self._freed = asyncio.Event()

    def spend(self, num_thinking: int, num_forced_stops: int) -> None:
        """Count a reply's thinking."""
        self.account.book(num_thinking, self._budget, self._per)
        self.account.num_forced_stops += num_forced_stops
