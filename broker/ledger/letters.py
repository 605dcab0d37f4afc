"""The operator's half of the ledger: dead letters that are issued again, or given up.

Works on the ledger's `TicketTable`. Owns what may be done with a dead letter: one that the learner holds has closed its
group and cannot come back to life; one that is given up stays, unlisted, until the learner has acked it, so that its
group closes without it whatever is killed meanwhile. Never touches a ticket that is not dead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from msgspec.structs import replace

from broker.ledger.events import Action, Count, JournalAttempt, JournalPurge, Purge, Reply, Requeue, Settled
from broker.ledger.table import Entry, TicketTable
from broker.protocol.commands import MAX_ROWS
from broker.protocol.commands import TicketState as T

PURGED: Final = "operator"  # the `source` of a dead letter that was given up
_PURGED_REASON: Final = "it was purged already"
_TOLD_REASON: Final = "the learner was told of it and has closed its group; it can only be purged"


class Letters:
    """The dead letters. `final_error`: that of letters which the learner itself asked for, by a CANCEL."""

    def __init__(self, table: TicketTable, final_error: str) -> None:
        self._table, self._final_error = table, final_error

    def requeue(self, event: Requeue) -> list[Action]:
        """Issue again, with no attempt used. Of the named ones all or, where one cannot be, none."""
        chosen, refused = self._choose(event, self._no_requeue)
        actions: list[Action] = []
        for entry in chosen:
            entry.ticket = replace(entry.ticket, attempt=0)
            entry.error, entry.result_seq = "", 0
            self._table.move(entry, "requeue")
            actions.append(JournalAttempt(entry.seq, entry.ticket.ticket_id, 0, ""))
        return [*actions, Count("requeued", len(chosen)), Reply(count=len(chosen), refused=refused)]

    def purge(self, event: Purge) -> list[Action]:
        """Give up. Of the named ones all or, where one cannot be, none."""
        chosen, refused = self._choose(event, self._no_purge)
        actions: list[Action] = []
        for entry in chosen:
            entry.source, entry.error = PURGED, f"purged by the operator: {entry.error}"
            actions.append(JournalPurge(entry.seq, entry.ticket.ticket_id, entry.error))
        return [*actions, Count("purged", len(chosen)), Reply(count=len(chosen), refused=refused)]

    def _choose(
        self, event: Requeue | Purge, why_not: Callable[[Entry], str]
    ) -> tuple[list[Entry], tuple[tuple[str, str], ...]]:
        """Which letters the event means, and what of it is refused."""
        entries = self._table.entries
        if event.everything:
            dead = [entry for entry in entries.values() if is_letter(entry)]
            reasons = ((entry.ticket.ticket_id, why_not(entry)) for entry in dead)
            refused = _refused(reasons)
            return [entry for entry in dead if not why_not(entry)], refused
        ids = list(dict.fromkeys(event.ticket_ids))
        refused = _refused((key, _not_dead(key, entries, event.settled) or why_not(entries[key])) for key in ids)
        return ([] if refused else [entries[key] for key in ids]), refused

    def _no_requeue(self, entry: Entry) -> str:
        if entry.source == PURGED:
            return _PURGED_REASON
        if entry.error == self._final_error:
            return "the learner has cancelled it"
        return _TOLD_REASON if entry.announced else ""

    def _no_purge(self, entry: Entry) -> str:
        return _PURGED_REASON if entry.source == PURGED else ""


def is_letter(entry: Entry) -> bool:
    """Whether this is a dead letter that was not given up."""
    return entry.state is T.DEAD and entry.source != PURGED


def _not_dead(ticket_id: str, entries: Mapping[str, Entry], settled: Mapping[str, Settled]) -> str:
    entry = entries.get(ticket_id)
    if entry is not None:
        return "" if entry.state is T.DEAD else f"it is {entry.state}, not dead"
    ended = settled.get(ticket_id)
    if ended is None:
        return "no ticket of this run has this id"
    return "the learner has acked it already" if ended.state is T.DEAD else f"it is {ended.state}, not dead"


def _refused(reasons: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((ticket_id, reason) for ticket_id, reason in reasons if reason)[:MAX_ROWS]
