"""The broker as a real process, its clients over real sockets: kills, refusals, resumption."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from broker.client import ActorClient, DeadLetter, LearnerClient
from broker.exchange.server import Server
from broker.process.lifecycle import ErgonError
from broker.process.settings import BrokerSection, RunSection, Settings
from broker.protocol.commands import ErrorBody, Hello, Lease, Role, Status, TicketState, parse_body
from broker.protocol.frames import Message, decode, encode
from broker.protocol.trajectory import Mode, Ticket, Trajectory
from tests.integration.broker.conftest import HEARTBEAT_S, LIVENESS, RUN_ID, BrokerProcess
from tests.ports import free_port
from tests.unit.broker.samples import make_ticket, make_trajectory


class Actors(threading.Thread):
    """Actors in a thread of their own, answering tickets until told to stop; each runs `width` episodes at once."""

    def __init__(self, endpoint: str, num: int = 2, width: int = 8, pause_s: float = 0.01) -> None:
        super().__init__(daemon=True)
        self.endpoint, self.num, self.width, self.pause_s = endpoint, num, width, pause_s
        self.statuses: Counter[str] = Counter()
        self.error: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._finish = asyncio.Event()
        self._sends: set[asyncio.Task[None]] = set()

    def run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except BaseException as error:
            self.error = error
            raise

    async def _main(self) -> None:
        clients = [
            ActorClient(self.endpoint, RUN_ID, f"actor-{n}", heartbeat_s=HEARTBEAT_S, liveness=LIVENESS)
            for n in range(self.num)
        ]
        await asyncio.gather(*(client.connect(30) for client in clients))
        workers = [asyncio.create_task(self._work(client)) for client in clients for _ in range(self.width)]
        stopped = asyncio.create_task(self._finish.wait())
        await asyncio.wait([stopped, *workers], return_when=asyncio.FIRST_COMPLETED)
        for worker in workers:
            worker.cancel()
        # What is being sent is waited for: its answer may come after the learner has the trajectory.
        results = await asyncio.gather(*workers, *self._sends, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in clients))
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _work(self, client: ActorClient) -> None:
        while True:
            ticket = await client.tickets.lease()
            await asyncio.sleep(self.pause_s)
            send = asyncio.create_task(self._send(client, ticket))
            self._sends.add(send)
            send.add_done_callback(self._sends.discard)
            await asyncio.shield(send)

    async def _send(self, client: ActorClient, ticket: Ticket) -> None:
        self.statuses[await client.sender.send(self.result_of(ticket, client))] += 1

    def result_of(self, ticket: Ticket, client: ActorClient) -> Trajectory:
        return make_trajectory(ticket, client.actor_id)

    def finish(self) -> Counter[str]:
        self._loop.call_soon_threadsafe(self._finish.set)
        self.join(30)
        assert not self.is_alive()
        self._loop.close()
        assert self.error is None
        return self.statuses


def receive(learner: LearnerClient, num: int, timeout_s: float = 60.0) -> list[str]:
    """The ids of the next `num` trajectories."""
    ids = []
    deadline = time.monotonic() + timeout_s
    while len(ids) < num:
        item = learner.receive(deadline - time.monotonic())
        assert isinstance(item, Trajectory), f"{len(ids)} of {num} trajectories, then {item}"
        ids.append(item.ticket.ticket_id)
    return ids


@contextmanager
def raw_socket(endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, 30_000)
        dealer.connect(endpoint)
        yield dealer


def ask_raw(endpoint: str, frames: list[bytes]) -> ErrorBody:
    """The ERROR that these frames get."""
    with raw_socket(endpoint) as dealer:
        dealer.send_multipart(frames)
        return parse_body(decode(dealer.recv_multipart()), ErrorBody)


def test_a_broker_killed_mid_stream_loses_and_doubles_nothing(broker: BrokerProcess) -> None:
    num = 400
    learner = broker.learner(window=32)
    assert learner.resume([]) == 0
    ids = [f"t{n}" for n in range(num)]
    assert learner.issue([make_ticket(ticket_id) for ticket_id in ids]) == num
    actors = Actors(broker.endpoint)
    actors.start()
    received: list[str] = []
    for upto, acked in ((100, 60), (200, 200), (300, 200), (num, num)):
        received += receive(learner, upto - len(received))
        learner.ack(received[:acked])
        if upto < num:
            broker.kill()
            broker.start()
            # Issued with the broker away: the call returns when it is back and the tickets are durable.
            assert learner.issue([make_ticket("t0"), make_ticket(f"t{num - 1}")]) == 0
    assert Counter(received) == Counter(ids)
    assert learner.receive(0.5) is None
    status = learner.status()
    assert status.count(TicketState.ACKED) == num
    assert sum(status.count(state) for state in TicketState) == num
    # On a busy machine a lease may run out around a restart: its result is late then, and may be followed by another.
    statuses = actors.finish()
    assert statuses["accepted"] + statuses["late"] == num
    assert set(statuses) <= {"accepted", "late", "duplicate"}
    learner.close()


def test_a_killed_learner_gets_exactly_what_was_assigned_and_not_acked(broker: BrokerProcess) -> None:
    script = """
