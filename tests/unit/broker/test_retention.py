"""A run of weeks: what is remembered of ended tickets is bounded, and costs nothing as it grows."""

from __future__ import annotations

from pathlib import Path

from broker.ledger.events import JournalEnd, JournalResult, JournalTicket, Settled
from broker.protocol.codec import trajectory_to_message
from broker.protocol.commands import TicketState as T
from broker.protocol.frames import encode
from broker.protocol.trajectory import Mode
from broker.store.database import FILE_NAME
from broker.store.journal import KEEP_SESSIONS, VACUUM_PAGES, Journal
from tests.unit.broker.samples import make_ticket, make_trajectory


def run_ticket(journal: Journal, num: int) -> None:
    ticket = make_ticket(f"t{num}")
    journal.apply(JournalTicket(2 * num + 1, ticket))
    message = trajectory_to_message(make_trajectory(ticket))
    journal.apply(JournalResult(2 * num + 2, ticket.ticket_id, "s1"), encode(message))
    journal.apply(JournalEnd(ticket.ticket_id, T.ACKED))


def test_the_newest_ended_tickets_are_remembered_and_all_are_counted(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run", keep_ended=10)
    journal.apply(JournalTicket(1_000, make_ticket("alive")))
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
        assert journal.next_seq() == 1_001
        journal.close()
        journal = Journal(tmp_path, "run", keep_ended=10)
    # An id that was forgotten is a new ticket; the counts go on.
    run_ticket(journal, 5)
    journal.commit()
    assert journal.settled("t5") == Settled(T.ACKED, "s1")
    assert journal.ended() == {(T.ACKED, Mode.TRAIN): 101}
    journal.close()


def test_lineages_go_on_where_sessions_are_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    lineages = [journal.lineage(f"session-{num}") for num in range(KEEP_SESSIONS + 10)]
    assert lineages == list(range(1, KEEP_SESSIONS + 11))
    assert journal._db.execute("SELECT COUNT(*) FROM sessions").fetchone() == (KEEP_SESSIONS,)
    journal.commit()
    journal.close()


def count_steps(directory: Path, num_ended: int) -> int:
    """Steps of SQLite's machine from the start of a broker over a ticket's life, with so many ended before."""
    journal = Journal(directory, "run", "interval")
    rows = ((f"old{num}", num, "train", "acked", 0, num, "s0", float(num), num) for num in range(1, num_ended + 1))
    journal._db.execute("BEGIN")
    journal._db.executemany(
        "INSERT INTO tickets (ticket_id, seq, mode, state, attempt, result_seq, source, ended, end_seq)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        rows,
    )
    journal._db.execute("COMMIT")
    journal.close()
    journal = Journal(directory, "run", "interval", keep_ended=num_ended)
    num_steps = 0

    def step() -> int:
        nonlocal num_steps
        num_steps += 1
        return 0

    journal._db.set_progress_handler(step, 1)
    journal._counters()
    assert list(journal.live()) == []
    assert journal.ended() == {}
    for num in range(1_000_000, 1_000_020):
        assert journal.settled(f"t{num}") is None
        run_ticket(journal, num)
        journal.commit()
    assert journal.settled("old1") is None  # trimmed, in step with the new ends
    assert journal.settled("old21") is not None
    journal._db.set_progress_handler(None, 0)
    journal.close()
    return num_steps


def test_no_statement_costs_more_with_more_ended_tickets(tmp_path: Path) -> None:
    few, many = count_steps(tmp_path / "few", 100), count_steps(tmp_path / "many", 10_000)
    assert many < 1.05 * few + 100


def test_the_file_shrinks_when_most_of_it_is_air(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run", "interval", blob_bytes=1 << 30)
    for num in range(3):
        ticket = make_ticket(f"t{num}")
        journal.apply(JournalTicket(2 * num + 1, ticket))
        frames = encode(trajectory_to_message(make_trajectory(ticket)))
        journal.apply(JournalResult(2 * num + 2, ticket.ticket_id, "s1"), [*frames, bytes(4 << 20)])
        journal.commit()
    for num in range(3):
        journal.apply(JournalEnd(f"t{num}", T.ACKED))
    journal.commit()
    while journal.compact() > VACUUM_PAGES:
        pass
    journal.close()
    assert (tmp_path / FILE_NAME).stat().st_size < 10 << 20
