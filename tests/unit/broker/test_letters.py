"""What an operator may do with dead letters, and what the ledger and the journal remember of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.exchange.inspection import inspect
from broker.ledger.events import (
    Ack,
    Action,
    ActorJoined,
    AnnounceDead,
    Arrived,
    Cancel,
    Credit,
    Deliver,
    Event,
    Finish,
    Grant,
    Issue,
    JournalAttempt,
    JournalEnds,
    JournalPurge,
    JournalRecall,
    JournalResults,
    JournalTickets,
    LearnerJoined,
    Purge,
    Release,
    Renew,
    Reply,
    Requeue,
    Results,
    Resume,
    Settled,
    Want,
)
from broker.ledger.ledger import CANCELLED_ERROR, Ledger
from broker.protocol.codec import pack_trajectories
from broker.protocol.commands import StatusReply
from broker.protocol.commands import TicketState as T
from broker.protocol.frames import Frame, encode
from broker.protocol.trajectory import Mode, Outcome
from broker.store.journal import Journal
from tests.unit.broker.samples import make_ticket, make_trajectory

JOURNALLED = (JournalTickets, JournalResults, JournalAttempt, JournalEnds, JournalPurge, JournalRecall)


class Desk:
    """A ledger on a journal, as the server has them, with one actor. `now` is 0 throughout."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.journal = Journal(directory, "run")
        self._start()

    def _start(self) -> None:
        self.ledger = Ledger(30.0, 2, list(self.journal.live()), self.journal.ended(), self.journal.next_seq())
        self.do(ActorJoined("s", "actor-0"))
        self.do(Renew("s", ()))
        self.do(Want("s", 1000))

    def restart(self) -> None:
        """Kill the broker and start it again."""
        self.journal.close()
        self.journal = Journal(self.directory, "run")
        self._start()

    def do(self, event: Event) -> list[Action]:
        actions = self.ledger.handle(event, 0.0)
        for action in actions:
            if isinstance(action, JOURNALLED):
                frames: list[Frame] = []
                if isinstance(action, JournalResults):
                    trajectories = [make_trajectory(make_ticket(row.ticket_id)) for row in action.rows]
                    frames = encode(pack_trajectories(trajectories))
                self.journal.apply(action, frames)
        self.journal.commit()
        return actions

    def kill(self, *ticket_ids: str) -> None:
        """Use up the attempts of these tickets, which are issued or leased."""
        for _ in range(2):
            self.do(Release("s", ticket_ids, "infra_failure", "no sandbox"))

    def learner(self, held: tuple[str, ...] = ()) -> list[Action]:
        """A learner joins; what it is sent."""
        return [
            action
            for event in (LearnerJoined("l"), Resume("l", (), held), Credit("l", 100))
            for action in self.do(event)
        ]

    def state(self, ticket_id: str) -> T | None:
        return next((e.state for e in self.ledger.entries if e.ticket.ticket_id == ticket_id), None)

    def settled(self, *ticket_ids: str) -> dict[str, Settled]:
        return {key: known for key in ticket_ids if key not in self.ledger and (known := self.journal.settled(key))}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    desk = Desk(tmp_path)
    desk.do(Issue(tuple(make_ticket(key) for key in ("a1", "a2", "b1"))))
    desk.kill("a1", "a2")
    assert (desk.state("a1"), desk.state("a2"), desk.state("b1")) == (T.DEAD, T.DEAD, T.LEASED)
    return desk


def reply(actions: list[Action]) -> Reply:
    (found,) = (action for action in actions if isinstance(action, Reply))
    return found


def told(actions: list[Action]) -> list[str]:
    return [action.ticket_id for action in actions if isinstance(action, AnnounceDead)]


@pytest.mark.parametrize("restarted", [False, True])
def test_a_requeued_ticket_is_issued_with_no_attempt_used(desk: Desk, restarted: bool) -> None:
    if restarted:
        desk.restart()
    actions = desk.do(Requeue(("a1",)))
    assert reply(actions) == Reply(count=1)
    (grant,) = (action for action in actions if isinstance(action, Grant))
    assert [(ticket.ticket_id, ticket.attempt) for ticket in grant.tickets] == [("a1", 0)]
    assert (desk.state("a1"), desk.state("a2")) == (T.LEASED, T.DEAD)
    assert desk.ledger.counts[T.DEAD, Mode.TRAIN] == 1
    desk.restart()
    assert [(r.ticket.attempt, r.error) for r in desk.journal.live() if r.ticket.ticket_id == "a1"] == [(0, "")]


def test_its_result_is_delivered_once_and_its_second_death_told(desk: Desk) -> None:
    desk.do(Requeue(everything=True))
    finish = Finish(Outcome.COMPLETED, 1.0, 1.0)
    assert reply(desk.do(Results("s", (Arrived("a1", finish),)))).statuses == (("a1", "accepted"),)
    desk.kill("a2")
    actions = desk.learner()
    assert [action.ticket_ids for action in actions if isinstance(action, Deliver)] == [("a1",)]
    assert told(actions) == ["a2"]
    assert reply(desk.do(Ack(("a1", "a2")))).count == 2
    assert "a1" not in desk.ledger
    assert "a2" not in desk.ledger


