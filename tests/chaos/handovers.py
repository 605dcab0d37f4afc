"""What became of unfinished episodes: the actors' journal of leases and handovers, and whether what was trained on
agrees with it.

Owns the lines of handovers.jsonl (an actor's, of every lease and every partial) and of episodes.jsonl (the learner's,
of every trajectory that it received). They are written at both ends of the broker, which knows of neither. A line is
one write, so the order of the lines is that of what they say. `judge_handovers` reads them after every process has
ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from actors.ends import Tickets
from broker.client import HandoverStatus, ReleaseReason
from broker.protocol.partials import Partial
from broker.protocol.trajectory import Ticket, Trajectory
from tests.chaos.episode import digest_of
from tests.chaos.orders import reach

JOURNAL = "handovers.jsonl"
EPISODES = "episodes.jsonl"
HANDOVER = "handover"  # the place of orders to whoever hands over, or goes on
SPREAD_S = 0.006  # within which a handover is mostly answered
MAX_PROBLEMS = 5  # that are told of a sort


class WatchedTickets:
    """An actor's source of tickets, the real one. Each lease and handover is a line, and a moment to be killed at."""

    def __init__(self, tickets: Tickets, run_dir: Path, place: str) -> None:
        self._tickets, self._run_dir, self._place = tickets, run_dir, place
        self._attempts: dict[str, int] = {}

    async def lease(self) -> Ticket:
        """See Tickets."""
        ticket = await self._tickets.lease()
        self._attempts[ticket.ticket_id] = ticket.attempt
        return ticket

    def take_partial(self, ticket_id: str) -> Partial | None:
        """See Tickets."""
        partial = self._tickets.take_partial(ticket_id)
        self._write("leased", ticket_id, None if partial is None else digest(partial))
        return partial

    async def hand_over(self, ticket_id: str, partial: Partial) -> HandoverStatus:
        """See Tickets."""
        (segment,), key = partial.segments, digest(partial)
        self._write("offered", ticket_id, key, prefix=digest_of(segment, segment.token_ids_T.size))
        sending = asyncio.ensure_future(self._tickets.hand_over(ticket_id, partial))
        try:
            await asyncio.wait({sending}, timeout=random.uniform(0, SPREAD_S))
            reach(self._run_dir, HANDOVER, "handing_over")
            status = await sending
        finally:
            sending.cancel()
            await asyncio.wait({sending})
        self._write("answered", ticket_id, key, status=status)
        if status == "kept":
            reach(self._run_dir, HANDOVER, "handed_over")
        return status

    async def withdrawn(self, ticket_id: str) -> None:
        """See Tickets."""
        await self._tickets.withdrawn(ticket_id)

    async def release(self, ticket_id: str, reason: ReleaseReason, error: str = "") -> None:
        """See Tickets."""
        await self._tickets.release(ticket_id, reason, error)

    def _write(self, event: str, ticket_id: str, partial: str | None, **more: str) -> None:
        line = {"event": event, "place": self._place, "ticket_id": ticket_id, "attempt": self._attempts[ticket_id]}
        append(self._run_dir / JOURNAL, {**line, "partial": partial, **more})


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line by one write, which lasts beyond the death of this process."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, json.dumps(line).encode() + b"\n")
    finally:
        os.close(descriptor)


def digest(partial: Partial) -> str:
    """All that a partial is."""
    whole = xxhash.xxh3_128(msgspec.json.encode(partial.head))
    for segment in partial.segments:
        whole.update(digest_of(segment, segment.token_ids_T.size).encode())
    whole.update(partial.snapshot)
    return whole.hexdigest()


def episode_line(trajectory: Trajectory, prefixes: list[str]) -> dict[str, Any]:
    """The learner's line: which prefixes of the episode it says were handed over."""
    return {"ticket_id": trajectory.ticket.ticket_id, "prefixes": prefixes}


@dataclass(slots=True)
class Handovers:
    """`kept`: partials that the broker answered for; `continued`: tickets trained on whose episode went on from one."""

    kept: int = 0
    continued: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Known:
    """What is known of the partials of one ticket. An actor whose lease has run out, and which takes it up again, hands
    over under the attempt that it was told of, which may be an older one."""

    prefixes: set[str] = field(default_factory=set)  # all that were offered
    next_ones: list[str] = field(default_factory=list)  # partials, of which the next lease may bring one
    kept_in: int | None = None  # the attempt whose next lease must
    attempts: dict[str, int] = field(default_factory=dict)  # that went on with a partial


def judge_handovers(run_dir: Path, trained: Collection[str]) -> Handovers:
    """Whether every partial that came was one that was handed over of this ticket, whole, and for one attempt; whether
    each that was kept came with the next lease of its attempt; and whether what is trained on went on from exactly what
    was handed over."""
    found = Handovers()
    tickets: defaultdict[str, _Known] = defaultdict(_Known)
    wrong = [problem for line in _lines(run_dir / JOURNAL) if (problem := _replay(line, tickets[line["ticket_id"]]))]
    found.kept = sum(line.get("status") == "kept" for line in _lines(run_dir / JOURNAL))
    prefixes: defaultdict[str, set[str]] = defaultdict(set)
    for line in _lines(run_dir / EPISODES):
        prefixes[line["ticket_id"]] |= set(line["prefixes"])
    found.continued = sum(bool(prefixes[key]) for key in trained if key in prefixes)
    if wrong:
        found.problems.append(f"handovers: {wrong[:MAX_PROBLEMS]}")
    if unknown := [key for key, named in prefixes.items() if not named <= tickets[key].prefixes]:
        found.problems.append(f"went on from what nobody handed over: {sorted(unknown)[:MAX_PROBLEMS]}")
    if unseen := set(trained) - prefixes.keys():
        found.problems.append(f"trained on and never examined: {sorted(unseen)[:MAX_PROBLEMS]}")
    return found


def _replay(line: dict[str, Any], known: _Known) -> str:
    """Take note of a line of the journal; what is wrong with it."""
    partial, attempt = line["partial"], line["attempt"]
    problem = ""
    match line["event"], line.get("status"):
        case "offered", _:
            known.prefixes.add(line["prefix"])
            known.next_ones.append(partial)
        case "answered", "kept":
            known.kept_in = attempt
            known.next_ones = known.next_ones[known.next_ones.index(partial) :]
        case "answered", "refused":
            known.kept_in = None  # the one before is dropped as well
        case "leased", _ if partial is None:
            problem = "leased without the partial that was kept" if known.kept_in == attempt else ""
        case "leased", _ if partial not in known.next_ones:
            problem = "leased with a partial that was not handed over last"
        case "leased", _ if known.attempts.setdefault(partial, attempt) != attempt:
            problem = "leased with a partial whose attempt had failed"
    return problem and f"{line['place']}, {line['ticket_id']} attempt {attempt}: {problem}"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open() as file:
            yield from map(json.loads, file)
