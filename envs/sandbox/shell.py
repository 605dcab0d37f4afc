"""The persistent shell of a sandbox: `cd`, variables and background jobs live on between commands. Grades nothing.

An interactive bash without a terminal, as the leader of its own process group. Its stdin is a socket: each command
comes as one `eval`, followed by a line that answers with a nonce, the status and the folder. Output of both kinds goes
through one pipe, in the order in which a terminal would show it; what background jobs write comes with the next
command's. A command past its time gets SIGINT, as from Ctrl-C, which background jobs of such a shell ignore. Where that
does not help, everything but the sandbox's PID 1 is killed and a new shell begins in the old one's folder.

The shell belongs to the policy, which may forge what it says of itself: statuses are for its eyes, never for a
grader's.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import select
import shlex
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from envs.interface import SandboxError
from envs.sandbox.limits import Limits
from envs.sandbox.spawn import Output

MAX_COMMAND_BYTES = 96 << 10
GRACE_S = 1.0  # for a command to end upon SIGINT
START_S = 10.0
MAX_ANSWER_BYTES = 16 << 10

SET_UP = "PS1= PS2= TERM=dumb; set +H; unset HISTFILE; cd {folder} 2>/dev/null || cd\n"


@dataclass(frozen=True, slots=True)
class ShellResult:
    """What one command of a persistent shell came to; stdout and stderr are one, as on a terminal.

    exit_code: None where it ended the shell, or where the shell had to be ended. truncated: there was more output.
    timed_out: it was interrupted for its time or for flooding its output. restarted: the shell is a new one: folder
    kept; variables and background jobs lost.
    """

    exit_code: int | None
    output: bytes
    truncated: bool
    timed_out: bool
    restarted: bool
    duration_s: float


class ShellHost(Protocol):
    """What a backend does for its shell."""

    async def start_shell(self) -> int:
        """Start the shell on its channels; a pidfd of it, which the caller closes. Raises SandboxError."""

    async def interrupt_shell(self) -> None:
        """SIGINT to the shell's process group."""

    async def kill_all(self) -> None:
        """Kill every process but what the backend itself needs."""


