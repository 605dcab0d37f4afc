"""One exec connection into a pod: frames out, frames in, and the end of it. Knows agent.py's letters, runs nothing.

Also the shell's local ends: the Shell of all backends speaks to a socket, a pipe and a descriptor that becomes readable
when it ends, and here these are fed from frames, in the order in which they came.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from envs.interface import SandboxError
from envs.sandbox.pods.agent import CLOSED, HEADER, STOPPED
from envs.sandbox.spawn import PIPE_BYTES, Output

PIECE_BYTES: Final = 32 << 10  # of a message on the WebSocket
STDIN, STDOUT, STDERR, ERROR = range(4)  # channels of v4.channel.k8s.io
MAX_FRAME_BYTES: Final = 192 << 20  # two outputs of the largest size that is not a flood, and some
PING_S: Final = 30.0
ANSWER_S: Final = 20.0  # for what needs no time in the pod
ERROR_BYTES: Final = 4096
FIRST_SIGNAL_STATUS: Final = 129


class LostError(Exception):
    """The session has ended. by_policy: something in the pod ended it; else it is the cluster's doing. silent: it only
    does not answer, which is the policy's doing if the next session finds it stopped (`found_stopped`)."""

    def __init__(self, reason: str, by_policy: bool, silent: bool = False) -> None:
        super().__init__(reason)
        self.by_policy = by_policy
        self.silent = silent


