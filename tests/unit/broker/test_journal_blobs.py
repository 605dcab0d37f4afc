"""Results beside the database: whole or said to be damaged, at whatever byte a write was torn; kept while named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from broker.ledger.events import JournalEnd, JournalRecall, JournalResult, JournalTicket
from broker.protocol.codec import trajectory_to_message
from broker.protocol.commands import TicketState as T
from broker.protocol.frames import Message, encode
from broker.protocol.trajectory import Segment, Trajectory, VersionRun
from broker.store.blobs import BlobStore, DamagedError
from broker.store.journal import Journal
from tests.unit.broker.samples import make_ticket, make_trajectory

BLOB_BYTES = 1000


def make_message(ticket_id: str, num_tokens: int = 1000, salt: int = 0) -> Message:
    """A TRAJECTORY with 9 bytes of arrays a token."""
    rng = np.random.default_rng(salt)
    mask_T = np.ones(num_tokens, dtype=np.bool_)
    logprobs_T = -rng.random(num_tokens, dtype=np.float32)
    token_ids_T = rng.integers(0, 1000, num_tokens, dtype=np.int32)
    segment = Segment(token_ids_T, mask_T, logprobs_T, (VersionRun(1, 1, num_tokens),))
    return trajectory_to_message(Trajectory(make_trajectory(make_ticket(ticket_id)).head, (segment,)))


def open_journal(directory: Path, fsync: str = "always") -> Journal:
    return Journal(directory, "run", "always" if fsync == "always" else "interval", blob_bytes=BLOB_BYTES)


def put(journal: Journal, ticket_id: str, seq: int = 1, message: Message | None = None) -> None:
    journal.apply(JournalTicket(seq, make_ticket(ticket_id)))
    journal.apply(JournalResult(seq + 1, ticket_id, "s1"), encode(message or make_message(ticket_id)))


def blobs(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / "blobs").glob("*/*") if path.is_file())


def same(loaded: Message | None, stored: Message) -> bool:
    return (
        loaded is not None
        and loaded.body == stored.body
        and all(np.array_equal(mine, theirs) for mine, theirs in zip(loaded.arrays, stored.arrays, strict=True))
    )


def test_large_arrays_lie_in_a_file_until_the_ticket_ends(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    put(journal, "large", 1)
    put(journal, "small", 3, make_message("small", 100))
    assert not [path for path in blobs(tmp_path) if path.parent.name != "tmp"]  # it has its name with the commit
    journal.commit()
    (path,) = blobs(tmp_path)
    assert path.stat().st_size == 9000
    assert path.name.endswith("-9000")
    assert path.parent.name == path.name[0]
    journal.close()
    journal = open_journal(tmp_path)
    assert same(journal.load("large"), make_message("large"))
    assert same(journal.load("small"), make_message("small", 100))
    loaded = journal.load("large")
    journal.apply(JournalEnd("large", T.ACKED))
    assert path.exists()
    journal.commit()
    assert blobs(tmp_path) == []
    assert same(loaded, make_message("large"))  # what is being sent stays readable
    journal.close()


def test_one_content_is_one_file_while_any_result_names_it(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    put(journal, "a", 1)
    put(journal, "b", 3)
    journal.commit()
    put(journal, "c", 5)
    journal.commit()
    assert len(blobs(tmp_path)) == 1
    for ticket_id in ("a", "b"):
        journal.apply(JournalEnd(ticket_id, T.ACKED))
        journal.commit()
    assert same(journal.load("c"), make_message("c"))
    journal.apply(JournalEnd("c", T.ACKED))
    journal.commit()
    assert blobs(tmp_path) == []
    journal.close()


def test_files_of_no_result_are_deleted_at_the_start(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    put(journal, "a")
    journal.commit()
    put(journal, "open", 3, make_message("open", salt=1))
    # Killed here: the second result's file is there, its row is not.
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path, killed, ignore=shutil.ignore_patterns("killed"))
    other = killed / "blobs" / "f" / "f00-12"
    other.write_bytes(b"from nowhere")
    assert len(blobs(killed)) == 3
    again = open_journal(killed)
    assert len(blobs(killed)) == 1
    assert same(again.load("a"), make_message("a"))
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
            journal.load("a")
        path.write_bytes(whole)
    assert same(journal.load("a"), make_message("a"))
    path.unlink()
    with pytest.raises(DamagedError, match="No such file"):
        journal.load("a")
    journal.close()


def test_a_row_with_other_bytes_is_damaged_too(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    put(journal, "a", message=make_message("a", 10))
    journal.commit()
    arrays = bytearray(journal._db.execute("SELECT arrays FROM results").fetchone()[0])
    arrays[5] ^= 1
    journal._db.execute("UPDATE results SET arrays = ?", (bytes(arrays),))
    with pytest.raises(DamagedError, match="ticket a"):
        journal.load("a")
    journal.close()


def test_a_recalled_ticket_is_issued_and_takes_another_result(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    put(journal, "a")
    journal.commit()
    damage(blobs(tmp_path)[0], "cut", 10)
    journal.apply(JournalRecall("a"))
    journal.commit()
    assert blobs(tmp_path) == []
    (row,) = journal.live()
    assert (row.state, row.ticket.attempt, row.result_seq, row.source) == (T.ISSUED, 0, 0, "")
    journal.apply(JournalResult(7, "a", "s2"), encode(make_message("a", salt=2)))
    journal.commit()
    assert same(journal.load("a"), make_message("a", salt=2))
    journal.close()


def test_a_write_torn_at_any_byte_leaves_whole_commits(tmp_path: Path) -> None:
    """The log of a killed broker, cut or changed anywhere: a prefix of the commits, each result whole."""
    num = 6
    journal = open_journal(tmp_path / "store")
    for n in range(num):
        put(journal, f"t{n}", 2 * n + 1, make_message(f"t{n}", 1000 if n % 2 else 50, salt=n))
        journal.commit()
    wal_bytes = (tmp_path / "store" / "journal.db-wal").stat().st_size
    assert wal_bytes > 40_000
    seen = set()
    for how in ("cut", "changed"):
        for offset in range(0, wal_bytes, wal_bytes // 24):
            torn = tmp_path / f"{how}-{offset}"
            shutil.copytree(tmp_path / "store", torn, ignore=shutil.ignore_patterns("reserve"))
            damage(torn / "journal.db-wal", how, offset)
            if len(list((torn).glob("journal.db*"))) and (torn / "journal.db").stat().st_size == 0:
                continue  # torn within the making of the store: SQLite starts anew, covered by the offsets before
            again = open_journal(torn, "interval")
            ids = [row.ticket.ticket_id for row in again.live()]
            assert ids == [f"t{n}" for n in range(len(ids))]
            for n, ticket_id in enumerate(ids):
                assert same(again.load(ticket_id), make_message(ticket_id, 1000 if n % 2 else 50, salt=n))
            assert len(blobs(torn)) == len(ids) // 2
            assert again.next_seq() == 2 * len(ids) + 1 or not ids
            again.close()
            shutil.rmtree(torn)
            seen.add(len(ids))
    assert len(seen) > num // 2
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
    put(journal, "b", 3)
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
    put(journal, "a")
    journal.commit()
    assert spy.take() == []
    (path,) = blobs(tmp_path)
    journal.sync()
    assert spy.take() == [path.name, path.parent.name, "journal.db-wal"]
    journal.apply(JournalEnd("a", T.ACKED))
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
    with pytest.raises(OSError, match="No space"):
        store.add([bytes(15)])
    monkeypatch.undo()
    store.add([b"and this is not committed"])
    store.discard(lambda _: False)
    assert [path.name for path in tmp_path.glob("*/*") if path.is_file()] == [kept]
    assert bytes(store.read(kept)) == b"kept"
    store.close()
