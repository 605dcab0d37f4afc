"""The life of one sandbox: its start, the socket to its session, its death. Runs no command and moves no file.

The session loop (bubblewrap.SESSION_LOOP) is PID 1 of the sandbox. Requests and their answers go over a socket that no
command can reach. Killing the first process of the outer PID namespace kills all there is, whatever it is doing.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import select
import signal
from contextlib import suppress

from envs.interface import SandboxError
from envs.sandbox import bubblewrap
from envs.sandbox.spawn import Spawned

EXIT_TIMEOUT_S = 30.0


async def _ended(pidfd: int) -> None:
    """Wait until a killed process has ended. Raises SandboxError where it does not."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(EXIT_TIMEOUT_S):
            await ended.wait()
    except TimeoutError:
        raise SandboxError(f"a killed sandbox was still there after {EXIT_TIMEOUT_S} s") from None
    finally:
        loop.remove_reader(pidfd)


class Life:
    """A spawned sandbox as something that answers, lives and dies. Belongs to one event loop.

    spawned: its process and channels. init_pidfd: the outer PID namespace's first process, -1 until it is known.
    """

    def __init__(self, spawned: Spawned) -> None:
        self.spawned = spawned
        self.init_pidfd = -1
        self._pending = b""
        self._dead_because: str | None = None
        self._exit: asyncio.Task[None] | None = None
        self._released = False

    @property
    def alive(self) -> bool:
        """False once it was killed or has ended by itself."""
        if self._dead_because is not None:
            return False
        events = select.poll()
        for pidfd in (self.init_pidfd, self.spawned.pidfd):
            events.register(pidfd, select.POLLIN)  # readable once the process has ended
        return not events.poll(0)

    def check(self) -> None:
        """Raises SandboxError for a sandbox that is known to be dead."""
        if self._dead_because is not None:
            raise self.died()

    def died(self) -> SandboxError:
        """The error for a dead sandbox, with why it is dead."""
        if self._dead_because is None:
            self._dead_because = "its session ended unexpectedly"
        return SandboxError(f"the sandbox is dead: {self._dead_because}")

    async def handshake(self, timeout_s: float) -> None:
        """Wait for the session's first word and take hold of its PID namespace. Raises SandboxError."""
        try:
            async with asyncio.timeout(timeout_s):
                word = await self._line()
        except TimeoutError:
            raise SandboxError(f"a sandbox was not ready within {timeout_s} s") from None
        except SandboxError:
            await self.exited()
            raise bubblewrap.failure(self.spawned.stderr.leftover(4096).decode(errors="replace")) from None
        if word != b"ready":
            raise SandboxError(f"a sandbox began with {word[:80]!r} instead of `ready`")
        self.init_pidfd = self.spawned.open_init()

    async def request(self, body: bytes) -> int:
        """Send the session a request, return its answer. Raises SandboxError."""
        nonce = secrets.token_hex(16).encode()
        message = nonce + b"\n" + body
        try:
            await asyncio.get_running_loop().sock_sendall(self.spawned.control, message)
        except OSError as error:
            raise self.died() from error
        answer = await self._line()
        got, _, status = answer.partition(b" ")
        if got != nonce or not status.isdigit():
            self.kill(f"its session broke the protocol with {answer[:80]!r}")
            raise self.died()
        return int(status)

    async def _line(self) -> bytes:
        """The next line from the session. Raises SandboxError at its end."""
        loop = asyncio.get_running_loop()
        while b"\n" not in self._pending:
            try:
                chunk = await loop.sock_recv(self.spawned.control, 4096)
            except OSError as error:
                raise self.died() from error
            if not chunk:
                raise self.died()
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def kill(self, reason: str) -> None:
        """Kill the whole PID namespace."""
        if self._dead_because is None:
            self._dead_because = reason
        if self._released:
            return
        with suppress(ProcessLookupError):  # it has ended already, which is what is wanted
            if self.init_pidfd >= 0:
                signal.pidfd_send_signal(self.init_pidfd, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(self.spawned.pidfd, signal.SIGKILL)  # the namespace follows by itself

    async def exited(self) -> None:
        """Wait until all in the sandbox has ended: its first process does so last, and then ours that started it."""
        if self._exit is None:
            self._exit = asyncio.create_task(self._wait_exit(), name="sandbox-exit")
        await asyncio.shield(self._exit)

    async def _wait_exit(self) -> None:
        for pidfd in (self.init_pidfd, self.spawned.pidfd):
            if pidfd >= 0:
                await _ended(pidfd)

    def release(self) -> None:
        """Release the descriptors of a sandbox that has ended; idempotent."""
        if not self._released:
            self._released = True
            self.spawned.release()
            if self.init_pidfd >= 0:
                os.close(self.init_pidfd)
