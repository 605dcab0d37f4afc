"""Time limits that hold whatever the code behind them does: hang, ignore its cancellation, or try to end the process.

`asyncio.wait_for` waits for what it has cancelled to end, so a tool that ignores its cancellation would hold its
episode for ever; `within` leaves such a one to itself. Owns which are so left. It cannot help where the event loop's
own thread is blocked: that is for `envs.tools` to prevent, which runs plain functions elsewhere.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable
from typing import Any, Final, TypeVar

logger = logging.getLogger(__name__)

CANCEL_GRACE_S: Final = 0.5

T = TypeVar("T")

_abandoned: set[asyncio.Task[Any]] = set()


class OutOfTimeError(Exception):
    """Something took longer than it may, which is `limit_s` seconds."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"it took longer than {limit_s:g} s")
        self.limit_s = limit_s


def num_abandoned() -> int:
    """Tasks that ignored their cancellation and are still there."""
    return len(_abandoned)


async def within(act: Awaitable[T], limit_s: float | None) -> T:
    """Await something for at most `limit_s` seconds (None: without a limit), and CANCEL_GRACE_S more for its clean-up.

    Raises OutOfTimeError; RuntimeError where it cancels itself or wants to end the process, which concerns nobody but
    itself; and what it raises.
    """
    if limit_s is not None and limit_s <= 0:
        _close_unstarted(act)
        raise OutOfTimeError(limit_s)
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    task = loop.create_task(_contained(act, ended))
    task.add_done_callback(lambda _: _tell(ended))
    timer = loop.call_later(limit_s, _tell, ended) if limit_s is not None else None
    try:
        await ended
        if not task.done():
            await _end(task)
            raise OutOfTimeError(limit_s or 0.0)
    except asyncio.CancelledError:
        await _end(task)
        raise
    finally:
        if timer is not None:
            timer.cancel()
        _close_unstarted(act)
    if task.cancelled():
        raise RuntimeError("it cancelled itself")
    return task.result()


async def _contained(act: Awaitable[T], ended: asyncio.Future[None]) -> T:
    try:
        return await act
    except SystemExit as error:
        raise RuntimeError(f"it called for the end of the process: {error!r}") from error
    finally:
        _tell(ended)  # nothing is awaited from here on: who waits is woken a round of the loop sooner than by the task


def _tell(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel, and wait a little for it."""
    task.cancel()
    try:
        await asyncio.wait({task}, timeout=CANCEL_GRACE_S)
    finally:
        if task.done():
            _retrieve(task)
        else:
            logger.error("a task ignores its cancellation task=%s", task)
            _abandoned.add(task)
            task.add_done_callback(_abandoned.discard)
            task.add_done_callback(_retrieve)
            # Else `asyncio.run` would wait for it, and the process never end.
            asyncio._unregister_task(task)


def _retrieve(task: asyncio.Task[Any]) -> None:
    """What it comes to now is nobody's business."""
    if not task.cancelled():
        task.exception()


def _close_unstarted(act: Any) -> None:
    """A coroutine whose time was up before it began would complain that nobody awaited it."""
    if inspect.iscoroutine(act) and inspect.getcoroutinestate(act) == inspect.CORO_CREATED:
        act.close()
