"""Checkpoints: complete or invisible, wherever the writer is killed and whatever is truncated."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from learner.checkpoint import Checkpoint, CheckpointStore


def writer(payload: bytes):
    def save(directory: Path) -> None:
        (directory / "nested").mkdir()
        (directory / "weights.bin").write_bytes(payload)
        (directory / "nested" / "optimizer.bin").write_bytes(payload[::-1])

    return save


def save(store: CheckpointStore, step: int) -> Checkpoint:
    return store.save({"step": step}, writer(bytes([step]) * 100))


def test_newest_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    assert store.newest() is None
    for step in range(4):
        save(store, step)
    newest = CheckpointStore(tmp_path, keep=2).newest()
    assert newest is not None
    assert newest.state == {"step": 3}
    assert newest.engine_directory is not None
    assert (newest.engine_directory / "nested" / "optimizer.bin").read_bytes() == bytes([3]) * 100
    assert len(list(tmp_path.iterdir())) == 2


def test_state_only_and_linked_checkpoints(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    first = store.save({"phase": "before"}, None)
    assert first.engine_directory is None
    second = store.save({"phase": "train"}, writer(b"abc"), first)
    third = store.save({"phase": "after"}, None, second)
    newest = store.newest()
    assert newest is not None
    assert newest.number == third.number
    assert newest.engine_directory is not None
    assert (newest.engine_directory / "weights.bin").read_bytes() == b"abc"  # survives the removal of `second`
    assert not second.directory.exists()


def test_any_truncated_file_makes_the_previous_checkpoint_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "whole", keep=3)
    save(store, 1)
    second = save(store, 2)
    files = [p.relative_to(second.directory) for p in second.directory.rglob("*") if p.is_file()]
    assert len(files) == 4
    for name in files:
        size = (second.directory / name).stat().st_size
        for cut in sorted({0, 1, size // 2, size - 1}):
            copy = tmp_path / f"{name.name}-{cut}"
            shutil.copytree(tmp_path / "whole", copy)
            os.truncate(copy / second.directory.name / name, cut)
            newest = CheckpointStore(copy, keep=3).newest()
            assert newest is not None
            assert newest.state == {"step": 1}, f"{name} cut to {cut} bytes"


@pytest.mark.parametrize("damage", ["missing", "extra", "flipped"])
def test_any_other_damage_is_found(tmp_path: Path, damage: str) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    save(store, 1)
    victim = save(store, 2).directory / "engine" / "weights.bin"
    if damage == "missing":
        victim.unlink()
    elif damage == "extra":
        victim.with_name("stray").write_bytes(b"x")
    else:
        victim.write_bytes(bytes([7]) + victim.read_bytes()[1:])
    newest = store.newest()
    assert newest is not None
    assert newest.state == {"step": 1}


# Kills itself at the n-th call of any function that changes the disk.
KILLED_WRITER = """
import os, shutil, signal, sys
from pathlib import Path
from learner.checkpoint import CheckpointStore

left = int(sys.argv[2])
def deadly(function):
    def wrapper(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper

def save(directory):
    (directory / "weights.bin").write_bytes(b"n" * 1000)

store = CheckpointStore(Path(sys.argv[1]), keep=2)
for name in ("fsync", "link"):
    setattr(os, name, deadly(getattr(os, name)))
for name in ("rename", "replace", "write_text", "write_bytes", "mkdir"):
    setattr(Path, name, deadly(getattr(Path, name)))
shutil.rmtree = deadly(shutil.rmtree)
store.save({"step": 3}, save)
"""


def test_killed_at_any_change_of_the_disk_something_complete_remains(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    store = CheckpointStore(whole, keep=2)
    save(store, 1)
    save(store, 2)
    seen = set()
    for moment in range(1, 60):
        copy = tmp_path / f"killed-{moment}"
        shutil.copytree(whole, copy)
        result = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(copy), str(moment)], check=False, timeout=60)
        survivor = CheckpointStore(copy, keep=2)
        newest = survivor.newest()
        assert newest is not None
        seen.add(newest.state["step"])
        assert newest.state["step"] in (2, 3)
        if newest.state["step"] == 2:
            assert (newest.directory / "engine" / "weights.bin").read_bytes() == bytes([2]) * 100
        assert not list(copy.glob(".tmp-*"))
        assert save(survivor, 4).number > newest.number
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL
    else:
        pytest.fail("the writer never came through")
    assert seen == {2, 3}
