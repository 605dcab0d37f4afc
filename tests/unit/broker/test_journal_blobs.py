"""Results beside the database: whole or said to be damaged, at whatever byte a write was torn; kept while named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.ledger.events import JournalRecall
from broker.protocol.commands import TicketState as T
from broker.store.blobs import BlobStore, DamagedError
from broker.store.journal import Journal
from broker.store.rows import pack_key
from broker.store.segments import ALIGNMENT, Segments
from tests.unit.broker.stored import end, load, make_message, put, rows, same, segment, stored_blobs, take

BLOB_BYTES = 1000


def open_journal(directory: Path, fsync: str = "always") -> Journal:
    return Journal(directory, "run", "always" if fsync == "always" else "interval", blob_bytes=BLOB_BYTES)


def test_large_arrays_lie_beside_the_database_until_the_ticket_ends(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    large = put(journal, "large")
    put(journal, "small", message=make_message("small", num_tokens=100))
    journal.commit()
    (blob,) = stored_blobs(journal)
    assert blob.extent.size == 9000
    arrays = b"".join(array.tobytes() for array in make_message("large").arrays)
    assert segment(tmp_path, blob).read_bytes()[:9000] == arrays
    journal.close()
    journal = open_journal(tmp_path)
    assert same(load(journal, "large"), make_message("large"))
    assert same(load(journal, "small"), make_message("small", num_tokens=100))
    loaded = load(journal, "large")
    end(journal, large, "large")
    journal.commit()
    assert stored_blobs(journal) == []
    put(journal, "other", message=make_message("other", salt=1))
    journal.commit()
    assert same(loaded, make_message("large"))  # what is being sent stays what it is, though its place has others
    journal.close()


def test_a_parcel_of_several_has_one_place_until_the_last_of_them_has_ended(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    seqs = put(journal, "a", "b", "c")
    journal.commit()
    (blob,) = stored_blobs(journal)
    assert blob.extent.size == 27_000
    end(journal, seqs[:2], "a", "b")
    journal.commit()
    put(journal, "d", message=make_message("d", salt=1))
    journal.commit()
    journal.close()
    journal = open_journal(tmp_path)
    assert same(load(journal, "c"), make_message("a", "b", "c"))
    assert same(load(journal, "d"), make_message("d", salt=1))
    journal.close()


def test_a_place_is_used_again_only_when_its_end_is_durable(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    seqs = put(journal, "a")
    journal.commit()
    (first,) = stored_blobs(journal)
    end(journal, seqs, "a")
    seqs = put(journal, "b", message=make_message("b", salt=1))  # in one commit one goes and another comes
    journal.commit()
    (second,) = stored_blobs(journal)
    assert second.extent.offset >= first.extent.end
    assert segment(tmp_path, first).read_bytes()[:9000] == b"".join(a.tobytes() for a in make_message("a").arrays)
    end(journal, seqs, "b")
    journal.commit()
    put(journal, "c")
    journal.commit()
    assert stored_blobs(journal)[0].extent == first.extent
    journal.close()


def test_what_a_crash_leaves_is_room_for_others(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    put(journal, "a")
    journal.commit()
    put(journal, "open", message=make_message("open", salt=1))
    journal._parcels.settle()
    # Killed here: the second result's bytes are there, its row is not.
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path, killed, ignore=shutil.ignore_patterns("killed"))
    segments = Segments(killed / "blobs")
    segments.restore([stored_blobs(journal)[0].extent])
    segments._make(4 * ALIGNMENT)  # and a segment that nothing has been written to
    again = open_journal(killed)
    assert again._parcels.free_blob_bytes == 4 * ALIGNMENT
    assert len(stored_blobs(again)) == 1
    assert same(load(again, "a"), make_message("a"))
    again.close()
    journal.close()


def damage(path: Path, how: str, offset: int) -> None:
    with path.open("r+b") as file:
        if how == "cut":
            file.truncate(offset)
        else:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_damaged_blob_is_never_taken_for_whole(tmp_path: Path, how: str) -> None:
    """Also where a write was torn: the rest of the place has what was there before, or nothing."""
    journal = open_journal(tmp_path)
    put(journal, "a")
    journal.commit()
    (blob,) = stored_blobs(journal)
    path = segment(tmp_path, blob)
    path.write_bytes(path.read_bytes()[: blob.extent.end])  # the rest of the segment only takes time
    whole = path.read_bytes()
    for offset in [*range(0, blob.extent.size, 97), blob.extent.size - 1]:
        damage(path, how, offset)
        with pytest.raises(DamagedError, match=f"blob {blob.digest.hex()} of 9000 bytes at 0 in segment 1"):
            load(journal, "a")
        path.write_bytes(whole)
    assert same(load(journal, "a"), make_message("a"))
    path.unlink()
    with pytest.raises(DamagedError, match="No such file"):
        load(journal, "a")
    journal.close()


def test_a_row_with_other_bytes_is_damaged_too(tmp_path: Path) -> None:
    """Of every byte of a row: it is loaded as it was written, or said to be damaged; at the start too."""
    journal = open_journal(tmp_path)
    message = make_message("a", "b", num_tokens=10)
    put(journal, "a", "b", message=message)
    journal.commit()
    (_, whole), table = dict(rows(journal))["parcels"][0], journal._db.tables.parcels
    for offset in range(len(whole)):
        row = bytearray(whole)
        row[offset] ^= 1
        journal._db.write.put(pack_key(1), bytes(row), db=table)
        with pytest.raises(DamagedError, match="parcel 1"):
            load(journal, "a")
    journal._db.write.put(pack_key(1), whole[:30], db=table)  # its head cannot be read
    journal.commit()
    journal.close()
    journal = open_journal(tmp_path)
    assert [row.state for row in journal.live()] == [T.ISSUED, T.ISSUED]
    assert journal.place("a") is None
    put(journal, "c")
    journal.commit()
    assert [key for key, _ in dict(rows(journal))["parcels"]] == [pack_key(2)]
    journal.close()


@pytest.mark.parametrize("others", [(), ("b", "c")])
def test_a_recalled_ticket_is_issued_and_takes_another_result(tmp_path: Path, others: tuple[str, ...]) -> None:
    journal = open_journal(tmp_path)
    ids = ("a", *others)
    seqs = put(journal, *ids)
    journal.commit()
    damage(segment(tmp_path, stored_blobs(journal)[0]), "changed", 10)
    journal.apply(JournalRecall(seqs[0], "a"))
    journal.commit()
    assert len(stored_blobs(journal)) == (1 if others else 0)
    for _ in range(2):
        assert journal.place("a") is None
        row = next(iter(journal.live()))
        assert (row.state, row.ticket.attempt, row.result_seq, row.source) == (T.ISSUED, 0, 0, "")
        assert [row.state for row in journal.live()][1:] == [T.DELIVERED] * len(others)
        journal.close()
        journal = open_journal(tmp_path)
    take(journal, seqs[:1], ["a"], make_message("a", salt=2), "s2")
    journal.commit()
    for _ in range(2):
        assert same(load(journal, "a"), make_message("a", salt=2))
        assert next(iter(journal.live())).source == "s2"
        journal.close()
        journal = open_journal(tmp_path)
    end(journal, seqs, *ids)
    journal.commit()
    stored = dict(rows(journal))
    assert stored["parcels"] == stored["states"] == stored["tickets"] == []
    journal.close()


class Spy:
    """What was synced, in order, as the names of files and directories."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name in ("fsync", "fdatasync"):
            self._watch(monkeypatch, name)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        real: Callable[[int], None] = getattr(os, name)

        def sync(descriptor: int) -> None:
            real(descriptor)
            self.names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

        monkeypatch.setattr(os, name, sync)

    def take(self) -> list[str]:
        names, self.names = self.names, []
        return names