import json, os, signal, sys
from tests.integration.broker.test_broker_process import RUN_ID, LearnerClient, make_ticket, receive
learner = LearnerClient(sys.argv[1], RUN_ID, window=4)
learner.connect(30)
learner.resume([])
learner.issue([make_ticket(f"t{n}") for n in range(20)])
ids = receive(learner, 12)
learner.ack(ids[:5])
print(json.dumps([learner.lineage, ids]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    actors = Actors(broker.endpoint, num=1)
    actors.start()
    killed = subprocess.run(
        [sys.executable, "-c", script, broker.endpoint], stdout=subprocess.PIPE, check=False, timeout=60, text=True
    )
    assert killed.returncode == -signal.SIGKILL
    lineage, ids = json.loads(killed.stdout)

    successor = broker.learner()
    assert successor.lineage == lineage + 1
    # Its checkpoint holds seven: two of them were not acked when it died, and the ack of the others is repeated.
    assert successor.resume(ids[:7]) >= 5
    again = receive(successor, 13)
    assert Counter(again) == Counter({f"t{n}" for n in range(20)} - set(ids[:7]))
    assert successor.receive(0.5) is None
    assert successor.ack(again) == 13
    assert successor.status().count(TicketState.ACKED) == 20
    assert actors.finish() == {"accepted": 20}
    successor.close()


def test_a_second_learner_is_refused_until_the_first_has_gone(broker: BrokerProcess) -> None:
    first = broker.learner()
    second = LearnerClient(broker.endpoint, RUN_ID, heartbeat_s=HEARTBEAT_S, liveness=LIVENESS)
    with pytest.raises(ErgonError, match="has a learner"):
        second.connect(30)
    first.close()
    third = broker.learner()
    assert third.lineage == first.lineage + 1
    third.close()


async def test_a_killed_actors_ticket_goes_to_its_successor(broker: BrokerProcess) -> None:
    learner = broker.learner()
    learner.resume([])
    learner.issue([make_ticket("t0")])
    script = """
import asyncio, os, signal, sys
from tests.integration.broker.test_broker_process import RUN_ID, ActorClient
async def main():
    client = ActorClient(sys.argv[1], RUN_ID, "actor-0")
    await client.connect()
    print((await client.lease()).ticket_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    killed = subprocess.run(
        [sys.executable, "-c", script, broker.endpoint], stdout=subprocess.PIPE, check=False, timeout=60
    )
    assert killed.stdout == b"t0\n"
    successor = ActorClient(broker.endpoint, RUN_ID, "actor-0")
    await successor.connect()
    ticket = await asyncio.wait_for(successor.lease(), 30)
    assert ticket == make_ticket("t0", attempt=1)
    assert await successor.send(make_trajectory(ticket)) == "accepted"
    await successor.close()
    learner.close()


async def test_leases_drain_fail_and_die(broker: BrokerProcess) -> None:
    learner = broker.learner()
    learner.resume([])
    learner.issue([make_ticket("t0", Mode.EVAL)])
    actor = ActorClient(broker.endpoint, RUN_ID, "actor-0")
    await actor.connect()
    ticket = await actor.lease()
    await actor.release(ticket.ticket_id, "drain")
    for attempt in range(broker.settings.broker.max_attempts):
        ticket = await asyncio.wait_for(actor.lease(), 30)
        assert ticket.attempt == attempt
        await actor.release(ticket.ticket_id, "infra_failure", "the sandbox died")
    letter = await asyncio.to_thread(learner.receive, 30)
    assert letter == DeadLetter("t0", "group-t", Mode.EVAL, "the sandbox died")
    assert learner.ack(["t0"]) == 1
    assert await actor.send(make_trajectory(ticket)) == "unwanted"
    assert learner.status().total("dead") == 1
    await actor.close()
    learner.close()


async def test_a_lease_outlives_its_time_by_heartbeats_and_is_lost_without(broker: BrokerProcess) -> None:
    learner = broker.learner()
    learner.resume([])
    learner.issue([make_ticket("t0"), make_ticket("t1")])
    actor, other = (ActorClient(broker.endpoint, RUN_ID, name) for name in ("actor-0", "actor-1"))
    await actor.connect()
    await other.connect()
    ticket = await actor.lease()
    waiting = asyncio.create_task(other.lease())
    assert (await waiting).ticket_id == "t1"
    waiting = asyncio.create_task(other.lease())
    done, _ = await asyncio.wait([waiting], timeout=1.5 * broker.settings.broker.lease_s)
    assert not done
    with actor._connection.lock:
        actor._leases.forget(actor.leases)  # it forgets the lease, and its heartbeats renew nothing
    again = await asyncio.wait_for(waiting, 30)
    assert (again.ticket_id, again.attempt) == ("t0", 1)
    assert await actor.send(make_trajectory(ticket)) == "late"
    assert await other.send(make_trajectory(again, "actor-1")) == "duplicate"
    item = await asyncio.to_thread(learner.receive, 30)
    assert isinstance(item, Trajectory)
    assert item.head.actor_id == "actor-0"
    await actor.close()
    await other.close()
    learner.close()


async def test_a_broker_that_is_stopped_and_goes_on_is_found_again(broker: BrokerProcess) -> None:
    learner = broker.learner()
    learner.resume([])
    actor = ActorClient(broker.endpoint, RUN_ID, "actor-0")
    await actor.connect()
    waiting = asyncio.create_task(actor.lease())
    assert broker.process is not None
    broker.process.send_signal(signal.SIGSTOP)
    issuing = asyncio.create_task(asyncio.to_thread(learner.issue, [make_ticket("t0")]))
    while learner._connection.connected or actor.connected:  # until both have given this connection up
        await asyncio.sleep(0.05)
    broker.process.send_signal(signal.SIGCONT)
    assert await asyncio.wait_for(issuing, 30) in (0, 1)
    assert (await asyncio.wait_for(waiting, 30)).ticket_id == "t0"
    assert learner.status().count(TicketState.LEASED) == 1
    await actor.close()
    assert learner.status().count(TicketState.ISSUED) == 1
    learner.close()


async def test_cancelling_a_wait_loses_no_ticket(broker: BrokerProcess) -> None:
    learner = broker.learner()
    learner.resume([])
    actor = ActorClient(broker.endpoint, RUN_ID, "actor-0")
    await actor.connect()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(actor.lease(), 0.05)
    learner.issue([make_ticket("t0"), make_ticket("t1")])
    assert {(await asyncio.wait_for(actor.lease(), 30)).ticket_id for _ in range(2)} == {"t0", "t1"}
    assert learner.cancel() == 2
    await actor.close()
    learner.close()


def test_peers_that_do_not_fit_get_one_sentence(broker: BrokerProcess) -> None:
    broker.learner().close()  # it is up
    hello = [bytes(frame) for frame in encode(Message("HELLO"))]
    error = ask_raw(broker.endpoint, [b"ERGN\x02\x00", hello[1]])
    assert error.code == "BAD_VERSION"
    assert error.fatal
    assert error.message.startswith("peer speaks protocol 2.0, this side 1.0")
    assert ask_raw(broker.endpoint, [b"GET / HTTP/1.1"]).code == "BAD_FRAME"
    assert ask_raw(broker.endpoint, hello).code == "BAD_MESSAGE"
    unknown = ask_raw(broker.endpoint, [bytes(frame) for frame in encode(Status(request_id="r").pack())])
    assert (unknown.code, unknown.about) == ("UNKNOWN_PEER", "r")
    assert ask_raw(broker.endpoint, [bytes(frame) for frame in encode(Message("DANCE"))]).code == "UNKNOWN_COMMAND"
    with pytest.raises(ErgonError, match="is of run 'another-run', this broker serves 'test-run'"):
        LearnerClient(broker.endpoint, "another-run").connect(30)
    with raw_socket(broker.endpoint) as dealer:
        dealer.send_multipart(encode(Hello(role=Role.OPERATOR, peer_id="me", run_id=RUN_ID, session="s").pack()))
        assert decode(dealer.recv_multipart()).command == "WELCOME"
        dealer.send_multipart(encode(Lease(credit=1).pack()))
        message = decode(dealer.recv_multipart())
        while message.command == "HEARTBEAT":
            message = decode(dealer.recv_multipart())
        assert parse_body(message, ErrorBody).code == "WRONG_ROLE"
    learner = broker.learner()  # and it still serves
    assert learner.status().full is False
    learner.close()


def test_a_broker_of_another_version_is_refused_by_its_peers() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def answer() -> None:
            routing, *_ = router.recv_multipart()
            router.send_multipart([routing, b"ERGN\x03\x01", b"whatever version 3 says"])

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ErgonError, match=r"peer speaks protocol 3\.1, this side 1\.0"):
            LearnerClient(f"tcp://127.0.0.1:{port}", RUN_ID).connect(30)
        thread.join(10)


async def test_nobody_there_is_said_after_the_timeout() -> None:
    with pytest.raises(ErgonError, match=r"no answer from tcp://127\.0\.0\.1:\d+ within 0\.3 s"):
        await ActorClient(f"tcp://127.0.0.1:{free_port()}", RUN_ID, "actor-0").connect(0.3)


def test_it_ends_cleanly_and_a_taken_port_is_named(broker: BrokerProcess, tmp_path: Path) -> None:
    broker.learner().close()
    other = [*broker.command(), "--set", f"run.directory={tmp_path / 'elsewhere'}"]
    second = subprocess.run(other, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 2
    assert f"cannot listen on 127.0.0.1:{broker.settings.broker.port}" in second.stderr
    assert "broker.port" in second.stderr
    assert "Traceback" not in second.stderr
    assert broker.terminate() == 0


def test_metrics_and_health_tell_what_happens(broker: BrokerProcess) -> None:
    learner = broker.learner()
    learner.resume([])
    learner.issue([make_ticket("t0"), make_ticket("t1", Mode.EVAL)])
    deadline = time.monotonic() + 30
    while 'ergon_broker_tickets{mode="eval",state="issued"} 1.0' not in (page := broker.http("/metrics")):
        assert time.monotonic() < deadline, page
        time.sleep(0.1)
    assert 'ergon_broker_peers{role="learner"} 1.0' in page
    assert "ergon_broker_issued_total 2.0" in page
    assert "ergon_broker_commit_seconds_count" in page
    health = json.loads(broker.http("/healthz"))
    assert health["ok"] is True
    assert health["tickets"]["issued"] == {"train": 1, "eval": 1}
    learner.close()


@contextmanager
def small_store(directory: Path, max_bytes: int) -> Iterator[Server]:
    """A broker in a thread, whose store takes no more bytes than this."""
    settings = Settings(
        run=RunSection(name=RUN_ID, directory=directory),
        broker=BrokerSection(port=free_port(), heartbeat_s=HEARTBEAT_S, liveness=LIVENESS, min_free_mb=0),
    )
    server = Server(settings, max_store_bytes=max_bytes)
    stop = threading.Event()
    loop = threading.Thread(target=server.run, args=(stop,))
    loop.start()
    try:
        yield server
    finally:
        stop.set()
        loop.join(10)
        server.close()


def test_a_full_disk_loses_nothing_and_passes(tmp_path: Path) -> None:
    num = 3000
    ids = [f"t{n}" for n in range(num)]
    with small_store(tmp_path, max_bytes=3 << 20) as server:
        learner = LearnerClient(server.endpoint, RUN_ID, window=1, heartbeat_s=HEARTBEAT_S, liveness=LIVENESS)
        learner.connect(30)
        learner.resume([])
        learner.issue([make_ticket(ticket_id) for ticket_id in ids])
        actors = Actors(server.endpoint, pause_s=0.0)
        actors.start()
        deadline = time.monotonic() + 30
        while server.health().ok:
            assert time.monotonic() < deadline, "all results fit into 3 MiB"
            time.sleep(0.05)
        received: list[str] = []
        while len(received) < num:
            received += receive(learner, 1)
            learner.ack(received[-1:])
        assert Counter(received) == Counter(ids)
        assert learner.status().count(TicketState.ACKED) == num
        statuses = actors.finish()
        # An actor that was admitted late may find its tickets given to the other: twice the work, one result.
        assert statuses["accepted"] + statuses["late"] == num
        learner.close()


def test_no_ticket_is_leased_while_the_disk_is_nearly_full(tmp_path: Path) -> None:
    with small_store(tmp_path, max_bytes=1 << 30) as server:
        server._watch.min_free_mb = 1 << 40
        learner = LearnerClient(server.endpoint, RUN_ID)
        learner.connect(30)
        learner.resume([])
        deadline = time.monotonic() + 30
        while not server.health().detail.get("leases_on_hold"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        learner.issue([make_ticket("t0")])
        actors = Actors(server.endpoint, num=1)
        actors.start()
        assert learner.receive(1.5) is None
        server._watch.min_free_mb = 0
        assert receive(learner, 1) == ["t0"]
        actors.finish()
        learner.close()
