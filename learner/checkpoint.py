"""Checkpoints: complete or invisible. Owns the folder of checkpoints; knows nothing of what is in them.

A checkpoint is written into a hidden folder, every file synced, its manifest (names, sizes, hashes) last, and then made
visible by one rename. A process killed at any byte leaves the previous checkpoint the newest one. Where the engine did
not change since, its files are hard-linked instead of written.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_STATE = "state.json"
_ENGINE = "engine"
_HIDDEN = ".tmp-"
_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    number: int
    directory: Path
    state: dict[str, Any]

    @property
    def engine_directory(self) -> Path | None:
        """What the training engine saved; None where it had nothing to save yet."""
        directory = self.directory / _ENGINE
        return directory if directory.is_dir() else None


class CheckpointStore:
    """Numbered checkpoints in one folder, the newest `keep` of them."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        directory.mkdir(parents=True, exist_ok=True)

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, its hashes verified; incomplete and damaged ones are removed."""
        for leftover in self._directory.glob(f"{_HIDDEN}*"):
            shutil.rmtree(leftover)
        for number in sorted(self._numbers(), reverse=True):
            directory = self._path(number)
            problem = _problem(directory)
            if problem is None:
                state = json.loads((directory / _STATE).read_text())
                return Checkpoint(number, directory, state)
            logger.warning("removing an unusable checkpoint path=%s problem=%s", directory, problem)
            shutil.rmtree(directory)
        return None

    def save(
        self, state: dict[str, Any], save_engine: Callable[[Path], None] | None, reuse: Checkpoint | None = None
    ) -> Checkpoint:
        """Write a checkpoint and make it visible; durable when this returns.

        `save_engine` writes into the empty folder it is given. Where it is None, the engine's files of `reuse` (if any)
        are linked.
        """
        number = max(self._numbers(), default=0) + 1
        temporary = self._directory / f"{_HIDDEN}{number}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        (temporary / _STATE).write_text(json.dumps(state))
        linked = reuse.engine_directory if reuse and save_engine is None else None
        if save_engine is not None:
            (temporary / _ENGINE).mkdir()
            save_engine(temporary / _ENGINE)
        elif linked is not None:
            shutil.copytree(linked, temporary / _ENGINE, copy_function=os.link)
        known = _entries(reuse.directory, _ENGINE) if reuse and linked is not None else {}
        _write_manifest(temporary, known)
        final = self._path(number)
        temporary.rename(final)
        _sync(self._directory)
        for old in sorted(self._numbers())[: -self._keep]:
            self._remove(old)
        return Checkpoint(number, final, state)

    def _remove(self, number: int) -> None:
        # Renamed first: a half-deleted checkpoint must never look like a whole one.
        hidden = self._directory / f"{_HIDDEN}old-{number}"
        self._path(number).rename(hidden)
        shutil.rmtree(hidden)

    def _numbers(self) -> list[int]:
        return [int(path.name) for path in self._directory.iterdir() if path.name.isdigit() and path.is_dir()]

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:06d}"


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / _MANIFEST)


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_manifest(directory: Path, known: dict[str, dict[str, Any]]) -> None:
    """Sync every file and folder, then write the manifest. `known`: entries of files that are linked, not new."""
    files: dict[str, dict[str, Any]] = {}
    for path in _files(directory):
        name = path.relative_to(directory).as_posix()
        if name in known:
            files[name] = known[name]
            continue
        _sync(path)
        files[name] = {"size": path.stat().st_size, "xxh3_128": _hash(path)}
    for folder in [path for path in directory.rglob("*") if path.is_dir()]:
        _sync(folder)
    manifest = directory / _MANIFEST
    draft = directory / f"{_MANIFEST}.tmp"
    draft.write_text(json.dumps({"files": files}))
    _sync(draft)
    draft.replace(manifest)
    _sync(directory)


def _entries(directory: Path, folder: str) -> dict[str, dict[str, Any]]:
    """The manifest's entries of the files below `folder`."""
    files: dict[str, dict[str, Any]] = json.loads((directory / _MANIFEST).read_text())["files"]
    return {name: entry for name, entry in files.items() if name.startswith(f"{folder}/")}


def _problem(directory: Path) -> str | None:
    """Why this is no complete checkpoint, or None."""
    try:
        files = json.loads((directory / _MANIFEST).read_text())["files"]
        present = {path.relative_to(directory).as_posix() for path in _files(directory)}
        if present != set(files) or _STATE not in files:
            return f"files differ from the manifest: {sorted(present ^ set(files))[:3]}"
        for name, entry in files.items():
            path = directory / name
            if path.stat().st_size != entry["size"] or _hash(path) != entry["xxh3_128"]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None
