"""The backend without walls: commands run as plain processes of this user, in a temporary folder. Protects nothing.

For code that the environment's author wrote and trusts, and where user namespaces are forbidden. It must be asked for
by name. Bounded per process: memory, file size, descriptors, CPU; not bounded: number of processes, disk, network.
What a command does it does to this machine: `kill -9 -1` ends every process of the user, as root all there are.
Its processes are found by a variable in their environment and killed at the end, even where they began a session.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from envs.interface import SandboxError
from envs.sandbox.bubblewrap import SEARCH_PATH, find_program
from envs.sandbox.limits import ExecResult, Limits
from envs.sandbox.shell import LazyShell, Shell, ShellResult
from envs.sandbox.spawn import Output

MARK = "ERGON_TRUSTED_SANDBOX"


class TrustedSandbox:
    """A temporary folder in which trusted commands run. Make it with `create`, close it always."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder = folder
        self._limits = limits
        self._mark = secrets.token_hex(16)
        self._lock = asyncio.Lock()
        self._dead_because: str | None = None
        self._shell = LazyShell(limits, self._make_shell, self._check, self._die)
        self._shell_process: subprocess.Popen[bytes] | None = None
        self._control, self._shell_end = socket.socketpair()
        self._control.setblocking(False)
        reading, self._shell_output = os.pipe2(os.O_CLOEXEC)
        self._output = Output(reading)
        self._released = False

    @classmethod
    async def create(cls, files: Mapping[str, bytes] | None = None, limits: Limits | None = None) -> TrustedSandbox:
        """Make the folder and these files, all of relative paths. Raises ValueError for other paths."""
        made = cls(Path(tempfile.mkdtemp(prefix="ergon-trusted-")), limits or Limits())
        try:
            for path, data in (files or {}).items():
                await made.write(path, data)
        except BaseException:
            await made.close()
            raise
        return made

    @property
    def alive(self) -> bool:
        """Until it is closed or a command ran past its time."""
        return self._dead_because is None

    @property
    def limits(self) -> Limits:
        """What one process may use."""
        return self._limits

    @property
    def work_dir(self) -> str:
        """The temporary folder."""
        return str(self._folder)

    def _bounded(self) -> list[str]:
        limits = self._limits
        bounds = [f"--as={limits.memory_bytes}", f"--fsize={limits.file_bytes}", f"--nofile={limits.open_files}"]
        return [find_program("prlimit"), *bounds, f"--cpu={limits.cpu_s}", "--core=0", "--"]

    def _environment(self) -> dict[str, str]:
        return {"PATH": SEARCH_PATH, "HOME": str(self._folder), "LANG": "C.UTF-8", MARK: self._mark}

    async def exec(self, command: str, timeout_s: float | None = None, output_bytes: int | None = None) -> ExecResult:
        """Run a command line with /bin/sh in the folder, stdin empty. Past its time everything is killed.

        Raises SandboxError where the sandbox is dead.
        """
        async with self._lock:
            self._check()
            keep = self._limits.output_bytes if output_bytes is None else output_bytes
            loop = asyncio.get_running_loop()
            pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(2)]
            outputs = [Output(reading) for reading, _ in pipes]
            flooded = asyncio.Event()
            began = time.monotonic()
            try:
                for output in outputs:
                    output.begin(loop, keep, flooded.set)
                process = await asyncio.create_subprocess_exec(
                    *self._bounded(),
                    "/bin/sh",
                    "-c",
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=pipes[0][1],
                    stderr=pipes[1][1],
                    cwd=self._folder,
                    env=self._environment(),
                    start_new_session=True,
                )
                timed_out = not await self._awaited(process, flooded, timeout_s)
                texts = [output.end(loop) for output in outputs]
            finally:
                for pair in pipes:
                    for fd in pair:
                        loop.remove_reader(fd)
                        os.close(fd)
            truncated = any(output.truncated for output in outputs)
            killed = timed_out or flooded.is_set()
            status = (
                process.returncode
                if process.returncode is None or process.returncode >= 0
                else (128 - process.returncode)
            )
            return ExecResult(
                None if killed else status, texts[0], texts[1], truncated, timed_out, time.monotonic() - began
            )

    async def _awaited(
        self, process: asyncio.subprocess.Process, flooded: asyncio.Event, timeout_s: float | None
    ) -> bool:
        """Whether the command ended within its time or flooded its output; kills everything if not by itself."""
        waits = [asyncio.ensure_future(process.wait()), asyncio.ensure_future(flooded.wait())]
        limit = self._limits.timeout_s if timeout_s is None else timeout_s
        try:
            await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended = waits[0].done()
            if not ended:
                self._dead_because = "a command ran past its limits or was abandoned"
                await self.kill_all()
                await process.wait()
            for wait in waits:
                wait.cancel()
        return ended or flooded.is_set()

    async def shell(
        self,
        command: str,
        timeout_s: float | None = None,
        output_bytes: int | None = None,
        on_output: Callable[[bytes], None] | None = None,
    ) -> ShellResult:
        """Run a command line in the persistent shell. Raises ValueError, SandboxError."""
        async with self._lock:
            self._check()
            try:
                return await self._shell.run(command, timeout_s, output_bytes, on_output)
            finally:
                if not self.alive:
                    await self.kill_all()

    def _make_shell(self) -> Shell:
        return Shell(self, self._control, self._output, str(self._folder))

    def _die(self, reason: str) -> None:
        self._dead_because = reason

    async def start_shell(self) -> int:
        """For the shell: a pidfd of a new one."""
        if self._shell_process is not None:
            self._shell_process.wait()
        control, output = self._shell_end.fileno(), self._shell_output
        move = f"exec bash --noprofile --norc -i <&{control} 4>&{output} {control}<&- {output}>&- >/dev/null 2>&1"
        self._shell_process = subprocess.Popen(  # noqa: ASYNC220  asyncio's has no way to hand over descriptors
            # Where this process ignores SIGINT, as one that a script has put in the background, commands would, too.
            [
                *(find_program("env"), "--default-signal=INT", *self._bounded()),
                *(find_program("bash"), "--noprofile", "--norc", "-c", move),
            ],
            pass_fds=(control, output),
            cwd=self._folder,
            env=self._environment(),
            start_new_session=True,
        )
        return os.pidfd_open(self._shell_process.pid)

    async def interrupt_shell(self) -> None:
        """For the shell: Ctrl-C."""
        if self._shell_process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._shell_process.pid, signal.SIGINT)

    async def kill_all(self) -> None:
        """Kill every process that carries this sandbox's mark, until there is none."""
        mark = f"{MARK}={self._mark}".encode()
        while found := [pid for pid in _all_processes() if _carries(pid, mark)]:
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.001)

    def _path(self, path: str) -> Path:
        """Where a file of the sandbox lies. Raises ValueError for a path outside of its folder."""
        found = (self._folder / path).resolve()
        if "\0" in path or self._folder.resolve() not in found.parents:
            raise ValueError(f"{path!r} is no file path of a trusted sandbox: it must lie in its folder")
        return found

    async def read(self, path: str, max_bytes: int = 1 << 20) -> bytes:
        """A file's content. Raises OSError where it cannot be read or is larger than `max_bytes`."""
        with self._path(path).open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise OSError(f"{path} in the sandbox is larger than {max_bytes} bytes")
        return data

    async def write(self, path: str, data: bytes) -> None:
        """Write a file, and the folders it lies in. Raises OSError."""
        found = self._path(path)
        found.parent.mkdir(parents=True, exist_ok=True)
        found.write_bytes(data)

    async def snapshot(self, max_bytes: int = 64 << 20) -> bytes:
        """A tar archive of the folder. Raises OSError where it is larger than `max_bytes`."""
        tar = "exec tar --create --sparse --ignore-failed-read --file=- ."
        result = await self.exec(tar, output_bytes=max_bytes)
        if result.truncated or result.exit_code not in (0, 1):
            raise OSError("the sandbox's files cannot be read: too large, or refused")
        return result.stdout

    @classmethod
    async def restore(
        cls, archive: bytes, files: Mapping[str, bytes] | None = None, limits: Limits | None = None
    ) -> TrustedSandbox:
        """Refused, by OSError: an archive from elsewhere is unpacked in a sandbox, and this is none."""
        raise OSError("the backend trusted unpacks no archives: it is no sandbox")

    async def fork(self) -> TrustedSandbox:
        """A new folder with copies of the files."""
        self._check()
        made = await TrustedSandbox.create(limits=self._limits)
        shutil.copytree(self._folder, made._folder, symlinks=True, dirs_exist_ok=True)
        return made

    def _check(self) -> None:
        if self._dead_because is not None:
            raise SandboxError(f"the sandbox is dead: {self._dead_because}")

    async def close(self) -> None:
        """Kill what runs, remove the folder. Idempotent."""
        self._dead_because = self._dead_because or "it was closed"
        if self._released:
            return
        self._released = True
        await self.kill_all()
        if self._shell_process is not None:
            self._shell_process.wait()
        self._shell.release()
        self._control.close()
        self._shell_end.close()
        os.close(self._output.fd)
        os.close(self._shell_output)
        # A command may have taken its own folders' permissions away.
        await asyncio.to_thread(subprocess.run, ["chmod", "-R", "u+rwX", str(self._folder)], check=False)
        await asyncio.to_thread(shutil.rmtree, self._folder)

    async def __aenter__(self) -> TrustedSandbox:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _all_processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _carries(pid: int, mark: bytes) -> bool:
    """Whether a live process carries the mark; one that has ended shows no environment any more."""
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
