"""Checkpoints: complete or invisible. Owns the folder of checkpoints; knows nothing of what is in them.

A checkpoint is written into a hidden folder, every file synced, its manifest (names, sizes, hashes) last, and then made
visible by one rename. A process killed at any byte leaves the previous checkpoint the newest one. Where the engine did
not change since, its files are hard-linked instead of written. The newest ones are kept, and those of named labels.
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
    """A complete checkpoint on disk. `label`: the name it may be kept under when it is not one of the newest, or ""."""

    number: int
    directory: Path
    state: dict[str, Any]
    label: str = ""

    @property
    def engine_directory(self) -> Path | None:
        """What the training engine saved; None where it had nothing to save yet."""
        directory = self.directory / _ENGINE
        return directory if directory.is_dir() else None


@dataclass(frozen=True, slots=True)
class Draft:
    """A checkpoint that nobody sees yet. The engine's files go into `engine_directory`, which is empty."""

    number: int
    directory: Path

    @property
    def engine_directory(self) -> Path:
        """Where the training engine saves."""
        return self.directory / _ENGINE


class CheckpointStore:
    """Numbered checkpoints in one folder: the newest `keep` of them, and those with a label in `kept_labels`."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        self.kept_labels: frozenset[str] = frozenset()
        directory.mkdir(parents=True, exist_ok=True)

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, its hashes verified; incomplete and damaged ones are removed."""
        for leftover in self._directory.glob(f"{_HIDDEN}*"):
            shutil.rmtree(leftover)
        for number in sorted(self._numbers(), reverse=True):
            directory = self._path(number)
            problem = find_problem(directory)
            if problem is None:
                return read_checkpoint(directory)
            logger.warning("removing an unusable checkpoint path=%s problem=%s", directory, problem)
            shutil.rmtree(directory)
        return None

    def draft(self) -> Draft:
        """Begin a checkpoint; `complete` ends it. One at a time."""
        number = max(self._numbers(), default=0) + 1
        draft = Draft(number, self._directory / f"{_HIDDEN}{number}")
        shutil.rmtree(draft.directory, ignore_errors=True)
        draft.engine_directory.mkdir(parents=True)
        return draft

    def complete(
        self, draft: Draft, state: dict[str, Any], *, reuse: Checkpoint | None = None, label: str = ""
    ) -> Checkpoint:
        """Make a draft visible; durable when this returns. From any thread.

        Where the draft has no engine files, those of `reuse` (if any) are linked.
        """
        (draft.directory / _STATE).write_text(json.dumps(state))
        known: dict[str, dict[str, Any]] = {}
        if not any(draft.engine_directory.iterdir()):
            draft.engine_directory.rmdir()
            if reuse is not None and (linked := reuse.engine_directory) is not None:
                shutil.copytree(linked, draft.engine_directory, copy_function=os.link)
                known = _entries(reuse.directory, _ENGINE)
        _write_manifest(draft.directory, label, known)
        final = self._path(draft.number)
        draft.directory.rename(final)
        _sync(self._directory)
        self._prune()
        return Checkpoint(draft.number, final, state, label)

    def save(
        self, state: dict[str, Any], save_engine: Callable[[Path], None] | None, reuse: Checkpoint | None = None
    ) -> Checkpoint:
        """Draft and complete at once. `save_engine` writes into the empty folder it is given; None: see `complete`."""
        draft = self.draft()
        if save_engine is not None:
            save_engine(draft.engine_directory)
        return self.complete(draft, state, reuse=reuse)

    def _prune(self) -> None:
        kept = self.kept_labels
        for old in sorted(self._numbers())[: -self._keep]:
            if not kept or read_checkpoint(self._path(old)).label not in kept:
                self._remove(old)

    def _remove(self, number: int) -> None:
        # Renamed first: a half-deleted checkpoint must never look like a whole one.
        hidden = self._directory / f"{_HIDDEN}old-{number}"
        self._path(number).rename(hidden)
        shutil.rmtree(hidden)

    def _numbers(self) -> list[int]:
        return [int(path.name) for path in checkpoint_directories(self._directory)]

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:06d}"


def read_checkpoint(directory: Path) -> Checkpoint:
    """A visible checkpoint, its hashes not verified."""
    label = json.loads((directory / _MANIFEST).read_text()).get("label", "")
    return Checkpoint(int(directory.name), directory, json.loads((directory / _STATE).read_text()), label)


def checkpoint_directories(directory: Path) -> list[Path]:
    """The visible checkpoints in a folder, oldest first."""
    return sorted(path for path in directory.glob("*") if path.name.isdigit() and path.is_dir())


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


def _write_manifest(directory: Path, label: str, known: dict[str, dict[str, Any]]) -> None:
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
    draft.write_text(json.dumps({"label": label, "files": files}))
    _sync(draft)
    draft.replace(manifest)
    _sync(directory)


def _entries(directory: Path, folder: str) -> dict[str, dict[str, Any]]:
    """The manifest's entries of the files below `folder`."""
    files: dict[str, dict[str, Any]] = json.loads((directory / _MANIFEST).read_text())["files"]
    return {name: entry for name, entry in files.items() if name.startswith(f"{folder}/")}


def find_problem(directory: Path) -> str | None:
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
