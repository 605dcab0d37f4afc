"""A receiver of the weight channel that says what a test tells it to, and reads only then."""

from __future__ import annotations

import zmq
from msgspec import msgpack

from broker.protocol import frames
from broker.protocol.frames import Message
from tests.integration.weights.ends import RUN


class RawPeer:
    """A DEALER under the test's control: it reads only when told to."""

    def __init__(self, endpoint: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 1)
        self.socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self.socket.connect(endpoint)

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *_error: object) -> None:
        self.socket.close()

    def send(self, message: Message) -> None:
        self.socket.send_multipart(frames.encode(message))

    def receive(self) -> Message:
        return frames.decode(self.socket.recv_multipart())

    def expect(self, command: str) -> Message:
        """The next message of this command; announcements and heartbeats before it are skipped."""
        while True:
            message = self.receive()
            if message.command == command:
                return message
            assert message.command in ("ANNOUNCE", "HEARTBEAT"), message

    def hello(self, **changes: object) -> None:
        body = {"role": "actor", "peer_id": "raw", "run_id": RUN, "session": "s", **changes}
        self.send(Message("HELLO", msgpack.encode(body)))
