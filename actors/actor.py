"""run_actor(): THE loop. Tickets in, trajectories out, as many episodes at once as keep the engine's batch full.

    lease -> wait for the ticket's policy version -> run the episode -> send; again

Each episode is a task, which asks for its ticket when there is room for it, so the credit that the broker sees follows
the window (window.py). An actor holds nothing that anyone would miss: what it cannot finish it gives back. Owns the
order of start, drain and end; never decides what an episode's outcome is (rollout.py) nor when weights change
(weights.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any, TypeVar

from actors import metrics
from actors.ends import Sender, Tickets
from actors.engine import Engine, EngineDeadError
from actors.gateway.server import Gateway
from actors.handover import EpisodeInterruptedError, HandoverError, is_stale
from actors.precedence import Precedence
from actors.renderer import Renderer
from actors.rollout import NO_BUDGETS, InfraFailureError, run_episode
from actors.weights import WeightAdopter
from actors.window import Window
from broker.client import ReleaseReason
from broker.process.settings import ActorSection
from broker.process.thinking_settings import ThinkingSection
from broker.protocol.codec import segment_bytes
from broker.protocol.errors import ProtocolError
from broker.protocol.partials import Partial
from broker.protocol.trajectory import Mode, Ticket, Trajectory
from envs.interface import Environment
from envs.timeouts import num_abandoned
from envs.tools import ToolRunner

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 0.2
HEALTH_POLL_S = 1.0
HAND_OVER_S = 3.0  # of a drain, its end: what is still unfinished is handed over
END_LIMIT_S = 5.0  # after a drain, for what was cut short: episodes close, leases are given back
LOOK_S = 0.5  # between two looks at the engine's load
INCREASE = 0.125  # of the engine's batch, in episodes, from one look to the next


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
        thinking: ThinkingSection = NO_BUDGETS,
        gateway: Gateway | None = None,
        max_staleness: int | None = None,
    ) -> None:
        """max_staleness: versions that the oldest token of an episode may be older than the one that is served, for it
        to be gone on with; None for any number."""
        self._actor_id = actor_id
        self._max_staleness = max_staleness
        self._gateway = gateway
        self._tickets = tickets
        self._sender = sender
        self._engine = engine
        self._weights = weights
        self._renderer = renderer
        self._environments = environments
        metrics.expect(environments)
        self._settings = settings
        self._thinking = thinking
        first, step = settings.max_num_seqs, max(1, round(settings.max_num_seqs * INCREASE))
        self._window = Window(settings.min_episodes, settings.max_episodes, first, step, settings.max_queue)
        self._precedence = Precedence()
        self._num_sampling = 0  # running episodes that the policy samples
        self._draining = self._ended = False
        self._slots: set[asyncio.Task[None]] = set()  # one for each ticket that is held or asked for
        self._waiting: set[asyncio.Task[Any] | None] = set()  # slots that a drain may interrupt without losing work

    async def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, then drain. Raises what else ended it: EngineDeadError, ProtocolError."""
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._interrupt: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        services = [self._spawn(each) for each in (self._weights.run(), self._watch_engine(), self._follow_load())]
        stopping = self._spawn(_wait(stop))
        self._fill()
        try:
            ended: set[asyncio.Future[None]] = {stopping, self._failed, *services}
            done, _ = await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
            if stopping in done:
                await self._drain()
        finally:
            self._ended = True
            tasks = {stopping, *self._slots, *services}
            for task in tasks:
                task.cancel()
            _, late = await asyncio.wait(tasks, timeout=END_LIMIT_S)
            if late:
                # Their leases are given back with the connection.
                logger.error("tasks that do not end are left behind number=%d", len(late))
        ended = {self._failed, *(tasks - late)}
        for each in ended:
            if each.done() and not each.cancelled() and (error := each.exception()) is not None:
                raise error

    def _fill(self) -> None:
        """As many slots as the window allows. One that is beyond it is not interrupted: it is not replaced."""
        while not self._draining and not self._ended and len(self._slots) < self._window.size:
            slot = self._spawn(self._work())
            self._slots.add(slot)
            slot.add_done_callback(self._emptied)

    def _emptied(self, slot: asyncio.Task[None]) -> None:
        self._slots.discard(slot)
        if slot.cancelled():
            return
        error = slot.exception()
        if error is None:
            self._fill()
        elif not self._failed.done():
            self._failed.set_exception(error)

    async def _work(self) -> None:
        """THE loop's body: one ticket, from its lease to its end."""
        with self._interruptible():
            ticket = await self._tickets.lease()
        begun = self._tickets.take_partial(ticket.ticket_id)
        try:
            if ticket.mode is not Mode.REFERENCE:
                with self._interruptible():
                    await self._weights.at_least(ticket.min_version)
            with self._counted(ticket):
                trajectory = await self._while_wanted(ticket, begun)
        except EpisodeInterruptedError as interrupted:
            await self._hand_over(ticket, interrupted.partial)
        except HandoverError as error:
            metrics.handovers.labels("failed").inc()
            await self._give_back(ticket, "drain", str(error))
        except InfraFailureError as error:
            metrics.infra_failures.labels(ticket.task.env, error.cause).inc()
            await self._give_back(ticket, "infra_failure", str(error))
        except EngineDeadError as error:
            metrics.infra_failures.labels(ticket.task.env, "engine").inc()
            await self._give_back(ticket, "infra_failure", f"engine: {error}")
            raise
        except asyncio.CancelledError:
            await self._give_back(ticket, "drain" if self._draining else "infra_failure", "the actor stopped")
            raise
        except Exception as error:
            # A fault of our own in one episode is no reason to lose the others.
            logger.exception("episode failed ticket=%s", ticket.ticket_id)
            metrics.infra_failures.labels(ticket.task.env, "actor").inc()
            await self._give_back(ticket, "infra_failure", f"{type(error).__name__}: {error}")
        else:
            if trajectory is not None:
                await self._send(trajectory)

    async def _while_wanted(self, ticket: Ticket, begun: Partial | None) -> Trajectory | None:
        """The ticket's episode; None where the broker withdrew the ticket, which stops the episode."""
        episode = self._spawn(self._episode(ticket, begun))
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

    async def _episode(self, ticket: Ticket, begun: Partial | None) -> Trajectory:
        environment = self._environments.get(ticket.task.env)
        if environment is None:
            known = ", ".join(self._environments)
            raise InfraFailureError(
                f"environment {ticket.task.env!r} is not in this actor's settings, which have {known}"
            )
        if begun is not None and is_stale(begun, self._engine.policy_version, self._max_staleness):
            metrics.handovers.labels("stale").inc()
            begun = None
        place = self._precedence.of(ticket, self._engine, begun is not None)
        with metrics.running_episodes.track_inprogress(), place as engine:
            trajectory = await run_episode(
                ticket,
                environment,
                engine,
                self._renderer,
                actor_id=self._actor_id,
                max_model_len=self._settings.max_model_len,
                turn_timeout_s=self._settings.turn_timeout_s,
                thinking=self._thinking,
                gateway=self._gateway,
                begun=begun,
                interrupt=self._interrupt,
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

    async def _hand_over(self, ticket: Ticket, partial: Partial) -> None:
        try:
            status = await self._tickets.hand_over(ticket.ticket_id, partial)
        except asyncio.CancelledError:
            await self._give_back(ticket, "drain", "the actor stopped")
            raise
        except ProtocolError as error:
            if error.fatal:
                raise
            # This one partial is at fault, not the channel.
            metrics.handovers.labels("failed").inc()
            await self._give_back(ticket, "drain", f"its partial was refused: {error}")
            return
        logger.info("handed over ticket=%s status=%s tokens=%d", ticket.ticket_id, status, partial.num_sampled)
        metrics.handovers.labels("handed_over" if status == "kept" else status).inc()
        if status == "kept":
            metrics.handover_bytes.inc(len(partial.snapshot) + sum(map(segment_bytes, partial.segments)))
            metrics.handover_tokens.inc(partial.num_sampled)

    async def _give_back(self, ticket: Ticket, reason: ReleaseReason, error: str) -> None:
        metrics.releases.labels(reason).inc()
        logger.warning("ticket given back ticket=%s reason=%s error=%s", ticket.ticket_id, reason, error)
        await self._tickets.release(ticket.ticket_id, reason, error)

    async def _drain(self) -> None:
        """Lease no more; give back what has not begun; finish what has, for at most `drain_s`, and at the end of that
        hand over what is unfinished."""
        self._draining = True
        for slot in self._waiting & self._slots:
            assert slot is not None
            slot.cancel()
        unfinished = set(self._slots)
        drain_s = self._settings.drain_s
        last_s = min(HAND_OVER_S, drain_s / 2) if self._settings.handover else 0.0
        if unfinished:
            _, unfinished = await asyncio.wait(unfinished, timeout=drain_s - last_s)
        if unfinished and last_s:
            self._interrupt.set_result(None)
            _, unfinished = await asyncio.wait(unfinished, timeout=last_s)
        logger.info("drained unfinished=%d", len(unfinished))

    async def _follow_load(self) -> None:
        """Let the window follow the engine."""
        while True:
            metrics.admitted_episodes.set(self._window.size)
            due = time.monotonic() + LOOK_S
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            metrics.loop_lag_seconds.set(now - due)
            metrics.abandoned_tools.set(num_abandoned() + ToolRunner.current().num_late_threads)
            self._window.observe(self._engine.load(), self._num_sampling, now)
            self._fill()

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

    @contextlib.contextmanager
    def _counted(self, ticket: Ticket) -> Iterator[None]:
        sampled = ticket.mode is not Mode.REFERENCE
        self._num_sampling += sampled
        try:
            yield
        finally:
            self._num_sampling -= sampled

    @staticmethod
    def _spawn(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        return asyncio.create_task(work)


async def _wait(stop: threading.Event) -> None:
    while not stop.is_set():  # noqa: ASYNC110  a signal handler sets it, which must not touch the event loop
        await asyncio.sleep(POLL_S)
