"""The live tickets in the store, and those that have ended: the tables `tickets`, `states`, `ended` and `past`.

Owns what is written of a ticket but for its trajectory. Of the ended ones the newest keep a row, for refusing a second
life. Never begins or ends a transaction: the journal does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, takewhile
from typing import Any, Final

import msgspec

from broker.ledger.events import EndedRow, JournalAttempt, Restored, Settled, TakenRow
from broker.protocol.commands import TicketState
from broker.protocol.trajectory import Ticket
from broker.store.database import Database
from broker.store.datafile import unusable
from broker.store.rows import STATES, State, decode_state, decode_ticket, encode, number, pack_key, ticket_key

TRIM_BATCH: Final = 2048  # rows of ended tickets forgotten in one commit at most
_CODES: Final = {state: bytes((code,)) for code, state in enumerate(STATES)}
_NO_STATE: Final = State()


class LiveTickets:
    """The tables `tickets` and `states` of `db`. `reload` is due before anything else. Writing raises lmdb.Error."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._states: set[int] = set()  # seqs that have a State
        self._last = 0  # the highest seq there ever was in this process

    def reload(self) -> None:
        """Take over what is committed."""
        with self._db.read() as transaction:
            cursor = transaction.cursor(db=self._db.tables.states)
            self._states = {number(key) for key in cursor.iternext(values=False)}
            cursor = transaction.cursor(db=self._db.tables.tickets)
            self._last = number(cursor.key()) if cursor.last() else 0

    def counts(self) -> Callable[[TakenRow, int], bool]:
        """A look-up: whether a row of a parcel, by the parcel's number, is the result of a live ticket."""
        with self._db.read() as transaction:
            live = set(map(number, transaction.cursor(db=self._db.tables.tickets).iternext(values=False)))
            recalled = {seq: self._state(transaction, seq).recalled for seq in self._states}
        return lambda row, parcel: row.seq in live and parcel > recalled.get(row.seq, 0)

    def add(self, rows: Sequence[tuple[int, Ticket]]) -> None:
        """New tickets, each with its seq."""
        items = [(pack_key(seq), encode(ticket)) for seq, ticket in rows]
        # In order as a rule; then the pages are filled one after the other.
        append = self._last < rows[0][0] and all(rows[i][0] < rows[i + 1][0] for i in range(len(rows) - 1))
        self._db.write.cursor(db=self._db.tables.tickets).putmulti(items, append=append)
        self._last = max(self._last, *(seq for seq, _ in rows))

    def attempt(self, action: JournalAttempt) -> None:
        """A new attempt, or the last one was used up."""
        state = self._state(self._db.write, action.seq)
        result_seq = action.result_seq if action.dead else 0
        self._put(
            action.seq,
            msgspec.structs.replace(
                state, attempt=action.attempt, dead=action.dead, result_seq=result_seq, error=action.error
            ),
        )

    def recall(self, seq: int, parcel: int) -> None:
        """The ticket is issued again; results in parcels up to this one do not count."""
        self._put(seq, msgspec.structs.replace(self._state(self._db.write, seq), recalled=parcel))

    def purge(self, seq: int, source: str, error: str) -> None:
        """A dead letter has another source and error."""
        self._put(seq, msgspec.structs.replace(self._state(self._db.write, seq), source=source, error=error))

    def source(self, seq: int) -> str:
        """The source that its State names; of a result the parcels know it."""
        return self._state(self._db.write, seq).source if seq in self._states else ""

    def remove(self, rows: Sequence[EndedRow]) -> None:
        """These have ended."""
        delete, tables = self._db.write.delete, self._db.tables
        for row in rows:
            key = pack_key(row.seq)
            delete(key, b"", tables.tickets)
            if row.seq in self._states:
                self._states.discard(row.seq)
                delete(key, b"", tables.states)

    def live(self, taken: Mapping[int, tuple[int, str]], partials: Mapping[str, int]) -> Iterator[Restored]:
        """Every live ticket, in the order of issue. `taken`: result_seq and source of the results by seq. `partials`:
        bytes of the partials by ticket. Raises ErgonError where a row cannot be read."""
        with self._db.read() as transaction:
            for key, packed in transaction.cursor(db=self._db.tables.tickets):
                seq = number(key)
                try:
                    ticket, state = decode_ticket(packed), self._state(transaction, seq)
                except msgspec.MsgspecError as error:
                    raise unusable(self._db.path, f"ticket {seq} cannot be read: {error}") from error
                if state.attempt is not None:
                    ticket = msgspec.structs.replace(ticket, attempt=state.attempt)
                if seq in taken:
                    yield Restored(seq, ticket, TicketState.DELIVERED, *taken[seq], state.error)
                else:
                    where = TicketState.DEAD if state.dead else TicketState.ISSUED
                    num_bytes = partials.get(ticket.ticket_id, 0)
                    yield Restored(seq, ticket, where, state.result_seq, state.source, state.error, num_bytes)

    def _state(self, transaction: Any, seq: int) -> State:
        if seq not in self._states:
            return _NO_STATE
        try:
            return decode_state(transaction.get(pack_key(seq), b"", db=self._db.tables.states))
        except msgspec.MsgspecError as error:
            raise unusable(self._db.path, f"the state of ticket {seq} cannot be read: {error}") from error

    def _put(self, seq: int, state: State) -> None:
        self._db.write.put(pack_key(seq), encode(state), db=self._db.tables.states)
        self._states.add(seq)


class EndedTickets:
    """The tables `ended` and `past` of `db`: the newest `keep` ended tickets. Writing raises lmdb.Error."""

    def __init__(self, db: Database, keep: int) -> None:
        self._db, self._keep = db, keep

    def add(self, ended: Sequence[tuple[str, TicketState, str]], last: int) -> int:
        """These have ended: id, state and source. `last`, the number of the end before them; returns the newest."""
        items = [(ticket_key(key), _CODES[state] + source.encode()) for key, state, source in ended]
        write, tables = self._db.write, self._db.tables
        write.cursor(db=tables.ended).putmulti(items)
        past = [(pack_key(last + i), item[0]) for i, item in enumerate(items, 1)]
        write.cursor(db=tables.past).putmulti(past, append=True)
        return last + len(items)

    def trim(self, last: int) -> None:
        """Forget the oldest ones beyond `keep`, a batch at a time. `last`: the number of the newest end."""
        if last <= self._keep:
            return
        bound, tables = pack_key(last - self._keep), self._db.tables
        delete, oldest = self._db.write.delete, self._db.write.cursor(db=tables.past).iternext()
        for number_key, key in list(islice(takewhile(lambda row: row[0] <= bound, oldest), TRIM_BATCH)):
            delete(key, b"", tables.ended)
            delete(number_key, b"", tables.past)

    def settled(self, ticket_id: str) -> Settled | None:
        """How it ended; None for one that has not, or was forgotten. Raises ErgonError where the row cannot be read."""
        with self._db.read() as transaction:
            row = transaction.get(ticket_key(ticket_id), db=self._db.tables.ended)
        try:
            return None if row is None else Settled(STATES[row[0]], row[1:].decode())
        except (IndexError, UnicodeDecodeError) as error:
            raise unusable(self._db.path, f"the end of ticket {ticket_id} cannot be read: {error}") from error

    def settled_ids(self, ticket_ids: Iterable[str]) -> frozenset[str]:
        """Those of the ids that have ended."""
        with self._db.read() as transaction:
            get, ended = transaction.get, self._db.tables.ended
            return frozenset(key for key in ticket_ids if get(ticket_key(key), db=ended) is not None)
