"""The serving half of the weight channel: one ROUTER, one thread, the same in the publisher and in every relay.

Owns the socket and what it knows of its peers; serves what the `WeightStore` holds and decides nothing about it except
which older versions are still being fetched. Every send is non-blocking: a peer that reads slowly fills its own queue,
its further requests wait (bounded), and nobody else notices. It never pushes data, only announcements.
"""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq

from broker.process.gatekeeper import Gatekeeper, identity_of
from broker.process.keys import Identity
from broker.process.lifecycle import ErgonError
from broker.process.security import OPEN, Security
from broker.protocol import frames
from broker.protocol import weight_messages as messages
from broker.protocol.commands import error_message, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Frame, Message
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weight_messages import Role
from broker.weights import metrics
from broker.weights.store import WeightStore

logger = logging.getLogger(__name__)

MAX_PEERS = 65536
MAX_WAITING = 256  # chunk requests of one peer that wait for its queue; the largest credit a receiver may use
SEND_QUEUE = 32  # messages of one peer inside ZeroMQ; they refer to the snapshot, so they cost no memory of their own
RETRY_S = 0.01  # how often waiting requests are tried again; ZeroMQ does not say when one peer's queue drains
MESSAGES_PER_TURN = 256
QUIET_CODES = (ErrorCode.NOT_FOUND, ErrorCode.UNKNOWN_PEER)  # ordinary life: counted, not logged
MAX_REQUEST_BYTES = 64 << 10
ADMITTED = frozenset({Identity.RELAY, Identity.ACTOR, Identity.OPERATOR})
REQUEST_LIMITS = frames.Limits(max_frames=2, max_envelope_bytes=MAX_REQUEST_BYTES, max_array_bytes=0)


class _Request(NamedTuple):
    """A manifest (chunk None) or a chunk that a peer wants."""

    version: PolicyVersion
    chunk: int | None


@dataclass(slots=True)
class _Peer:
    """What the server knows of one connected peer. Times are of the monotonic clock."""

    peer_id: str
    role: Role
    seen_at: float
    watching: bool = False
    have: PolicyVersion | None = None
    fetching: PolicyVersion | None = None
    requested_at: float = 0.0
    waiting: deque[_Request] = field(default_factory=deque)


