"""One sandbox as its users hold it: runs commands, moves files. Never more than one command at a time.

Its start, its end and the socket for commands and their statuses are in life.py. One pipe each carries stdout and
stderr, and nothing but output: when a status arrives, all that the command wrote lies in the pipes already, so reading
without waiting gets all of it.

Known weakness: what a command leaves running in the background can write into, and read from, the output of later
commands of its sandbox, as it can change their files. So grade in a fresh sandbox, or in the parent.
"""

from __future__ import annotations

import asyncio
import base64
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from types import TracebackType

from envs.interface import SandboxError
from envs.sandbox import bubblewrap
from envs.sandbox.files import FilesByCommand, succeeded
from envs.sandbox.life import Life
from envs.sandbox.limits import ExecResult, Limits
from envs.sandbox.shell import LazyShell, Shell, ShellResult
from envs.sandbox.spawn import Spawned, spawn

MAX_COMMAND_BYTES = 96 << 10  # the kernel takes 128 KiB in one argument
CHUNK_BYTES = 48 << 10  # of a file, encoded, in one command
SNAPSHOT = "/opt/snapshot.tar"  # where a fork finds its files


class Sandbox(FilesByCommand):
    """A place where untrusted commands run. Make it with `create`, close it always; closing kills all that runs in it.

    Belongs to one event loop. Dies with the thread and the process that made it.
    """

    def __init__(self, spawned: Spawned, limits: Limits, hidden: Sequence[str] = ()) -> None:
        self._life = Life(spawned)
        self._hidden = hidden
        self._limits = limits
        self._lock = asyncio.Lock()
        self._shell = LazyShell(limits, self._make_shell, self._life.check, self._life.kill)
        self._shell_pid = 0

    @classmethod
    async def create(
        cls,
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
        mounts: Mapping[str, str] | None = None,
        hidden: Sequence[str] = (),
    ) -> Sandbox:
        """Start a sandbox with these files: relative paths lie in /workspace, those elsewhere are immutable.

        mounts: path in the sandbox -> directory, file or socket of the host that is shown there, read-only.
        hidden: files and directories of the system that are empty in the sandbox, in its forks too.
        Takes 10-30 ms. Raises ValueError for a bad path, SandboxError where no sandbox can be made.
        """
        limits = limits or Limits()
        contents = {"/etc/passwd": bubblewrap.PASSWD, "/etc/group": bubblewrap.GROUP}
        contents |= {bubblewrap.check_path(path): data for path, data in (files or {}).items()}
        sandbox = cls(spawn(contents, limits, mounts, hidden), limits, hidden)
        try:
            await sandbox._life.handshake(limits.start_timeout_s)
        except BaseException:
            await sandbox.close()
            raise
        return sandbox

    @property
    def limits(self) -> Limits:
        """What it may use."""
        return self._limits

    @property
    def work_dir(self) -> str:
        """The folder in which commands begin and relative paths lie."""
        return bubblewrap.WORK_DIR

    @property
    def alive(self) -> bool:
        """False once it was closed, killed, or has ended by itself."""
        return self._life.alive

    async def exec(self, command: str, timeout_s: float | None = None, output_bytes: int | None = None) -> ExecResult:
        """Run a command line with /bin/sh in /workspace, stdin empty; wait for its end, not for what it left behind.

        Costs 1-2 ms more than the command. At `timeout_s`, or when it floods its output, the whole sandbox is killed.
        Raises ValueError for a command that is too long or holds a NUL, SandboxError where the sandbox is dead.
        """
        script = command.encode()
        if len(script) > MAX_COMMAND_BYTES or b"\0" in script:
            raise ValueError(f"a sandbox command of {len(script)} bytes: at most {MAX_COMMAND_BYTES}, and no NUL")
        async with self._lock:
            self._life.check()
            return await self._exec(
                script,
                self._limits.timeout_s if timeout_s is None else timeout_s,
                self._limits.output_bytes if output_bytes is None else output_bytes,
            )

    async def _exec(self, script: bytes, timeout_s: float, output_bytes: int) -> ExecResult:
        loop = asyncio.get_running_loop()
        outputs = (self._life.spawned.stdout, self._life.spawned.stderr)
        flooded = False

        def on_flood() -> None:
            nonlocal flooded
            flooded = True
            self._life.kill("a command flooded its output")

        for output in outputs:
            output.begin(loop, output_bytes, on_flood)
        began = time.monotonic()
        exit_code: int | None = None
        timed_out = False
        try:
            async with asyncio.timeout(timeout_s):
                exit_code = await self._life.request(b"%d\n%s\n" % (script.count(b"\n") + 1, script))
        except TimeoutError:
            timed_out = True
            self._life.kill("a command ran past its time limit")
            await self._life.exited()
        except SandboxError:
            if not flooded:
                raise
            await self._life.exited()
        except BaseException:
            self._life.kill("a command was abandoned")
            raise
        finally:
            stdout, stderr = (output.end(loop) for output in outputs)
        truncated = any(output.truncated for output in outputs)
        return ExecResult(exit_code, stdout, stderr, truncated, timed_out, time.monotonic() - began)

    async def shell(
        self,
        command: str,
        timeout_s: float | None = None,
        output_bytes: int | None = None,
        on_output: Callable[[bytes], None] | None = None,
    ) -> ShellResult:
        """Run a command line in the sandbox's persistent shell, which the first call starts (2-5 ms).

        Folder, variables and background jobs stay for the next call. At `timeout_s`, or when it floods its output, the
        command is interrupted; the result says whether the shell had to be restarted. `on_output` gets the output as
        it comes. Raises ValueError for a command that is too long or holds a NUL, SandboxError for a dead sandbox.
        """
        return await self._shell.run(command, timeout_s, output_bytes, on_output)

    def _make_shell(self) -> Shell:
        return Shell(self, self._life.spawned.shell_control, self._life.spawned.shell_output, bubblewrap.WORK_DIR)

    async def start_shell(self) -> int:
        """For the shell: a pidfd of a new one. Raises SandboxError."""
        async with self._lock:
            self._life.check()
            self._shell_pid = await self._life.request(b"shell\n")
        pidfd = self._life.spawned.open_shell(self._shell_pid)
        if pidfd is None:
            raise SandboxError("a sandbox's shell ended as it began")
        return pidfd

    async def interrupt_shell(self) -> None:
        """For the shell: Ctrl-C."""
        await self.exec(f"kill -INT -{self._shell_pid}")

    async def kill_all(self) -> None:
        """Kill every process of the sandbox but its session, whatever it is doing. Files stay. Raises SandboxError."""
        result = await self.exec("kill -KILL -1; exit 0")  # spares PID 1 and the shell that asks
        if result.timed_out:
            raise self._life.died()

    async def fork(self) -> Sandbox:
        """A new sandbox with copies of this one's files in /workspace and /tmp; processes are not copied.

        Raises OSError where the files cannot be read, SandboxError where no sandbox can be made.
        """
        return await Sandbox.restore(await self.snapshot(), limits=self._limits, hidden=self._hidden)

    @classmethod
    async def restore(
        cls,
        archive: bytes,
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
        *,
        hidden: Sequence[str] = (),
    ) -> Sandbox:
        """A new sandbox with these files and those of a snapshot. The archive is unpacked inside, where it can do no
        more than a command.

        Raises OSError where it cannot be unpacked, SandboxError where no sandbox can be made.
        """
        made = await cls.create({**(files or {}), SNAPSHOT: archive}, limits, hidden=hidden)
        try:
            await made._succeed(f"tar --extract --file={SNAPSHOT} --directory=/ --no-same-owner --no-overwrite-dir")
        except BaseException:
            await made.close()
            raise
        return made

    async def write(self, path: str, data: bytes) -> None:
        """Put a file where commands may write (relative: in /workspace). Raises OSError where the sandbox refuses."""
        absolute = PurePosixPath(bubblewrap.check_path(path))
        target = shlex.quote(str(absolute))
        prefix = (
            ""
            if absolute.parent == PurePosixPath(bubblewrap.WORK_DIR)
            else f"mkdir -p {shlex.quote(str(absolute.parent))} && "
        )
        quoted = shlex.quote(data.decode(errors="replace"))
        if b"\0" not in data and quoted.isascii() and len(quoted) <= CHUNK_BYTES:
            await self._succeed(f"{prefix}printf %s {quoted} > {target}")  # no process but the shell
            return
        await self._succeed(f"{prefix}: > {target}")
        step = CHUNK_BYTES // 4 * 3
        for start in range(0, len(data), step):
            encoded = base64.b64encode(data[start : start + step]).decode()
            await self._succeed(f"printf %s {encoded} | base64 -d >> {target}")

    async def close(self) -> None:
        """Kill everything in the sandbox, wait until it is gone, release the descriptors. Idempotent."""
        self._life.kill("it was closed")
        await self._life.exited()
        self._shell.release()
        self._life.release()

    async def __aenter__(self) -> Sandbox:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _succeed(self, command: str) -> None:
        """Run a command of our own that must exit with 0. Raises OSError with its complaint."""
        succeeded(await self.exec(command))
