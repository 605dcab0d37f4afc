"""Places for blobs: never two in one place, used again when empty, bounded when nothing is stored."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.store import segments as module
from broker.store.segments import ALIGNMENT, Extent, Segments, padded

SMALL = 16 * ALIGNMENT


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", SMALL)
    monkeypatch.setattr(module, "KEEP_FREE_BYTES", 3 * SMALL)


def opened(directory: Path, *extents: Extent) -> Segments:
    segments = Segments(directory)
    segments.restore(extents)
    return segments


def files(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in directory.iterdir()}


def overlap(one: Extent, other: Extent) -> bool:
    return one.segment == other.segment and one.offset < other.end and other.offset < one.end


@given(st.lists(st.one_of(st.integers(1, 3 * SMALL), st.floats(0, 1), st.just("restart")), max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_two_blobs_share_a_place_whatever_comes_and_goes(steps: list[int | float | str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        segments, live = opened(directory), list[Extent]()
        for step in steps:
            if step == "restart":
                segments.close()
                segments = opened(directory, *live)
            elif isinstance(step, float) and live:
                segments.release(live.pop(int(step * (len(live) - 1))))
            elif isinstance(step, int):
                extent = segments.allocate(step)
                assert extent.size == step
                assert extent.offset % ALIGNMENT == 0
                assert extent.end <= segments.path(extent.segment).stat().st_size
                assert not any(overlap(extent, other) for other in live)
                live.append(extent)
        segments.close()
        kept = {segments.path(extent.segment).name for extent in live}
        assert kept <= set(files(directory))
        rest = sum(size for name, size in files(directory).items() if name not in kept)
        assert rest <= 3 * SMALL + padded(3 * SMALL)  # the free ones, and the one that is being filled


def test_what_is_empty_is_used_again(tmp_path: Path) -> None:
    segments = opened(tmp_path)
    for _ in range(10):
        extents = [segments.allocate(SMALL // 2) for _ in range(6)]
        for extent in extents:
            segments.release(extent)
    assert len(files(tmp_path)) <= 4
    segments.close()


def test_the_segment_in_use_begins_anew_when_all_of_it_is_free(tmp_path: Path) -> None:
    segments = opened(tmp_path)
    for _ in range(50):
        extent = segments.allocate(SMALL)
        assert (extent.segment, extent.offset) == (1, 0)
        segments.release(extent)
    segments.close()


def test_a_segment_far_larger_than_a_blob_is_left_to_larger_ones(tmp_path: Path) -> None:
    segments = opened(tmp_path)
    large = segments.allocate(3 * SMALL)
    small = segments.allocate(1)
    segments.release(large)
    filler = segments.allocate(SMALL)
    assert filler.segment not in (large.segment, small.segment)
    assert segments.allocate(2 * SMALL).segment == large.segment
    segments.close()


def test_a_restart_keeps_what_is_wanted_and_offers_the_rest(tmp_path: Path) -> None:
    segments = opened(tmp_path)
    wanted, other = segments.allocate(SMALL), segments.allocate(SMALL)
    segments.close()
    again = Segments(tmp_path)
    assert again.restore([wanted]) == 1
    assert again.free_bytes == SMALL
    assert again.allocate(SMALL).segment == other.segment
    assert again.allocate(SMALL).segment not in (wanted.segment, other.segment)
    again.close()


def test_a_full_disk_is_met_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = opened(tmp_path)
    kept = [segments.allocate(SMALL) for _ in range(3)]
    segments.release(kept[0])
    real, room = os.posix_fallocate, [0]

    def fallocate(descriptor: int, offset: int, length: int) -> None:
        if length > room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(OSError, match="No space"):
        segments.allocate(2 * SMALL)
    assert set(files(tmp_path)) == {segments.path(extent.segment).name for extent in kept[1:]}, (
        "free room was given back"
    )
    room[0] = 2 * ALIGNMENT  # less than a segment, and enough for this one
    extent = segments.allocate(ALIGNMENT + 1)
    assert segments.path(extent.segment).stat().st_size == 2 * ALIGNMENT
    segments.close()


def test_any_other_trouble_of_the_disk_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = opened(tmp_path)

    def broken(*_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "posix_fallocate", broken)
    with pytest.raises(OSError, match="Input/output"):
        segments.allocate(1)
    assert files(tmp_path) == {}
    segments.close()
