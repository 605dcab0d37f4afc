"""What a sandbox's files came to, read from a tar archive in the parent. Runs nothing, extracts nothing to a disk.

The archive was made after all processes of the policy were dead, by a program of the read-only system.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass

from envs.sandbox import AnySandbox

MAX_STATE_BYTES = 32 << 20
MAX_ENTRIES = 20_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One file (`data`), folder (both None) or symbolic link (`target`), with its permission bits."""

    mode: int
    data: bytes | None = None
    target: str | None = None


State = Mapping[str, Entry]
"""Path relative to /workspace -> what lies there."""


class StateError(Exception):
    """The files cannot be read as a state, by the policy's doing: too large, too many, or a broken archive."""


def parse_state(archive: bytes) -> dict[str, Entry]:
    """The entries under workspace/. Raises StateError."""
    found: dict[str, Entry] = {}
    left = MAX_STATE_BYTES
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for member in tar:
                name = member.name.removeprefix("workspace").lstrip("/")
                left -= member.size
                if left < 0 or len(found) >= MAX_ENTRIES:
                    raise StateError("the files left behind are too many or too large")
                if not member.name.startswith("workspace/"):
                    continue
                if member.isreg():
                    file = tar.extractfile(member)
                    found[name] = Entry(member.mode, data=file.read() if file else b"")
                elif member.islnk():
                    original = found.get(member.linkname.removeprefix("workspace/"))
                    found[name] = Entry(member.mode, data=original.data if original else None)
                elif member.issym():
                    found[name] = Entry(member.mode, target=member.linkname)
                elif member.isdir():
                    found[name] = Entry(member.mode)
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise StateError(f"the files left behind cannot be read ({error})") from error
    return found


async def final_state(sandbox: AnySandbox) -> dict[str, Entry]:
    """Kill all that runs in the sandbox, then read its files. Raises StateError, SandboxError."""
    await sandbox.kill_all()
    try:
        return parse_state(await sandbox.snapshot(MAX_STATE_BYTES))
    except OSError as error:
        raise StateError(str(error)) from error
