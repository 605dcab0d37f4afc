"""run_actor(): THE loop. Tickets in, trajectories out, as many episodes at once as `actor.concurrency` says.

    lease -> wait for the ticket's policy version -> run the episode -> send; again

An actor holds nothing that anyone would miss: what it cannot finish it gives back. Owns the order of start, drain and
end; never decides what an episode's outcome is (rollout.py) nor when weights change (weights.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from actors import metrics
from actors.engine import Engine, EngineDeadError
from actors.gateway.server import Gateway
from actors.renderer import Renderer
from actors.rollout import InfraFailureError, run_episode
from actors.weights import WeightAdopter
from broker.client import ReleaseReason
from broker.process.settings import ActorSection
from broker.protocol.errors import ProtocolError
from broker.protocol.trajectory import Mode, Ticket, Trajectory
from envs.interface import Environment

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 0.2
HEALTH_POLL_S = 1.0


class Tickets(Protocol):
    """broker.client's TicketSource."""

    async def lease(self) -> Ticket:
        """Wait for a ticket; its lease is renewed until it is sent or released."""
        ...

    async def withdrawn(self, ticket_id: str) -> None:
        """Wait until the result of a leased ticket is not wanted any more."""
        ...

    async def release(self, ticket_id: str, reason: ReleaseReason, error: str = "") -> None:
        """Give a lease back."""
        ...


class Sender(Protocol):
    """broker.client's TrajectorySender."""

    async def send(self, trajectory: Trajectory) -> str:
        """Hand over a trajectory; returns its status once it is durable."""
        ...


class Actor:
    """The loop of one process, with what it needs; `run` it once."""

    def __init__(
        self,
        actor_id: str,
        tickets: Tickets,
        sender: Sender,
        engine: Engine,
        weights: WeightAdopter,
        renderer: Renderer,
        environments: Mapping[str, Environment],
        settings: ActorSection,
        gateway: Gateway | None = None,
    ) -> None:
        self._actor_id = actor_id
        self._gateway = gateway
        self._tickets = tickets
        self._sender = sender
        self._engine = engine
        self._weights = weights
        self._renderer = renderer
        self._environments = environments
        self._settings = settings
        self._draining = False
        self._waiting: set[asyncio.Task[Any] | None] = set()  # workers that a drain may interrupt without losing work

    async def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, then drain. Raises what else ended it: EngineDeadError, ProtocolError."""
        services = [self._spawn(self._weights.run()), self._spawn(self._watch_engine())]
        workers = [self._spawn(self._work()) for _ in range(self._settings.concurrency)]
        stopping = self._spawn(_wait(stop))
        try:
            done, _ = await asyncio.wait({stopping, *services, *workers}, return_when=asyncio.FIRST_COMPLETED)
            if stopping in done:
                await self._drain(workers)
        finally:
            tasks = [stopping, *workers, *services]
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _work(self) -> None:
        """THE loop."""
        while not self._draining:
            with self._interruptible():
                ticket = await self._tickets.lease()
            try:
                if ticket.mode is not Mode.REFERENCE:
                    with self._interruptible():
                        await self._weights.at_least(ticket.min_version)
                trajectory = await self._while_wanted(ticket)
            except InfraFailureError as error:
                await self._give_back(ticket, "infra_failure", str(error))
            except EngineDeadError as error:
                await self._give_back(ticket, "infra_failure", f"engine: {error}")
                raise
            except asyncio.CancelledError:
                await self._give_back(ticket, "drain" if self._draining else "infra_failure", "the actor stopped")
                raise
            else:
                if trajectory is not None:
                    await self._send(trajectory)

    async def _while_wanted(self, ticket: Ticket) -> Trajectory | None:
        """The ticket's episode; None where the broker withdrew the ticket, which stops the episode."""
        episode = self._spawn(self._episode(ticket))
        withdrawn = self._spawn(self._tickets.withdrawn(ticket.ticket_id))
        try:
            await asyncio.wait({episode, withdrawn}, return_when=asyncio.FIRST_COMPLETED)
            if episode.done():
                return episode.result()
        finally:
            episode.cancel()
            withdrawn.cancel()
            await asyncio.gather(episode, withdrawn, return_exceptions=True)  # the sandbox closes before the next lease
        metrics.withdrawn_episodes.inc()
        logger.info("episode stopped ticket=%s reason=its result is not wanted any more", ticket.ticket_id)
        return None

    async def _episode(self, ticket: Ticket) -> Trajectory:
        environment = self._environments.get(ticket.task.env)
        if environment is None:
            known = ", ".join(self._environments)
            raise InfraFailureError(
                f"environment {ticket.task.env!r} is not in this actor's settings, which have {known}"
            )
        with metrics.running_episodes.track_inprogress():
            trajectory = await run_episode(
                ticket,
                environment,
                self._engine,
                self._renderer,
                actor_id=self._actor_id,
                max_model_len=self._settings.max_model_len,
                gateway=self._gateway,
            )
        metrics.observe_episode(trajectory)
        return trajectory

    async def _send(self, trajectory: Trajectory) -> None:
        try:
            status = await self._sender.send(trajectory)
        except ProtocolError as error:
            if error.fatal:
                raise
            # This one trajectory is at fault, not the channel: its lease runs out and the ticket is tried again.
            logger.error("trajectory refused ticket=%s reason=%s", trajectory.ticket.ticket_id, error)
            status = "refused"
        metrics.sends.labels(status).inc()

    async def _give_back(self, ticket: Ticket, reason: ReleaseReason, error: str) -> None:
        metrics.releases.labels(reason).inc()
        logger.warning("ticket given back ticket=%s reason=%s error=%s", ticket.ticket_id, reason, error)
        await self._tickets.release(ticket.ticket_id, reason, error)

    async def _drain(self, workers: list[asyncio.Task[None]]) -> None:
        """Lease no more; give back what has not begun; finish what has, for at most `drain_s`."""
        self._draining = True
        for worker in self._waiting & set(workers):
            assert worker is not None
            worker.cancel()
        _, unfinished = await asyncio.wait(workers, timeout=self._settings.drain_s)
        logger.info("drained unfinished=%d", len(unfinished))

    async def _watch_engine(self) -> None:
        """An engine may die while no request is in flight."""
        while True:
            self._engine.check()
            await asyncio.sleep(HEALTH_POLL_S)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        task = asyncio.current_task()
        self._waiting.add(task)
        try:
            yield
        finally:
            self._waiting.discard(task)

    @staticmethod
    def _spawn(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        return asyncio.create_task(work)


async def _wait(stop: threading.Event) -> None:
    while not stop.is_set():  # noqa: ASYNC110  a signal handler sets it, which must not touch the event loop
        await asyncio.sleep(POLL_S)
