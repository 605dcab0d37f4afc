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
from tests.unit.broker.stored import blobs, end, load, make_message, put, rows, same, take

BLOB_BYTES = 1000


def open_journal(directory: Path, fsync: str = "always") -> Journal:
    return Journal(directory, "run", "always" if fsync == "always" else "interval", blob_bytes=BLOB_BYTES)


def test_large_arrays_lie_in_a_file_until_the_ticket_ends(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    large = put(journal, "large")
    put(journal, "small", message=make_message("small", num_tokens=100))
    assert not [path for path in blobs(tmp_path) if path.parent.name != "tmp"]  # it has its name with the commit
    journal.commit()
    (path,) = blobs(tmp_path)
    assert path.stat().st_size == 9000
    assert path.name.endswith("-9000")
    assert path.parent.name == path.name[0]
    journal.close()
    journal = open_journal(tmp_path)
    assert same(load(journal, "large"), make_message("large"))
    assert same(load(journal, "small"), make_message("small", num_tokens=100))
    loaded = load(journal, "large")
    end(journal, large, "large")
    assert path.exists()
    journal.commit()
    assert blobs(tmp_path) == []
    assert same(loaded, make_message("large"))  # what is being sent stays readable
    journal.close()


def test_a_parcel_of_several_has_one_file_until_the_last_of_them_has_ended(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    seqs = put(journal, "a", "b", "c")
    journal.commit()
    (path,) = blobs(tmp_path)
    assert path.stat().st_size == 27_000
    end(journal, seqs[:2], "a", "b")
    journal.commit()
    journal.close()
    journal = open_journal(tmp_path)
    assert same(load(journal, "c"), make_message("a", "b", "c"))
    end(journal, seqs[2:], "c")
    journal.commit()
    assert blobs(tmp_path) == []
    journal.close()


def test_one_content_is_one_file_while_any_result_names_it(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    seqs = [*put(journal, "a"), *put(journal, "b")]
    journal.commit()
    seqs += put(journal, "c")
    journal.commit()
    assert len(blobs(tmp_path)) == 1
    for seq, ticket_id in zip(seqs[:2], ("a", "b"), strict=True):
        end(journal, [seq], ticket_id)
        journal.commit()
    assert same(load(journal, "c"), make_message("c"))
    end(journal, seqs[2:], "c")
    put(journal, "d")  # in one commit the last name goes and a new one comes
    journal.commit()
    assert same(load(journal, "d"), make_message("d"))
    journal.close()


def test_files_of_no_result_are_deleted_at_the_start(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    put(journal, "a")
    journal.commit()
    put(journal, "open", message=make_message("open", salt=1))
    journal._parcels._blobs._pending[0].descriptor.result()
    # Killed here: the second result's file is there, its row is not.
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path, killed, ignore=shutil.ignore_patterns("killed"))
    other = killed / "blobs" / "f" / "f00-12"
    other.write_bytes(b"from nowhere")
    assert len(blobs(killed)) == 3
    again = open_journal(killed)
    assert len(blobs(killed)) == 1
    assert same(load(again, "a"), make_message("a"))
    again.close()
    journal.close()
    assert len(blobs(tmp_path)) == 1


def damage(path: Path, how: str, offset: int) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[offset:]
    else:
        data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_damaged_blob_is_never_taken_for_whole(tmp_path: Path, how: str) -> None:
    journal = open_journal(tmp_path)
    put(journal, "a")
    journal.commit()
    (path,) = blobs(tmp_path)
    whole = path.read_bytes()
    for offset in [*range(0, len(whole), 97), len(whole) - 1]:
        damage(path, how, offset)
        with pytest.raises(DamagedError, match=path.name):
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
    damage(blobs(tmp_path)[0], "cut", 10)
    journal.apply(JournalRecall(seqs[0], "a"))
    journal.commit()
    assert len(blobs(tmp_path)) == (1 if others else 0)
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
    assert blobs(tmp_path) == []
    stored = dict(rows(journal))
    assert stored["parcels"] == stored["states"] == stored["tickets"] == []
    journal.close()


class Spy:
    """What was fsynced, in order, as the names of files and directories."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        real: Callable[[int], None] = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            self.names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

        monkeypatch.setattr(os, "fsync", fsync)

    def take(self) -> list[str]:
        names, self.names = self.names, []
        return names


def test_always_syncs_file_and_directory_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(tmp_path)
    put(journal, "a")
    spy = Spy(monkeypatch)
    journal.commit()
    (path,) = blobs(tmp_path)
    assert spy.take() == [path.name, path.parent.name]
    put(journal, "b", message=make_message("a"))
    journal.commit()  # the same bytes: their file is durable before it takes the other one's place
    assert spy.take() == [f"{os.getpid()}-2", path.parent.name]
    journal.sync()
    assert spy.take() == []
    journal.close()


def test_interval_syncs_when_told_blobs_first_and_deletes_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(tmp_path, "interval")
    spy = Spy(monkeypatch)
    seqs = put(journal, "a")
    journal.commit()
    assert spy.take() == []
    (path,) = blobs(tmp_path)
    journal.sync()
    assert spy.take() == [path.name, path.parent.name]
    end(journal, seqs, "a")
    journal.commit()
    assert path.exists()  # if the ack is forgotten in a crash, the result must still be there
    journal.sync()
    assert not path.exists()
    journal.close()


def test_a_blob_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(tmp_path, durable=True)
    kept = store.add([b"kept"])
    store.settle()
    store.keep()
    real = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) > 10:
            return real(descriptor, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    store.add([bytes(15)])
    with pytest.raises(OSError, match="No space"):
        store.settle()
    monkeypatch.undo()
    store.add([b"and this is not committed"])
    store.discard(lambda _: False)
    assert [path.name for path in tmp_path.glob("*/*") if path.is_file()] == [kept]
    assert bytes(store.read(kept)) == b"kept"
    store.close()
