"""What an operator sees: the answer to INSPECT, from the ledger's live tickets and the connected peers.

Pure reading, at a cost that grows with the live tickets; whoever asks pays with a round of the broker. Changes nothing.
"""

from __future__ import annotations

import contextlib
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from broker.exchange.peers import Peer
from broker.ledger.leases import Actor
from broker.ledger.letters import is_letter
from broker.ledger.table import Entry
from broker.protocol.commands import (
    MAX_ERROR_CHARACTERS,
    MAX_ROWS,
    ActorRow,
    DeadRow,
    InspectReply,
    LeaseRow,
    PeerRow,
    StatusReply,
)
from broker.protocol.commands import TicketState as T

_NO_ACTOR = Actor("unknown", joined=False)


def inspect(
    status: StatusReply,
    run_id: str,
    entries: Iterable[Entry],
    actors: dict[str, Actor],
    peers: Iterable[Peer],
    *,
    now: float,
    max_dead: int,
    store_bytes: int,
) -> InspectReply:
    """The reply, with the request id of `status`. `actors` by session; `now` is the ledger's clock."""
    live = list(entries)
    leased = [entry for entry in live if entry.state is T.LEASED]
    oldest = min(leased, key=lambda entry: entry.leased_at, default=None)
    letters = [entry for entry in live if is_letter(entry)]
    connections = sorted(
        (PeerRow(role=p.role, peer_id=p.peer_id, silent_s=_seconds(now - p.heard_at)) for p in peers),
        key=lambda row: (row.role, row.peer_id),
    )
    return InspectReply(
        request_id=status.request_id,
        run_id=run_id,
        tickets=status.tickets,
        totals=status.totals,
        peers=status.peers,
        full=status.full,
        leases_on_hold=status.leases_on_hold,
        store_bytes=store_bytes,
        environments=_by_environment(live),
        oldest_lease=None if oldest is None else _lease_row(oldest, actors, now),
        num_dead=len(letters),
        actors=tuple(_actor_rows(leased, actors, now))[:MAX_ROWS],
        connections=tuple(connections)[:MAX_ROWS],
        dead=tuple(_dead_row(entry) for entry in letters[: min(max_dead, MAX_ROWS)]),
    )


def _by_environment(live: Iterable[Entry]) -> dict[str, dict[str, int]]:
    counts = Counter((entry.ticket.task.env, entry.state) for entry in live)
    environments: dict[str, dict[str, int]] = {}
    for (env, state), num in sorted(counts.items()):
        if env in environments or len(environments) < MAX_ROWS:
            environments.setdefault(env, {})[state.value] = num
    return environments


def _lease_row(entry: Entry, actors: dict[str, Actor], now: float) -> LeaseRow:
    return LeaseRow(
        ticket_id=entry.ticket.ticket_id,
        env=entry.ticket.task.env,
        actor_id=actors.get(entry.holder, _NO_ACTOR).actor_id,
        held_s=_seconds(now - entry.leased_at),
        left_s=round(entry.expires_at - now, 3),
    )


def _actor_rows(leased: Iterable[Entry], actors: dict[str, Actor], now: float) -> list[ActorRow]:
    """One row per process of an actor, those with the oldest leases first."""
    oldest: dict[str, float] = {}
    for entry in leased:
        oldest[entry.holder] = max(oldest.get(entry.holder, 0.0), now - entry.leased_at)
    rows = [
        ActorRow(
            actor_id=actor.actor_id,
            connected=actor.joined,
            leases=len(actor.leases),
            oldest_lease_s=_seconds(oldest[session]) if session in oldest else None,
        )
        for session, actor in actors.items()
    ]
    return sorted(rows, key=lambda row: (-(row.oldest_lease_s or 0.0), row.actor_id))


def _dead_row(entry: Entry) -> DeadRow:
    ticket = entry.ticket
    return DeadRow(
        ticket_id=ticket.ticket_id,
        group_id=ticket.group_id,
        env=ticket.task.env,
        mode=ticket.mode,
        attempts=ticket.attempt,
        error=entry.error[:MAX_ERROR_CHARACTERS],
        told=entry.announced,
    )


def stored_bytes(directory: Path) -> int:
    """Size of all files of the store: database, blobs, reserve."""
    num_bytes = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a blob that was collected meanwhile
            status = path.stat()
            num_bytes += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return num_bytes


def _seconds(value: float) -> float:
    return round(max(value, 0.0), 3)
