"""A sandbox that is a pod of its own, with the other backends' words: commands, the persistent shell, files, the end.

What runs in it runs elsewhere, perhaps under another kernel (`runtime_class`); its image is all that it sees. Commands
go through one exec connection to the agent (agent.py), so they cost a round trip and no more. Whatever the cluster does
wrong is a SandboxError. Never runs anything here, and never makes a sandbox of another kind instead.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from types import TracebackType
from typing import Final

from envs.interface import SandboxError
from envs.sandbox.bubblewrap import WORK_DIR, check_path
from envs.sandbox.files import FilesByCommand, succeeded
from envs.sandbox.limits import ExecResult, Limits
from envs.sandbox.pods.agent import COMMAND, FLOODED, RESULT, TIMED_OUT, TRUNCATED
from envs.sandbox.pods.life import PodLife
from envs.sandbox.pods.manifest import PodSettings, divide, make_manifest
from envs.sandbox.pods.session import LostError
from envs.sandbox.shell import LazyShell, Shell, ShellResult

MAX_COMMAND_BYTES: Final = 96 << 10  # the kernel takes 128 KiB in one argument
MAX_STDIN_BYTES: Final = 128 << 20
PATIENCE_S: Final = 15.0  # beyond a command's own time, for its answer to come
KILL_S: Final = 5.0  # for an agent that has nothing to do but kill
KILLED: Final = 137  # as a shell tells of SIGKILL

_settings = PodSettings()


def configure_pods(settings: PodSettings) -> None:
    """What pods of this process are like from now on; it is the process's own choice, made once at its start."""
    global _settings
    _settings = settings


def pod_settings() -> PodSettings:
    """What `configure_pods` was told last."""
    return _settings


