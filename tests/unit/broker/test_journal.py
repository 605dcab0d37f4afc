"""The journal: what was committed comes back, what was not does not, and a full disk is said so."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from broker.ledger.events import JournalAttempt, JournalEnd, JournalResult, JournalTicket, Settled
from broker.process.lifecycle import ErgonError
from broker.protocol.codec import trajectory_from_message, trajectory_to_message
from broker.protocol.commands import TicketState as T
from broker.protocol.frames import encode
from broker.protocol.trajectory import Mode
from broker.store.journal import FILE_NAME, Journal, StoreFullError
from tests.unit.broker.samples import make_ticket, make_trajectory


def store_result(journal: Journal, ticket_id: str, seq: int, num_segments: int = 1) -> None:
    trajectory = make_trajectory(make_ticket(ticket_id), num_segments=num_segments)
    journal.apply(JournalResult(seq, ticket_id, "s1"), encode(trajectory_to_message(trajectory)))


def test_the_ledger_is_rebuilt_from_what_was_committed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    for seq, ticket_id in enumerate(("b", "a", "c", "d", "e"), start=1):
        journal.apply(JournalTicket(seq, make_ticket(ticket_id, Mode.EVAL if ticket_id == "b" else Mode.TRAIN)))
    store_result(journal, "a", 6, num_segments=2)
    journal.apply(JournalAttempt("c", 2, "its lease ran out"))
    journal.apply(JournalAttempt("d", 3, "sandbox died", dead=True, seq=7))
    store_result(journal, "e", 8)
    journal.apply(JournalEnd("e", T.ACKED))
    assert journal.commit()
    assert not journal.commit()
    journal.close()

    journal = Journal(tmp_path, "run")
    rows = list(journal.live())
    assert [(row.ticket.ticket_id, row.state, row.ticket.attempt) for row in rows] == [
        ("b", T.ISSUED, 0),
        ("a", T.DELIVERED, 0),
        ("c", T.ISSUED, 2),
        ("d", T.DEAD, 3),
    ]
    assert rows[0].ticket == make_ticket("b", Mode.EVAL)
    assert (rows[1].result_seq, rows[1].source) == (6, "s1")
    assert (rows[3].result_seq, rows[3].error) == (7, "sandbox died")
    assert journal.next_seq() == 9
    assert journal.ended() == {(T.ACKED, Mode.TRAIN): 1}
    assert journal.settled("e") == Settled(T.ACKED, "s1")
    assert journal.settled_ids(["e", "z"]) == {"e"}
    assert journal.load("e") is None
    loaded = journal.load("a")
    assert loaded is not None
    trajectory, original = trajectory_from_message(loaded), make_trajectory(make_ticket("a"), num_segments=2)
    assert trajectory.head == original.head
    for mine, theirs in zip(original.segments, trajectory.segments, strict=True):
        np.testing.assert_array_equal(mine.logprobs_T, theirs.logprobs_T)
        np.testing.assert_array_equal(mine.loss_mask_T, theirs.loss_mask_T)
    journal.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from broker.store.journal import Journal
from broker.ledger.events import JournalTicket
from tests.unit.broker.samples import make_ticket
journal = Journal(Path(sys.argv[1]), "run")
journal.apply(JournalTicket(1, make_ticket("committed")))
journal.commit()
journal.apply(JournalTicket(2, make_ticket("open")))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_exactly_what_it_committed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=60)
    assert done.returncode == -9
    journal = Journal(tmp_path, "run")
    assert [row.ticket.ticket_id for row in journal.live()] == ["committed"]
    journal.close()


def test_lineages_increase_and_stay_with_their_session(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    assert [journal.lineage(session) for session in ("x", "y", "x")] == [1, 2, 1]
    journal.commit()
    journal.close()
    journal = Journal(tmp_path, "run")
    assert [journal.lineage(session) for session in ("y", "z")] == [2, 3]
    journal.close()


def test_a_full_store_rolls_back_and_recovers(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run", max_pages=64)

    def store(num: int) -> None:
        journal.apply(JournalTicket(num, make_ticket(f"t{num}")))
        store_result(journal, f"t{num}", num, num_segments=50)
        journal.commit()

    num_committed = 0
    with contextlib.suppress(StoreFullError):
        while num_committed < 1000:
            store(num_committed)
            num_committed += 1
    assert 0 < num_committed < 1000
    assert len(list(journal.live())) == num_committed
    with pytest.raises(StoreFullError, match="full"):
        journal.probe()
    for num in range(num_committed):
        journal.apply(JournalEnd(f"t{num}", T.ACKED))
    journal.commit()
    journal.probe()
    assert journal.ended() == {(T.ACKED, Mode.TRAIN): num_committed}
    journal.close()


def test_a_store_of_another_run_another_process_or_no_store_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    with pytest.raises(ErgonError, match=r"locked.*end the other broker"):
        Journal(tmp_path, "run")
    journal.close()
    with pytest.raises(ErgonError, match="has run_id 'run', not 'other'"):
        Journal(tmp_path, "other")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / FILE_NAME).write_bytes(b"this is not a database" * 100)
    with pytest.raises(ErgonError, match="cannot be opened"):
        Journal(tmp_path / "bad", "run")


@pytest.mark.parametrize(("fsync", "level"), [("always", 2), ("interval", 1)])
def test_fsync_chooses_the_durability(tmp_path: Path, fsync: str, level: int) -> None:
    journal = Journal(tmp_path, "run", "always" if fsync == "always" else "interval")
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (level,)
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    journal.sync()
    journal.close()


def test_the_store_is_a_plain_sqlite_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    journal.apply(JournalTicket(1, make_ticket("a")))
    journal.commit()
    journal.close()
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        assert db.execute("SELECT ticket_id, state FROM tickets").fetchall() == [("a", "issued")]
    db.close()
