"""Places written around the page cache hold what they were given, on any file system."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from broker.store import directfile
from broker.store.directfile import PIECE_BYTES, DirectWriter, open_direct, read_direct
from broker.store.segments import ALIGNMENT


def make_file(path: Path, num_bytes: int) -> Path:
    path.write_bytes(bytes(num_bytes))
    return path


@pytest.mark.parametrize(
    "sizes",
    [
        (ALIGNMENT,),
        (1, ALIGNMENT - 1),
        (PIECE_BYTES,),
        (PIECE_BYTES - 7, 0, 7, ALIGNMENT),
        (3 * PIECE_BYTES, ALIGNMENT),
    ],
)
def test_a_place_holds_the_frames_one_after_the_other_and_nothing_beside_it_changes(
    tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    rng, num_bytes = np.random.default_rng(1), sum(sizes)
    frames = [rng.bytes(size) for size in sizes]
    path = make_file(tmp_path / "file", num_bytes + 3 * ALIGNMENT)
    descriptor = open_direct(path, os.O_RDWR)
    DirectWriter().write(descriptor, ALIGNMENT, frames)
    memory = read_direct(descriptor, ALIGNMENT, num_bytes)
    os.close(descriptor)
    assert memory[:] == b"".join(frames)
    assert path.read_bytes() == bytes(ALIGNMENT) + b"".join(frames) + bytes(2 * ALIGNMENT)


def test_what_lies_beyond_the_end_reads_as_missing(tmp_path: Path) -> None:
    path = make_file(tmp_path / "file", ALIGNMENT)
    path.write_bytes(b"x" * ALIGNMENT)
    descriptor = open_direct(path, os.O_RDONLY)
    assert read_direct(descriptor, 0, 2 * ALIGNMENT)[:] == b"x" * ALIGNMENT + bytes(ALIGNMENT)
    os.close(descriptor)


def test_a_file_system_without_direct_access_is_used_plainly_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directfile._say_that_it_is_slower.cache_clear()
    real_open = os.open

    def open_plainly(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", open_plainly)
    descriptor = open_direct(make_file(tmp_path / "file", ALIGNMENT), os.O_RDWR)
    monkeypatch.undo()
    assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
    DirectWriter().write(descriptor, 0, [b"y" * ALIGNMENT])
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"y" * ALIGNMENT
    assert [record.message for record in caplog.records if "page cache" in record.message], "it does so silently"


def test_short_writes_are_continued_and_none_at_all_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = make_file(tmp_path / "file", 4 * ALIGNMENT), os.pwrite
    descriptor = os.open(path, os.O_RDWR)
    content = np.random.default_rng(2).bytes(4 * ALIGNMENT)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:ALIGNMENT], offset))
    DirectWriter().write(descriptor, 0, [content])
    assert path.read_bytes() == content
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="nothing of 16384 bytes was written"):
        DirectWriter().write(descriptor, 0, [content])
    os.close(descriptor)