class PodSandbox(FilesByCommand):
    """A pod in which untrusted commands run. Make it with `create`, close it always; closing deletes the pod.

    Belongs to one event loop. Its pod outlives a killed process by `orphan_s`, or until the next one removes it.
    """

    def __init__(self, life: PodLife, limits: Limits) -> None:
        self._life = life
        self._limits = limits
        self._lock = asyncio.Lock()
        self._shell = LazyShell(limits, self._make_shell, life.check, life.kill)

    @classmethod
    async def create(cls, files: Mapping[str, bytes] | None = None, limits: Limits | None = None) -> PodSandbox:
        """Make a pod with these files: relative paths lie in /workspace, those elsewhere are immutable.

        Takes seconds: a pool keeps it off the critical path. Raises ValueError for a bad path or too many files,
        ErgonEnvError where there is no cluster, SandboxError where the cluster makes no pod, with why.
        """
        limits = limits or Limits()
        changeable, given = divide(files or {})
        made = cls(await PodLife.begin(_settings, make_manifest(_settings, limits, given)), limits)
        try:
            for path, data in changeable.items():
                await made.write(path, data)
        except OSError as error:
            await made.close()
            raise SandboxError(f"a new sandbox does not take its files: {error}") from error
        except BaseException:
            await made.close()
            raise
        return made

    @property
    def name(self) -> str:
        """The pod's name."""
        return self._life.name

    @property
    def limits(self) -> Limits:
        """What it may use."""
        return self._limits

    @property
    def work_dir(self) -> str:
        """The folder in which commands begin and relative paths lie."""
        return WORK_DIR

    @property
    def alive(self) -> bool:
        """False once it was closed or killed, its pod has ended, or its connection broke."""
        return self._life.alive

    @property
    def worn(self) -> bool:
        """Whether too much of its life is over for it to be handed out."""
        return self._life.worn

    async def exec(self, command: str, timeout_s: float | None = None, output_bytes: int | None = None) -> ExecResult:
        """Run a command line with /bin/sh in /workspace, stdin empty; wait for its end, not for what it left behind.

        At `timeout_s`, or when it floods its output, the whole sandbox is killed. A command that kills the session has
        exit code 137 and no output. Raises ValueError for a command that is too long or holds a NUL, SandboxError where
        the sandbox is dead.
        """
        return await self._exec(command, b"", timeout_s, output_bytes)

    async def _exec(
        self, command: str, given: bytes, timeout_s: float | None = None, output_bytes: int | None = None
    ) -> ExecResult:
        """As `exec`, with this on its stdin."""
        script = command.encode()
        if len(script) > MAX_COMMAND_BYTES or b"\0" in script:
            raise ValueError(f"a sandbox command of {len(script)} bytes: at most {MAX_COMMAND_BYTES}, and no NUL")
        if len(given) > MAX_STDIN_BYTES:
            raise ValueError(f"{len(given)} bytes for a sandbox at once; at most {MAX_STDIN_BYTES}")
        limit_s = self._limits.timeout_s if timeout_s is None else timeout_s
        keep = self._limits.output_bytes if output_bytes is None else output_bytes
        body = COMMAND.pack(int(limit_s * 1000), keep, len(script)) + script + given
        async with self._lock:
            session = await self._life.connected()
            began = time.monotonic()
            try:
                answer = await session.ask(b"X", body, limit_s + PATIENCE_S)
            except LostError as error:
                if not error.by_policy:
                    raise self._life.died(str(error)) from None
                await self._life.connected()  # or else the pod is what ended, and the session with it
                if time.monotonic() - began >= limit_s + PATIENCE_S:  # it was stopped, and so was the clock of its time
                    self._life.kill("a command ran past its time limit")
                    return ExecResult(None, b"", b"", False, True, time.monotonic() - began)
                return ExecResult(KILLED, b"", b"", False, False, time.monotonic() - began)
            except BaseException:
                self._life.kill("a command was abandoned")
                raise
        code, flags, length = RESULT.unpack_from(answer)
        if flags & FLOODED:
            self._life.kill("a command flooded its output")
        if flags & TIMED_OUT:
            self._life.kill("a command ran past its time limit")
        streams = answer[RESULT.size : RESULT.size + length], answer[RESULT.size + length :]
        truncated, timed_out = bool(flags & TRUNCATED), bool(flags & TIMED_OUT)
        return ExecResult(None if code < 0 else code, *streams, truncated, timed_out, time.monotonic() - began)

    async def shell(
        self,
        command: str,
        timeout_s: float | None = None,
        output_bytes: int | None = None,
        on_output: Callable[[bytes], None] | None = None,
    ) -> ShellResult:
        """Run a command line in the persistent shell, which the first call starts. As of the other backends.

        Raises ValueError for a command that is too long or holds a NUL, SandboxError for a dead sandbox.
        """
        return await self._shell.run(command, timeout_s, output_bytes, on_output)

    def _make_shell(self) -> Shell:
        return Shell(self, self._life.ends.control, self._life.ends.output, WORK_DIR)

    async def start_shell(self) -> int:
        """For the shell: a descriptor that is readable once it has ended."""
        async with self._lock:
            session = await self._life.connected()
            try:
                pid = int(await session.ask(b"S"))
            except LostError as error:
                raise self._life.died(str(error)) from None
            return self._life.ends.open(session, pid)

    async def interrupt_shell(self) -> None:
        """For the shell: Ctrl-C. Where the agent does not take it, the shell will be ended with everything else."""
        session = await self._life.connected()
        try:
            await session.ask(b"I", timeout_s=KILL_S)
        except LostError as error:
            if not error.by_policy:
                raise self._life.died(str(error)) from None

    async def kill_all(self) -> None:
        """Kill every process of the sandbox, whatever it is doing. Files stay. Raises SandboxError.

        An agent that was killed or stopped is replaced by a new one, which kills the old one too.
        """
        async with self._lock:
            for _ in range(3):
                session = await self._life.connected()
                try:
                    await session.ask(b"K", timeout_s=KILL_S)
                    return
                except LostError as error:
                    if not error.by_policy:
                        raise self._life.died(str(error)) from None
        raise self._life.died("it could not be brought to rest")

    async def write(self, path: str, data: bytes) -> None:
        """Put a file where commands may write (relative: in /workspace). Raises OSError where the sandbox refuses."""
        target = PurePosixPath(check_path(path))
        folder = "" if str(target.parent) == WORK_DIR else f"mkdir -p {shlex.quote(str(target.parent))} && "
        succeeded(await self._exec(f"{folder}cat > {shlex.quote(str(target))}", data))

    async def unpack(self, archive: bytes) -> None:
        """Lay the files of a snapshot over its own. Raises OSError where that cannot be done."""
        # /workspace and /tmp themselves are mounts that are not the sandbox's to change.
        ours = "--no-recursion --anchored --exclude=workspace --exclude=tmp"
        tar = f"tar --extract --file=- --directory=/ --no-same-owner --no-overwrite-dir {ours}"
        succeeded(await self._exec(tar, archive))

    async def fork(self) -> PodSandbox:
        """A new pod with copies of this one's files in /workspace and /tmp; processes are not copied.

        Raises OSError where the files cannot be read, SandboxError where no pod can be made.
        """
        return await PodSandbox.restore(await self.snapshot(), limits=self._limits)

    @classmethod
    async def restore(
        cls, archive: bytes, files: Mapping[str, bytes] | None = None, limits: Limits | None = None
    ) -> PodSandbox:
        """A new pod with these files and those of a snapshot, unpacked inside. Raises OSError, SandboxError."""
        made = await cls.create(files, limits)
        try:
            await made.unpack(archive)
        except BaseException:
            await made.close()
            raise
        return made

    async def close(self) -> None:
        """Delete the pod, and with it all that runs. Idempotent. Does not wait until the node has ended it."""
        await self._life.close()
        self._shell.release()

    async def __aenter__(self) -> PodSandbox:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
