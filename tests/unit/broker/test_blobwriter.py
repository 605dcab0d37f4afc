"""Files written around the page cache hold what they were given, on any file system; a full disk leaves none."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from broker.protocol.frames import Frame
from broker.store import blobwriter
from broker.store.blobwriter import ALIGNMENT, DIRECT_BYTES, PIECE_BYTES, BlobWriter

SIZES = (
    (0,),
    (1,),
    (DIRECT_BYTES - 1,),
    (DIRECT_BYTES,),
    (DIRECT_BYTES + 1, 0, 3),
    (PIECE_BYTES,),
    (PIECE_BYTES - 7, 7, ALIGNMENT),
    (3 * PIECE_BYTES + 12_345, 17, 2 * PIECE_BYTES + 1),
)


@pytest.fixture
def writer() -> Iterator[BlobWriter]:
    opened = BlobWriter()
    yield opened
    opened.close()


def make_frames(sizes: tuple[int, ...]) -> list[Frame]:
    rng = np.random.default_rng(1)
    return [rng.bytes(size) for size in sizes]


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_file_holds_the_frames_one_after_the_other(
    writer: BlobWriter, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    frames = make_frames(sizes)
    os.close(writer.write(tmp_path / "blob", frames).result())
    assert (tmp_path / "blob").read_bytes() == b"".join(frames)


def test_several_at_a_time_do_not_mix(writer: BlobWriter, tmp_path: Path) -> None:
    contents = [np.random.default_rng(i).bytes(2 * PIECE_BYTES + i) for i in range(12)]
    begun = [writer.write(tmp_path / str(i), [content]) for i, content in enumerate(contents)]
    for future in begun:
        os.close(future.result())
    assert [(tmp_path / str(i)).read_bytes() for i in range(12)] == contents


@pytest.mark.parametrize("refuses", ["open", "write"])
def test_a_file_system_without_direct_writes_has_them_plainly(
    writer: BlobWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refuses: str,
) -> None:
    blobwriter._say_that_it_is_slower.cache_clear()
    real_open, real_write = os.open, os.write

    def open_plainly(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    def write_plainly(descriptor: int, data: memoryview) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, data)

    monkeypatch.setattr(os, refuses, {"open": open_plainly, "write": write_plainly}[refuses])
    frames = make_frames((2 * PIECE_BYTES + 5,))
    future = writer.write(tmp_path / "blob", frames)
    descriptor = future.result()
    monkeypatch.undo()
    assert not is_direct(descriptor)
    os.close(descriptor)
    assert (tmp_path / "blob").read_bytes() == frames[0]
    assert [record.message for record in caplog.records if "page cache" in record.message], "it does so silently"


@pytest.mark.parametrize("room", [0, 100, ALIGNMENT, PIECE_BYTES + 100])
def test_a_disk_that_fills_up_leaves_no_file(
    writer: BlobWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    real, left = os.write, [room]

    def write(descriptor: int, data: memoryview) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        num = min(len(data), left[0])
        if is_direct(descriptor):  # whole pages only
            num = num // ALIGNMENT * ALIGNMENT
        left[0] -= num
        return real(descriptor, data[:num]) if num else 0

    monkeypatch.setattr(os, "write", write)
    error = writer.write(tmp_path / "blob", make_frames((3 * PIECE_BYTES,))).exception()
    monkeypatch.undo()
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
