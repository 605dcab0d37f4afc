"""The ledger under arbitrary sequences of events, with an explicit clock and a model of what everybody holds."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from broker.exchange.drift import DriftMonitor
from broker.ledger.events import (
    Ack,
    Action,
    ActorJoined,
    AnnounceDead,
    Arrived,
    Cancel,
    Credit,
    Damaged,
    Deliver,
    Event,
    Finish,
    Finished,
    GoOn,
    Grant,
    HandOver,
    Hold,
    Issue,
    JournalEnds,
    JournalPartial,
    JournalRecall,
    JournalResults,
    LearnerJoined,
    PartialLost,
    PeerGone,
    Purge,
    Release,
    Renew,
    Requeue,
    Results,
    Resume,
    Settle,
    Tick,
    Want,
    Withdraw,
)
from broker.ledger.table import OPEN
from broker.protocol.commands import TicketState as T
from broker.protocol.trajectory import Mode, Outcome, Ticket
from tests.unit.broker.book import FINISH, LEASE_S, MAX_PARTIAL_BYTES, Book, reply, ticket_of

MAX_ATTEMPTS = 4
ACTORS = st.sampled_from(["s0", "s1", "s2", "s3"])  # s0 and s1 are two processes of one actor
NUMBERS = list(range(8))
IDS = st.sampled_from([f"t{number}" for number in NUMBERS])
GROUPS = st.sampled_from(["g0", "g1", "g2"])
OUTCOMES = st.sampled_from([outcome for outcome in Outcome if outcome is not Outcome.INFRA_FAILURE])
FINISHES = st.builds(Finish, OUTCOMES, st.floats(-1, 2), st.floats(0, 1e6))


def ticket(ticket_id: str) -> Ticket:
    """Two environments, three groups of training tickets, two evaluation tickets."""
    number = int(ticket_id[1:])
    mode = Mode.EVAL if number >= 6 else Mode.TRAIN
    return ticket_of(ticket_id, mode, f"g{number // 2}", f"env{number % 4 // 2}")


class LedgerMachine(RuleBasedStateMachine):
    """What is checked at every action is in `check`, what must hold in between in the invariants."""

    def __init__(self) -> None:
        super().__init__()
        self.book = Book(MAX_ATTEMPTS)
        self.monitor = DriftMonitor(patience=4)
        self.issued: set[str] = set()
        self.acked: set[str] = set()
        self.learner_has: set[str] = set()
        self.rotten: set[str] = set()  # stored trajectories that the disk has damaged
        self.partials: dict[str, int] = {}  # the attempt that each partial was made in
        self.joined: set[str] = set()
        self.credit: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    @initialize(ids=st.lists(IDS, min_size=2, max_size=8), at_work=st.sampled_from([True, True, False]))
    def a_run_has_begun(self, ids: list[str], at_work: bool) -> None:
        """Else most sequences would come to an end before anything is leased."""
        if at_work:
            self.issue(ids)
            for session in ("s2", "s3"):
                self.actor_joins(session, 3, set())
            self.learner_joins(3, same=False, lose=set())

    # --- what is done with the ledger's actions

    def do(self, event: Event) -> list[Action]:
        actions = self.book.do(event)
        unreadable = [ticket_id for action in actions for ticket_id in self.check(action)]
        told = {(a.session, key) for a in actions if isinstance(a, Withdraw) for key in a.ticket_ids}
        for session, ticket_id in told:
            assert session in self.joined
            row = self.book.rows.get(ticket_id)
            assert row is None or row.state is not T.ISSUED, "withdrawn although its result is wanted"
        for ticket_id in unreadable:
            self.do(Damaged("L", ticket_id))
        return actions

    def check(self, action: Action) -> list[str]:
        """The tickets whose trajectories were to be delivered and cannot be read."""
        match action:
            case Grant(session, granted):
                assert session in self.joined
                self.sent[session] += len(granted)
                assert self.sent[session] <= self.credit[session], "more than the credit"
                for ticket in granted:
                    assert self.book.rows[ticket.ticket_id].state is T.ISSUED, "granted although it has a result"
                    assert not self.book.rows[ticket.ticket_id].partial_bytes, "begun anew in spite of a partial"
            case GoOn(session, ticket):
                assert session in self.joined
                self.sent[session] += 1
                assert self.sent[session] <= self.credit[session], "more than the credit"
                row = self.book.rows[ticket.ticket_id]
                assert row.state is T.ISSUED, "gone on with although it has a result"
                assert row.partial_bytes, "nothing to go on with"
                assert ticket.attempt == self.partials[ticket.ticket_id], "a failed attempt is gone on with"
            case JournalPartial(_, ticket_id, lost=False):
                self.partials[ticket_id] = self.book.rows[ticket_id].ticket.attempt
            case Deliver(_, ticket_ids):
                return [ticket_id for ticket_id in ticket_ids if not self.arrives(ticket_id, ticket_id in self.rotten)]
            case AnnounceDead(_, ticket_id):
                self.arrives(ticket_id, rotten=False)
            case JournalResults(_, rows) | JournalEnds(rows):
                self.rotten.difference_update(row.ticket_id for row in rows)
            case JournalRecall(_, ticket_id):
                self.rotten.discard(ticket_id)
                self.monitor.recalled(ticket_id)
            case Finished() | Settle():
                self.monitor.observe(action)
        return []

    def arrives(self, ticket_id: str, rotten: bool) -> bool:
        """Whether the learner gets it."""
        self.sent["L"] += 1
        assert self.sent["L"] <= self.credit["L"], "more than the credit"
        assert ticket_id not in self.acked, "delivered after its ack"
        assert ticket_id not in self.learner_has, "delivered twice to one learner"
        if rotten:
            self.sent["L"] -= 1
            return False
        self.learner_has.add(ticket_id)
        return True

    # --- tickets

    @rule(ids=st.lists(IDS, max_size=4))
    def issue(self, ids: list[str]) -> None:
        tickets = tuple(ticket(ticket_id) for ticket_id in ids)
        count = reply(self.do(Issue(tickets, frozenset(key for key in ids if self.book.settled(key))))).count
        assert count == len(set(ids) - self.issued)
        self.issued.update(ids)

    @rule(data=st.data(), groups=st.sets(GROUPS, max_size=1))
    def cancel_some(self, data: st.DataObject, groups: set[str]) -> None:
        ids = data.draw(st.sets(IDS, max_size=2))
        entries = self.book.ledger._table.entries.values()
        hit = [e for e in entries if e.state in OPEN and (e.ticket.ticket_id in ids or e.ticket.group_id in groups)]
        holders = {(e.holder, e.ticket.ticket_id) for e in hit if e.holder in self.joined}
        actions = self.do(Cancel(tuple(ids), tuple(groups)))
        assert reply(actions).count == len(hit)
        assert holders == {(a.session, key) for a in actions if isinstance(a, Withdraw) for key in a.ticket_ids}
        for entry in hit:
            assert self.book.rows[entry.ticket.ticket_id].state is T.DEAD

    @rule()
    def cancel_everything(self) -> None:
        self.do(Cancel(everything=True))
        assert not any(row.state is T.ISSUED for row in self.book.rows.values())

    @rule(ids=st.sets(IDS, max_size=2), everything=st.booleans())
    def requeue(self, ids: set[str], everything: bool) -> None:
        settled = {key: known for key in ids if (known := self.book.settled(key))}
        actions = self.do(Requeue(() if everything else tuple(ids), everything, settled))
        for row in self.book.rows.values():
            if row.state is T.DEAD and row.ticket.ticket_id in self.learner_has:
                assert reply(actions).count == 0 or row.ticket.ticket_id not in ids or everything

    @rule(ids=st.sets(IDS, max_size=2), everything=st.booleans())
    def purge(self, ids: set[str], everything: bool) -> None:
        settled = {key: known for key in ids if (known := self.book.settled(key))}
        self.do(Purge(() if everything else tuple(ids), everything, settled))

    # --- actors

    @rule(session=ACTORS, credit=st.integers(0, 3), leases=st.sets(IDS, max_size=3))
    def actor_joins(self, session: str, credit: int, leases: set[str]) -> None:
        actor_id = "actor-0" if session in ("s0", "s1") else session
        self.joined -= {"s0", "s1"} if actor_id == "actor-0" else set()
        self.joined.add(session)
        self.credit[session] = self.sent[session] = 0
        self.do(ActorJoined(session, actor_id))
        self.renew(session, leases)
        self.want(session, credit)

    @rule(session=ACTORS, leases=st.sets(IDS, max_size=3))
    def renew(self, session: str, leases: set[str]) -> None:
        in_vain = {key for key in leases if self.unwanted(key, session)} if session in self.joined else set()
        actions = self.do(Renew(session, tuple(leases)))
        assert in_vain == {key for a in actions if isinstance(a, Withdraw) for key in a.ticket_ids}

    def unwanted(self, ticket_id: str, session: str) -> bool:
        row = self.book.rows.get(ticket_id)
        return row is None or (row.state is not T.ISSUED and row.source != session)

    @rule(session=ACTORS, more=st.integers(1, 3))
    def want(self, session: str, more: int) -> None:
        if session in self.joined:
            self.credit[session] += more
            self.do(Want(session, self.credit[session]))

    @rule(session=ACTORS, parcel=st.lists(st.tuples(IDS, FINISHES), min_size=1, max_size=4))
    def results(self, session: str, parcel: list[tuple[str, Finish]]) -> None:
        arrived = tuple(Arrived(ticket_id, finish, self.book.settled(ticket_id)) for ticket_id, finish in parcel)
        wanted = {key for key, _ in parcel if key in self.book.rows and self.book.rows[key].state is T.ISSUED}
        actions = self.do(Results(session, arrived))
        statuses = reply(actions).statuses
        assert [ticket_id for ticket_id, _ in statuses] == [ticket_id for ticket_id, _ in parcel]
        seen = set()
        for ticket_id, status in statuses:
            is_first = ticket_id in wanted and ticket_id not in seen
            assert status in ("late", "accepted") or not is_first
            assert status != "late" or is_first
            assert status == "accepted" or ticket_id not in seen or ticket_id not in wanted
            seen.add(ticket_id)
        finished = [entry.ticket_id for a in actions if isinstance(a, Finished) for entry, _ in a.results]
        assert sorted(finished) == sorted(wanted), "a result was counted twice, or never"

    @rule(session=ACTORS, ticket_id=IDS, drain=st.booleans())
    def release(self, session: str, ticket_id: str, drain: bool) -> None:
        self.do(Release(session, (ticket_id,), "drain" if drain else "infra_failure"))

    @rule(session=ACTORS, ticket_id=IDS, num_bytes=st.integers(1, MAX_PARTIAL_BYTES))
    def hand_over(self, session: str, ticket_id: str, num_bytes: int) -> None:
        entry = self.book.ledger._table.entries.get(ticket_id)
        held = entry is not None and entry.state is T.LEASED and entry.holder == session
        attempt = entry.ticket.attempt if entry is not None else 0
        others = sum(row.partial_bytes for key, row in self.book.rows.items() if key != ticket_id)
        fits = others + num_bytes <= MAX_PARTIAL_BYTES
        before = self.book.rows[ticket_id].partial_bytes if held else 0
        actions = self.do(HandOver(session, ticket_id, num_bytes))
        assert reply(actions).handover == ("unwanted" if not held else "kept" if fits else "refused")
        if held:
            row = self.book.rows[ticket_id]
            assert row.ticket.attempt == attempt, "a handover is no failure"
            assert row.partial_bytes == (num_bytes if fits else before)

    @precondition(lambda self: self.held())
    @rule(data=st.data(), num_bytes=st.integers(1, MAX_PARTIAL_BYTES // 2), then=st.booleans())
    def a_holder_hands_over(self, data: st.DataObject, num_bytes: int, then: bool) -> None:
        """And, perhaps, another goes on and fails, or the broker dies in between."""
        session, ticket_id = data.draw(st.sampled_from(self.held()))
        self.hand_over(session, ticket_id, num_bytes)
        if then:
            self.want("s2", 8)
            self.time_passes(data.draw(st.sampled_from([0.0, LEASE_S])))
            for session, ticket_id in self.held():
                self.release(session, ticket_id, drain=data.draw(st.booleans()))

    def held(self) -> list[tuple[str, str]]:
        """Leases: (session, ticket)."""
        entries = self.book.ledger._table.entries
        return [(entry.holder, key) for key, entry in entries.items() if entry.state is T.LEASED]

    @rule(ticket_id=IDS)
    def partial_rots(self, ticket_id: str) -> None:
        self.do(PartialLost(ticket_id))
        assert ticket_id not in self.book.rows or not self.book.rows[ticket_id].partial_bytes

    @rule(session=st.sampled_from(["s0", "s2", "L"]))
    def peer_gone(self, session: str) -> None:
        self.joined.discard(session)
        self.do(PeerGone(session))

    # --- learner

    @rule(credit=st.integers(0, 4), same=st.booleans(), lose=st.sets(IDS, max_size=2))
    def learner_joins(self, credit: int, same: bool, lose: set[str]) -> None:
        """Either the same process on a new connection, on which deliveries may have been lost, or a new one."""
        self.learner_has = self.learner_has - lose if same else set()
        self.sent["L"] = self.credit["L"] = 0
        self.do(LearnerJoined("L"))
        self.do(Resume("L", (), tuple(self.learner_has)))
        self.more_credit(credit)

    @rule(more=st.integers(0, 4))
    def more_credit(self, more: int) -> None:
        self.credit["L"] += more
        self.do(Credit("L", self.credit["L"]))

    @precondition(lambda self: self.learner_has)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        ids = data.draw(st.sets(st.sampled_from(sorted(self.learner_has)), max_size=3))
        dropped = data.draw(st.sets(IDS, max_size=2))
        self.do(Ack(tuple(ids), frozenset(dropped)))
        for ticket_id in ids:
            assert ticket_id in self.book.ended, "an acked ticket lives on"
        self.acked |= ids
        self.learner_has -= ids

    # --- the world

    @rule(seconds=st.floats(0, 12))
    def time_passes(self, seconds: float) -> None:
        self.book.now += seconds
        self.do(Tick())

    @rule(on=st.booleans())
    def hold(self, on: bool) -> None:
        self.do(Hold(on))

    @rule(ids=st.sets(IDS, max_size=2))
    def disk_rots(self, ids: set[str]) -> None:
        self.rotten |= {key for key in ids if key in self.book.rows and self.book.rows[key].state is T.DELIVERED}

    @rule()
    def restart(self) -> None:
        self.book.restart()
        self.monitor = DriftMonitor(patience=4)
        self.joined.clear()
        self.credit.clear()
        self.sent.clear()

    # --- what must always hold

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.issued == self.book.rows.keys() | self.book.ended.keys()
        assert self.book.rows.keys() == self.book.ledger._table.entries.keys()

    @invariant()
    def ledger_and_journal_agree(self) -> None:
        for ticket_id, row in self.book.rows.items():
            entry = self.book.ledger._table.entries[ticket_id]
            volatile = {T.LEASED: T.ISSUED, T.ASSIGNED: T.DELIVERED}
            assert volatile.get(entry.state, entry.state) is row.state
            assert (entry.ticket, entry.source) == (row.ticket, row.source)
            assert entry.partial_bytes == row.partial_bytes
            assert not row.partial_bytes or (row.state is T.ISSUED and row.ticket.attempt == self.partials[ticket_id])
            assert entry.ticket.attempt <= MAX_ATTEMPTS

    @invariant()
    def partials_have_a_bound(self) -> None:
        num_bytes = sum(row.partial_bytes for row in self.book.rows.values())
        assert self.book.ledger.partial_bytes == num_bytes <= MAX_PARTIAL_BYTES

    @invariant()
    def counts_are_right(self) -> None:
        states = Counter((e.state, e.ticket.mode) for e in self.book.ledger._table.entries.values())
        states.update((known.state, self.book.ended_modes[key]) for key, known in self.book.ended.items())
        assert states == Counter({key: num for key, num in self.book.ledger.counts.items() if num})

    @invariant()
    def the_schedule_holds_exactly_what_waits(self) -> None:
        table = self.book.ledger._table
        entries = table.entries
        issued = {key for key, entry in entries.items() if entry.state is T.ISSUED}
        assert issued == table.schedule._places.keys()
        leased = Counter(
            e.ticket.task.env for e in table.entries.values() if e.state is T.LEASED and not_urgent(e.ticket)
        )
        for env, environment in table.schedule._environments.items():
            assert environment.leased.running == leased[env]
            for group_id, group in environment.groups.items():
                assert group.num_missing == table._groups[group_id].num_open
                assert group.tickets.num == table._groups[group_id].num_issued

    @invariant()
    def groups_know_their_tickets(self) -> None:
        entries, groups = self.book.ledger._table.entries, self.book.ledger._table._groups
        assert groups.keys() == {entry.ticket.group_id for entry in entries.values()}
        for group_id, group in groups.items():
            members = [entry for entry in entries.values() if entry.ticket.group_id == group_id]
            assert group.ticket_ids == {entry.ticket.ticket_id for entry in members}
            assert group.num_open == sum(entry.state in OPEN for entry in members)
            assert group.num_issued == sum(entry.state is T.ISSUED for entry in members)
            assert all(entry.group is group for entry in members)
            assert group.num_dead >= sum(entry.state is T.DEAD for entry in members)

    @invariant()
    def the_monitor_holds_no_more_than_what_is_open(self) -> None:
        entries = self.book.ledger._table.entries
        for ticket_id in self.monitor._results:
            assert entries[ticket_id].state not in (T.ACKED, T.CANCELLED)
        assert len(self.monitor._groups) <= len(self.monitor._results)

    @invariant()
    def no_lease_outlives_its_time(self) -> None:
        self.do(Tick())
        expiries = [entry.expires_at for entry in self.book.ledger._table._leases.values()]
        assert expiries == sorted(expiries)
        for entry in self.book.ledger._table.entries.values():
            assert (entry.state is T.LEASED) == (entry.ticket.ticket_id in self.book.ledger._table._leases)
            if entry.state is T.LEASED:
                assert entry.leased_at <= self.book.now < entry.expires_at <= self.book.now + LEASE_S
                assert entry.ticket.ticket_id in self.book.ledger._leases.actors[entry.holder].leases

    def teardown(self) -> None:
        """Whatever has happened: patient actors and a learner bring every ticket to its end."""
        self.rotten.clear()
        self.do(Hold(False))
        self.actor_joins("s3", 0, set())
        self.learner_joins(0, same=False, lose=set())
        self.book.now += 2 * LEASE_S
        self.do(Tick())
        self.want("s3", 100)
        for ticket_id in [key for key, row in self.book.rows.items() if row.state is T.ISSUED]:
            self.results("s3", [(ticket_id, FINISH)])
        self.more_credit(100)
        self.do(Ack(tuple(self.learner_has)))
        assert self.book.rows == {}
        assert self.issued == self.book.ended.keys()


def not_urgent(of: Ticket) -> bool:
    return of.mode is Mode.TRAIN


LedgerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLedger = LedgerMachine.TestCase
