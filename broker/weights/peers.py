"""The peers of a server of the weight channel and the socket they are reached by. Owns routing, liveness, who watches.

Knows no store and answers nothing by itself. Every send is non-blocking: a peer that reads slowly fills its own queue.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq

from broker.process.gatekeeper import Gatekeeper, identity_of
from broker.process.keys import Identity
from broker.process.lifecycle import ErgonError
from broker.process.logs import Throttle
from broker.process.security import Security
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message, encode
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weight_messages import Hello, Pair, Role
from broker.weights import metrics
from broker.weights.chain import Key

logger = logging.getLogger(__name__)

MAX_PEERS = 65536
MAX_REQUEST_BYTES = 64 << 10
SEND_QUEUE = 32  # messages of one peer inside ZeroMQ; they refer to the payload, so they cost no memory of their own
ADMITTED = frozenset({Identity.RELAY, Identity.ACTOR, Identity.OPERATOR})


LAG_LABELS = ("0", "1", "2", "3-4", "5-8", "more", "lineage", "none")


def lag_label(have: Pair | None, newest: PolicyVersion | None) -> str:
    """How far who holds `have` is behind, as the metric has it."""
    if have is None:
        return "none"
    if newest is None or have >= newest:  # a relay that was restarted may be behind its receivers
        return "0"
    if have[0] != newest.lineage:
        return "lineage"
    lag = newest.version - have[1]
    if lag <= 2:
        return str(lag)
    return "3-4" if lag <= 4 else "5-8" if lag <= 8 else "more"


class Request(NamedTuple):
    """A manifest (`chunk` None, `parent` is what the peer has) or a chunk of a payload that a peer wants."""

    version: PolicyVersion
    parent: PolicyVersion | None
    chunk: int | None


@dataclass(slots=True)
class Peer:
    """What the server knows of one connected peer. Times are of the monotonic clock."""

    peer_id: str
    role: Role
    seen_at: float
    watching: bool = False
    have: Pair | None = None
    push_bytes: int = 0  # the largest payload it would take unasked; 0 from a push until its next WATCH
    parts: tuple[Key, int] | None = None  # the delta that parts were sent of, and how many of its bytes
    told: PolicyVersion | None = None  # the version announced or pushed to it last, on this connection
    fetching: Key | None = None
    requested_at: float = 0.0
    waiting: deque[Request] = field(default_factory=deque)


class Peers:
    """The ROUTER socket on `endpoint` and who is behind it. Raises ErgonError where it cannot bind, or may not.

    A peer silent for `silence_s` seconds is forgotten by `drop_silent`. All but `len` is for the server's thread.
    """

    def __init__(self, endpoint: str, run_id: str, silence_s: float, security: Security) -> None:
        self._run_id, self._silence_s = run_id, silence_s
        self._by_routing: dict[bytes, Peer] = {}
        self._joins, self._losses = Throttle(), Throttle()  # thousands may come or go at once
        self._context = zmq.Context()  # of its own: a context has one gatekeeper
        self._keyed = security.curve
        self._gatekeeper = Gatekeeper(
            self._context, security, ADMITTED, lambda reason: metrics.refused_handshakes.labels(reason).inc()
        )
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1),  # a full or vanished peer is an error to handle, not a silent loss
            (zmq.ROUTER_HANDOVER, 1),  # a peer that reconnects under its identity replaces its former self
            (zmq.SNDHWM, SEND_QUEUE),
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, 2 * MAX_REQUEST_BYTES),  # sealed frames are a little longer
            # A frozen peer must not keep snapshots alive for ever: ZeroMQ's own heartbeat ends its connection.
            (zmq.HEARTBEAT_IVL, max(int(silence_s * 500), 100)),
            (zmq.HEARTBEAT_TIMEOUT, max(int(silence_s * 1000), 200)),
        ):
            self.socket.setsockopt(option, value)
        try:
            security.protect_server(self.socket, endpoint, "weights")
            self._gatekeeper.guard(self.socket)
            self.socket.bind(endpoint)
        except BaseException as error:
            self.close()
            if not isinstance(error, zmq.ZMQError):
                raise
            raise ErgonError(
                f"the weight channel's endpoint {endpoint} of run {run_id} cannot be bound ({error.strerror}); "
                "set another host or port in [weights] or stop the process that holds it"
            ) from error
        self.endpoint = str(self.socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def __len__(self) -> int:
        return len(self._by_routing)

    def join(self, routing: bytes, hello: Hello, frame: zmq.Frame, now: float) -> None:
        """A peer said HELLO in a message that began with `frame`; what was known of its routing id is forgotten.

        Raises ProtocolError where it may not join: its key is of another role, it is of another run, or there are
        too many.
        """
        if self._keyed and (owner := identity_of(frame)) != hello.role.value:
            raise ProtocolError(
                ErrorCode.WRONG_ROLE, f"HELLO: role is {hello.role}, but the connection's key is that of {owner}"
            )
        if hello.run_id != self._run_id:
            raise ProtocolError(
                ErrorCode.WRONG_RUN,
                f"HELLO: run_id is {hello.run_id!r:.80}, this is run {self._run_id!r}; check host and port",
            )
        if routing not in self._by_routing and len(self) >= MAX_PEERS:
            raise ProtocolError(ErrorCode.BAD_STATE, f"{MAX_PEERS} peers are connected; put a relay in between")
        self._by_routing[routing] = Peer(hello.peer_id, hello.role, seen_at=now)
        level = self._joins.level(logging.INFO)
        logger.log(level, "Peer joined. role=%s peer_id=%s session=%s", hello.role, hello.peer_id, hello.session)

    def heard(self, routing: bytes, command: str, now: float) -> Peer:
        """Who sent this command. Raises ProtocolError (UNKNOWN_PEER) where it has not said HELLO."""
        peer = self._by_routing.get(routing)
        if peer is None:
            raise ProtocolError(ErrorCode.UNKNOWN_PEER, f"{command:.40} from a peer that has not said HELLO")
        peer.seen_at = now
        return peer

    def drop(self, routing: bytes) -> None:
        """Forget a peer, known or not."""
        self._by_routing.pop(routing, None)

    def drop_silent(self, now: float) -> None:
        """Forget who has been silent for too long. Raises the gatekeeper's failure, without which nobody can join."""
        if self._gatekeeper.failure is not None:
            raise self._gatekeeper.failure
        for routing in [r for r, peer in self._by_routing.items() if now - peer.seen_at > self._silence_s]:
            peer = self._by_routing.pop(routing)
            level = self._losses.level(logging.INFO)
            logger.log(level, "Peer lost: it is silent. role=%s peer_id=%s", peer.role, peer.peer_id)

    def watching(self) -> list[tuple[bytes, Peer]]:
        """Who wants announcements."""
        return [(routing, peer) for routing, peer in self._by_routing.items() if peer.watching]

    def waiting(self) -> list[tuple[bytes, Peer]]:
        """Whose requests wait for room in their queue."""
        return [(routing, peer) for routing, peer in self._by_routing.items() if peer.waiting]

    def fetched(self, now: float) -> set[Key]:
        """Payloads that somebody has asked for a part of within `silence_s`."""
        peers = self._by_routing.values()
        return {p.fetching for p in peers if p.fetching and now - p.requested_at <= self._silence_s}

    def observe(self, newest: PolicyVersion | None) -> None:
        """Set the metrics about peers."""
        peers = self._by_routing.values()
        for role in Role:
            metrics.peers.labels(role).set(sum(peer.role is role for peer in peers))
        metrics.peers_behind.set(sum(p.watching and p.have != newest for p in peers) if newest else 0)
        held = [p.have for p in peers if p.watching and p.role is not Role.OPERATOR]
        metrics.versions_in_use.set(len(set(held)))
        lags = Counter(lag_label(have, newest) for have in held)
        for label in LAG_LABELS:
            metrics.peers_by_lag.labels(label).set(lags[label])

    def receive(self) -> list[zmq.Frame]:
        """The frames of the next message, the sender's routing id first; none where nothing has arrived."""
        try:
            return self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return []

    def send(self, routing: bytes, message: Message) -> bool:
        """Hand a message to ZeroMQ without waiting; False where the peer's queue is full."""
        try:
            self.socket.send_multipart([routing, *encode(message)], zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.drop(routing)  # gone: its connection ended; it says HELLO again when it comes back
        return True

    def close(self) -> None:
        """Close the socket and free the port; what is queued is lost."""
        self._gatekeeper.close()
        self.socket.close(linger=0)
        self._context.term()
