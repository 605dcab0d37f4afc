"""A connection against a ROUTER in the test's hands: what it reads of a WELCOME, and that nothing it is given stays."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import zmq
from msgspec import msgpack

from broker.client.connection import Connection, ConnectionClosedError
from broker.protocol.commands import Heartbeat, Hello, Role
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message, decode, encode

HELLO = Hello(role=Role.ACTOR, peer_id="peer", run_id="run", session="s")
TIMERS = {"heartbeat_s": 60, "liveness": 10}  # no heartbeat wakes what should have been awake


class Server:
    """A ROUTER that says what the test wants."""

    def __init__(self) -> None:
        self._router = zmq.Context.instance().socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.RCVTIMEO, 30_000)
        self.endpoint = f"tcp://127.0.0.1:{self._router.bind_to_random_port('tcp://127.0.0.1')}"
        self._peer = b""

    def receive(self) -> Message:
        self._peer, *parts = self._router.recv_multipart()
        return decode(parts)

    def say(self, command: str, body: object) -> None:
        self._router.send_multipart([self._peer, *encode(Message(command, msgpack.encode(body)))])

    def close(self) -> None:
        self._router.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


class Owner:
    """Who holds the connection: keeps what it is told."""

    def __init__(self, on_welcome: Callable[[Connection], None] = lambda _connection: None) -> None:
        self.welcomes: list[tuple[Message, bool]] = []
        self.arrived: list[Message] = []
        self.failures: list[Exception] = []
        self.something = threading.Event()
        self._on_welcome = on_welcome
        self.connection: Connection

    def welcomed(self, message: Message, first: bool) -> None:
        self.welcomes.append((message, first))
        self._on_welcome(self.connection)

    def told(self, message: Message) -> None:
        self.arrived.append(message)
        self.something.set()


@contextlib.contextmanager
def connected_to(server: Server, owner: Owner) -> Iterator[Connection]:
    owner.connection = Connection(
        server.endpoint,
        hello=HELLO.pack,
        on_welcome=owner.welcomed,
        on_message=owner.told,
        on_failure=owner.failures.append,
    )
    owner.connection.start()
    try:
        yield owner.connection
    finally:
        owner.connection.close()


def test_of_a_welcome_it_reads_the_timers_and_leaves_the_rest_to_its_owner(server: Server) -> None:
    owner = Owner()
    welcome = {**TIMERS, "run_id": "run", "lineage": 3, "of a later minor version": [1, {"a": None}]}
    with connected_to(server, owner) as connection:
        hello = server.receive()
        assert (hello.command, bytes(hello.body)) == ("HELLO", bytes(HELLO.pack().body))
        server.say("WELCOME", welcome)
        connection.wait_welcome(30)
        assert connection.connected
        server.say("ANYTHING", {"x": 1})
        assert owner.something.wait(30)
    (first,) = owner.welcomes
    assert (msgpack.decode(first[0].body), first[1]) == (welcome, True)
    assert [(m.command, msgpack.decode(m.body)) for m in owner.arrived] == [("ANYTHING", {"x": 1})]
    assert owner.failures == []
    with pytest.raises(ConnectionClosedError):
        connection.send(Message(Heartbeat.COMMAND))


@pytest.mark.parametrize(
    "wrong",
    [
        {"heartbeat_s": 0},
        {"heartbeat_s": -1.0},
        {"heartbeat_s": float("nan")},
        {"heartbeat_s": float("inf")},
        {"heartbeat_s": True},
        {"heartbeat_s": "1"},
        {"heartbeat_s": None},
        {"liveness": 0},
        {"liveness": -1},
        {"liveness": 1.5},
        {"liveness": True},
        {"liveness": 2**63},
        {"liveness": [15]},
    ],
    ids=repr,
)
def test_a_welcome_without_usable_timers_ends_it_with_a_sentence(server: Server, wrong: dict[str, Any]) -> None:
    owner = Owner()
    with connected_to(server, owner) as connection:
        server.receive()
        server.say("WELCOME", {**TIMERS, "run_id": "run", **wrong})
        with pytest.raises(ProtocolError, match=f"WELCOME: {next(iter(wrong))} is") as caught:
            connection.wait_welcome(30)
        assert caught.value.code is ErrorCode.BAD_MESSAGE
    assert owner.failures == [connection.failure]
    assert owner.welcomes == []


def test_bursts_from_many_threads_arrive_whole_and_in_order(server: Server) -> None:
    """What is queued beside a burst of others needs no wake-up of its own; none may be left lying."""
    num_threads, num_messages = 4, 500
    greeting = 50  # sent by the owner from within the handshake

    def greet(connection: Connection) -> None:
        for number in range(greeting):
            assert connection.send(Message("SAY", msgpack.encode({"from": num_threads, "n": number})))

    owner = Owner(greet)

    def burst(thread: int) -> None:
        for number in range(num_messages):
            array = np.full(number % 3, thread, "<i4")
            assert owner.connection.send(Message("SAY", msgpack.encode({"from": thread, "n": number}), (array,)))

    with connected_to(server, owner) as connection:
        server.receive()
        server.say("WELCOME", {**TIMERS, "run_id": "run"})
        connection.wait_welcome(30)
        threads = [threading.Thread(target=burst, args=(thread,)) for thread in range(num_threads)]
        for thread in threads:
            thread.start()
        seen: dict[int, list[int]] = {}
        for _ in range(greeting + num_threads * num_messages):
            message = server.receive()
            assert message.command == "SAY"
            body = msgpack.decode(message.body)
            sender, number = body["from"], body["n"]
            seen.setdefault(sender, []).append(number)
            assert all(array.tolist() == [sender] * (number % 3) for array in message.arrays)
        for thread in threads:
            thread.join()
        # One at a time: each finds an empty queue and a sleeping thread.
        for number in range(200):
            assert connection.send(Message("SAY", msgpack.encode({"n": number})))
            assert msgpack.decode(server.receive().body) == {"n": number}
    assert seen == {n: list(range(num_messages)) for n in range(num_threads)} | {num_threads: list(range(greeting))}
    assert owner.failures == []
