"""A run of weeks: what is remembered of ended tickets is bounded, and costs nothing as it grows."""

from __future__ import annotations

from pathlib import Path

import pytest
from lmdb import verify

from broker.ledger.events import EndedRow, JournalEnds, JournalResults, JournalTickets, Settled, TakenRow
from broker.protocol.commands import TicketState as T
from broker.protocol.frames import encode
from broker.protocol.trajectory import Mode
from broker.store import database
from broker.store.journal import KEEP_SESSIONS, Journal
from broker.store.tickets import TRIM_BATCH
from tests.unit.broker.samples import make_ticket
from tests.unit.broker.stored import end, issue, load, make_message, put, rows, same

PAGE = 4096


def run_ticket(journal: Journal, num: int) -> None:
    end(journal, put(journal, f"t{num}", message=make_message(f"t{num}", num_tokens=10)), f"t{num}")


def test_the_newest_ended_tickets_are_remembered_and_all_are_counted(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run", keep_ended=10)
    issue(journal, "alive")
    for num in range(100):
        run_ticket(journal, num)
        if num % 3 == 0:
            journal.commit()
    journal.commit()
    for _ in range(2):
        assert journal.settled("t99") == Settled(T.ACKED, "s1")
        assert [journal.settled(f"t{num}") is not None for num in range(100)] == [False] * 90 + [True] * 10
        assert [row.ticket.ticket_id for row in journal.live()] == ["alive"]
        assert journal.ended() == {(T.ACKED, Mode.TRAIN): 100}
        assert journal.next_seq() == 202
        journal.close()
        journal = Journal(tmp_path, "run", keep_ended=10)
    # An id that was forgotten is a new ticket; the counts go on.
    run_ticket(journal, 5)
    journal.commit()
    assert journal.settled("t5") == Settled(T.ACKED, "s1")
    assert journal.ended() == {(T.ACKED, Mode.TRAIN): 101}
    journal.close()


def test_no_commit_forgets_more_than_a_batch(tmp_path: Path) -> None:
    """A smaller `keep_ended` is reached in many commits, none of which is a long one."""
    num = 2 * TRIM_BATCH + 100
    ids = [f"t{n}" for n in range(num)]
    journal = Journal(tmp_path, "run")
    end(journal, issue(journal, *ids), *ids)
    journal.commit()
    journal.close()
    journal = Journal(tmp_path, "run", keep_ended=10)
    left = []
    for n in range(4):
        issue(journal, f"new-{n}")
        journal.commit()
        stored = dict(rows(journal))
        assert len(stored["past"]) == len(stored["ended"])
        left.append(len(stored["past"]))
    assert left == [num - TRIM_BATCH, num - 2 * TRIM_BATCH, 10, 10]
    assert journal.settled_ids(ids) == frozenset(ids[-10:])
    journal.close()


def test_lineages_go_on_where_sessions_are_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    lineages = [journal.lineage(f"session-{num}") for num in range(KEEP_SESSIONS + 10)]
    assert lineages == list(range(1, KEEP_SESSIONS + 11))
    assert len(dict(rows(journal))["sessions"]) == KEEP_SESSIONS
    journal.commit()
    journal.close()
    journal = Journal(tmp_path, "run")
    assert journal.lineage("session-10") == 11
    assert journal.lineage("session-9") == KEEP_SESSIONS + 11
    journal.close()


class Batches:
    """Tickets through a journal, from issue to ack, many at a time and by parcels of 8. Counts pages, not time."""

    def __init__(self, directory: Path, keep_ended: int) -> None:
        self.journal = Journal(directory, "run", "interval", keep_ended=keep_ended)
        self.frames = encode(make_message(*(f"t{i}" for i in range(8)), num_tokens=2))
        self.ticket = make_ticket("any")
        self.num = 0

    def run(self, num: int) -> int:
        """So many tickets' lives, in three commits; how many bytes were written to the data file, in pages."""
        ids = [f"run/train/{self.num + i:08}" for i in range(num)]
        journal, first = self.journal, self.journal.next_seq()
        before = journal.path.read_bytes()
        journal.apply(JournalTickets(tuple((first + i, self.ticket) for i in range(num))))
        journal.commit()
        for start in range(0, num, 8):
            taken = (TakenRow(i, first + start + i, journal.next_seq() + i, ids[start + i]) for i in range(8))
            journal.apply(JournalResults("s1", tuple(taken)), self.frames)
        journal.commit()
        journal.apply(JournalEnds(tuple(EndedRow(first + i, ids[i], Mode.TRAIN, T.ACKED) for i in range(num))))
        journal.commit()
        self.num += num
        after = journal.path.read_bytes()
        return sum(before[at : at + PAGE] != after[at : at + PAGE] for at in range(0, len(after), PAGE))


def test_a_batch_writes_no_more_and_the_file_grows_no_more_after_200_000_tickets(tmp_path: Path) -> None:
    keep = 5_000
    batches = Batches(tmp_path, keep)
    pages: list[int] = []
    sizes: list[int] = []
    for num in range(10_000, 200_001, 10_000):
        pages.append(batches.run(128))
        while batches.num < num:
            batches.run(1_000 if num - batches.num >= 1_000 else num - batches.num)
        sizes.append(batches.journal.path.stat().st_size)
    assert batches.journal.ended() == {(T.ACKED, Mode.TRAIN): 200_000}
    stored = dict(rows(batches.journal))
    assert len(stored["ended"]) == len(stored["past"]) == keep
    assert not stored["parcels"]
    assert not stored["tickets"]
    assert max(pages[10:]) <= 1.2 * max(pages[2:6])
    assert sizes[-1] <= 1.1 * sizes[1]
    assert sizes[-1] < 16 << 20
    batches.journal.close()
    assert verify.verify(str(batches.journal.path), subdir=False) == []


def test_a_batch_writes_no_more_with_more_ended_tickets_remembered(tmp_path: Path) -> None:
    """Beside 10,000 and 100,000 rows: the pages of a batch differ by the depth of a tree, not by its size."""
    batches = Batches(tmp_path, 1_000_000)
    while batches.num < 10_000:
        batches.run(1_000)
    few = [batches.run(128) for _ in range(5)]
    while batches.num < 100_000:
        batches.run(1_000)
    many = [batches.run(128) for _ in range(5)]
    assert max(many) <= max(few) + 12
    batches.journal.close()


def test_free_pages_are_given_back_when_the_store_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "COMPACT_BYTES", 1 << 20)
    ids = [f"t{num}" for num in range(12)]
    journal = Journal(tmp_path, "run", "interval", blob_bytes=1 << 30)
    seqs = [put(journal, key, message=make_message(key, num_tokens=50_000))[0] for key in ids]
    journal.commit()
    size = journal.path.stat().st_size
    assert size > 5 << 20
    end(journal, seqs[:4], *ids[:4])
    journal.commit()
    for first, last, shrunk in ((4, 4, False), (4, 11, True), (11, 11, False)):
        end(journal, seqs[first:last], *ids[first:last])
        journal.commit()
        journal.close()
        before = (tmp_path / "journal.mdb").stat().st_ino
        journal = Journal(tmp_path, "run", "interval", blob_bytes=1 << 30)
        assert (journal.path.stat().st_ino != before) == shrunk
    assert journal.path.stat().st_size < size // 5
    assert same(load(journal, "t11"), make_message("t11", num_tokens=50_000))
    assert journal.ended() == {(T.ACKED, Mode.TRAIN): 11}
    put(journal, "more")
    journal.commit()
    journal.close()
    assert verify.verify(str(journal.path), subdir=False) == []


def test_what_acks_have_freed_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file keeps its free pages: a broker that looked at the disk alone would never lease again."""

    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    journal = Journal(tmp_path, "run")
    before = journal.free_bytes
    (seq,) = put(journal, "a", message=make_message("a", num_tokens=100_000))
    journal.commit()
    assert abs(journal.free_bytes - before) < 100_000
    end(journal, [seq], "a")
    journal.commit()
    assert journal.free_bytes > before + 850_000
    journal.close()
