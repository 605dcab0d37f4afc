"""What the sandbox tests look at on the host, from outside the sandbox."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import select
import signal
import time
from pathlib import Path

from envs.sandbox import Sandbox, bubblewrap

PATIENCE_S = 5.0


def unique_marker() -> str:
    """A number for a command line that no other process on the host has."""
    return str(10**9 + secrets.randbelow(10**9))


def processes_with(marker: str) -> list[int]:
    """Ids of the host's processes whose command line holds the marker, this one excepted."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command_line = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if marker.encode() in command_line:
            found.append(int(entry.name))
    return found


def children(parent: int | None = None) -> list[int]:
    """Ids of a process's children (this one's by default), ended but unreaped ones included."""
    parent = parent or os.getpid()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent:
            found.append(int(entry.name))
    return sorted(found)


def kill_from_outside(sandbox: Sandbox) -> None:
    """Kill a sandbox behind its owner's back, as the kernel would when memory runs out; returns when it is gone."""
    signal.pidfd_send_signal(sandbox._life.init_pidfd, signal.SIGKILL)
    assert select.select([sandbox._life.init_pidfd], [], [], 10)[0]


def files_of_sandboxes() -> list[Path]:
    """Files that the sandbox's own user id left where files in memory and temporary ones are."""
    places = (Path("/dev/shm"), Path("/tmp"), Path("/var/tmp"))
    return [path for place in places for path in place.iterdir() if path.lstat().st_uid == bubblewrap.SANDBOX_ID]


def open_descriptors() -> int:
    """How many file descriptors this process holds, what nobody can reach any more excepted."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


async def more_descriptors(before: int) -> int:
    """How many more it holds than `before`, for good: other tests' threads open and close some meanwhile."""
    deadline = time.monotonic() + PATIENCE_S
    while (more := open_descriptors() - before) > 0 and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return max(more, 0)
