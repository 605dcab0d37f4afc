"""The engine's queue: who has begun goes first, and groups get finished."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import msgspec

from actors.precedence import Precedence
from broker.protocol.trajectory import Mode, Sampling, Ticket
from tests.unit.actors.support import ScriptedEngine, make_renderer, make_ticket

RENDERER = make_renderer()


class Queue:
    """The priorities that requests get, whose episodes run for as long as the test wants."""

    def __init__(self) -> None:
        self.engine = ScriptedEngine(RENDERER, ["x"] * 50)
        self.precedence = Precedence()

    async def ask(self, engine: Any) -> int:
        await engine.generate([1], Sampling(), 5, (), "r")
        return self.engine.priorities[-1]


def of_group(group: str, number: int, **changes: Any) -> Ticket:
    return msgspec.structs.replace(make_ticket(f"{group}{number}", **changes), group_id=group)


async def test_groups_go_by_age_all_of_one_together_and_within_it_who_is_furthest() -> None:
    queue = Queue()
    with ExitStack() as running:
        old, young, old_too = (
            running.enter_context(queue.precedence.of(ticket, queue.engine))
            for ticket in (of_group("old", 0), of_group("young", 0), of_group("old", 1))
        )
        young_first = await queue.ask(young)
        fresh, further = await queue.ask(old_too), [await queue.ask(old) for _ in range(3)][-1]
        assert further < fresh < await queue.ask(young) < young_first
        evaluation = running.enter_context(queue.precedence.of(of_group("e", 0, mode=Mode.EVAL), queue.engine))
        retried = running.enter_context(queue.precedence.of(of_group("r", 0, attempt=1), queue.engine))
        assert await queue.ask(evaluation) < await queue.ask(retried) < further
    assert len(queue.precedence) == 0


async def test_a_group_keeps_its_age_while_it_has_an_episode_and_no_longer() -> None:
    queue = Queue()
    with queue.precedence.of(of_group("a", 0), queue.engine) as first:
        oldest = await queue.ask(first)
        with queue.precedence.of(of_group("b", 0), queue.engine) as second:
            younger = await queue.ask(second)
        with queue.precedence.of(of_group("a", 1), queue.engine) as sibling:
            assert await queue.ask(sibling) == oldest < younger
    with queue.precedence.of(of_group("a", 2), queue.engine) as late:
        assert await queue.ask(late) > younger
