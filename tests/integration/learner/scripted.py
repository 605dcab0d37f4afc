"""An actor whose episodes are a function of the ticket's id (without the run's name), in strictly the order of the ids.

So two runs see the same trajectories in the same order, however often their learners are killed.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

from broker.client import ActorClient
from broker.protocol.trajectory import Mode, Outcome, Segment, Ticket, Trajectory, TrajectoryHead, VersionRun

PROMPT = [5, 6, 7, 8]
NUM_LEASES = 64


def number_of(name: str) -> int:
    """The same number for a ticket or group of every run, whatever the run is called."""
    return zlib.crc32(name.partition("/")[2].encode())


def episode(ticket: Ticket) -> Trajectory:
    """The episode of a ticket: a few tokens, and a reward that differs within most groups."""
    rng = np.random.default_rng(number_of(ticket.ticket_id))
    group_is_flat = number_of(ticket.group_id) % 4 == 0
    tokens = rng.integers(40, 80, int(rng.integers(2, 9)))
    mask_T = np.asarray([False] * len(PROMPT) + [True] * len(tokens))
    logprobs_T = np.where(mask_T, rng.uniform(-6.5, -5.5, mask_T.size), 0.0).astype(np.float32)
    newest = 1 << 20  # newer than any learner: it counts as fresh, whatever was current when the ticket was issued
    segment = Segment(
        np.asarray([*PROMPT, *tokens], dtype=np.int32),
        mask_T,
        logprobs_T,
        (VersionRun(ticket.min_version.lineage, newest, len(tokens)),),
    )
    reward = 0.0 if group_is_flat and ticket.mode is Mode.TRAIN else float(rng.integers(0, 2))
    head = TrajectoryHead(
        ticket=ticket,
        outcome=Outcome.COMPLETED,
        reward=reward,
        num_turns=1,
        actor_id="actor-0",
        finished_at=time.time(),
    )
    return Trajectory(head, (segment,))


class OrderedActor:
    """Holds leases until it is their ticket's turn."""

    def __init__(self, client: ActorClient, group_size: int) -> None:
        self._client = client
        self._group_size = group_size
        self._waiting: dict[tuple[int, int], Ticket] = {}
        self._next = (0, 0)
        self._changed = asyncio.Condition()

    async def lease(self) -> None:
        """Take tickets: one worker of many."""
        while True:
            ticket = await self._client.lease()
            if ticket.mode is not Mode.TRAIN:
                await self._client.send(episode(ticket))
                continue
            group, member = (int(part) for part in ticket.ticket_id.split("/")[-2:])
            async with self._changed:
                self._waiting[group, member] = ticket
                self._changed.notify_all()
                await self._changed.wait_for(lambda key=(group, member): key not in self._waiting)

    async def hand_in(self) -> None:
        """Send the next one, one at a time."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._next in self._waiting)
                ticket = self._waiting[self._next]
            await self._client.send(episode(ticket))
            async with self._changed:
                del self._waiting[self._next]
                group, member = self._next
                self._next = (group, member + 1) if member + 1 < self._group_size else (group + 1, 0)
                self._changed.notify_all()


@asynccontextmanager
async def ordered_actor(endpoint: str, run_id: str, group_size: int) -> AsyncIterator[None]:
    """The actor at work."""
    client = ActorClient(endpoint, run_id, "actor-0")
    await client.connect()
    actor = OrderedActor(client, group_size)
    tasks = [asyncio.create_task(actor.lease()) for _ in range(NUM_LEASES)]
    tasks.append(asyncio.create_task(actor.hand_in()))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()
