"""A simulated actor's end of the weight channel: the real fetch on a socket that its owner polls, so without a thread.

It says which version it holds, takes what is pushed, asks for what is not, verifies every chunk and applies none: a
base for each of a thousand would fit no machine's memory.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import zmq

from broker.protocol import weight_messages as messages
from broker.protocol.commands import ErrorBody, Heartbeat, Welcome, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Frame, Message, decode, encode
from broker.protocol.trajectory import PolicyVersion
from broker.weights.fetch import Announced, Fetch, WeightsSupersededError
from broker.weights.pushed import PushSlot
from broker.weights.subscriber import REPLY_LIMITS
from tests.bench.exchange.ergon import open_dealer
from tests.bench.exchange.load import RUN_ID
from tests.bench.weightchannel.crowd import DeltaSink

CREDIT = 8  # as weights.credit
PUSH_BYTES = 16 << 20  # as weights.push_mb


class Receiver:
    """One actor's. `arrived`: version -> when it was verified, by the machine's monotonic clock. `num_lost`: times that
    the relay knew it no more, because nothing had been heard of it for too long; it says HELLO again then."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], port: int, actor_id: str, have: PolicyVersion) -> None:
        self.dealer = open_dealer(context, port)
        self.arrived: dict[PolicyVersion, float] = {}
        self.welcomed = False
        self.num_pulled = 0  # versions that were not pushed
        self.num_lost = 0
        self._sink, self._slot = DeltaSink(have), PushSlot(PUSH_BYTES)
        self._fetch: tuple[PolicyVersion, Fetch] | None = None
        self._hello = messages.Hello(
            role=messages.Role.ACTOR, peer_id=actor_id, run_id=RUN_ID, session=uuid.uuid4().hex
        )
        self._send(self._hello.pack())

    @property
    def have(self) -> PolicyVersion:
        """The version it holds."""
        assert self._sink.have is not None
        return self._sink.have

    def beat(self) -> None:
        """A sign of life."""
        if self.welcomed:
            self._send(Message(Heartbeat.COMMAND))

    def receive(self) -> None:
        """Take everything that has come."""
        while True:
            try:
                frames = self.dealer.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._handle([frame.buffer for frame in frames])

    def _handle(self, frames: Sequence[Frame]) -> None:
        message = decode(frames, REPLY_LIMITS)
        if message.command == Welcome.COMMAND:
            self.welcomed = True
            self._watch()
        elif message.command == messages.Announce.COMMAND:
            newest = messages.policy_version(parse_body(message, messages.Announce).newest)
            if self._fetch is not None:
                self._follow(Announced(newest))
            self._want(newest)
        elif message.command == messages.PushPart.COMMAND:
            self._slot.put_part(messages.read_part(message))
        elif message.command == messages.Push.COMMAND:
            pushed = messages.read_push(message)
            self._slot.put(pushed)
            self._want(pushed.manifest.version)
        elif message.command == ErrorBody.COMMAND and self._is_lost(parse_body(message, ErrorBody)):
            self._again()
        elif self._fetch is not None:
            self._follow(message)

    @staticmethod
    def _is_lost(error: ErrorBody) -> bool:
        """Whether the relay knows us no more. Raises ProtocolError for what should not be."""
        if error.known_code not in (ErrorCode.UNKNOWN_PEER, ErrorCode.NOT_FOUND):
            raise ProtocolError(error.known_code, error.message)
        return error.known_code == ErrorCode.UNKNOWN_PEER

    def _again(self) -> None:
        if self.welcomed:  # what was on its way meanwhile is refused as well, once each
            self.welcomed, self._fetch = False, None
            self.num_lost += 1
            self._send(self._hello.pack())

    def _want(self, version: PolicyVersion | None) -> None:
        if self._fetch is not None or version is None or version <= self.have:
            return
        self._fetch = version, Fetch(version, RUN_ID, self._sink, CREDIT, self._send)
        pushed = self._slot.take(version, self.have)
        self.num_pulled += pushed is None
        self._fetch[1].start(pushed)
        self._finish()

    def _follow(self, event: Message | Announced) -> None:
        assert self._fetch is not None
        try:
            self._fetch[1].handle(event)
        except WeightsSupersededError:
            self._fetch = None
            self._watch()
            return
        self._finish()

    def _finish(self) -> None:
        assert self._fetch is not None
        version, fetch = self._fetch
        if fetch.complete and fetch.finish() is not None:
            self.arrived[version] = time.monotonic()
            self._fetch = None
            self._watch()

    def _watch(self) -> None:
        self._send(messages.Watch(have=self._sink.have, push_bytes=PUSH_BYTES).pack())

    def _send(self, message: Message) -> None:
        self.dealer.send_multipart(encode(message))