def test_what_the_learner_holds_is_not_requeued(desk: Desk) -> None:
    assert told(desk.learner()) == ["a1", "a2"]
    refused = reply(desk.do(Requeue(("a1",)))).refused
    assert refused == (("a1", "the learner was told of it and has closed its group; it can only be purged"),)
    result = reply(desk.do(Requeue(everything=True)))
    assert (result.count, [key for key, _ in result.refused]) == (0, ["a1", "a2"])
    # Its successor does not hold them, and is told only of what is still dead.
    desk.do(LearnerJoined("m"))
    desk.do(Resume("m", (), ()))
    assert reply(desk.do(Requeue(("a1",)))).count == 1
    assert told(desk.do(Credit("m", 100))) == ["a2"]


def test_one_ticket_that_cannot_be_leaves_all_as_they_are(desk: Desk) -> None:
    desk.learner()
    desk.do(Ack(("a2",)))
    desk.do(Cancel(everything=True))
    ids = ("a1", "a2", "b1", "zz")
    for event in (Requeue, Purge):
        result = reply(desk.do(event(ids, settled=desk.settled(*ids))))
        assert result.count == 0
        refused = dict(result.refused)
        assert refused["a2"] == "the learner has acked it already"
        assert refused["b1"] == "it is cancelled, not dead"
        assert refused["zz"] == "no ticket of this run has this id"
    assert desk.state("a1") is T.DEAD


def test_a_live_ticket_that_is_not_dead_is_refused_by_its_state(desk: Desk) -> None:
    assert reply(desk.do(Requeue(("b1",)))).refused == (("b1", "it is leased, not dead"),)
    assert reply(desk.do(Purge(("b1",)))).refused == (("b1", "it is leased, not dead"),)


def test_what_the_learner_cancelled_stays_dead(desk: Desk) -> None:
    desk.do(Cancel(("b1",)))
    assert desk.state("b1") is T.DEAD
    assert reply(desk.do(Requeue(("b1",)))).refused == (("b1", "the learner has cancelled it"),)
    assert reply(desk.do(Requeue(everything=True))).count == 2
    assert CANCELLED_ERROR in {entry.error for entry in desk.ledger.entries}


@pytest.mark.parametrize("restarted", [False, True])
def test_a_purged_letter_is_not_listed_and_the_learner_is_told_until_it_acks(desk: Desk, restarted: bool) -> None:
    assert reply(desk.do(Purge(("a1",)))) == Reply(count=1)
    if restarted:
        desk.restart()
    assert [row.ticket_id for row in look(desk).dead] == ["a2"]
    assert look(desk).num_dead == 1
    assert reply(desk.do(Requeue(("a1",)))).refused == (("a1", "it was purged already"),)
    assert reply(desk.do(Purge(("a1",)))).refused == (("a1", "it was purged already"),)
    assert reply(desk.do(Purge(everything=True))).count == 1
    assert reply(desk.do(Requeue(everything=True))).count == 0
    (first, second) = (action for action in desk.learner() if isinstance(action, AnnounceDead))
    assert (first.ticket_id, first.error) == ("a1", "purged by the operator: no sandbox")
    assert second.ticket_id == "a2"
    desk.restart()  # before its checkpoint: the group of the next learner must close, too
    assert told(desk.learner()) == ["a1", "a2"]
    assert reply(desk.do(Ack(("a1", "a2")))).count == 2
    desk.restart()
    assert told(desk.learner()) == []
    assert desk.journal.settled("a1") is not None


def test_a_letter_that_the_learner_holds_can_be_purged(desk: Desk) -> None:
    desk.learner()
    assert reply(desk.do(Purge(("a1",)))).count == 1
    assert reply(desk.do(Ack(("a1",)))).count == 1


def look(desk: Desk, now: float = 5.0, max_dead: int = 100):  # type: ignore[no-untyped-def]
    status = StatusReply(request_id="r", tickets={}, totals={}, peers={}, full=False)
    return inspect(
        status, "run", desk.ledger.entries, desk.ledger.actors, [], now=now, max_dead=max_dead, store_bytes=1
    )


def test_inspection_counts_by_environment_and_actor(desk: Desk) -> None:
    seen = look(desk)
    assert seen.environments == {"shop": {"dead": 2, "leased": 1}}
    assert [(row.actor_id, row.leases, row.oldest_lease_s, row.connected) for row in seen.actors] == [
        ("actor-0", 1, 5.0, True)
    ]
    assert seen.oldest_lease is not None
    assert (seen.oldest_lease.ticket_id, seen.oldest_lease.actor_id) == ("b1", "actor-0")
    assert (seen.oldest_lease.held_s, seen.oldest_lease.left_s) == (5.0, 25.0)
    assert [(row.ticket_id, row.attempts, row.error, row.told) for row in seen.dead] == [
        ("a1", 2, "no sandbox", False),
        ("a2", 2, "no sandbox", False),
    ]
    desk.learner()
    assert all(row.told for row in look(desk).dead)


def test_inspection_is_bounded(desk: Desk) -> None:
    desk.do(Issue(tuple(make_ticket(f"c{number}") for number in range(1500))))
    desk.do(Release("s", ("b1",), "drain"))
    desk.do(Want("s", 10_000))
    ids = tuple(e.ticket.ticket_id for e in desk.ledger.entries if e.state in (T.LEASED, T.ISSUED))
    desk.kill(*ids)
    seen = look(desk, max_dead=1000)
    assert seen.num_dead > 1000
    assert len(seen.dead) == 1000
    assert look(desk, max_dead=0).dead == ()
    assert sum(len(frame) for frame in encode(seen.pack())) < 1 << 20
