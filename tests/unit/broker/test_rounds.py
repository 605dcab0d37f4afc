"""Rounds overlap: one is written while the next is gathered; nothing is told before the store has it."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.exchange.committer import Committer
from broker.exchange.dispatch import Request
from broker.exchange.executor import Executor
from broker.exchange.peers import Peers
from broker.ledger.events import Ack, Cancel, Issue, Reply
from broker.process.settings import BrokerSection
from broker.protocol.commands import Acked, Issued, TicketState
from broker.protocol.frames import Message
from broker.store.journal import Journal, StoreFullError
from tests.ports import free_ports
from tests.unit.broker.samples import make_ticket


class SlowDisk(Journal):
    """A journal whose disk waits for the test."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "test-run")
        self.goes_on = threading.Event()
        self.error: OSError | None = None

    def flush(self) -> None:
        assert self.goes_on.wait(30)
        if self.error is not None:
            raise self.error
        super().flush()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SlowDisk]:
    opened = SlowDisk(tmp_path / "store")
    yield opened
    opened.close()


@pytest.fixture
def executor(journal: SlowDisk) -> Iterator[Executor]:
    peers = Peers("127.0.0.1", free_ports(1)[0], 1.0, 15)
    running = Executor(BrokerSection(), journal, peers)
    yield running
    journal.goes_on.set()
    running.close()
    peers.close()


def issue(executor: Executor, *ids: str) -> None:
    def reply(done: Reply) -> Message:
        return Issued(request_id="-".join(ids), accepted=done.count).pack()

    executor.execute(Request(Issue(tuple(make_ticket(key) for key in ids)), reply), b"learner")


def told(executor: Executor) -> list[str]:
    return [message.command for _, message in executor.take()]


def test_nothing_is_told_before_it_is_durable_and_the_next_round_waits_for_its_turn(
    executor: Executor, journal: SlowDisk
) -> None:
    issue(executor, "a")
    executor.commit()
    issue(executor, "b")
    executor.commit()
    assert told(executor) == []
    assert [row.ticket.ticket_id for row in journal.live()] == [], "the first round is still being written"
    journal.goes_on.set()
    executor.barrier()
    assert told(executor) == ["ISSUED", "ISSUED"]
    assert [row.ticket.ticket_id for row in journal.live()] == ["a", "b"]


def test_who_asks_how_a_ticket_of_an_unwritten_round_ended_gets_the_stores_word(
    executor: Executor, journal: SlowDisk
) -> None:
    journal.goes_on.set()
    issue(executor, "a")
    executor.barrier()
    executor.execute(Request(Ack(("a",)), lambda done: Acked(request_id="r", count=done.count).pack()), b"learner")
    assert executor.settled(["a"]) == {}, "it has no result: it cannot be acked"
    executor.execute(Request(Cancel(everything=True)))
    assert executor.round.ended == {"a"}
    assert executor.settled(["a", "b"])["a"].state is TicketState.CANCELLED
    assert executor.settled_ids(["a", "b"]) == {"a"}
    assert not executor.round.ended


def test_a_disk_that_refuses_a_round_undoes_it_and_the_one_after_it(executor: Executor, journal: SlowDisk) -> None:
    issue(executor, "a")
    executor.commit()
    issue(executor, "b")
    journal.error = OSError(28, "No space left on device")
    journal.goes_on.set()
    with pytest.raises(StoreFullError, match="No space left"):
        executor.barrier()
    executor.start_over()
    assert told(executor) == []
    assert len(executor.ledger) == 0
    journal.error = None
    issue(executor, "a")
    executor.barrier()
    assert told(executor) == ["ISSUED"]


def test_the_end_of_a_commit_wakes_the_server_once_and_its_failure_is_raised() -> None:
    failures: list[Exception | None] = [None, OSError("broken"), *[None] * 200]

    def flush() -> None:
        if (failure := failures.pop(0)) is not None:
            raise failure

    committer = Committer(flush)
    committer.start()
    assert select.select([committer.descriptor], [], [], 30)[0]
    committer.finish()
    committer.start()
    with pytest.raises(OSError, match="broken"):
        committer.finish()
    for _ in range(200):  # a wake-up that came after the end would stay behind
        committer.start()
        while not committer.ended:
            pass
        assert select.select([committer.descriptor], [], [], 0)[0]
        committer.finish()
        assert not select.select([committer.descriptor], [], [], 0)[0]
    assert not committer.busy
    committer.close()