class WeightServer:
    """Serves a store on `endpoint` from its own thread until closed. Raises ErgonError where it cannot bind."""

    def __init__(
        self,
        endpoint: str,
        run_id: str,
        store: WeightStore,
        *,
        heartbeat_s: float = 1.0,
        liveness: int = 15,
        security: Security = OPEN,
    ) -> None:
        self._run_id = run_id
        self._store = store
        self._heartbeat_s = heartbeat_s
        self._liveness = liveness
        self._silence_s = heartbeat_s * liveness
        self._peers: dict[bytes, _Peer] = {}
        self._closing = False
        self._warned_at = -math.inf
        self.failure: Exception | None = None  # why the thread ended by itself; its owner must not go on without it
        self._context = zmq.Context()
        self._keyed = security.curve
        self._gatekeeper = Gatekeeper(
            self._context, security, ADMITTED, lambda reason: metrics.refused_handshakes.labels(reason).inc()
        )
        self._socket = _bind(self._context, endpoint, run_id, self._silence_s, security, self._gatekeeper)
        self.endpoint = str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="weight-server", daemon=True)
        self._thread.start()

    def announce(self) -> None:
        """Announce the store's newest version to every watcher now. Thread-safe, returns at once."""
        try:
            self._wake_in.send(b"\0")
        except BlockingIOError:
            logger.debug("a wake-up is already pending")

    def close(self) -> None:
        """Stop serving and free the port. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self.announce()
        self._thread.join()
        self._gatekeeper.close()
        self._socket.close(linger=0)
        self._context.term()
        self._wake_in.close()
        self._wake_out.close()

    @property
    def num_peers(self) -> int:
        """Peers connected at this moment."""
        return len(self._peers)

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:
            logger.exception("the weight server died")
            self.failure = error

    def _loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_out, zmq.POLLIN)
        next_beat = time.monotonic()
        while not self._closing:
            now = time.monotonic()
            if now >= next_beat:
                self._beat(now)
                next_beat = now + self._heartbeat_s
            waiting = any(peer.waiting for peer in self._peers.values())
            pause_s = RETRY_S if waiting else max(next_beat - time.monotonic(), 0.0)
            ready = dict(poller.poll(int(pause_s * 1000) + 1))
            if self._wake_out.fileno() in ready:
                self._wake_out.recv(4096)
                self._announce_all()
            if self._socket in ready:
                self._receive()
            if waiting:
                self._serve_waiting()

    def _beat(self, now: float) -> None:
        if self._gatekeeper.failure is not None:
            raise self._gatekeeper.failure
        for identity in [i for i, peer in self._peers.items() if now - peer.seen_at > self._silence_s]:
            peer = self._peers.pop(identity)
            logger.info("peer is silent, forgotten peer=%s role=%s", peer.peer_id, peer.role)
        self._store.keep_only(
            {p.fetching for p in self._peers.values() if p.fetching and now - p.requested_at <= self._silence_s}
        )
        newest = self._store.newest
        for role in Role:
            metrics.peers.labels(role).set(sum(peer.role is role for peer in self._peers.values()))
        behind = sum(p.watching and p.have != newest.version for p in self._peers.values()) if newest else 0
        metrics.peers_behind.set(behind)
        self._announce_all()

    def _announce_all(self) -> None:
        message = self._announcement()
        for identity in [i for i, peer in self._peers.items() if peer.watching]:
            self._send(identity, message)

    def _announcement(self) -> Message:
        newest = self._store.newest
        return messages.announce(newest.version, newest.data.size) if newest else messages.announce(None, 0)

    def _receive(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                first, *parts = self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            identity = first.bytes
            try:
                message = frames.decode([part.bytes for part in parts], REQUEST_LIMITS)
                if self._keyed and message.command == "HELLO":
                    _check_key(message, identity_of(first))
                self._handle(identity, message)
            except ProtocolError as error:
                self._refuse(identity, error, about="")

    def _refuse(self, identity: bytes, error: ProtocolError, about: str) -> None:
        metrics.refused.labels(error.code.value).inc()
        now = time.monotonic()
        if (
            error.code not in QUIET_CODES and now - self._warned_at >= self._heartbeat_s
        ):  # a flood is counted, not logged
            self._warned_at = now
            logger.warning("refused a message code=%s reason=%s", error.code, error.message)
        self._send(identity, error_message(error, about))
        if error.fatal:
            self._peers.pop(identity, None)

    # --- commands ---------------------------------------------------------------------------------------------------

    def _handle(self, identity: bytes, message: Message) -> None:
        now = time.monotonic()
        if message.command == "HELLO":
            self._on_hello(identity, message, now)
            return
        peer = self._peers.get(identity)
        if peer is None:
            raise ProtocolError(ErrorCode.UNKNOWN_PEER, f"{message.command:.40} from a peer that has not said HELLO")
        peer.seen_at = now
        if message.command == "HEARTBEAT":
            self._send(identity, Message("HEARTBEAT"))
        elif message.command == "WATCH":
            peer.have, peer.watching, peer.fetching = messages.read_have(message), True, None
            peer.waiting.clear()
            self._send(identity, self._announcement())
        elif message.command == "MANIFEST":
            self._on_request(identity, peer, _Request(messages.read_manifest_request(message), None), now)
        elif message.command == "CHUNK":
            self._on_request(identity, peer, _Request(*messages.read_chunk_request(message)), now)
        else:
            raise ProtocolError(
                ErrorCode.UNKNOWN_COMMAND,
                f"{message.command!r:.40} is no command of the weight channel; "
                f"known: {', '.join(messages.FROM_RECEIVER)} (the experience channel has another port)",
            )

    def _on_hello(self, identity: bytes, message: Message, now: float) -> None:
        hello = parse_body(message, messages.Hello)
        if hello.run_id != self._run_id:
            raise ProtocolError(
                ErrorCode.WRONG_RUN,
                f"HELLO: run_id is {hello.run_id!r:.80}, this is run {self._run_id!r}; check host and port",
            )
        if identity not in self._peers and len(self._peers) >= MAX_PEERS:
            raise ProtocolError(ErrorCode.BAD_STATE, f"{MAX_PEERS} peers are connected; put a relay in between")
        self._peers[identity] = _Peer(hello.peer_id, hello.role, seen_at=now)
        self._send(identity, messages.welcome(self._run_id, self._heartbeat_s, self._liveness))
        logger.info("peer connected peer=%s role=%s", hello.peer_id, hello.role)

    def _on_request(self, identity: bytes, peer: _Peer, request: _Request, now: float) -> None:
        peer.fetching, peer.requested_at = request.version, now
        if not peer.waiting and self._serve(identity, request):
            return
        if len(peer.waiting) >= MAX_WAITING:
            raise ProtocolError(
                ErrorCode.BAD_STATE, f"{MAX_WAITING} requests are waiting; keep to a credit of at most {MAX_WAITING}"
            )
        peer.waiting.append(request)
        metrics.deferred_requests.inc()

    def _serve(self, identity: bytes, request: _Request) -> bool:
        """Answer a request; False where the peer's queue is full."""
        version, index = request.version, request.chunk
        snapshot = self._store.get(version)
        if snapshot is None:
            newest = self._store.newest
            held = f"the newest is {tuple(newest.version)}" if newest else "none is held yet"
            error = ProtocolError(ErrorCode.NOT_FOUND, f"version {tuple(version)} is not held; {held}")
            self._refuse(identity, error, messages.version_text(version))
            return True
        self._store.mark_in_use(version)
        if index is None:
            return self._send(identity, messages.manifest_reply(snapshot.manifest))
        if index >= snapshot.manifest.num_chunks:
            last = snapshot.manifest.num_chunks - 1
            error = ProtocolError(ErrorCode.BAD_MESSAGE, f"CHUNK: index is {index}; {tuple(version)} has 0 to {last}")
            self._refuse(identity, error, "CHUNK")
            return True
        chunk = snapshot.chunk(index)
        if not self._send(identity, messages.chunk_reply(version, index, chunk)):
            return False
        metrics.served_chunks.inc()
        metrics.served_bytes.inc(chunk.size)
        return True

    def _serve_waiting(self) -> None:
        for identity, peer in list(self._peers.items()):
            while peer.waiting and self._serve(identity, peer.waiting[0]):
                peer.waiting.popleft()

    def _send(self, identity: bytes, message: Message) -> bool:
        """Hand a message to ZeroMQ without waiting; False where the peer's queue is full."""
        parts: list[Frame] = [identity, *frames.encode(message)]
        try:
            self._socket.send_multipart(parts, zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._peers.pop(identity, None)  # gone: its connection ended; it says HELLO again when it comes back
        return True


def _check_key(hello: Message, owner: Identity | None) -> None:
    """A connection may only take the role that its key allows."""
    role = hello.body.get("role")
    if owner is None or role != owner.value:
        raise ProtocolError(
            ErrorCode.WRONG_ROLE, f"HELLO: role is {role!r:.40}, the connection's key is that of {owner}"
        )


def _bind(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    run_id: str,
    silence_s: float,
    security: Security,
    gatekeeper: Gatekeeper,
) -> zmq.Socket[bytes]:
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a full or vanished peer is an error to handle, not a silent loss
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that reconnects under its identity replaces its former self
    router.setsockopt(zmq.SNDHWM, SEND_QUEUE)
    router.setsockopt(zmq.LINGER, 0)
    router.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_REQUEST_BYTES)  # sealed frames are a little longer
    # A frozen peer must not keep snapshots alive for ever: ZeroMQ's own heartbeat ends its connection.
    router.setsockopt(zmq.HEARTBEAT_IVL, max(int(silence_s * 500), 100))
    router.setsockopt(zmq.HEARTBEAT_TIMEOUT, max(int(silence_s * 1000), 200))
    try:
        security.protect_server(router, endpoint, "weights")
        gatekeeper.guard(router)
        router.bind(endpoint)
    except BaseException as error:
        gatekeeper.close()
        router.close(linger=0)
        context.term()
        if not isinstance(error, zmq.ZMQError):
            raise
        raise ErgonError(
            f"the weight channel's endpoint {endpoint} of run {run_id} cannot be bound ({error.strerror}); "
            "set another host or port in [weights] or stop the process that holds it"
        ) from error
    return router
