"""Copies of the packages that this machine's system holds, where a policy could read the right version. Only looks.

Sandboxes show the system's programs and libraries, and some of those bring libraries of their own. What looks like a
copy, of whatever version, is hidden from the sandboxes of this environment. Python's own library is none: a file is a
copy where most functions that it defines have names that the package defines too.
"""

from __future__ import annotations

import functools
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from envs.repo.packages import packages
from envs.repo.sources import tree
from envs.sandbox.bubblewrap import SYSTEM_PATHS

DEFINED = re.compile(rb"^\s*(?:async )?def (\w+)", re.MULTILINE)
ARCHIVES = (".whl", ".zip", ".egg", ".pyz")
MIN_FUNCTIONS = 4
SHARE = 0.5


@functools.lru_cache(maxsize=8)
def copies(names: tuple[str, ...], cache: str) -> tuple[str, ...]:
    """The files and folders to hide, for these packages; blocks for a second or so. Raises SandboxError."""
    wanted = {name: _functions_of(name, cache) for name in names}
    found: set[str] = set()
    for system in {os.path.realpath(path) for path in SYSTEM_PATHS}:
        for path, name in _candidates(Path(system), set(wanted)):
            if name is None:
                if _holds_copy(path, wanted):
                    found.add(str(path))
            elif _is_copy(_content(path), wanted[name]):
                found.add(str(path.parent if path.parent.name == name else path))
    # What lies in a folder that is hidden needs no hiding, and could not be.
    return tuple(sorted(path for path in found if not any(path.startswith(f"{other}/") for other in found)))


def _functions_of(name: str, cache: str) -> frozenset[bytes]:
    package = packages()[name]
    code = (data for path, data in tree(package, cache).items() if package.is_code(path))
    return frozenset(word for data in code for word in DEFINED.findall(data))


def _candidates(system: Path, names: set[str]) -> Iterator[tuple[Path, str | None]]:
    """Python files that bear a package's name, or lie in a folder that does; and all archives, without a name."""
    if system.is_dir():
        for folder, _, files in os.walk(system):
            top = os.path.basename(folder)  # noqa: PTH119  a hundred thousand of them
            for file in files:
                if file.endswith(".py") and (top in names or file[:-3] in names):
                    yield Path(folder, file), top if top in names else file[:-3]
                elif file.endswith(ARCHIVES):
                    yield Path(folder, file), None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # nobody can read it in a sandbox either


def _holds_copy(path: Path, wanted: Mapping[str, frozenset[bytes]]) -> bool:
    """Whether an archive, as wheels are, has a copy of one of the packages in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                parts = PurePosixPath(member)
                name = parts.parent.name if parts.parent.name in wanted else parts.stem
                if parts.suffix == ".py" and name in wanted and _is_copy(_member(archive, member), wanted[name]):
                    return True
    except (OSError, zipfile.BadZipFile):
        return False  # it cannot be read, or is no archive
    return False


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError):
        return b""  # damaged, encrypted or packed in a way that Python does not know; the others are looked at


def _is_copy(data: bytes, functions: frozenset[bytes]) -> bool:
    defined = set(DEFINED.findall(data))
    return len(defined) >= MIN_FUNCTIONS and len(defined & functions) >= SHARE * len(defined)
