"""What every sandbox can do, and the backends by name. Chooses nothing by itself: there is no fallback to another one.

`bubblewrap` is the sandbox (session.py). `pod` is a Kubernetes pod for each (pods/), and is refused where there is no
cluster. `trusted` is a plain subprocess without any wall, for code of the environment's author, never of a policy; it
must be asked for by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from envs.interface import ErgonEnvError
from envs.sandbox.limits import ExecResult, Limits
from envs.sandbox.pods import PodSandbox
from envs.sandbox.session import Sandbox
from envs.sandbox.shell import ShellResult
from envs.sandbox.trusted import TrustedSandbox


class AnySandbox(Protocol):
    """A place for commands, made by `create_sandbox` or a pool. Close it always; belongs to one event loop."""

    @property
    def alive(self) -> bool:
        """False once it was closed, killed, or has ended by itself."""

    @property
    def limits(self) -> Limits:
        """What it may use."""

    @property
    def work_dir(self) -> str:
        """The folder in which commands begin and relative paths lie."""

    async def exec(self, command: str, timeout_s: float | None = None, output_bytes: int | None = None) -> ExecResult:
        """Run a command with /bin/sh, apart from all others. Past its time the whole sandbox is killed."""

    async def shell(
        self,
        command: str,
        timeout_s: float | None = None,
        output_bytes: int | None = None,
        on_output: Callable[[bytes], None] | None = None,
    ) -> ShellResult:
        """Run a command in the persistent shell. Past its time the command is interrupted."""

    async def read(self, path: str, max_bytes: int = 1 << 20) -> bytes:
        """A file's content. Raises OSError."""

    async def write(self, path: str, data: bytes) -> None:
        """Write a file. Raises OSError."""

    async def kill_all(self) -> None:
        """Kill every process in it; its files stay, and so does it."""

    async def snapshot(self, max_bytes: int = 64 << 20) -> bytes:
        """Its files as a tar archive. Raises OSError."""

    async def fork(self) -> AnySandbox:
        """A new sandbox with copies of the files, and none of the processes."""

    async def close(self) -> None:
        """Kill everything in it and release it; idempotent."""

    async def __aenter__(self) -> Self:
        """Itself."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""


BACKENDS: Mapping[str, type[Sandbox] | type[TrustedSandbox] | type[PodSandbox]] = {
    "bubblewrap": Sandbox,
    "trusted": TrustedSandbox,
    "pod": PodSandbox,
}
WALLED = ("bubblewrap", "pod")
"""Backends in which a policy's commands may run."""


def check_backend(name: str) -> str:
    """The name of a backend. Raises ErgonEnvError for any other."""
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ErgonEnvError(f"there is no sandbox backend {name!r}: {hint}choose {' or '.join(BACKENDS)}")
    return name


def check_walled(name: str) -> str:
    """The name of a backend that a policy's commands may run in. Raises ErgonEnvError for any other."""
    if check_backend(name) not in WALLED:
        raise ErgonEnvError(
            f"the sandbox backend {name!r} has no walls, and this environment's tools run what the policy says: choose "
            f"{' or '.join(WALLED)}"
        )
    return name


async def create_sandbox(
    backend: str = "bubblewrap",
    files: Mapping[str, bytes] | None = None,
    limits: Limits | None = None,
    hidden: Sequence[str] = (),
) -> AnySandbox:
    """Make a sandbox. hidden: files and directories of the system that are empty in it.

    Raises ErgonEnvError for an unknown backend, or one that hides nothing; SandboxError where none can be made.
    """
    made = BACKENDS[check_backend(backend)]
    if made is Sandbox:
        return await Sandbox.create(files, limits, hidden=hidden)
    if hidden:
        raise ErgonEnvError(f"the sandbox backend {backend!r} hides nothing of the system; use bubblewrap")
    return await made.create(files, limits)