SEGMENT = "00000001.segment"


def test_always_syncs_bytes_before_the_commit_and_the_directory_of_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(tmp_path)
    put(journal, "a")
    spy = Spy(monkeypatch)
    monkeypatch.setattr(journal._db, "flush", lambda: spy.names.append("commit"))
    journal.prepare()
    journal.flush()
    assert spy.take() == [SEGMENT, "blobs", "commit"]
    monkeypatch.undo()
    journal.flush()
    journal.finish()
    spy = Spy(monkeypatch)
    put(journal, "b")
    put(journal, "c")
    journal.commit()
    assert spy.take() == [SEGMENT]
    journal.sync()
    assert spy.take() == []
    journal.close()


def test_interval_syncs_when_told_and_frees_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(tmp_path, "interval")
    spy = Spy(monkeypatch)
    seqs = put(journal, "a")
    journal.commit()
    assert spy.take() == []
    journal.sync()
    assert spy.take() == [SEGMENT, "blobs"]
    (first,) = stored_blobs(journal)
    end(journal, seqs, "a")
    journal.commit()
    put(journal, "b")  # if the ack is forgotten in a crash, the result must still be there
    journal.commit()
    (second,) = stored_blobs(journal)
    assert second.extent.offset >= first.extent.end
    journal.sync()
    journal.close()


def test_a_blob_that_cannot_be_written_leaves_the_others_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(tmp_path, durable=True)
    store.restore([])
    kept = store.add([b"ke", b"pt"])
    store.settle()

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwrite", broken)
    store.add([bytes(15)])
    with pytest.raises(OSError, match="Input/output"):
        store.settle()
    monkeypatch.undo()
    assert store.restore([kept]) == 0
    assert bytes(store.read(kept)) == b"kept"
    other = store.add([b"other"])
    store.settle()
    assert bytes(store.read(other)) == b"other"
    assert bytes(store.read(kept)) == b"kept"
    store.close()


def test_neighbours_are_written_at_once_each_with_its_own_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(tmp_path, durable=True)
    store.restore([])
    contents = [bytes([number]) * size for number, size in enumerate((1, ALIGNMENT, ALIGNMENT + 1, 70_000, 3))]
    added = [store.add([content[:1], content[1:]]) for content in contents]
    real, places = os.pwrite, list[int]()

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        places.append(offset)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    store.settle()
    assert places == [0]
    assert [bytes(store.read(blob)) for blob in added] == contents
    store.close()
