"""Warm sandboxes, made ahead so that no episode waits for one. Each is used once; nothing is ever given back to it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType

from envs.interface import SandboxError
from envs.sandbox.backends import BACKENDS, AnySandbox, check_backend, create_sandbox
from envs.sandbox.limits import Limits
from envs.sandbox.pods import PodSandbox

logger = logging.getLogger(__name__)

MAKING = {"pod": 8}
"""How many sandboxes are made at a time; of other backends 2, since a start costs CPU that episodes need."""


class SandboxPool:
    """Keeps up to `size` sandboxes ready, all with the same files, limits and hidden paths. Belongs to one event loop.

    The taker owns what `acquire` returns and closes it. Refilling starts with the first `acquire` or `prepare` and
    makes a few at a time (MAKING). When making one fails, refilling stops until the next `acquire`, which then makes
    its own and so raises the reason.
    """

    def __init__(
        self,
        size: int,
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
        backend: str = "bubblewrap",
        hidden: Sequence[str] = (),
    ) -> None:
        if size < 0:
            raise ValueError(f"a sandbox pool of size {size} makes no sense; it must be 0 or more")
        self._backend = check_backend(backend)
        self._size = size
        self._files = dict(files or {})
        self._limits = limits or Limits()
        self._hidden = hidden
        self._ready: deque[AnySandbox] = deque()
        self._filler: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def num_ready(self) -> int:
        """Sandboxes that wait to be taken."""
        return len(self._ready)

    async def prepare(self) -> None:
        """Fill the pool; returns when it is full. Raises SandboxError where no sandbox can be made."""
        sandbox = await self.acquire()  # one in the foreground, for its error; also for a pool of size 0
        if len(self._ready) < self._size:
            self._ready.append(sandbox)
        else:
            await sandbox.close()
        if self._filler is not None:
            await asyncio.shield(self._filler)

    async def acquire(self) -> AnySandbox:
        """A fresh sandbox: a warm one, or one made now. Raises SandboxError."""
        if self._closed:
            raise SandboxError("the sandbox pool is closed")
        while self._ready:
            sandbox = self._ready.popleft()
            if sandbox.alive and not (isinstance(sandbox, PodSandbox) and sandbox.worn):
                self._refill()
                return sandbox
            await sandbox.close()
        sandbox = await self._create()
        self._refill()
        return sandbox

    async def restore(self, archive: bytes) -> AnySandbox:
        """A sandbox like those of the pool, with the files of a snapshot. Raises OSError where they cannot be unpacked,
        SandboxError where no sandbox can be made."""
        if self._closed:
            raise SandboxError("the sandbox pool is closed")
        if self._backend != "pod":
            return await BACKENDS[self._backend].restore(archive, self._files, self._limits)
        sandbox = await self.acquire()  # a warm one, since a new pod takes seconds
        assert isinstance(sandbox, PodSandbox)
        try:
            await sandbox.unpack(archive)
        except BaseException:
            await sandbox.close()
            raise
        return sandbox

    async def _create(self) -> AnySandbox:
        return await create_sandbox(self._backend, self._files, self._limits, self._hidden)

    def _refill(self) -> None:
        if not self._closed and (self._filler is None or self._filler.done()):
            self._filler = asyncio.create_task(self._fill(), name="sandbox-pool-refill")

    async def _fill(self) -> None:
        while len(self._ready) < self._size:
            want = min(MAKING.get(self._backend, 2), self._size - len(self._ready))
            made = await asyncio.gather(*(self._create() for _ in range(want)), return_exceptions=True)
            self._ready.extend(sandbox for sandbox in made if not isinstance(sandbox, BaseException))
            for error in made:
                if isinstance(error, SandboxError):
                    logger.warning("sandbox pool stopped refilling ready=%d error=%s", len(self._ready), error)
                    return
                if isinstance(error, BaseException):
                    raise error

    async def close(self) -> None:
        """Close all that wait and make no more; those taken belong to their takers. Idempotent."""
        self._closed = True
        if self._filler is not None:
            # Not cancelled: two starts are over in milliseconds, and a cancelled one could not be awaited to its end.
            self._size = 0
            await asyncio.wait([self._filler])
        while self._ready:
            await self._ready.popleft().close()

    async def __aenter__(self) -> SandboxPool:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
