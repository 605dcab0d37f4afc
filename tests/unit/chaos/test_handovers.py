"""The journal of leases and handovers: what it says of real calls, and what is wrong with it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from broker.client import HandoverStatus, ReleaseReason
from broker.protocol.partials import Partial
from broker.protocol.trajectory import PolicyVersion, Ticket
from tests.chaos.episode import Episode, digest_of
from tests.chaos.handovers import EPISODES, JOURNAL, WatchedTickets, append, digest, judge_handovers
from tests.unit.broker.samples import make_ticket

KEY = "r/train/0/0"


def line(event: str, partial: str | None, *, attempt: int = 0, ticket_id: str = KEY, **more: str) -> dict[str, Any]:
    return {"event": event, "place": "a", "ticket_id": ticket_id, "attempt": attempt, "partial": partial, **more}


def offered(partial: str, **more: Any) -> dict[str, Any]:
    return line("offered", partial, prefix=f"prefix of {partial}", **more)


def kept(partial: str, **more: Any) -> list[dict[str, Any]]:
    return [offered(partial, **more), line("answered", partial, status="kept", **more)]


def trained(*partials: str) -> dict[str, Any]:
    return {"ticket_id": KEY, "prefixes": [f"prefix of {partial}" for partial in partials]}


def judge(run_dir: Path, lines: list[dict[str, Any]], episode: dict[str, Any] | None) -> tuple[int, int, list[str]]:
    for each in lines:
        append(run_dir / JOURNAL, each)
    if episode is not None:
        append(run_dir / EPISODES, episode)
    found = judge_handovers(run_dir, [KEY])
    return found.kept, found.continued, found.problems


NEW = line("leased", None)


@pytest.mark.parametrize(
    ("lines", "episode", "counts"),
    [
        ([NEW], trained(), (0, 0)),
        ([NEW, *kept("p"), line("leased", "p")], trained("p"), (1, 1)),
        ([NEW, *kept("p"), line("leased", "p"), *kept("q"), line("leased", "q")], trained("p", "q"), (2, 1)),
        # It was too old for who got it.
        ([NEW, *kept("p"), line("leased", "p")], trained(), (1, 0)),
        # The broker died before it answered: it had kept it, or not.
        ([NEW, offered("p"), line("leased", "p")], trained("p"), (0, 1)),
        ([NEW, offered("p"), NEW], trained(), (0, 0)),
        # Whoever went on with it was killed: the partial went with the attempt.
        ([NEW, *kept("p"), line("leased", "p"), line("leased", None, attempt=1)], trained(), (1, 0)),
        ([NEW, *kept("p"), line("answered", "p", status="refused"), NEW], trained(), (1, 0)),
        # Its lease had run out, and was taken up again.
        ([NEW, *kept("p"), line("leased", "p", attempt=1)], trained("p"), (1, 1)),
    ],
)
def test_what_may_be(
    tmp_path: Path, lines: list[dict[str, Any]], episode: dict[str, Any], counts: tuple[int, int]
) -> None:
    assert judge(tmp_path, lines, episode) == (*counts, [])


@pytest.mark.parametrize(
    ("lines", "episode", "problem"),
    [
        ([NEW, *kept("p"), NEW], trained(), "leased without the partial that was kept"),
        ([line("leased", "p")], trained(), "not handed over last"),
        ([NEW, *kept("p"), line("leased", "p"), line("leased", "p", attempt=1)], trained(), "attempt had failed"),
        ([NEW, *kept("p", ticket_id="other"), line("leased", "p")], trained(), "not handed over last"),
        ([NEW, *kept("p"), line("leased", "p"), *kept("q"), line("leased", "p")], trained(), "not handed over last"),
        ([NEW, *kept("p"), line("leased", "p")], trained("q"), "went on from what nobody handed over"),
        ([NEW, *kept("p", ticket_id="other")], trained("p"), "went on from what nobody handed over"),
        ([NEW], None, "never examined"),
    ],
)
def test_what_must_not_be(
    tmp_path: Path, lines: list[dict[str, Any]], episode: dict[str, Any] | None, problem: str
) -> None:
    (found,) = judge(tmp_path, lines, episode)[2]
    assert problem in found


class Tickets:
    """A source that has one ticket, which was begun."""

    def __init__(self, ticket: Ticket, begun: Partial) -> None:
        self.ticket, self.begun = ticket, begun
        self.answer: asyncio.Future[HandoverStatus] = asyncio.get_running_loop().create_future()
        self.ended: list[str] = []

    async def lease(self) -> Ticket:
        return self.ticket

    def take_partial(self, ticket_id: str) -> Partial | None:
        return self.begun if ticket_id == self.ticket.ticket_id else None

    async def hand_over(self, ticket_id: str, partial: Partial) -> HandoverStatus:
        try:
            return await self.answer
        finally:
            self.ended.append(ticket_id)

    async def withdrawn(self, ticket_id: str) -> None:
        self.ended.append(f"{ticket_id} withdrawn")

    async def release(self, ticket_id: str, reason: ReleaseReason, error: str = "") -> None:
        self.ended.append(f"{ticket_id} {reason}")


async def test_each_lease_and_handover_is_a_line(tmp_path: Path) -> None:
    ticket = make_ticket(KEY)
    episode = Episode(1, ticket)
    episode.sample(0.5, PolicyVersion(1, 1))
    partial = episode.partial()
    tickets = Tickets(ticket, partial)
    watched = WatchedTickets(tickets, tmp_path, "actor-1")
    await watched.lease()
    assert watched.take_partial(KEY) is partial
    tickets.answer.set_result("kept")
    assert await watched.hand_over(KEY, partial) == "kept"
    lines = [json.loads(text) for text in (tmp_path / JOURNAL).read_text().splitlines()]
    (segment,) = partial.segments
    prefix = digest_of(segment, segment.token_ids_T.size)
    common = {"place": "actor-1", "ticket_id": KEY, "attempt": 0, "partial": digest(partial)}
    assert lines == [
        {"event": "leased", **common},
        {"event": "offered", **common, "prefix": prefix},
        {"event": "answered", **common, "status": "kept"},
    ]


async def test_a_handover_that_is_cancelled_has_ended_before_its_lease_is_given_back(tmp_path: Path) -> None:
    ticket = make_ticket(KEY)
    episode = Episode(1, ticket)
    episode.sample(0.5, PolicyVersion(1, 1))
    tickets = Tickets(ticket, episode.partial())
    watched = WatchedTickets(tickets, tmp_path, "actor-1")
    await watched.lease()
    call = asyncio.create_task(watched.hand_over(KEY, tickets.begun))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert tickets.ended == [KEY]
    assert [json.loads(text)["event"] for text in (tmp_path / JOURNAL).read_text().splitlines()] == ["offered"]
