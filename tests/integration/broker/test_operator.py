"""`ergon broker` and `ergon keys` against a real broker: look, requeue, purge, and every mistake in one sentence."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.client import ActorClient, DeadLetter, LearnerClient, OperatorClient
from broker.process.keys import Identity
from broker.process.lifecycle import ErgonError
from broker.process.security import load_security
from broker.process.settings import SecuritySection
from broker.protocol.commands import Role, TicketState
from broker.protocol.trajectory import Trajectory
from tests.integration.broker.conftest import HEARTBEAT_S, LIVENESS, RUN_ID, BrokerProcess
from tests.integration.weights.ends import until
from tests.ports import free_port
from tests.unit.broker.samples import make_ticket, make_trajectory

TICKETS = ("a1", "a2", "b1", "b2")


def ergon(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def refused(*arguments: object) -> str:
    """The sentence that a command ends with."""
    done = ergon(*arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if ": error: " in line)
    assert "Traceback" not in done.stderr
    return line.partition(": error: ")[2]


class Run:
    """A broker with keys, made by the command line, whose tickets die at the first failure."""

    def __init__(self, directory: Path) -> None:
        keys = directory / "keys"
        made = ergon("keys", "make", keys)
        assert made.returncode == 0, made
        assert str(keys / "operator.secret") in made.stdout
        assert "holds keys already" in refused("keys", "make", keys)
        self.broker = BrokerProcess(directory, max_attempts=1, security=SecuritySection(mode="curve", keys=keys))
        self.file = self.broker.config

    def learner(self) -> LearnerClient:
        security = load_security(self.broker.settings, Identity.LEARNER)
        client = LearnerClient(
            self.broker.endpoint, RUN_ID, security=security, heartbeat_s=HEARTBEAT_S, liveness=LIVENESS
        )
        client.connect(30)
        return client

    def actor(self, name: str = "actor-0") -> ActorClient:
        security = load_security(self.broker.settings, Identity.ACTOR)
        return ActorClient(
            self.broker.endpoint, RUN_ID, name, security=security, heartbeat_s=HEARTBEAT_S, liveness=LIVENESS
        )

    def inspect(self) -> dict[str, object]:
        done = ergon("broker", "inspect", self.file, "--json")
        assert done.returncode == 0, done
        return dict(json.loads(done.stdout))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    running = Run(tmp_path)
    yield running
    running.broker.kill()


async def fail(run: Run, num: int) -> None:
    """An actor that fails so many tickets, and leaves."""
    actor = run.actor()
    await actor.connect(30)
    for _ in range(num):
        ticket = await actor.tickets.lease()
        await actor.tickets.release(ticket.ticket_id, "infra_failure", f"no sandbox\nfor {ticket.ticket_id}")
    await actor.close()


async def answer(run: Run, num: int) -> list[str]:
    actor = run.actor("actor-1")
    await actor.connect(30)
    ids = []
    for _ in range(num):
        ticket = await actor.tickets.lease()
        assert ticket.attempt == 0
        assert await actor.sender.send(make_trajectory(ticket, "actor-1")) == "accepted"
        ids.append(ticket.ticket_id)
    await actor.close()
    return ids


def dead(seen: dict[str, object]) -> list[str]:
    letters = seen["dead"]
    assert isinstance(letters, list)
    return [row["ticket_id"] for row in letters]


def test_dead_letters_are_seen_requeued_and_purged(run: Run) -> None:
    learner = run.learner()
    learner.resume([])
    assert learner.issue([make_ticket(key) for key in TICKETS]) == 4
    learner.close()  # and let the broker notice, before anything dies: the letters are told to nobody
    until(lambda: "learner" not in str(run.inspect()["connections"]))
    asyncio.run(fail(run, 4))

    seen = run.inspect()
    assert seen["run_id"] == RUN_ID
    assert dead(seen) == list(TICKETS)
    assert seen["environments"] == {"shop": {"dead": 4}}
    assert seen["num_dead"] == 4
    assert seen["oldest_lease"] is None
    tickets = seen["tickets"]
    assert isinstance(tickets, dict)
    assert {state: modes for state, modes in tickets.items() if any(modes.values())} == {"dead": {"train": 4}}
    page = ergon("broker", "inspect", run.file).stdout
    assert re.search(r"^dead +4 +0 +0$", page, re.MULTILINE)
    assert re.search(r"^a1 +shop +train +1 +no +no sandbox for a1$", page, re.MULTILINE)
    assert re.search(r"^operator +\S+ +\d", page, re.MULTILINE)

    assert ergon("broker", "requeue", run.file, "a1").stdout == "1 ticket issued again\n"
    assert ergon("broker", "purge", run.file, "a2").stdout == "1 ticket purged\n"
    run.broker.kill()
    run.broker.start()
    seen = run.inspect()
    assert dead(seen) == ["b1", "b2"]
    assert seen["environments"] == {"shop": {"dead": 3, "issued": 1}}
    assert ergon("broker", "requeue", run.file, "--dead").stdout == "2 tickets issued again\n"
    assert sorted(asyncio.run(answer(run, 3))) == ["a1", "b1", "b2"]

    learner = run.learner()
    learner.resume([])
    items = [learner.receive(30) for _ in TICKETS]
    assert sorted(item.ticket.ticket_id for item in items if isinstance(item, Trajectory)) == ["a1", "b1", "b2"]
    (letter,) = (item for item in items if isinstance(item, DeadLetter))
    assert (letter.ticket_id, letter.error) == ("a2", "purged by the operator: no sandbox\nfor a2")
    assert learner.ack(TICKETS) == 4
    status = learner.status()
    assert (status.count(TicketState.ACKED), status.count(TicketState.DEAD)) == (3, 1)
    learner.close()
    assert ergon("broker", "purge", run.file, "--all").stdout == "0 tickets purged\n"
    assert "no dead letters" in ergon("broker", "inspect", run.file).stdout


def test_a_running_lease_is_shown_with_its_actor(run: Run) -> None:
    learner = run.learner()
    learner.resume([])
    learner.issue([make_ticket("a1")])

    async def hold() -> dict[str, object]:
        actor = run.actor("the-actor")
        await actor.connect(30)
        await actor.tickets.lease()
        seen = await asyncio.to_thread(run.inspect)
        await actor.close()
        return seen

    seen = asyncio.run(hold())
    learner.close()
    lease, actors, connections = seen["oldest_lease"], seen["actors"], seen["connections"]
    assert isinstance(lease, dict)
    assert isinstance(actors, list)
    assert isinstance(connections, list)
    assert (lease["ticket_id"], lease["actor_id"], lease["env"]) == ("a1", "the-actor", "shop")
    assert 0 < lease["left_s"] <= run.broker.settings.broker.lease_s
    assert [(row["actor_id"], row["leases"], row["connected"]) for row in actors] == [("the-actor", 1, True)]
    assert [row["role"] for row in connections] == [Role.ACTOR, Role.LEARNER, Role.OPERATOR]


def test_mistakes_are_one_sentence(run: Run, tmp_path: Path) -> None:
    learner = run.learner()
    learner.resume([])
    learner.issue([make_ticket("a1"), make_ticket("a2")])
    sentence = refused("broker", "requeue", run.file, "a1", "zz")
    assert sentence == (
        "nothing was issued again, because not everything named can be: "
        "a1: it is issued, not dead; zz: no ticket of this run has this id"
    )
    assert "nothing was purged" in refused("broker", "purge", run.file, "zz")
    asyncio.run(fail(run, 1))
    letter = learner.receive(30)
    assert isinstance(letter, DeadLetter)
    assert "the learner was told of it" in refused("broker", "requeue", run.file, letter.ticket_id)
    left = ergon("broker", "requeue", run.file, "--dead").stdout
    assert left.startswith(f"0 tickets issued again\nleft as they are: {letter.ticket_id}: the learner was told")
    learner.close()

    assert "is of run 'other', this broker serves" in refused("broker", "inspect", run.file, "--set", "run.name=other")
    assert "is no ticket id" in refused("broker", "purge", run.file, "x" * 300)
    assert "--max-dead 5000" in refused("broker", "inspect", run.file, "--max-dead", 5000)
    assert "--timeout 0" in refused("broker", "inspect", run.file, "--timeout", 0)
    nowhere = refused("broker", "inspect", run.file, "--set", f"broker.port={free_port()}", "--timeout", 0.5)
    assert "no answer from tcp://127.0.0.1:" in nowhere
    assert "within 0.5 s" in nowhere
    (tmp_path / "keys" / "operator.secret").unlink()
    assert "operator.secret cannot be read" in refused("broker", "inspect", run.file)


def test_an_operator_of_a_frozen_broker_does_not_wait_for_ever(run: Run) -> None:
    assert run.broker.process is not None
    run.inspect()  # it is up
    security = load_security(run.broker.settings, Identity.OPERATOR)
    with OperatorClient(run.broker.endpoint, RUN_ID, timeout_s=4.0, security=security) as operator:
        assert operator.inspect().num_dead == 0
        run.broker.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(ErgonError, match="has not answered INSPECT within 4 s"):
                operator.inspect()
        finally:
            run.broker.process.send_signal(signal.SIGCONT)
