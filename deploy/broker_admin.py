"""`ergon broker inspect|requeue|purge`: what an operator does with a running broker, as text for a terminal.

Owns the tables and sentences; the commands are `OperatorClient`'s. Prints nothing: the command line does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from broker.client.operator import OperatorClient
from broker.process.config import load_settings
from broker.process.keys import Identity
from broker.process.lifecycle import ErgonError
from broker.process.security import load_security
from broker.protocol.commands import DeadRow, InspectReply, Purged, Requeued, TicketState
from broker.protocol.trajectory import Mode

ERROR_CHARACTERS = 80  # of a dead letter in the table; --json has 500


def connect(file: Path, overrides: Sequence[str], timeout_s: float) -> OperatorClient:
    """The operator of the run that this TOML describes, not yet connected."""
    if timeout_s <= 0:
        raise ErgonError(f"--timeout {timeout_s:g} is not a positive number of seconds")
    settings = load_settings(file, overrides)
    return OperatorClient(
        f"tcp://{settings.broker.host}:{settings.broker.port}",
        settings.run.name,
        timeout_s=timeout_s,
        security=load_security(settings, Identity.OPERATOR),
    )


def as_json(reply: InspectReply) -> str:
    """One JSON object: the fields of INSPECT_REPLY."""
    facts = msgspec.to_builtins(reply)
    del facts["request_id"]
    return msgspec.json.encode(facts).decode()


def as_tables(reply: InspectReply) -> str:
    """The reply for a person."""
    store = f"{reply.store_bytes / 1e6:.1f} MB"
    trouble = (
        "; it refuses writes" if reply.full else "; nearly full, nothing is leased" if reply.leases_on_hold else ""
    )
    sections = [f"run {reply.run_id}: store {store}{trouble}", _tickets(reply)]
    if reply.environments:
        sections.append(_environments(reply))
    if reply.oldest_lease is not None:
        lease = reply.oldest_lease
        sections.append(
            f"oldest lease: {lease.ticket_id} ({lease.env}), held by {lease.actor_id} for {duration(lease.held_s)}, "
            f"runs out in {duration(lease.left_s)}"
        )
    if reply.actors:
        rows = [
            (row.actor_id, str(row.leases), duration(row.oldest_lease_s), "yes" if row.connected else "no")
            for row in reply.actors
        ]
        sections.append(table(("actor", "leases", "oldest", "connected"), rows))
    connected = [(row.role.value, row.peer_id, duration(row.silent_s)) for row in reply.connections]
    sections.append(table(("peer", "id", "silent"), connected))
    sections.append(_dead(reply.dead, reply.num_dead))
    return "\n\n".join(sections)


def _tickets(reply: InspectReply) -> str:
    rows = [
        (state.value, *(str(reply.tickets.get(state.value, {}).get(mode.value, 0)) for mode in Mode))
        for state in TicketState
    ]
    return table(("tickets", *(mode.value for mode in Mode)), rows)


def _environments(reply: InspectReply) -> str:
    live = [
        state.value for state in TicketState if any(state.value in counts for counts in reply.environments.values())
    ]
    rows = [(env, *(str(counts.get(state, 0)) for state in live)) for env, counts in reply.environments.items()]
    return table(("environment", *live), rows)


def _dead(letters: Sequence[DeadRow], num_dead: int) -> str:
    if not num_dead:
        return "no dead letters"
    rows = [
        (row.ticket_id, row.env, row.mode.value, str(row.attempts), "yes" if row.told else "no", _one_line(row.error))
        for row in letters
    ]
    text = table(("dead letter", "environment", "mode", "attempts", "told", "error"), rows)
    more = num_dead - len(letters)
    return f"{text}\n... and {more} more" if more else text


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= ERROR_CHARACTERS else text[: ERROR_CHARACTERS - 1] + "…"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need to be, numbers to the right; never cut, so that ids can be copied."""
    lines = [list(head), *(["".join(c if c.isprintable() else "?" for c in cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if cell.isdecimal() else cell.ljust(width)
            for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def duration(seconds: float | None) -> str:
    """Seconds for a person."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return time.strftime("%-H h %M min", time.gmtime(seconds)) if seconds < 86_400 else f"{seconds / 86_400:.1f} d"


def outcome(done: Requeued | Purged, everything: bool) -> str:
    """What a requeue or purge did. Raises ErgonError where tickets that were named were refused."""
    verb = "issued again" if isinstance(done, Requeued) else "purged"
    refused = "; ".join(f"{row.ticket_id}: {row.reason}" for row in done.refused[:10])
    more = f"; and {len(done.refused) - 10} more" if len(done.refused) > 10 else ""
    if done.refused and not everything:
        raise ErgonError(f"nothing was {verb}, because not everything named can be: {refused}{more}")
    text = f"{done.count} {'ticket' if done.count == 1 else 'tickets'} {verb}"
    return f"{text}\nleft as they are: {refused}{more}" if done.refused else text