class ShellEnds:
    """The parent's ends of a sandbox's shell: `control` and `output` as Shell wants them, and what feeds them."""

    def __init__(self) -> None:
        self.control, self._far_control = socket.socketpair()
        for end in (self.control, self._far_control):
            end.setblocking(False)
        reading, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.fcntl(self._writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.output = Output(reading)
        self._ended = -1
        self._pid = 0
        self._waiting: deque[tuple[Session, bytes, int, bytes]] = deque()  # frames that have no room yet
        self._session: Session | None = None

    def open(self, session: Session, pid: int) -> int:
        """A new shell has begun in this session; a descriptor, the caller's, that is readable once it has ended."""
        self.close_shell()
        self._session, self._pid = session, pid
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        asyncio.get_running_loop().add_reader(self._far_control, self._speak)
        return os.dup(self._ended)

    def _speak(self) -> None:
        data = self._far_control.recv(64 << 10)
        if self._session is not None:
            self._session.send(b"D", 0, data)

    def take(self, session: Session, letter: bytes, number: int, body: bytes) -> None:
        """A frame of the shell's."""
        self._waiting.append((session, letter, number, body))
        self._pass_on()

    def _pass_on(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            session, letter, number, body = self._waiting[0]
            if letter == b"O":
                written = self._write(body)
                if written:
                    session.send(b"C", written)
                if written < len(body):
                    self._waiting[0] = (session, letter, number, body[written:])
                    loop.add_writer(self._writing, self._pass_on)
                    return
            elif letter == b"D":
                # Only a policy that says more than it was asked for fills the socket; what has no room is dropped.
                with suppress(BlockingIOError):
                    self._far_control.send(body)
            elif number == self._pid:
                self.close_shell()
            self._waiting.popleft()
        loop.remove_writer(self._writing)

    def _write(self, body: bytes) -> int:
        try:
            return os.write(self._writing, body)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return 0
            raise

    def close_shell(self) -> None:
        """The shell, if there is one, has ended."""
        self._session, self._pid = None, 0
        if self._ended >= 0:
            asyncio.get_running_loop().remove_reader(self._far_control)
            os.eventfd_write(self._ended, 1)
            os.close(self._ended)
            self._ended = -1

    def close(self) -> None:
        """Release the descriptors."""
        self.close_shell()
        asyncio.get_running_loop().remove_writer(self._writing)
        self.control.close()
        self._far_control.close()
        os.close(self._writing)
        os.close(self.output.fd)


class Session:
    """A connection to an agent. Make it with `open`, close it always. Belongs to one event loop."""

    def __init__(self, stream: Any, ends: ShellEnds) -> None:
        self._stream = stream
        self._ends = ends
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self._hello: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._next = 0
        self._pending = bytearray()
        self._complaint = bytearray()
        self._status: str | None = None
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._tasks = [asyncio.create_task(each()) for each in (self._read, self._write, self._ping)]
        self.lost: LostError | None = None
        self.found_stopped = False
        self.on_lost: Callable[[LostError], None] | None = None

    @classmethod
    async def open(cls, stream: Any, ends: ShellEnds) -> Session:
        """Wait for the agent's first word. Raises SandboxError where it is none, or others could read its memory."""
        made = cls(stream, ends)
        try:
            async with asyncio.timeout(ANSWER_S):
                told = await made._hello
        except LostError as error:
            await made.close()
            raise SandboxError(f"a sandbox's session did not begin: {error}") from None
        except BaseException as error:
            await made.close()
            if isinstance(error, TimeoutError):
                raise SandboxError(f"a sandbox's session said nothing within {ANSWER_S:g} s") from None
            raise
        made.found_stopped = bool(told & STOPPED)
        if not told & CLOSED:
            await made.close()
            raise SandboxError(
                "a sandbox's session could be read and written by what runs in it, so nothing runs: the image's Python "
                "must not be readable; build it from deploy/images/sandbox.Dockerfile"
            )
        return made

    def send(self, letter: bytes, number: int, body: bytes = b"") -> None:
        """Send a frame, after those that wait already."""
        if self.lost is None:
            self._outgoing.put_nowait(HEADER.pack(letter, number, len(body)) + body)

    async def ask(self, letter: bytes, body: bytes = b"", timeout_s: float = ANSWER_S) -> bytes:
        """Send a request, return its answer's body. Raises LostError, also where there is none in time: an agent that
        is stopped is as good as killed."""
        if self.lost is not None:
            raise self.lost
        self._next += 1
        number = self._next
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        self.send(letter, number, body)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            self._end(LostError(f"its session did not answer within {timeout_s:g} s", True, silent=True))
            raise self.lost or AssertionError from None
        finally:
            self._asked.pop(number, None)

    async def _read(self) -> None:
        reason, by_policy = "its connection broke", False
        try:
            async for message in self._stream:
                data = message.data if isinstance(message.data, bytes) else str(message.data).encode()
                if data:
                    self._take(data[0], data[1:])
        except _ProtocolError as error:
            reason = str(error)
        except OSError as error:
            reason = f"its connection broke: {error}"
        if self._status is not None:
            reason, by_policy = _meaning(self._status, self._complaint.decode(errors="replace"))
        self._end(LostError(reason, by_policy))

    def _take(self, channel: int, data: bytes) -> None:
        if channel == STDOUT:
            self._pending += data
            self._frames()
        elif channel == STDERR:
            self._complaint += data[: max(0, ERROR_BYTES - len(self._complaint))]
        elif channel == ERROR:
            self._status = (self._status or "") + data.decode(errors="replace")

    def _frames(self) -> None:
        while len(self._pending) >= HEADER.size:
            letter, number, length = HEADER.unpack_from(self._pending)
            if letter not in b"HRASDOE" or length > MAX_FRAME_BYTES:
                raise _ProtocolError(f"its session began a frame of {length} bytes with {letter!r}")
            if len(self._pending) < HEADER.size + length:
                return
            body = bytes(self._pending[HEADER.size : HEADER.size + length])
            del self._pending[: HEADER.size + length]
            if letter == b"H" and not self._hello.done():
                self._hello.set_result(number)
            elif letter in b"RAS" and number in self._asked and not self._asked[number].done():
                self._asked[number].set_result(body)
            elif letter in b"DOE" and self.lost is None:
                self._ends.take(self, letter, number, body)

    async def _write(self) -> None:
        try:
            while True:
                data = await self._outgoing.get()
                for start in range(0, len(data), PIECE_BYTES):
                    await self._stream.send_bytes(bytes((STDIN,)) + data[start : start + PIECE_BYTES])
        except OSError:  # aiohttp's are among them
            return  # the reader finds out why, and may have been told more

    async def _ping(self) -> None:
        """Keep the connection from being idle, which something on its way may take for an end."""
        while True:
            await asyncio.sleep(PING_S)
            self.send(b"P", 0)

    def _end(self, lost: LostError) -> None:
        if self.lost is not None:
            return
        self.lost = lost
        self._ends.close_shell()
        waited_for: list[asyncio.Future[Any]] = [self._hello, *self._asked.values()]
        for answer in waited_for:
            if not answer.done():
                answer.set_exception(lost)
        if not self._hello.cancelled():
            self._hello.exception()  # nobody may be waiting for it
        if self.on_lost is not None:
            self.on_lost(lost)

    async def close(self) -> None:
        """End the connection. Idempotent."""
        self._end(LostError("it was closed", by_policy=False))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):  # the other side may not answer, and need not
                await self._stream.close()


class _ProtocolError(Exception):
    """Bytes that no agent sends."""


def _meaning(status: str, complaint: str) -> tuple[str, bool]:
    """Why a session ended, by the Status object that ends every exec; whether something in the pod killed it."""
    try:
        found = json.loads(status)
        if found["status"] == "Success":
            return "its session ended by itself", False
        causes = {cause.get("reason"): cause.get("message") for cause in found.get("details", {}).get("causes", ())}
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"its connection ended with {status[:200]!r}", False
    code = str(causes.get("ExitCode", ""))
    if code.isdigit():
        detail = f": {' '.join(complaint.split())[-300:]}" if complaint.strip() else ""
        return f"its session ended with status {code}{detail}", int(code) >= FIRST_SIGNAL_STATUS
    return f"its connection ended: {found.get('message', status)[:300]}", False
