"""The journal: what was committed comes back, what was not does not, and a full disk is said so."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from broker.ledger.events import JournalAttempt, JournalPurge, JournalTickets, Settled
from broker.ledger.letters import PURGED
from broker.process.lifecycle import ErgonError
from broker.protocol.codec import pack_trajectories, unpack_trajectories
from broker.protocol.commands import TicketState as T
from broker.protocol.trajectory import Mode
from broker.store.datafile import FILE_NAME, OLD_NAME
from broker.store.journal import Journal, StoreFullError
from broker.store.parcels import Place
from broker.store.room import RESERVE_BYTES, RESERVE_NAME, Room
from tests.unit.broker.samples import make_ticket, make_trajectory
from tests.unit.broker.stored import end, issue, load, make_message, put, rows, same, stored_blobs, take

ROOT = Path(__file__).parents[3]


def reserved(journal: Journal) -> bool:
    return journal.reserved


def test_the_ledger_is_rebuilt_from_what_was_committed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    issue(journal, "b", mode=Mode.EVAL)
    seqs = issue(journal, "a", "c", "d", "e", "f")
    original = [make_trajectory(make_ticket(key), num_segments=num) for key, num in (("e", 1), ("x", 1), ("a", 2))]
    journal.apply(JournalAttempt(seqs[0], "a", 1, "its lease ran out"))
    take(journal, (seqs[3], 0, seqs[0]), ("e", "x", "a"), pack_trajectories(original))
    journal.apply(JournalAttempt(seqs[1], "c", 2, "its lease ran out"))
    journal.apply(JournalAttempt(seqs[2], "d", 3, "sandbox died", dead=True, result_seq=10))
    journal.apply(JournalAttempt(seqs[4], "f", 3, "no tools", dead=True, result_seq=11))
    journal.apply(JournalPurge(seqs[4], "f", "purged by the operator: no tools"))
    end(journal, seqs[3:4], "e")
    assert journal.commit()
    assert not journal.commit()
    assert journal.place("a") == Place(1, 2)
    journal.close()

    journal = Journal(tmp_path, "run")
    live = list(journal.live())
    assert [(row.seq, row.ticket.ticket_id, row.state, row.ticket.attempt) for row in live] == [
        (1, "b", T.ISSUED, 0),
        (2, "a", T.DELIVERED, 1),
        (3, "c", T.ISSUED, 2),
        (4, "d", T.DEAD, 3),
        (6, "f", T.DEAD, 3),
    ]
    assert live[0].ticket == make_ticket("b", Mode.EVAL)
    assert (live[1].result_seq, live[1].source, live[1].error) == (9, "s1", "its lease ran out")
    assert (live[2].result_seq, live[2].error) == (0, "its lease ran out")
    assert (live[3].result_seq, live[3].error, live[3].source) == (10, "sandbox died", "")
    assert (live[4].result_seq, live[4].error, live[4].source) == (11, "purged by the operator: no tools", PURGED)
    assert journal.next_seq() == 12
    assert journal.ended() == {(T.ACKED, Mode.TRAIN): 1}
    assert journal.settled("e") == Settled(T.ACKED, "s1")
    assert journal.settled_ids(["e", "z", "a"]) == {"e"}
    assert journal.place("e") is None
    assert journal.place("a") == Place(1, 2)
    trajectories = unpack_trajectories(journal.load(1))
    assert [each.head for each in trajectories] == [each.head for each in original]
    for mine, theirs in zip(original[2].segments, trajectories[2].segments, strict=True):
        np.testing.assert_array_equal(mine.logprobs_T, theirs.logprobs_T)
        np.testing.assert_array_equal(mine.loss_mask_T, theirs.loss_mask_T)
    journal.close()


def test_a_parcel_stays_until_its_last_result_has_ended(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    seqs = put(journal, "a", "b", "c")
    journal.commit()
    end(journal, seqs[:1], "a")
    end(journal, seqs[2:], "c", state=T.CANCELLED)
    journal.commit()
    for _ in range(2):
        assert (journal.place("a"), journal.place("b"), journal.place("c")) == (None, Place(1, 1), None)
        assert same(journal.load(1), make_message("a", "b", "c"))
        journal.close()
        journal = Journal(tmp_path, "run")
    end(journal, seqs[1:2], "b")
    journal.commit()
    stored = dict(rows(journal))
    assert [name for name, table in stored.items() if table] == ["meta", "ended", "past"]
    assert journal.settled("b") == Settled(T.ACKED, "s1")
    assert journal.settled("c") == Settled(T.CANCELLED, "s1")
    put(journal, "d")
    assert journal.place("d") == Place(2, 0)  # the number of a parcel is not used again
    journal.close()


def test_a_ticket_that_was_issued_again_is_taken_once_more(tmp_path: Path) -> None:
    """A purged and a requeued dead letter: their ends keep what the ledger must know of them."""
    journal = Journal(tmp_path, "run")
    seqs = issue(journal, "a", "b")
    for seq, key in zip(seqs, ("a", "b"), strict=True):
        journal.apply(JournalAttempt(seq, key, 2, "no sandbox", dead=True, result_seq=3))
    journal.apply(JournalAttempt(seqs[0], "a", 0, ""))
    journal.apply(JournalPurge(seqs[1], "b", "purged"))
    journal.commit()
    assert [(row.state, row.ticket.attempt, row.result_seq) for row in journal.live()] == [
        (T.ISSUED, 0, 0),
        (T.DEAD, 2, 3),
    ]
    take(journal, seqs[:1], ["a"], make_message("a"), "s2")
    end(journal, seqs, "a", "b")
    journal.commit()
    assert (journal.settled("a"), journal.settled("b")) == (Settled(T.ACKED, "s2"), Settled(T.ACKED, PURGED))
    assert dict(rows(journal))["states"] == []
    journal.close()


def test_an_id_of_any_length_is_a_ticket_of_its_own(tmp_path: Path) -> None:
    ids = ["é" * 127, "é" * 128, "é" * 256, "é" * 255 + "e", "x" * 255, "x" * 256]
    journal = Journal(tmp_path, "run")
    end(journal, put(journal, *ids), *ids)
    journal.commit()
    assert journal.settled_ids([*ids, "x" * 254]) == frozenset(ids)
    journal.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from broker.store.journal import Journal
from tests.unit.broker.stored import issue
journal = Journal(Path(sys.argv[1]), "run")
issue(journal, "committed")
journal.commit()
issue(journal, "open")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_exactly_what_it_committed_and_no_lock(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == -9
    journal = Journal(tmp_path, "run")
    assert [row.ticket.ticket_id for row in journal.live()] == ["committed"]
    journal.close()


def test_lineages_increase_and_stay_with_their_session(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    assert [journal.lineage(session) for session in ("x", "y", "x")] == [1, 2, 1]
    journal.commit()
    assert journal.lineage("forgotten") == 3
    journal.close()
    journal = Journal(tmp_path, "run")
    assert [journal.lineage(session) for session in ("y", "z")] == [2, 3]
    journal.close()


def test_a_full_store_rolls_back_and_recovers(tmp_path: Path) -> None:
    max_bytes = 2 << 20
    journal = Journal(tmp_path, "run", max_bytes=max_bytes)
    committed: dict[str, int] = {}
    with contextlib.suppress(StoreFullError):
        while len(committed) < 1000:
            key = f"t{len(committed)}"
            (seq,) = put(journal, key)
            journal.commit()
            committed[key] = seq
    num = len(committed)
    assert 100 < num < 1000
    assert [row.ticket.ticket_id for row in journal.live()] == list(committed)
    assert journal.place(f"t{num}") is None
    assert all(same(load(journal, key), make_message(key)) for key in committed)
    assert journal.next_seq() == 2 * num + 1
    assert not reserved(journal)
    with pytest.raises(StoreFullError, match=r"are in use|MAP_FULL"):
        journal.probe()
    for key, seq in committed.items():  # one at a time: this is the most that acks can need
        end(journal, [seq], key)
        journal.commit()
    journal.probe()
    assert reserved(journal)
    assert journal.ended() == {(T.ACKED, Mode.TRAIN): num}
    assert dict(rows(journal))["parcels"] == []
    assert journal.path.stat().st_size < max_bytes + RESERVE_BYTES
    put(journal, "more")
    journal.commit()
    journal.close()


def test_acks_in_any_order_get_through_where_all_at_once_would_not(tmp_path: Path) -> None:
    """They touch nearly every page there is, and before the first is free they would need as many again."""
    journal = Journal(tmp_path, "run", max_bytes=16 << 20)
    committed: dict[str, int] = {}
    with contextlib.suppress(StoreFullError):
        while len(committed) < 20_000:
            ids = [f"{len(committed) + i:05}" for i in range(200)]
            seqs = [put(journal, key, message=make_message(key, num_tokens=3))[0] for key in ids]
            journal.commit()
            committed |= zip(ids, seqs, strict=True)
    assert 5_000 < len(committed) < 20_000
    every_third = [key for start in range(3) for key in list(committed)[start::3]]
    acked = every_third[: len(committed) // 3]
    end(journal, [committed[key] for key in acked], *acked)
    journal.commit()
    assert journal.settled_ids(committed) == frozenset(acked)
    assert sorted(row.ticket.ticket_id for row in journal.live()) == sorted(every_third[len(acked) :])
    journal.close()


def test_a_rollback_leaves_memory_as_it_was_at_the_last_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, "run", blob_bytes=5000)
    journal.lineage("x")
    seqs = put(journal, "a", "b")
    small = put(journal, "s", message=make_message("s", num_tokens=10))
    journal.commit()
    before = dict(rows(journal))

    def change() -> None:
        journal.lineage("y")
        end(journal, seqs, "a", "b")
        end(journal, small, "s")
        put(journal, "c")
        journal.commit()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal._parcels._blobs, "settle", full)
    with pytest.raises(StoreFullError, match="No space"):
        change()
    monkeypatch.undo()
    assert dict(rows(journal)) == before
    assert (journal.place("a"), journal.place("b"), journal.place("c")) == (Place(1, 0), Place(1, 1), None)
    assert journal.next_seq() == 6 + 1
    assert journal.ended() == {}
    assert same(load(journal, "a"), make_message("a", "b"))
    assert len(stored_blobs(journal)) == 1
    assert journal._parcels.free_blob_bytes == 0, "a full disk gets back what is empty"
    assert not reserved(journal)
    journal.probe()
    assert reserved(journal)
    change()
    assert journal.lineage("y") == 2
    assert journal.ended() == {(T.ACKED, Mode.TRAIN): 3}
    assert journal.place("c") == Place(3, 0)
    journal.close()


def test_free_pages_stand_for_the_reserve_where_the_disk_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that the file itself has filled: acks make pages free, and with these the store goes on."""
    journal = Journal(tmp_path, "run", max_bytes=64 << 20, blob_bytes=1 << 30)
    ids = [f"t{n}" for n in range(40)]
    seqs = [put(journal, key, message=make_message(key, num_tokens=100_000))[0] for key in ids]
    journal.commit()
    end(journal, seqs[:15], *ids[:15])
    journal.commit()
    (tmp_path / RESERVE_NAME).unlink()
    journal.close()

    def refuse(_: Room) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Usage:
        free = 0

    monkeypatch.setattr(Room, "hold", refuse)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    journal = Journal(tmp_path, "run", max_bytes=64 << 20, blob_bytes=1 << 30)
    assert reserved(journal)

    def fill() -> None:
        for n in range(20):
            put(journal, f"n{n}", message=make_message(f"n{n}", num_tokens=100_000))
            journal.commit()

    with pytest.raises(StoreFullError, match="kept for acks"):
        fill()
    num = len(list(journal.live())) - 25
    assert 0 < num < 15
    assert not reserved(journal)
    with pytest.raises(StoreFullError, match="0 are free"):
        journal.probe()
    end(journal, seqs[15:25], *ids[15:25])
    journal.commit()
    journal.probe()
    assert reserved(journal)
    put(journal, "more", message=make_message("more", num_tokens=100_000))
    journal.commit()
    monkeypatch.undo()
    put(journal, "and more")
    journal.commit()
    assert (tmp_path / RESERVE_NAME).exists()  # the disk has room again
    journal.close()


