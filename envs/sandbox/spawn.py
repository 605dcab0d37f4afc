"""Starts bubblewrap and holds the descriptors that lead into the sandbox. Knows no commands and no protocol."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from envs.interface import SandboxError
from envs.sandbox import bubblewrap, seccomp
from envs.sandbox.limits import Limits

PIPE_BYTES = 1 << 20  # the most a pipe can hold
FLOOD_BYTES = 64 << 20  # output beyond this is a flood, not output
READ_BYTES = 64 << 10


class Output:
    """The reading end of an output pipe: keeps the first bytes of a command's output, passes on or counts the rest."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self._data = bytearray()
        self._num_bytes = 0
        self._keep = 0
        self._on_data: Callable[[bytes], None] | None = None

    def begin(
        self,
        loop: asyncio.AbstractEventLoop,
        keep: int,
        on_flood: Callable[[], None],
        on_data: Callable[[bytes], None] | None = None,
        forget: bool = True,
    ) -> None:
        """Collect up to `keep` bytes from now on; what came since the last command (late writers) is forgotten, or not.

        on_data: called with each piece as it arrives, whatever is kept of it.
        """
        if forget:
            self._on_data = None
            self._drain()
        self._data = bytearray()
        self._num_bytes = 0
        self._keep = keep
        self._on_data = on_data
        loop.add_reader(self.fd, self._readable, loop, on_flood)

    def end(self, loop: asyncio.AbstractEventLoop) -> bytes:
        """Collect what is there already and stop."""
        loop.remove_reader(self.fd)
        self._drain()
        return bytes(self._data)

    def leftover(self, keep: int) -> bytes:
        """What is there to read now, outside of any command."""
        self._keep = keep
        self._drain()
        return bytes(self._data)

    @property
    def truncated(self) -> bool:
        """Whether output was dropped."""
        return self._num_bytes > len(self._data)

    def _read(self) -> int:
        """Bytes read; 0 when nothing is there, -1 at the end of the stream."""
        try:
            chunk = os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return 0
        self._data += chunk[: max(0, self._keep - len(self._data))]
        self._num_bytes += len(chunk)
        if self._on_data is not None and chunk:
            self._on_data(chunk)
        return len(chunk) or -1

    def _drain(self) -> None:
        left = PIPE_BYTES  # bounded, since something in the background may go on writing
        while left > 0 and (num_read := self._read()) > 0:
            left -= num_read

    def _readable(self, loop: asyncio.AbstractEventLoop, on_flood: Callable[[], None]) -> None:
        num_read = self._read()
        if self._num_bytes > FLOOD_BYTES:
            on_flood()
        if num_read < 0 or self._num_bytes > FLOOD_BYTES:
            loop.remove_reader(self.fd)


@dataclass(slots=True)
class Spawned:
    """The started process (its `pidfd` becomes readable when it ends) and the parent's ends of its channels."""

    process: subprocess.Popen[bytes]
    pidfd: int
    control: socket.socket
    stdout: Output
    stderr: Output
    shell_control: socket.socket
    shell_output: Output

    def open_init(self) -> int:
        """A pidfd of the outer PID namespace's first process, which ends after all others. Raises SandboxError."""
        listing = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return os.pidfd_open(int(listing.read_text().split()[0]))
        except (OSError, IndexError) as error:
            raise SandboxError(f"a sandbox's first process cannot be found in {listing} ({error})") from error

    def open_shell(self, inner_pid: int) -> int | None:
        """A pidfd of the shell that has this id inside; None where it has ended already. Raises SandboxError."""
        outer = _children(self.process.pid)
        first = _children(outer[0]) if outer else []  # bubblewrap's child is the sandbox's PID 1
        for pid in _children(first[0]) if first else []:
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                inner = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1]
                if int(inner) == inner_pid:
                    return os.pidfd_open(pid)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
        return None

    def release(self) -> None:
        """Close the descriptors of a sandbox that has ended, and reap its process."""
        self.process.wait()
        self.control.close()
        self.shell_control.close()
        for fd in (self.pidfd, self.stdout.fd, self.stderr.fd, self.shell_output.fd):
            os.close(fd)


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


@functools.cache
def _shell_image() -> bytes:
    return Path("/bin/sh").read_bytes()


def _memory_file(stack: ExitStack, data: bytes) -> int:
    """A descriptor from which `data` can be read once."""
    fd = os.memfd_create("ergon-sandbox-file")
    stack.callback(os.close, fd)
    with open(os.dup(fd), "wb") as file:  # noqa: PTH123  a descriptor, not a path
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _pipe(stack: ExitStack, parent_ends: ExitStack) -> tuple[int, int]:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    parent_ends.callback(os.close, reading)
    stack.callback(os.close, writing)
    return reading, writing


def _sockets(stack: ExitStack, parent_ends: ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    parent_ends.callback(ours.close)
    stack.callback(theirs.close)
    ours.setblocking(False)
    return ours, theirs


def spawn(
    files: Mapping[str, bytes], limits: Limits, mounts: Mapping[str, str] | None = None, hidden: Sequence[str] = ()
) -> Spawned:
    """Start a sandbox that holds these files (absolute path -> content), shows these mounts and hides these paths.

    Blocks for about 2 ms. Raises SandboxError. It dies with the calling thread. It has its own session, so that Ctrl-C
    in a terminal is not for it.
    """
    with ExitStack() as child_ends, ExitStack() as parent_ends:
        contents = {**files, bubblewrap.SESSION: _shell_image()}
        file_fds = {path: _memory_file(child_ends, data) for path, data in contents.items()}
        seccomp_fd = _memory_file(child_ends, seccomp.filter_bytes())
        control, child_control = _sockets(child_ends, parent_ends)
        shell_control, child_shell_control = _sockets(child_ends, parent_ends)
        stdout_fd, child_stdout = _pipe(child_ends, parent_ends)
        stderr_fd, child_stderr = _pipe(child_ends, parent_ends)
        shell_fd, child_shell_output = _pipe(child_ends, parent_ends)
        shell_fds = child_shell_control.fileno(), child_shell_output
        process = subprocess.Popen(
            bubblewrap.command_line(limits, file_fds, seccomp_fd, shell_fds, mounts, hidden),
            stdin=child_control.fileno(),
            stdout=child_stdout,
            stderr=child_stderr,
            pass_fds=(*file_fds.values(), seccomp_fd, *shell_fds),
            cwd="/",
            env={},
            start_new_session=True,
        )
        pidfd = os.pidfd_open(process.pid)
        parent_ends.pop_all()
        outputs = Output(stdout_fd), Output(stderr_fd)
        return Spawned(process, pidfd, control, *outputs, shell_control, Output(shell_fd))
