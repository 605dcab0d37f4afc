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
from dataclasses import dataclass

import zmq

from broker import experience_metrics as metrics
from broker.process.lifecycle import ErgonError
from broker.protocol.commands import Heartbeat, Role
from broker.protocol.frames import DEFAULT_LIMITS, Message, encode

log = logging.getLogger(__name__)

SEND_HWM = 8192  # messages queued for one peer; twice the largest credit window
RECEIVE_HWM = 64  # messages read ahead from one peer: back-pressure reaches its socket soon
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


class Peers:
    """The ROUTER socket and who is behind it. Raises ErgonError where the port is taken."""

    def __init__(self, host: str, port: int, heartbeat_s: float, liveness: int) -> None:
        self._heartbeat_s, self._silence_s = heartbeat_s, heartbeat_s * liveness
        self._by_routing: dict[bytes, Peer] = {}
        self._by_session: dict[str, Peer] = {}
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 500),
            (zmq.ROUTER_MANDATORY, 1),  # a vanished peer is an error, not silence
            (zmq.SNDHWM, SEND_HWM),
            (zmq.RCVHWM, RECEIVE_HWM),
            (zmq.MAXMSGSIZE, DEFAULT_LIMITS.max_array_bytes),
            (zmq.TCP_KEEPALIVE, 1),
        ):
            self.socket.setsockopt(option, value)
        try:
            self.socket.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as error:
            self.socket.close()
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
        return next((peer for peer in self._by_routing.values() if peer.role is Role.LEARNER), None)

    def count_by_role(self) -> Counter[Role]:
        """Connected peers by role."""
        return Counter(peer.role for peer in self._by_routing.values())

    def add(self, peer: Peer) -> None:
        """A peer said HELLO; an older connection of the same session, or of the same routing id, is forgotten."""
        for old in (self._by_session.get(peer.session), self._by_routing.get(peer.routing)):
            if old is not None:
                self.drop(old)
        self._by_routing[peer.routing] = self._by_session[peer.session] = peer

    def drop(self, peer: Peer) -> bool:
        """Forget a connection; False where it had been forgotten already."""
        if self._by_routing.get(peer.routing) is not peer:
            return False
        del self._by_routing[peer.routing]
        if self._by_session.get(peer.session) is peer:
            del self._by_session[peer.session]
        return True

    def clear(self) -> None:
        """Forget everybody."""
        self._by_routing.clear()
        self._by_session.clear()

    def send(self, routing: bytes, message: Message) -> bool:
        """Hand a message to the network; False where the peer cannot be reached."""
        frames = encode(message)
        try:
            self.socket.send_multipart([routing, *frames], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in _UNREACHABLE:
                raise
            return False
        metrics.sent_bytes.inc(sum(len(frame) for frame in frames))
        peer = self._by_routing.get(routing)
        if peer is not None:
            peer.sent_at = time.monotonic()
        return True

    def beat(self, now: float) -> list[Peer]:
        """Send the heartbeats that are due; returns the peers that are gone (silent too long, or out of reach)."""
        gone = []
        for peer in self:
            silent = now - peer.heard_at > self._silence_s
            idle = now - peer.sent_at >= self._heartbeat_s
            if silent or (idle and not self.send(peer.routing, Heartbeat().pack())):
                gone.append(peer)
        return gone

    def close(self) -> None:
        """Close the socket; what is queued gets half a second."""
        self.socket.close()
