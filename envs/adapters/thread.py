"""A thread that belongs to one episode, for other people's code that may block, or that wants the same thread always.

Owns the thread; knows nothing of what runs in it. A call that hangs holds its own episode and no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class OwnThread:
    """Runs calls one after the other, from the first on until `close`. Belongs to one event loop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._num_asked, self._num_done = 0, 0  # each is counted in one thread only

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(*arguments)` there. Raises what it raises."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T] = loop.create_future()

        def call() -> None:
            try:
                settle: tuple[Callable[[Any], None], Any] = outcome.set_result, function(*arguments)
            except BaseException as error:  # noqa: BLE001  it is raised where it is awaited
                # A future takes no StopIteration.
                named = RuntimeError(f"it raised {error!r}") if isinstance(error, StopIteration) else error
                settle = outcome.set_exception, named
            self._num_done += 1
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_settled, outcome, *settle)

        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        self._num_asked += 1
        self._calls.put(call)
        return await outcome

    async def close(self, last: Callable[[], Any] | None = None) -> None:
        """Run `last`, then end the thread. Where a call hangs, that comes to pass when it ends, and is not waited for.
        Idempotent. Raises what `last` raises."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if last is not None and self._num_asked == self._num_done:
            self._thread = thread
            try:
                await self.run(last)
            finally:
                self._thread = None
        elif last is not None:
            self._calls.put(last)
        self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


def _settled(outcome: asyncio.Future[Any], settle: Callable[[Any], None], value: Any) -> None:
    if not outcome.done():  # nobody waits any more where it was cancelled
        settle(value)
