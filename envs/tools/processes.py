"""A few worker processes for tools that are heavy, or may hang: whichever runs past its time is killed and replaced.

A call's time begins when a worker takes it, so that neither waiting for a worker nor the start of one counts, which is
when it imports the tool's module. It ends with the worker's life. (`concurrent.futures` cannot kill the one worker that
hangs; `anyio.to_process` can, and counts its start.) Owns the processes; never decides how long a tool may take.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from envs.interface import EnvironmentFailureError, SandboxError
from envs.timeouts import OutOfTimeError
from envs.tools.worker import LENGTH

START_LIMIT_S: Final = 60.0
STREAM_BYTES: Final = 1 << 20  # read ahead of an answer


class ToolProcesses:
    """Up to `num` workers, started as they are needed and kept. Belongs to one event loop."""

    def __init__(self, num: int) -> None:
        self._slots = asyncio.Semaphore(num)
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()

    async def call(self, function: Callable[..., Any], first: Any, arguments: Mapping[str, Any], limit_s: float) -> Any:
        """`function(first, **arguments)` in a worker; `function` is found there by its module and name.

        Raises OutOfTimeError, what the function raises, EnvironmentFailureError where it ends its process, SandboxError
        where there can be none.
        """
        call = pickle.dumps((function, first, dict(arguments)))
        async with self._slots:
            worker = self._idle.pop() if self._idle else await _Worker.start(function.__module__)
            self._busy.add(worker)
            try:
                ok, outcome = await worker.call(call, limit_s)
            except BaseException:
                await asyncio.shield(worker.end())
                raise
            finally:
                self._busy.discard(worker)
            self._idle.append(worker)
        if not ok:
            raise outcome
        return outcome

    async def close(self) -> None:
        """End them all."""
        idle, self._idle = self._idle, []
        await asyncio.gather(*(worker.end() for worker in (*idle, *self._busy)))


class _Worker:
    """One process and the pipes to it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, module: str) -> _Worker:
        """A worker that is ready and has imported this module."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from envs.tools.worker import main; main()", module),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,  # so that what a tool starts dies with it
            limit=STREAM_BYTES,
        )
        worker = cls(process)
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await worker._answer()
        except BaseException as error:
            await asyncio.shield(worker.end())
            if isinstance(error, TimeoutError):
                raise SandboxError(f"a tool process did not start within {START_LIMIT_S:g} s") from error
            if isinstance(error, EnvironmentFailureError):
                raise EnvironmentFailureError(f"a tool process could not import {module}: {error}") from error
            raise
        return worker

    async def call(self, call: bytes, limit_s: float) -> tuple[bool, Any]:
        assert self._process.stdin is not None
        try:
            async with asyncio.timeout(limit_s):
                with suppress(ConnectionError):  # it has died; the answer says so
                    self._process.stdin.write(LENGTH.pack(len(call)) + call)
                    await self._process.stdin.drain()
                return await self._answer()
        except TimeoutError:
            raise OutOfTimeError(limit_s) from None

    async def _answer(self) -> tuple[bool, Any]:
        assert self._process.stdout is not None
        try:
            (length,) = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
            ok, outcome = pickle.loads(await self._process.stdout.readexactly(length))
        except asyncio.IncompleteReadError:
            code = await self._process.wait()
            raise EnvironmentFailureError(f"its process ended with {code}") from None
        return ok, outcome

    async def end(self) -> None:
        """Kill it and what it started, and wait until it is gone. Idempotent."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(ConnectionError):
            await self._process.communicate()  # also closes its pipes
