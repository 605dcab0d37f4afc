"""The serving half of the weight channel: one thread, the same in the publisher and in every relay.

Serves what the `WeightStore` holds and decides nothing about it except which payloads are still being fetched. Folds of
deltas are made in a thread of their own (`folding.py`); who asks for one waits until it is there. A peer that reads
slowly fills its own queue, its further requests wait (bounded), and nobody else notices. Data goes out on request, but
for one small delta at a time to each peer that asked for that in advance (`pushing.py`). The socket and its peers are
in `peers.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

import zmq

from broker.process.logs import Throttle
from broker.process.security import OPEN, Security
from broker.process.wakeup import Wakeup
from broker.protocol import frames
from broker.protocol import weight_messages as messages
from broker.protocol.commands import Heartbeat, error_message, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Manifest
from broker.weights import metrics
from broker.weights.chain import FoldJob, Payload
from broker.weights.folding import Folder
from broker.weights.peers import MAX_REQUEST_BYTES, Peer, Peers, Request
from broker.weights.pushing import Ahead, Pusher, PushMessages
from broker.weights.store import Unsealed, WeightStore

logger = logging.getLogger(__name__)

MAX_WAITING = 256  # chunk requests of one peer that wait for its queue; the largest credit a receiver may use
RETRY_S = 0.01  # how often waiting requests are tried again; ZeroMQ does not say when one peer's queue drains
MESSAGES_PER_TURN = 256
QUIET_CODES = (ErrorCode.NOT_FOUND, ErrorCode.UNKNOWN_PEER)  # ordinary life: counted, not logged
REQUEST_LIMITS = frames.Limits(max_frames=2, max_envelope_bytes=MAX_REQUEST_BYTES, max_array_bytes=0)


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
        self._store = store
        self._heartbeat_s = heartbeat_s
        self._welcome = messages.Welcome(run_id=run_id, heartbeat_s=heartbeat_s, liveness=liveness).pack()
        self._closing = False
        self._refusals = Throttle()
        self.failure: Exception | None = None  # why the thread ended by itself; its owner must not go on without it
        self._peers = Peers(endpoint, run_id, heartbeat_s * liveness, security)
        self._pusher = Pusher(self._peers)
        self.endpoint = self._peers.endpoint
        self._ahead: deque[Payload] = deque(maxlen=1)  # to be pushed; only the newest is worth it
        self._parts: deque[Ahead | None] = deque()
        self._wakeup = Wakeup()
        self._folder = Folder(store)
        self._thread = threading.Thread(target=self._run, name="weight-server", daemon=True)
        self._thread.start()

    def announce(self) -> None:
        """Announce the store's newest version to every watcher now. Thread-safe, returns at once."""
        self._wakeup.wake()

    def push_ahead(self, delta: Payload) -> None:
        """Push this delta to who waits for it; the store need not hold what it leads to yet. Thread-safe."""
        self._ahead.append(delta)
        self._wakeup.wake()

    def push_part(self, ahead: Ahead | None) -> None:
        """Send some bytes of a delta that is still being made to who would take it. Thread-safe. Parts come in order,
        and behind them the push; or None, where nothing will come of it."""
        self._parts.append(ahead)
        self._wakeup.wake()

    def close(self) -> None:
        """Stop serving and free the port. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self.announce()
        self._thread.join()
        self._folder.close()
        self._peers.close()
        self._wakeup.close()

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
        poller.register(self._peers.socket, zmq.POLLIN)
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        next_beat = time.monotonic()
        while not self._closing:
            now = time.monotonic()
            if now >= next_beat:
                self._beat(now)
                next_beat = now + self._heartbeat_s
            waiting = bool(self._peers.waiting())
            pause_s = RETRY_S if waiting else max(next_beat - time.monotonic(), 0.0)
            ready = dict(poller.poll(int(pause_s * 1000) + 1))
            if self._wakeup.fileno() in ready:
                self._wakeup.drain()
                while self._parts:
                    self._pusher.send_part(self._parts.popleft())
                while self._ahead:
                    self._pusher.push_to_all(self._ahead.popleft())
                self._announce_all()
            if self._peers.socket in ready:
                self._receive()
            if waiting:
                self._serve_waiting()

    def _serve_waiting(self) -> None:
        for routing, peer in self._peers.waiting():
            while peer.waiting and self._serve(routing, peer, peer.waiting[0]):
                peer.waiting.popleft()

    def _beat(self, now: float) -> None:
        self._peers.drop_silent(now)
        self._store.keep_only(self._peers.fetched(now))
        newest = self._store.newest
        self._peers.observe(newest.version if newest else None)
        metrics.held_bytes.set(self._store.live_bytes)
        self._announce_all()

    def _announce_all(self) -> None:
        newest, made = self._store.newest, PushMessages()
        for routing, peer in self._peers.watching():
            self._tell(routing, peer, newest, made)

    def _tell(self, routing: bytes, peer: Peer, newest: Manifest | None, made: PushMessages) -> None:
        """Announce the newest version to a peer; by pushing it, where that is news to the peer, wanted and possible.
        `made`: the pushes so far."""
        if newest is None:
            self._peers.send(routing, messages.Announce(newest=None, num_bytes=0, proof=None).pack())
        elif peer.told == newest.version or not self._push(routing, peer, newest.version, made):
            news = messages.Announce(newest=newest.version, num_bytes=newest.total_bytes, proof=newest.proof)
            if self._peers.send(routing, news.pack()):
                peer.told = newest.version

    def _push(self, routing: bytes, peer: Peer, newest: PolicyVersion, made: PushMessages) -> bool:
        """Send the newest version as a delta to what the peer holds; whether there is one, and it was sent."""
        have = messages.policy_version(peer.have)
        if not peer.push_bytes or have is None or have >= newest:
            return False
        delta = self._store.delta(newest, have)
        if delta is None:
            metrics.pushes_withheld.labels("behind").inc()
            return False
        return self._pusher.push(routing, peer, delta, made)

    def _receive(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            parts = self._peers.receive()
            if not parts:
                return
            routing = parts[0].bytes
            try:
                self._handle(parts[0], frames.decode([part.bytes for part in parts[1:]], REQUEST_LIMITS))
            except ProtocolError as error:
                self._refuse(routing, error, about="")

    def _refuse(self, routing: bytes, error: ProtocolError, about: str) -> None:
        metrics.refused.labels(error.code.value).inc()
        if error.code not in QUIET_CODES:
            level = self._refusals.level(logging.WARNING)
            logger.log(level, "Message refused. code=%s reason=%s", error.code, error.message)
        self._peers.send(routing, error_message(error, about))
        if error.fatal:
            self._peers.drop(routing)

    # --- commands ---------------------------------------------------------------------------------------------------

    def _handle(self, sender: zmq.Frame, message: Message) -> None:
        now, routing = time.monotonic(), sender.bytes
        if message.command == messages.Hello.COMMAND:
            self._peers.join(routing, parse_body(message, messages.Hello), sender, now)
            self._peers.send(routing, self._welcome)
            return
        peer = self._peers.heard(routing, message.command, now)
        if message.command == Heartbeat.COMMAND:
            self._peers.send(routing, Message(Heartbeat.COMMAND))
        elif message.command == messages.Watch.COMMAND:
            watch = parse_body(message, messages.Watch)
            peer.watching, peer.have, peer.push_bytes, peer.fetching = True, watch.have, watch.push_bytes, None
            peer.waiting.clear()
            self._tell(routing, peer, self._store.newest, PushMessages())
        elif message.command == messages.ManifestRequest.COMMAND:
            manifest = parse_body(message, messages.ManifestRequest)
            have = messages.policy_version(manifest.have)
            self._on_request(routing, peer, Request(manifest.policy_version, have, None), now)
        elif message.command == messages.ChunkRequest.COMMAND:
            chunk = parse_body(message, messages.ChunkRequest)
            parent = messages.policy_version(chunk.parent)
            self._on_request(routing, peer, Request(chunk.policy_version, parent, chunk.index), now)
        else:
            raise ProtocolError(
                ErrorCode.UNKNOWN_COMMAND,
                f"{message.command!r:.40} is no command of the weight channel; "
                f"known: {', '.join(messages.FROM_RECEIVER)} (the experience channel has another port)",
            )

    def _on_request(self, routing: bytes, peer: Peer, request: Request, now: float) -> None:
        peer.requested_at = now
        if not peer.waiting and self._serve(routing, peer, request):
            return
        if len(peer.waiting) >= MAX_WAITING:
            raise ProtocolError(
                ErrorCode.BAD_STATE, f"{MAX_WAITING} requests are waiting; keep to a credit of at most {MAX_WAITING}"
            )
        peer.waiting.append(request)
        metrics.deferred_requests.inc()

    def _serve(self, routing: bytes, peer: Peer, request: Request) -> bool:
        """Answer a request; False where the peer's queue is full, or what it asks for is being made."""
        if request.chunk is None:
            return self._serve_manifest(routing, peer, request)
        key, index = (request.version, request.parent), request.chunk
        try:
            chunk = self._store.lend(key, index)
        except IndexError as error:
            refusal = ProtocolError(ErrorCode.BAD_MESSAGE, f"CHUNK: version {tuple(request.version)} has no {error}")
            self._refuse(routing, refusal, "CHUNK")
            return True
        if chunk is None:
            return self._not_held(routing, request.version)
        peer.fetching = key
        if not self._peers.send(routing, messages.chunk_reply(*key, index, chunk)):
            return False
        peer.requested_at = time.monotonic()  # what has waited so long for a slow peer is still being fetched
        metrics.served_chunks.inc()
        metrics.served_bytes.labels(metrics.kind(request.parent)).inc(chunk.size)
        return True

    def _serve_manifest(self, routing: bytes, peer: Peer, request: Request) -> bool:
        found = self._store.find(request.version, request.parent)
        if found is None:
            return self._not_held(routing, request.version)
        peer.fetching = found.key
        if isinstance(found, FoldJob):
            self._folder.make(found)
        if isinstance(found, (FoldJob, Unsealed)):
            return False
        return self._peers.send(routing, messages.manifest_reply(found.manifest))

    def _not_held(self, routing: bytes, version: PolicyVersion) -> bool:
        newest = self._store.newest
        held = f"the newest is {tuple(newest.version)}" if newest else "none is held yet"
        error = ProtocolError(ErrorCode.NOT_FOUND, f"version {tuple(version)} is not held; {held}")
        self._refuse(routing, error, messages.version_text(version))
        return True
