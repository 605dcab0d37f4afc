"""Honest peers at work while the others attack: a learner, actors, and a receiver of weights. Counts what arrives."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from pathlib import Path

from broker.client import ActorClient, LearnerClient
from broker.protocol.trajectory import Trajectory
from broker.weights.basefile import BaseFile
from broker.weights.subscriber import WeightSubscriber
from tests.unit.broker.samples import make_ticket, make_trajectory

BATCH = 50
TOGETHER = 3  # episodes that an honest worker finishes at once
TOGETHER_S = 0.02  # how long it waits for so many


class Learner(threading.Thread):
    """Issues tickets in small batches and takes and acks what comes back, until told to finish; then waits for all."""

    def __init__(self, client: LearnerClient, prefix: str = "honest", most: int = 1 << 60) -> None:
        super().__init__(daemon=True, name="honest-learner")
        self._client, self._prefix, self._most = client, prefix, most
        self._finish = threading.Event()
        self.issued = 0
        self.arrived: Counter[str] = Counter()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._client.resume([])
            while not self._finish.is_set() and self.issued < self._most:
                self._issue()
                self._take(self.issued - BATCH)
            self._take(self.issued)
        except BaseException as error:
            self.error = error
            raise

    def _issue(self) -> None:
        ids = [f"{self._prefix}-{self.issued + n:07d}" for n in range(BATCH)]
        if (num := self._client.issue([make_ticket(ticket_id) for ticket_id in ids])) != BATCH:
            raise AssertionError(f"{num} of {BATCH} new tickets were accepted")
        self.issued += BATCH

    def _take(self, upto: int) -> None:
        """Until so many have arrived. One that never comes ends this after a minute."""
        while self.arrived.total() < upto:
            item = self._client.receive(60.0)
            if item is None:
                raise AssertionError(f"{self.arrived.total()} of {self.issued} trajectories arrived, then none")
            ticket_id = item.ticket.ticket_id if isinstance(item, Trajectory) else item.ticket_id
            if ticket_id.startswith(self._prefix):
                if not isinstance(item, Trajectory):
                    raise AssertionError(f"an honest ticket has died: {item}")
                self.arrived[ticket_id] += 1
            self._client.ack([ticket_id])  # also what is left of the attackers' tickets

    def finish(self, timeout_s: float) -> None:
        """Issue no more; wait for the rest."""
        self._finish.set()
        self.join(timeout_s)
        if self.is_alive() or self.error is not None:
            raise AssertionError(f"the honest learner got {self.arrived.total()} of {self.issued}: {self.error}")


class Actors(threading.Thread):
    """Two actors with a few episodes each, until told to stop."""

    def __init__(self, endpoint: str, run_id: str, heartbeat_s: float, liveness: int) -> None:
        super().__init__(daemon=True, name="honest-actors")
        self._endpoint, self._run_id, self._timers = endpoint, run_id, (heartbeat_s, liveness)
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self.statuses: Counter[str] = Counter()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except BaseException as error:
            self.error = error
            raise

    async def _main(self) -> None:
        heartbeat_s, liveness = self._timers
        clients = [
            ActorClient(self._endpoint, self._run_id, f"honest-{n}", heartbeat_s=heartbeat_s, liveness=liveness)
            for n in range(2)
        ]
        await asyncio.gather(*(client.connect(30) for client in clients))
        workers = [asyncio.create_task(self._work(client)) for client in clients for _ in range(4)]
        stopped = asyncio.create_task(self._ended.wait())
        await asyncio.wait([stopped, *workers], return_when=asyncio.FIRST_COMPLETED)
        failed = [worker.exception() for worker in workers if worker.done()]
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in clients))
        if failed and failed[0] is not None:
            raise failed[0]

    async def _work(self, client: ActorClient) -> None:
        """Episodes that end together, so that their trajectories may travel together."""
        while True:
            tickets = [await client.tickets.lease()]
            with contextlib.suppress(TimeoutError):  # the last tickets come singly
                async with asyncio.timeout(TOGETHER_S):
                    while len(tickets) < TOGETHER:
                        tickets.append(await client.tickets.lease())
            trajectories = [make_trajectory(ticket, client.actor_id) for ticket in tickets]
            self.statuses.update(await asyncio.gather(*map(client.sender.send, trajectories)))

    def finish(self) -> None:
        """Stop, give the leases back."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self.join(60)
        if self.is_alive() or self.error is not None:
            raise AssertionError(f"the honest actors failed: {self.error}")
        self._loop.close()


class Receiver(threading.Thread):
    """Pulls the newest weights again and again; the client verifies every hash."""

    def __init__(self, subscriber: WeightSubscriber, directory: Path) -> None:
        super().__init__(daemon=True, name="honest-receiver")
        self._subscriber, self._directory = subscriber, directory
        self._finish = threading.Event()
        self.num_fetched = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._finish.is_set():
                version = self._subscriber.wait_newer(None, 30.0)
                if version is None:
                    raise AssertionError("no version was announced within 30 s")
                base = BaseFile(self._directory / "honest.safetensors")
                self._subscriber.fetch_base(version, base, 60.0)
                base.close()
                self.num_fetched += 1
                self._finish.wait(0.05)
        except BaseException as error:
            self.error = error
            raise

    def finish(self) -> None:
        """Stop after the present fetch."""
        self._finish.set()
        self.join(90)
        if self.is_alive() or self.error is not None:
            raise AssertionError(f"the honest receiver failed after {self.num_fetched} fetches: {self.error}")
