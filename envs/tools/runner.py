"""Where a tool runs, and for how long: nothing that a tool does holds the event loop or outlives its time limit.

- `async def` tools run on the event loop, where they may only wait. What ignores its cancellation is left to itself.
- Plain functions run in a thread of their own, with the live episode as their first argument. A thread cannot be ended:
  one that runs past its time is not waited for, and keeps its slot until it ends; when all slots are so lost, tools
  fail as infrastructure does.
- Plain functions that are declared `where="process"` run in one of a few worker processes, which is killed when time is
  up. What is heavy, or may hang, or holds Python's lock for long (regular expressions, big numbers, C code), belongs
  there. They get what `ToolEpisode.process_state` returns, pickled, in place of the episode.

Owns threads and processes of one event loop; knows neither schemas nor texts.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from envs.interface import SandboxError
from envs.timeouts import OutOfTimeError, within
from envs.tools.processes import ToolProcesses

Where = Literal["loop", "thread", "process"]

TIMEOUT_S: Final = 60.0
NUM_PROCESSES: Final = 2
NUM_THREADS: Final = 256

_runners: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, ToolRunner] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tool runs, and its own limit in seconds, where it has one."""

    where: Where
    timeout_s: float | None = None


class ToolRunner:
    """Runs tools. Process-wide settings of one event loop; without one, there is a default one for each loop."""

    def __init__(
        self, timeout_s: float = TIMEOUT_S, num_processes: int = NUM_PROCESSES, num_threads: int = NUM_THREADS
    ) -> None:
        """timeout_s: of a call of a tool that has no limit of its own. num_threads: plain tools at once."""
        self._timeout_s = timeout_s
        self._num_threads = num_threads
        self._num_late = 0
        self._threads = asyncio.Semaphore(num_threads)
        self._processes = ToolProcesses(num_processes)

    @staticmethod
    def current() -> ToolRunner:
        """The one of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in _runners:
            _runners[loop] = ToolRunner()
        return _runners[loop]

    async def __aenter__(self) -> ToolRunner:
        _runners[asyncio.get_running_loop()] = self
        return self

    async def __aexit__(self, *_: object) -> None:
        _runners.pop(asyncio.get_running_loop(), None)
        await self._processes.close()

    @property
    def num_late_threads(self) -> int:
        """Threads of tools whose time is up and that have not ended."""
        return self._num_late

    async def run(self, place: Place, function: Callable[..., Any], first: Any, arguments: Mapping[str, Any]) -> Any:
        """`function(first, **arguments)`, awaited where it returns something to await.

        Raises OutOfTimeError, what the function raises, and SandboxError where there is no thread or process for it.
        """
        limit_s = place.timeout_s or self._timeout_s
        if place.where == "process":
            return await self._processes.call(function, first, arguments, limit_s)
        if place.where == "thread":
            result = await self._in_thread(function, first, arguments, limit_s)
            return await within(result, limit_s) if inspect.isawaitable(result) else result
        return await within(function(first, **arguments), limit_s)

    async def _in_thread(
        self, function: Callable[..., Any], first: Any, arguments: Mapping[str, Any], limit_s: float
    ) -> Any:
        if self._num_late >= self._num_threads:
            raise SandboxError(
                f"{self._num_late} tools hang in their threads, which is all there are; "
                f'declare {function.__name__} and others that may hang with @tool(where="process")'
            )
        await self._threads.acquire()
        thread = _ToolThread(function, first, arguments, self._ended)
        thread.start()
        try:
            await asyncio.wait({thread.outcome}, timeout=limit_s)
            if not thread.outcome.done():
                raise OutOfTimeError(limit_s)
            return thread.outcome.result()
        finally:
            if not thread.outcome.done():
                thread.late = True
                self._num_late += 1

    def _ended(self, thread: _ToolThread) -> None:
        self._threads.release()
        self._num_late -= thread.late


class _ToolThread:
    """One call in a thread of its own, a daemon: the process does not wait for it."""

    def __init__(
        self,
        function: Callable[..., Any],
        first: Any,
        arguments: Mapping[str, Any],
        on_end: Callable[[_ToolThread], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.outcome: asyncio.Future[Any] = self._loop.create_future()
        self.late = False
        self._on_end = on_end
        context = contextvars.copy_context()
        self._call: Callable[[], Any] = lambda: context.run(function, first, **arguments)
        self._thread = threading.Thread(target=self._run, name=f"tool-{function.__name__}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = self._call()
        except SystemExit as wish:
            error = RuntimeError(f"it called for the end of the process: {wish!r}")
        except BaseException as raised:  # noqa: BLE001  it is raised again where the tool is awaited
            error = raised
        try:
            self._loop.call_soon_threadsafe(self._end, result, error)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    def _end(self, result: Any, error: BaseException | None) -> None:
        self._on_end(self)
        if self.late or self.outcome.done():
            return
        if error is None:
            self.outcome.set_result(result)
        elif isinstance(error, StopIteration):  # a future does not take it
            self.outcome.set_exception(RuntimeError(f"it raised {error!r}"))
        else:
            self.outcome.set_exception(error)