class Shell:
    """One persistent shell. Belongs to its sandbox, which makes it and whose end is its end. One command at a time."""

    def __init__(self, host: ShellHost, control: socket.socket, output: Output, folder: str) -> None:
        self.folder = folder
        self._host = host
        self._control = control
        self._output = output
        self._pidfd = -1
        self._pending = b""
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Start it, or start it anew. Raises SandboxError."""
        self.release()
        self._pidfd = await self._host.start_shell()
        self._pending = b""
        try:
            async with asyncio.timeout(START_S):
                await self._ask(SET_UP.format(folder=shlex.quote(self.folder)).encode())
        except TimeoutError:
            raise SandboxError(f"a sandbox's shell was not ready within {START_S} s") from None
        except _EndedError:
            raise SandboxError("a sandbox's shell ended as it began") from None

    def release(self) -> None:
        """Let go of the shell's process."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    async def run(
        self,
        command: str,
        timeout_s: float,
        output_bytes: int,
        on_output: Callable[[bytes], None] | None = None,
    ) -> ShellResult:
        """Run a command line to its end or its time. `on_output` gets all its output in pieces, as they come.

        Raises ValueError for a command that is too long or holds a NUL, SandboxError where the sandbox is dead.
        """
        script = command.encode(errors="surrogateescape")
        if len(script) > MAX_COMMAND_BYTES or b"\0" in script:
            raise ValueError(f"a shell command of {len(script)} bytes: at most {MAX_COMMAND_BYTES}, and no NUL")
        async with self._lock:
            return await self._run(script, timeout_s, output_bytes, on_output)

    async def _run(
        self, script: bytes, timeout_s: float, output_bytes: int, on_output: Callable[[bytes], None] | None
    ) -> ShellResult:
        loop = asyncio.get_running_loop()
        flooded = asyncio.Event()
        self._output.begin(loop, output_bytes, flooded.set, on_output, forget=False)
        began = time.monotonic()
        exit_code: int | None = None
        timed_out = restarted = False
        line = b"eval " + _quoted(script) + b" 0</dev/null 1>&4 2>&4 3>&- 4>&-\n"
        try:
            asking = asyncio.ensure_future(self._ask(line))
            try:
                if not await _within(asking, timeout_s, flooded):
                    timed_out = True
                    await self._host.interrupt_shell()
                    if not await _within(asking, GRACE_S, None):
                        raise _EndedError
                exit_code = asking.result()
            except _EndedError:
                restarted = True
            finally:
                asking.cancel()
                with suppress(asyncio.CancelledError, _EndedError, SandboxError):
                    await asking
            if restarted:
                await self._host.kill_all()
        finally:
            output = self._output.end(loop)
        if restarted:
            await self.start()
        return ShellResult(exit_code, output, self._output.truncated, timed_out, restarted, time.monotonic() - began)

    async def _ask(self, lines: bytes) -> int:
        """Send lines and one that answers; the status before it. Raises _EndedError where the shell has ended."""
        nonce = secrets.token_hex(8).encode()
        answer = b"""builtin printf '%%s %%d %%s\\n' %s "$?" "$PWD" >&0\n""" % nonce
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._control, lines + answer)
            while True:
                while b"\n" not in self._pending:
                    self._pending += await self._receive(loop)
                    if len(self._pending) > MAX_ANSWER_BYTES:
                        raise _EndedError
                word, _, self._pending = self._pending.partition(b"\n")
                got, _, rest = word.partition(b" ")
                status, _, folder = rest.partition(b" ")
                if got == nonce and status.isdigit():
                    self.folder = folder.decode(errors="surrogateescape")
                    return int(status)
        except OSError:
            raise _EndedError from None

    async def _receive(self, loop: asyncio.AbstractEventLoop) -> bytes:
        """The next bytes of the shell. Raises _EndedError where it has ended: the socket outlives it, in PID 1."""
        readable: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not readable.done():
                readable.set_result(None)

        for fd in (self._control.fileno(), self._pidfd):
            loop.add_reader(fd, wake)
        try:
            await readable
        finally:
            for fd in (self._control.fileno(), self._pidfd):
                loop.remove_reader(fd)
        try:
            data = self._control.recv(4096)
        except BlockingIOError:
            raise _EndedError from None  # it was the pidfd that woke us
        if not data:
            raise _EndedError
        return data

    @property
    def alive(self) -> bool:
        """Whether its process is there."""
        return self._pidfd >= 0 and not select.select([self._pidfd], [], [], 0)[0]


class LazyShell:
    """The one shell of a sandbox: the first command starts it, within the sandbox's limits. One command at a time.

    make: it, not started yet. check: raises SandboxError where the sandbox is dead. kill: the sandbox, and why.
    """

    def __init__(
        self, limits: Limits, make: Callable[[], Shell], check: Callable[[], None], kill: Callable[[str], None]
    ) -> None:
        self._limits, self._make, self._check, self._kill = limits, make, check, kill
        self._shell: Shell | None = None
        self._lock = asyncio.Lock()

    async def run(
        self,
        command: str,
        timeout_s: float | None = None,
        output_bytes: int | None = None,
        on_output: Callable[[bytes], None] | None = None,
    ) -> ShellResult:
        """As `Shell.run`, by the sandbox's limits where none are given. What is abandoned kills the sandbox."""
        async with self._lock:
            self._check()
            try:
                if self._shell is None:
                    self._shell = self._make()
                    await self._shell.start()
                return await self._shell.run(
                    command,
                    self._limits.timeout_s if timeout_s is None else timeout_s,
                    self._limits.output_bytes if output_bytes is None else output_bytes,
                    on_output,
                )
            except ValueError:
                raise
            except BaseException:
                self._kill("a shell command was abandoned")
                raise

    def release(self) -> None:
        """Let go of the shell's process, if there is one."""
        if self._shell is not None:
            self._shell.release()


class _EndedError(Exception):
    """The shell's process has ended, or is as good as ended."""


def _quoted(script: bytes) -> bytes:
    """The bytes as one word of the shell."""
    return b"'" + script.replace(b"'", b"'\"'\"'") + b"'"


async def _within(asking: asyncio.Future[int], timeout_s: float, flooded: asyncio.Event | None) -> bool:
    """Whether the answer came in time, and before a flood of output."""
    waits: list[asyncio.Future[Any]] = [asking]
    if flooded is not None:
        waits.append(asyncio.ensure_future(flooded.wait()))
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for other in waits[1:]:
            other.cancel()
    return asking.done()
