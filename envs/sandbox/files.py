"""A sandbox's files, moved by commands in it: there a path can reach no more than a command can. Starts nothing."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod

from envs.sandbox import bubblewrap
from envs.sandbox.limits import ExecResult


class FilesByCommand(ABC):
    """What backends with one `exec` have in common of reading files."""

    @abstractmethod
    async def exec(self, command: str, timeout_s: float | None = None, output_bytes: int | None = None) -> ExecResult:
        """Run a command with /bin/sh."""

    async def snapshot(self, max_bytes: int = 64 << 20) -> bytes:
        """A tar archive of /workspace and /tmp, as they are; unreadable files are left out. No process is stopped.

        Raises OSError where it is larger than `max_bytes` or cannot be made.
        """
        tar = "exec tar --create --sparse --ignore-failed-read --file=- --directory=/ workspace tmp"
        result = await self.exec(tar, output_bytes=max_bytes)
        if result.truncated or result.exit_code not in (0, 1):  # 1: a file changed as it was read
            reason = "too large" if result.truncated else result.stderr.decode(errors="replace").strip()[:200]
            raise OSError(f"the sandbox's files cannot be read: {reason}")
        return result.stdout

    async def read(self, path: str, max_bytes: int = 1 << 20) -> bytes:
        """A file's content. Raises OSError where it cannot be read or is larger than `max_bytes`."""
        target = bubblewrap.check_path(path)
        result = succeeded(await self.exec(f"exec head -c {max_bytes + 1} {shlex.quote(target)}", None, max_bytes + 1))
        if len(result.stdout) > max_bytes:
            raise OSError(f"{target} in the sandbox is larger than {max_bytes} bytes")
        return result.stdout


def succeeded(result: ExecResult) -> ExecResult:
    """The result of a command of our own, which must exit with 0. Raises OSError with its complaint."""
    if not result.ok:
        reason = "it timed out" if result.timed_out else result.stderr.decode(errors="replace").strip()
        raise OSError(f"the sandbox refused: {reason}")
    return result
