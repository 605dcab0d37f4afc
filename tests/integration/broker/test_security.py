"""Keys on both channels, with real processes: who is let in, who is not, and that nothing readable is on the wire."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import re
import select
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from broker.client import ActorClient, LearnerClient
from broker.client.connection import Connection
from broker.process.config import save_settings
from broker.process.keys import Identity, make_keys, read_pair
from broker.process.lifecycle import ErgonError
from broker.process.security import OPEN, Security, load_security
from broker.process.settings import (
    BrokerSection,
    MetricsSection,
    RunSection,
    SecuritySection,
    Settings,
    WeightsSection,
)
from broker.protocol.commands import (
    Ack,
    Body,
    Cancel,
    Credit,
    ErrorBody,
    Hello,
    Inspect,
    Issue,
    Lease,
    Purge,
    Requeue,
    Resume,
    Role,
    TicketState,
    parse_body,
)
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message, decode, encode
from broker.protocol.trajectory import PolicyVersion, Trajectory
from broker.weights.basefile import BaseFile
from broker.weights.publisher import WeightPublisher
from broker.weights.subscriber import WeightSubscriber
from tests.integration.broker.conftest import HEARTBEAT_S, LIVENESS, RUN_ID
from tests.integration.proxy import Proxy
from tests.integration.weights.ends import until
from tests.ports import free_ports
from tests.unit.broker.samples import make_ticket, make_trajectory

TIMERS = {"heartbeat_s": HEARTBEAT_S, "liveness": LIVENESS}


class Run:
    """A broker process and, where asked for, a relay process, that ask everybody for a key."""

    def __init__(self, directory: Path) -> None:
        self.keys = directory / "keys"
        make_keys(self.keys)
        broker, learner, relay, broker_metrics, relay_metrics = free_ports(5)
        self.settings = Settings(
            run=RunSection(name=RUN_ID, directory=directory),
            broker=BrokerSection(port=broker, min_free_mb=0, **TIMERS),
            weights=WeightsSection(port=learner, relay_port=relay, **TIMERS),
            security=SecuritySection(mode="curve", keys=self.keys),
            metrics=MetricsSection(broker_port=broker_metrics, relay_port=relay_metrics),
        )
        self._config = directory / "run.toml"
        save_settings(self.settings, self._config)
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, process: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "broker", process, "--config", str(self._config)]
        self._processes.append(
            subprocess.Popen(command, stderr=subprocess.PIPE if process == "relay" else None, text=True)
        )
        return self._processes[-1]

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def security(self, identity: Identity) -> Security:
        return load_security(self.settings, identity)

    def foreign(self, identity: Identity, directory: Path) -> Security:
        """This identity's place in another run's keys, but with this run's public list: nobody here knows its key."""
        make_keys(directory)
        (directory / "public.keys").write_text((self.keys / "public.keys").read_text())
        return Security(identity, read_pair(directory, identity), directory)

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.settings.broker.port}"

    @property
    def publisher_endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.settings.weights.port}"

    @property
    def relay_endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.settings.weights.relay_port}"

    def refused(self, port: int, name: str = "broker") -> dict[str, int]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            text = page.read().decode()
        found = re.findall(rf'^ergon_{name}_handshakes_refused_total{{reason="(\w+)"}} (\S+)', text, re.MULTILINE)
        return {reason: int(float(num)) for reason, num in found}

    def learner(self, security: Security, endpoint: str = "") -> LearnerClient:
        return LearnerClient(endpoint or self.endpoint, RUN_ID, security=security, **TIMERS)

    def actor(self, security: Security, endpoint: str = "") -> ActorClient:
        return ActorClient(endpoint or self.endpoint, RUN_ID, "actor-0", security=security, **TIMERS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    running = Run(tmp_path_factory.mktemp("run"))
    running.start("serve")
    yield running
    running.end()


class Tap(Proxy):
    """Keeps every byte it passes on."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.seen = bytearray()
        self.start()

    def _pass(self, inside: socket.socket, outside: socket.socket) -> None:
        with inside, outside, contextlib.suppress(OSError):
            while True:
                for source in select.select([inside, outside], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    self.seen += data
                    (outside if source is inside else inside).sendall(data)


async def answer_one(actor: ActorClient) -> str:
    await actor.connect(30)
    ticket = await actor.tickets.lease()
    status = await actor.sender.send(make_trajectory(ticket, "actor-0"))
    await actor.close()
    return status


def through_the_corridor(run: Run, endpoint: str, learner_key: Security, actor_key: Security) -> None:
    """One ticket out, its trajectory back, acked."""
    learner = run.learner(learner_key, endpoint)
    learner.connect(30)
    learner.resume([])
    assert learner.issue([make_ticket("the-ticket-in-question")]) == 1
    assert asyncio.run(answer_one(run.actor(actor_key, endpoint))) == "accepted"
    item = learner.receive(30)
    assert isinstance(item, Trajectory)
    assert learner.ack([item.ticket.ticket_id]) == 1
    assert learner.status().count(TicketState.ACKED) == 1
    learner.close()


def test_with_keys_no_word_of_a_ticket_is_on_the_wire(run: Run) -> None:
    tap = Tap(run.settings.broker.port)
    through_the_corridor(run, tap.endpoint, run.security(Identity.LEARNER), run.security(Identity.ACTOR))
    tap.close()
    assert len(tap.seen) > 2000
    assert b"CURVE" in tap.seen
    for word in (b"the-ticket-in-question", b"shop", b"ISSUE", b"ERGN", b"learner", RUN_ID.encode()):
        assert word not in tap.seen


def test_peers_with_keys_survive_a_killed_broker_and_a_struck_off_key_does_not(tmp_path: Path) -> None:
    run = Run(tmp_path)
    broker = run.start("serve")
    learner = run.learner(run.security(Identity.LEARNER))
    try:
        learner.connect(30)
        learner.resume([])
        broker.kill()
        broker.wait()
        broker = run.start("serve")
        assert learner.issue([make_ticket("t1")]) == 1
        public = run.keys / "public.keys"
        lines = public.read_text().splitlines(True)
        public.write_text("".join(line for line in lines if not line.startswith("learner ")))
        assert learner.status().count(TicketState.ISSUED) == 1  # an open connection goes on
        broker.terminate()
        broker.wait()
        run.start("serve")
        with pytest.raises(ErgonError, match="refuses the key of this learner"):
            learner.status()
    finally:
        learner.close()
        run.end()


def test_the_tap_would_have_seen_a_ticket_without_keys(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.settings = run.settings.model_copy(update={"security": SecuritySection()})
    save_settings(run.settings, tmp_path / "run.toml")
    run.start("serve")
    tap = Tap(run.settings.broker.port)
    try:
        through_the_corridor(run, tap.endpoint, OPEN, OPEN)
    finally:
        run.end()
        tap.close()
    for word in (b"the-ticket-in-question", b"shop", b"ISSUE", b"ERGN", b"learner", RUN_ID.encode()):
        assert word in tap.seen


def test_weights_pass_from_learner_to_relay_to_actor_with_a_key_each(run: Run, tmp_path: Path) -> None:
    relay = run.start("relay")
    publisher = WeightPublisher(
        run.publisher_endpoint, RUN_ID, chunk_bytes=64 << 10, security=run.security(Identity.LEARNER), **TIMERS
    )
    data = np.random.default_rng(5).integers(0, 256, 1 << 20, np.uint8)
    publisher.publish(PolicyVersion(1, 1), [("w", "uint8", (1 << 20,), data)])
    tap = Tap(run.settings.weights.relay_port)
    actor = WeightSubscriber(tap.endpoint, RUN_ID, "actor-0", security=run.security(Identity.ACTOR), **TIMERS)
    newest = actor.wait_newer(None, 30)
    assert newest == PolicyVersion(1, 1)
    actor.fetch_base(newest, BaseFile(tmp_path / "weights.safetensors"), 30)
    actor.close()
    publisher.close()
    tap.close()
    relay.kill()
    relay.communicate()
    assert (tmp_path / "weights.safetensors").read_bytes().endswith(data.tobytes())
    assert len(tap.seen) > data.nbytes
    assert data.tobytes()[:64] not in tap.seen
    assert b"MANIFEST" not in tap.seen


def test_a_key_that_is_not_listed_is_told_so_and_counted(run: Run, tmp_path: Path) -> None:
    stranger = run.foreign(Identity.LEARNER, tmp_path / "foreign")
    before = run.refused(run.settings.metrics.broker_port).get("unknown_key", 0)
    with pytest.raises(ErgonError, match=r"refuses the key of this learner; check that its public\.keys has the line"):
        run.learner(stranger).connect(60)
    assert run.refused(run.settings.metrics.broker_port)["unknown_key"] == before + 1


def test_a_key_without_business_on_the_channel_is_not_let_in(run: Run) -> None:
    before = run.refused(run.settings.metrics.broker_port).get("wrong_role", 0)
    with pytest.raises(ErgonError, match="refuses the key of this relay"):
        run.learner(run.security(Identity.RELAY)).connect(60)
    assert run.refused(run.settings.metrics.broker_port)["wrong_role"] == before + 1


def test_a_peer_without_a_key_is_told_so_and_gets_nothing(run: Run) -> None:
    with pytest.raises(ErgonError, match=r"is open and the other side's is encrypted; set the same security\.mode"):
        run.learner(OPEN).connect(60)
    until(lambda: any(run.refused(run.settings.metrics.broker_port).values()))  # not_encrypted, or it hung up first
    with socket.create_connection(("127.0.0.1", run.settings.broker.port)) as raw:
        raw.settimeout(30)
        raw.sendall(b"GET / HTTP/1.1\r\nHost: broker\r\n\r\n" + bytes(100))
        received = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while data := raw.recv(4096):
                received += data
        assert len(received) <= 64  # ZeroMQ's greeting, and no more


def test_a_server_with_another_key_than_expected_is_not_talked_to(run: Run, tmp_path: Path) -> None:
    """The client's first HELLO is sealed for the server's key, so an impostor cannot answer it."""
    directory = tmp_path / "other"
    make_keys(directory)
    with pytest.raises(ErgonError, match=r"the first key of broker in .* is not the one that it has"):
        run.learner(Security(Identity.LEARNER, read_pair(directory, Identity.LEARNER), directory)).connect(60)
    until(lambda: run.refused(run.settings.metrics.broker_port).get("not_encrypted", 0) >= 3)


def test_a_relay_of_a_learner_with_another_key_ends_with_one_sentence(run: Run, tmp_path: Path) -> None:
    publisher = WeightPublisher(
        run.publisher_endpoint, RUN_ID, security=run.foreign(Identity.LEARNER, tmp_path / "foreign"), **TIMERS
    )
    try:
        relay = run.start("relay")
        _, errors = relay.communicate(timeout=60)
    finally:
        publisher.close()
    assert relay.returncode == 2
    assert "hangs up during the handshake; the first key of learner" in errors
    assert "Traceback" not in errors


@contextlib.contextmanager
def raw_peer(endpoint: str, security: Security, server: Identity) -> Iterator[Callable[[Body], None]]:
    """Sends bodies as they are, and raises what the server answers."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, 30_000)
        security.protect_client(dealer, server)
        dealer.connect(endpoint)

        def ask(body: Body) -> None:
            dealer.send_multipart(encode(body.pack()))
            reply = decode(dealer.recv_multipart())
            while reply.command == "HEARTBEAT":
                reply = decode(dealer.recv_multipart())
            if reply.command == "ERROR":
                error = parse_body(reply, ErrorBody)
                raise ProtocolError(error.known_code, error.message)

        yield ask


def hello(role: Role, run_id: str = RUN_ID) -> Hello:
    return Hello(role=role, peer_id="peer", run_id=run_id, session=f"session-of-{role}")


@pytest.mark.parametrize("role", [Role.LEARNER, Role.OPERATOR])
def test_an_actors_key_cannot_take_another_role(run: Run, role: Role) -> None:
    with raw_peer(run.endpoint, run.security(Identity.ACTOR), Identity.BROKER) as ask:
        with pytest.raises(ProtocolError, match=f"role is {role}, but the connection's key is that of actor") as caught:
            ask(hello(role))
        assert caught.value.code is ErrorCode.WRONG_ROLE
        ask(hello(Role.ACTOR))


@pytest.mark.parametrize(
    "body",
    [
        Issue(request_id="r", tickets=(make_ticket("mine"),)),
        Ack(request_id="r", ticket_ids=("t0",)),
        Resume(request_id="r"),
        Credit(credit=1),
        Cancel(request_id="r"),
        Inspect(request_id="r"),
        Requeue(request_id="r", all_dead=True),
        Purge(request_id="r", all_dead=True),
    ],
    ids=lambda body: body.COMMAND,
)
def test_an_actors_key_cannot_use_anothers_commands(run: Run, body: Body) -> None:
    with raw_peer(run.endpoint, run.security(Identity.ACTOR), Identity.BROKER) as ask:
        with pytest.raises(ProtocolError) as caught:  # before HELLO nobody may do anything
            ask(body)
        assert caught.value.code is ErrorCode.UNKNOWN_PEER
        ask(hello(Role.ACTOR))
        with pytest.raises(ProtocolError) as caught:
            ask(body)
        assert caught.value.code is ErrorCode.WRONG_ROLE


def test_an_actors_key_reads_no_other_run(run: Run) -> None:
    with raw_peer(run.endpoint, run.security(Identity.ACTOR), Identity.BROKER) as ask:
        with pytest.raises(ProtocolError) as caught:
            ask(hello(Role.ACTOR, "another-run"))
        assert caught.value.code is ErrorCode.WRONG_RUN


def test_an_operators_key_takes_no_ticket_and_a_learners_key_pulls_no_weights(run: Run) -> None:
    with raw_peer(run.endpoint, run.security(Identity.OPERATOR), Identity.BROKER) as ask:
        ask(hello(Role.OPERATOR))
        with pytest.raises(ProtocolError) as caught:
            ask(Lease(credit=1))
        assert caught.value.code is ErrorCode.WRONG_ROLE
    publisher = WeightPublisher(run.publisher_endpoint, RUN_ID, security=run.security(Identity.LEARNER), **TIMERS)
    try:
        learner = WeightSubscriber(
            publisher.endpoint, RUN_ID, "x", security=run.security(Identity.LEARNER), server=Identity.LEARNER, **TIMERS
        )
        with pytest.raises(ErgonError, match="refuses the key of this learner"):
            learner.wait_connected(60)
        learner.close()
        with raw_peer(publisher.endpoint, run.security(Identity.ACTOR), Identity.LEARNER) as ask:
            with pytest.raises(ProtocolError, match="the connection's key is that of actor") as caught:
                ask(hello(Role.OPERATOR))
            assert caught.value.code is ErrorCode.WRONG_ROLE
    finally:
        publisher.close()


def test_who_is_refused_before_it_could_say_hello_is_told_so(run: Run) -> None:
    """ZeroMQ takes a refused connection away; what is said then would wait for a connection for ever."""
    dealers: list[zmq.Socket[bytes]] = []

    class Watched(Security):
        def protect_client(self, socket: zmq.Socket[bytes], server: Identity) -> None:
            super().protect_client(socket, server)
            dealers.append(socket)

    def late_hello() -> Message:
        while dealers[-1].poll(0, zmq.POLLOUT):  # until there is no connection left that would take it
            time.sleep(0.001)
        return hello(Role.LEARNER).pack()

    known = run.security(Identity.RELAY)
    failed: queue.SimpleQueue[Exception] = queue.SimpleQueue()
    connection = Connection(
        run.endpoint,
        hello=late_hello,
        on_welcome=lambda _message, _first: None,
        on_message=lambda _message: None,
        on_failure=failed.put,
        security=Watched(known.identity, known.pair, known.directory),
        **TIMERS,
    )
    connection.start()
    with pytest.raises(ErgonError, match="refuses the key of this relay"):
        raise failed.get(timeout=60)
    connection.close()


def test_a_broker_on_an_open_address_without_keys_does_not_start(tmp_path: Path) -> None:
    run = Run(tmp_path)
    overrides = ["--set", "security.mode=none", "--set", "broker.host=0.0.0.0"]
    command = [sys.executable, "-m", "broker", "serve", "--config", str(tmp_path / "run.toml"), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert 'broker.host = "0.0.0.0" is no loopback address and security.mode is "none"' in done.stderr
    assert "Traceback" not in done.stderr
    run.end()
