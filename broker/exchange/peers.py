"""The peers connected to the broker and the socket they are reached by. Owns routing, liveness, and what is sent when.

Knows no ticket. Nothing blocks: a peer that cannot be reached, or whose queue is full, is dropped, and says HELLO again
when it is able to.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import zmq

from broker.exchange import metrics
from broker.exchange.outflow import Outflow
from broker.process.gatekeeper import Gatekeeper, identity_of
from broker.process.keys import Identity
from broker.process.lifecycle import ErgonError
from broker.process.security import OPEN, OVERHEAD_BYTES, Security
from broker.protocol.commands import Heartbeat, Hello, Role
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import DEFAULT_LIMITS, Message, encode

log = logging.getLogger(__name__)

SEND_HWM = 8192  # messages queued for one peer; twice the largest credit window
RECEIVE_HWM = 2  # messages read ahead from one peer, of 1 MiB each: back-pressure reaches its socket soon
BEAT_SHARE = 0.1  # of a heartbeat, between looks at all peers: thousands of them are not looked at in every round
ADMITTED = frozenset({Identity.ACTOR, Identity.LEARNER, Identity.OPERATOR})
_LAST, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_UNREACHABLE = frozenset({errno.EHOSTUNREACH, errno.EAGAIN})


@dataclass(slots=True)
class Peer:
    """One connection. Times are of the monotonic clock."""

    routing: bytes
    role: Role
    peer_id: str
    session: str
    heard_at: float
    sent_at: float
    outflow: Outflow = field(default_factory=Outflow)


class Peers:
    """The ROUTER socket and who is behind it. Raises ErgonError where the port is taken, or may not be open."""

    def __init__(self, host: str, port: int, heartbeat_s: float, liveness: int, security: Security = OPEN) -> None:
        self._heartbeat_s, self._silence_s = heartbeat_s, heartbeat_s * liveness
        self.max_queued_bytes = 0
        """Of frames on their way to one peer; see `outflow.py`."""
        self._by_routing: dict[bytes, Peer] = {}
        self._by_session: dict[str, Peer] = {}
        self._learner: Peer | None = None
        self._beat_at = self._judge_at = float("-inf")
        self._context = zmq.Context()  # of its own: a context has one gatekeeper
        self._keyed = security.curve
        self._gatekeeper = Gatekeeper(
            self._context, security, ADMITTED, lambda reason: metrics.refused_handshakes.labels(reason).inc()
        )
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 500),
            (zmq.ROUTER_MANDATORY, 1),  # a vanished peer is an error, not silence
            (zmq.SNDHWM, SEND_HWM),
            (zmq.RCVHWM, RECEIVE_HWM),
            (zmq.MAXMSGSIZE, DEFAULT_LIMITS.max_array_bytes + OVERHEAD_BYTES),
            (zmq.TCP_KEEPALIVE, 1),
        ):
            self.socket.setsockopt(option, value)
        try:
            security.protect_server(self.socket, f"tcp://{host}:{port}", "experience")
            self._gatekeeper.guard(self.socket)
            self.socket.bind(f"tcp://{host}:{port}")
        except ErgonError:
            self.close()
            raise
        except zmq.ZMQError as error:
            self.close()
            raise ErgonError(
                f"the experience channel cannot listen on {host}:{port} ({error.strerror}); "
                "end the process that holds the port, or set another broker.host or broker.port"
            ) from error

    def __iter__(self) -> Iterator[Peer]:
        return iter(tuple(self._by_routing.values()))

    def get(self, routing: bytes) -> Peer | None:
        """The peer behind a routing id."""
        return self._by_routing.get(routing)

    def by_session(self, session: str) -> Peer | None:
        """The connection of a session."""
        return self._by_session.get(session)

    def learner(self) -> Peer | None:
        """The connected learner."""
        return self._learner

    def leads(self, routing: bytes) -> bool:
        """Whether what this peer says goes before what actors say."""
        peer = self._by_routing.get(routing)
        return peer is not None and peer.role is not Role.ACTOR

    def count_by_role(self) -> Counter[Role]:
        """Connected peers by role."""
        return Counter(peer.role for peer in self._by_routing.values())

    def add(self, peer: Peer) -> None:
        """A peer said HELLO; an older connection of the same session, or of the same routing id, is forgotten."""
        for old in (self._by_session.get(peer.session), self._by_routing.get(peer.routing)):
            if old is not None:
                self.drop(old)
        self._by_routing[peer.routing] = self._by_session[peer.session] = peer
        if peer.role is Role.LEARNER:
            self._learner = peer

    def drop(self, peer: Peer) -> bool:
        """Forget a connection; False where it had been forgotten already."""
        if self._by_routing.get(peer.routing) is not peer:
            return False
        del self._by_routing[peer.routing]
        if self._learner is peer:
            self._learner = None
        if self._by_session.get(peer.session) is peer:
            del self._by_session[peer.session]
        return True

    def clear(self) -> None:
        """Forget everybody."""
        self._by_routing.clear()
        self._by_session.clear()
        self._learner = None

    def receive(self) -> list[zmq.Frame]:
        """The frames of the next message, the sender's routing id first; none where nothing has arrived."""
        try:
            frame = self.socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return []
        frames = [frame]
        while frame.more:  # recv_multipart asks the socket instead, which takes longer than the rest of it
            frame = self.socket.recv(zmq.NOBLOCK, copy=False)
            frames.append(frame)
        return frames

    def send(self, routing: bytes, message: Message) -> bool:
        """Hand a message to the network; False where the peer cannot be reached."""
        frames = encode(message)
        peer = self._by_routing.get(routing)
        parts = frames if peer is None else peer.outflow.track(frames, self.max_queued_bytes)
        send = self.socket.send
        try:
            # send_multipart combines its flags anew for every frame, which takes as long as the sending.
            send(routing, _MORE)
            for part in parts[:-1]:
                send(part, _MORE, copy=False)
            send(parts[-1], _LAST, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in _UNREACHABLE:
                raise
            return False
        metrics.tally.add(metrics.sent_bytes, sum(map(len, frames)))
        if peer is not None:
            peer.sent_at = time.monotonic()
        return True

    def check_key(self, hello: Hello, frame: zmq.Frame) -> None:
        """Raises ProtocolError (WRONG_ROLE) where the key of the connection does not allow the HELLO's role.

        `frame` is any of the message. That holds for all that follows: a routing id is that of one connection.
        """
        if self._keyed and (owner := identity_of(frame)) != hello.role.value:
            raise ProtocolError(
                ErrorCode.WRONG_ROLE, f"HELLO: role is {hello.role}, but the connection's key is that of {owner}"
            )

    def beat(self, now: float, heard_until: float) -> list[Peer]:
        """Send the heartbeats that are due; returns the peers that are gone (silent too long, or out of reach).

        heard_until: what peers had said by then has been looked at. A peer is silent by what it has not said, not by
        what waits unread: neither in a queue here, nor, where this process stood still, on its way from the network.
        """
        if self._gatekeeper.failure is not None:
            raise self._gatekeeper.failure
        if now < self._beat_at:
            return []
        if now - self._beat_at > self._heartbeat_s:
            self._judge_at = now + self._heartbeat_s
        self._beat_at = now + self._heartbeat_s * BEAT_SHARE
        gone = []
        for peer in self:
            silent = now >= self._judge_at and heard_until - peer.heard_at > self._silence_s
            idle = now - peer.sent_at >= self._heartbeat_s
            if silent or (idle and not self.send(peer.routing, Heartbeat().pack())):
                gone.append(peer)
        return gone

    def close(self) -> None:
        """Close the socket; what is queued gets half a second."""
        self._gatekeeper.close()
        self.socket.close()
        self._context.term()
