"""The real packages that bugs are put into: which source distributions, by hash, and what in them is what."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PINS = Path(__file__).with_name("packages.toml")


@dataclass(frozen=True, slots=True)
class Pin:
    """One file of the package index: `NAME==VERSION`, its name and its SHA-256."""

    name: str
    version: str
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Package:
    """One package. Paths are relative to the top of its source distribution.

    root: the folder that is put on the path. code: folders and modules of the package itself. tests: what pytest is
    given. test_paths: the paths, tests' own helpers included, that a working copy does not have.
    """

    pin: Pin
    licence: str
    root: str
    code: tuple[str, ...]
    tests: tuple[str, ...]
    test_paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """As the package index names it."""
        return self.pin.name

    def is_test(self, path: str) -> bool:
        """Whether the path belongs to the tests."""
        return _within(path, self.test_paths)

    def is_code(self, path: str) -> bool:
        """Whether the path is a Python file of the package itself, which is what a policy repairs."""
        return path.endswith(".py") and _within(path, self.code) and not self.is_test(path)

    def is_shown(self, path: str) -> bool:
        """Whether a working copy has the file: the code, and what stands at the top to be read."""
        top = ("/" not in path and path.endswith((".md", ".rst", ".toml", ".txt", ".cfg"))) or path.startswith("LICEN")
        return self.is_code(path) or (not self.is_test(path) and (_within(path, self.code) or top))

    def module(self, path: str) -> str:
        """The name under which a file of the code is imported."""
        parts = PurePosixPath(path).relative_to(self.root or ".").with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _within(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


@functools.cache
def packages() -> Mapping[str, Package]:
    """Name -> package."""
    read = tomllib.loads(PINS.read_text())
    found = {}
    for name, row in read["packages"].items():
        pin = Pin(name, row["version"], row["file"], row["sha256"])
        lists = (tuple(row[key]) for key in ("code", "tests", "test_paths"))
        found[name] = Package(pin, row["licence"], row["root"], *lists)
    return found


@functools.cache
def kit() -> tuple[Pin, ...]:
    """The wheels that the hidden tests run with: pytest, and what it needs."""
    rows = tomllib.loads(PINS.read_text())["kit"]
    return tuple(Pin(name, row["version"], row["file"], row["sha256"]) for name, row in rows.items())
