"""The broker's end of the wire in a test's own hands: a real ROUTER that says what the test tells it to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from broker.protocol.commands import Body, BodyT, ErrorBody, Hello, Welcome, parse_body
from broker.protocol.errors import ErrorCode
from broker.protocol.frames import Message, decode, encode
from tests.integration.broker.conftest import RUN_ID

TIMEOUT_S = 30.0


class RawBroker:
    """Talks to the one peer that said HELLO last. Blocking: in an async test, `asyncio.to_thread` waits."""

    def __init__(self, router: zmq.Socket[bytes]) -> None:
        self.endpoint = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
        self._router = router
        self._routing = b""

    def expect(self, *commands: str) -> list[Message]:
        """The next messages, which must be of these commands, in this order. Passed over are heartbeats that are not
        expected, and whatever comes before a HELLO that is."""
        messages: list[Message] = []
        deadline = time.monotonic() + TIMEOUT_S
        while len(messages) < len(commands):
            assert self._router.poll(int(1000 * max(0.0, deadline - time.monotonic()))), f"after {messages}: nothing"
            routing, *frames = self._router.recv_multipart()
            message = decode(frames)
            if message.command == "HELLO":
                self._routing = routing
            elif routing != self._routing:
                continue  # the rest of a connection that the peer has given up
            wanted = commands[len(messages)]
            if message.command != wanted and (message.command == "HEARTBEAT" or wanted == "HELLO"):
                continue
            assert message.command == wanted, f"{message} after {messages}"
            messages.append(message)
        return messages

    def body(self, body: type[BodyT]) -> BodyT:
        """The next message, which must be one of these."""
        (message,) = self.expect(body.COMMAND)  # type: ignore[attr-defined]
        return parse_body(message, body)

    def send(self, message: Message | Body) -> None:
        """Send it to the peer."""
        packed = message.pack() if isinstance(message, Body) else message
        self._router.send_multipart([self._routing, *encode(packed)])

    def welcome(self, lineage: int | None = None) -> Hello:
        """Wait for a HELLO and let the peer in."""
        hello = self.body(Hello)
        # Nothing is heard of this broker for long; no peer is to think it dead.
        self.send(Welcome(run_id=RUN_ID, lineage=lineage, heartbeat_s=60.0, liveness=15, lease_s=600.0))
        return hello

    def forget(self) -> None:
        """As after a restart: the peer has to say HELLO again."""
        self.refuse(ErrorCode.UNKNOWN_PEER, "HEARTBEAT")

    def refuse(self, code: ErrorCode, about: str) -> None:
        """An ERROR, in the words of a test."""
        self.send(ErrorBody(code=code, message=f"{about} is refused", fatal=False, about=about))


@contextmanager
def raw_broker() -> Iterator[RawBroker]:
    """A RawBroker on a free port."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        yield RawBroker(router)