def test_a_store_of_another_run_another_process_or_no_store_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    with pytest.raises(ErgonError, match=r"locked.*end the other broker"):
        Journal(tmp_path, "run")
    journal.close()
    with pytest.raises(ErgonError, match="has run_id 'run', not 'other'"):
        Journal(tmp_path, "other")
    for name, content, reason in (
        (FILE_NAME, b"this is not a database" * 500, "it is no LMDB file"),
        (FILE_NAME, b"", "cut short"),
        (OLD_NAME, b"SQLite format 3\0", r"earlier version.*give the run another name"),
    ):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / name).write_bytes(content)
        with pytest.raises(ErgonError, match=reason):
            Journal(tmp_path / "bad", "run")


def test_another_format_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    journal._db.write.put(b"format", b"3", db=journal._db.tables.meta)
    journal.commit()
    journal.close()
    with pytest.raises(ErgonError, match="has format '3', not '4'; give the run another name"):
        Journal(tmp_path, "run")


NO_ADDRESSES = """
import resource, sys
from pathlib import Path
from broker.process.lifecycle import ErgonError
from broker.store.journal import Journal
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
try:
    Journal(Path(sys.argv[1]), "run")
except ErgonError as error:
    print(error)
"""


def test_a_limit_on_addresses_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NO_ADDRESSES, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert "256 GiB of addresses" in done.stdout, done.stderr
    assert "ulimit -v unlimited" in done.stdout


@pytest.mark.parametrize(("fsync", "metasync"), [("always", True), ("interval", False)])
def test_fsync_chooses_the_durability(tmp_path: Path, fsync: str, metasync: bool) -> None:
    journal = Journal(tmp_path, "run", "always" if fsync == "always" else "interval")
    flags = journal._db._environment.flags()
    assert (flags["sync"], flags["metasync"], flags["writemap"], flags["lock"]) == (True, metasync, False, False)
    issue(journal, "a")
    journal.commit()
    journal.sync()
    journal.close()


def test_tickets_may_be_written_in_any_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    for seqs in ((5, 3), (4,), (9, 10), (7,)):
        journal.apply(JournalTickets(tuple((seq, make_ticket(f"t{seq}")) for seq in seqs)))
    journal.commit()
    assert [(row.seq, row.ticket.ticket_id) for row in journal.live()] == [(n, f"t{n}") for n in (3, 4, 5, 7, 9, 10)]
    journal.close()
