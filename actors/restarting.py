"""An engine that is started again when it dies, within the process: leases and connections stay, its requests do not.

    serving -> dead -> a new engine, which must adopt a version -> serving; or given up, after `max_restarts` in a row

A request that was in the engine when it died is lost, and its ticket is tried again by the rules of every
infrastructure failure: it may be what killed it. Everything else waits, episodes whose tools run notice nothing. What
the new engine serves first is the newest version, so that nothing is sampled by the model that it was started with.
Owns the engine's lives; never fetches weights (`weights.py` does, told by `on_death`), never leases.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from actors import metrics
from actors.engine import AdoptionFailedError, Engine, EngineDeadError, EngineLoad, Sample
from broker.protocol.trajectory import PolicyVersion, Sampling

logger = logging.getLogger(__name__)

T = TypeVar("T")

BACKOFF_S = 1.0  # before the second restart in a row; doubled with each


class RequestLostError(Exception):
    """A request went down with its engine, or could not wait for the next one."""


class MortalEngine(Engine, Protocol):
    """An engine that knows whether it is dead, as `VllmEngine` does."""

    @property
    def dead(self) -> str | None:
        """Why the engine serves no more, None while it does."""
        ...

    def shutdown(self) -> None:
        """`close` for where no event loop runs. Idempotent; blocks."""
        ...


class RestartingEngine(Engine):
    """Implements Engine. `check`, which its user calls again and again, is what notices that an idle engine died."""

    def __init__(
        self,
        start: Callable[[], MortalEngine],
        max_restarts: int,
        reset_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the first one, and raises what `start` does. max_restarts: in a row, each death less than `reset_s`
        after the start before."""
        self._start, self._max_restarts, self._reset_s, self._clock = start, max_restarts, reset_s, clock
        self._engine = start()
        self._started_at = clock()
        self._num_restarts = 0  # in a row
        self._given_up: EngineDeadError | None = None
        self._alive, self._serving = asyncio.Event(), asyncio.Event()
        self._alive.set()
        self._serving.set()
        self._lost: asyncio.Future[None] | None = None  # done when the engine dies, for all its requests
        self._waiting: dict[str, asyncio.Future[None]] = {}  # requests, for an engine that serves
        self._restart: asyncio.Task[None] | None = None
        # Engines are started by one thread, which lives as long as they may.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.on_death: Callable[[], None] = lambda: None

    @property
    def policy_version(self) -> PolicyVersion:
        """See Engine."""
        return self._engine.policy_version

    @property
    def dead(self) -> str | None:
        """Why no request is served just now, None where they are."""
        return self._engine.dead or (None if self._serving.is_set() else "it has no version to serve yet")

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
        priority: int = 0,
    ) -> Sample:
        """See Engine. Raises RequestLostError where the engine died, EngineDeadError where there will be no other."""
        if not self._serving.is_set():
            await self._wait(request_id)
        engine = self._engine
        try:
            return await self._unless_lost(
                engine.generate(prompt_ids, sampling, max_tokens, stop_token_ids, request_id, priority)
            )
        except EngineDeadError as error:
            self._bury(engine)
            raise RequestLostError(f"the engine died with the request {request_id}: {error}") from error

    async def abort(self, request_id: str) -> None:
        """See Engine. One that waits for an engine has sampled nothing: it is lost."""
        waiting = self._waiting.get(request_id)
        if waiting is None:
            await self._engine.abort(request_id)
        elif not waiting.done():
            waiting.set_exception(RequestLostError(f"there was no engine for the request {request_id} in time"))

    def check(self) -> None:
        """See Engine."""
        if self._given_up is not None:
            raise self._given_up
        if self._engine.dead is not None:
            self._bury(self._engine)

    def load(self) -> EngineLoad:
        """See Engine."""
        return self._engine.load()

    async def adopt(self, version: PolicyVersion, weights: Path, digest: str) -> float:
        """See Engine. Waits for an engine that can; one that dies meanwhile is an adoption to be tried again."""
        await self._alive.wait()
        if self._given_up is not None:
            raise self._given_up
        engine = self._engine
        try:
            pause_s = await self._unless_lost(engine.adopt(version, weights, digest))
            engine.check()
        except EngineDeadError as error:
            self._bury(engine)
            raise self._given_up or AdoptionFailedError(f"the engine died: {error}") from error
        self._serve()
        return pause_s

    async def close(self) -> None:
        """See Engine."""
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.gather(self._restart, return_exceptions=True)
        self._thread.shutdown(wait=False)  # an engine that is being started ends with this process
        await self._engine.close()

    def shutdown(self) -> None:
        """`close` for where no event loop runs. Idempotent."""
        self._engine.shutdown()

    async def _unless_lost(self, act: Coroutine[Any, Any, T]) -> T:
        """Await something of the engine. Raises EngineDeadError also where a dead engine leaves it unanswered."""
        engine, lost, task = self._engine, self._loss(), asyncio.ensure_future(act)
        either: set[asyncio.Future[Any]] = {task, lost}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.add_done_callback(_forget)
                task.cancel()
        if not task.done():
            raise EngineDeadError(engine.dead or "it was replaced")
        return task.result()

    def _loss(self) -> asyncio.Future[None]:
        if self._lost is None:
            self._lost = asyncio.get_running_loop().create_future()
        return self._lost

    async def _wait(self, request_id: str) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        try:
            await future
        finally:
            del self._waiting[request_id]

    def _serve(self) -> None:
        self._serving.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_result(None)

    def _bury(self, engine: MortalEngine) -> None:
        """An engine is dead; harmless where that was known."""
        if engine is not self._engine or self._restart is not None or self._given_up is not None:
            return
        logger.error("engine lost reason=%r", engine.dead)
        self._alive.clear()
        self._serving.clear()
        self._loss().set_result(None)
        self._lost = None
        self.on_death()
        self._restart = asyncio.get_running_loop().create_task(self._begin_again(), name="engine-restart")

    async def _begin_again(self) -> None:
        """Another engine in place of the dead one, or give up. Nothing else than the end of this process cancels it."""
        died_at = self._clock()
        if died_at - self._started_at >= self._reset_s:
            self._num_restarts = 0
        reason = self._engine.dead
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._engine.shutdown)
        while self._num_restarts < self._max_restarts:
            self._num_restarts += 1
            if self._num_restarts > 1:
                await asyncio.sleep(BACKOFF_S * 2.0 ** (self._num_restarts - 2))
            try:
                self._engine = await loop.run_in_executor(self._thread, self._start)
            except Exception as error:
                reason = f"it could not be started again: {type(error).__name__}: {error}"
                logger.exception("engine not restarted number=%d", self._num_restarts)
                continue
            self._started_at = self._clock()
            metrics.engine_restarts.labels("restarted").inc()
            metrics.engine_restart_seconds.observe(self._started_at - died_at)
            logger.warning("engine restarted number=%d seconds=%.1f", self._num_restarts, self._started_at - died_at)
            self._restart = None
            self._alive.set()
            return
        metrics.engine_restarts.labels("given_up").inc()
        self._given_up = EngineDeadError(f"{reason}; it was restarted {self._num_restarts} times in a row")
        self._alive.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._given_up)


def _forget(task: asyncio.Future[Any]) -> None:
    """What comes of something that nobody waits for."""
    if not task.cancelled():
        task.exception()
