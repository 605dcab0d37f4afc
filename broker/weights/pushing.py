"""What a server sends unasked: a small delta with its announcement, and its first bytes while it is being made.

Owns who may be sent it, within the credit that a peer has given, and what of it a peer has been sent. Holds no delta
and looks none up. For the server's thread alone.
"""

from __future__ import annotations

from typing import NamedTuple

from broker.protocol import weight_messages as messages
from broker.protocol.frames import Message
from broker.protocol.weight_messages import Part
from broker.protocol.weights import MAX_CHUNK_BYTES
from broker.weights import metrics
from broker.weights.chain import Key, Payload
from broker.weights.peers import Peer, Peers


class Ahead(NamedTuple):
    """A part of a delta that is still being made, and how many bytes it is expected to have in the end."""

    part: Part
    expected_bytes: int


class PushMessages:
    """The messages that push deltas, each made once for all who are to get the same of it."""

    def __init__(self) -> None:
        self._made: dict[tuple[Key, int], Message] = {}

    def of(self, delta: Payload, sent_bytes: int) -> Message:
        """That of this delta, but for the bytes that were sent in parts."""
        key = (delta.key, sent_bytes)
        if key not in self._made:
            self._made[key] = messages.push(delta.manifest, delta.data, sent_bytes)
        return self._made[key]


class Pusher:
    """Sends to the peers of one server."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def send_part(self, ahead: Ahead | None) -> None:
        """Send it to those that the delta can be pushed to, as far as is known yet, and that have all bytes before.
        None: what was sent is of no use."""
        if ahead is None:
            for _, peer in self._peers.watching():
                peer.parts = None
            return
        part = ahead.part
        key: Key = (part.version, part.parent)
        end = part.start + part.data.size
        message = messages.push_part(part)
        for routing, peer in self._peers.watching():
            if part.start == 0:
                pushable = peer.have == part.parent and peer.told != part.version
                peer.parts = (key, 0) if pushable and ahead.expected_bytes <= peer.push_bytes else None
            if peer.parts == (key, part.start):
                fits = end <= peer.push_bytes and peer.fetching is None
                peer.parts = (key, end) if fits and self._peers.send(routing, message) else None
                if peer.parts is not None:
                    metrics.served_bytes.labels(metrics.DELTA).inc(part.data.size)

    def push_to_all(self, delta: Payload) -> None:
        """Push a delta that the store does not hold yet to who holds its parent."""
        made = PushMessages()
        for routing, peer in self._peers.watching():
            if peer.push_bytes and peer.have == delta.manifest.parent and peer.told != delta.version:
                self.push(routing, peer, delta, made)

    def push(self, routing: bytes, peer: Peer, delta: Payload, made: PushMessages) -> bool:
        """Send it within the peer's credit, which is used up with it; whether that was done.

        Never behind an answer that the peer still waits for, so that a peer has one push in its queue at most, and
        nothing but announcements and that push's own parts before it.
        """
        if delta.data.size > min(peer.push_bytes, MAX_CHUNK_BYTES):
            metrics.pushes_withheld.labels("large").inc()
            return False
        sent_bytes = peer.parts[1] if peer.parts is not None and peer.parts[0] == delta.key else 0
        if peer.fetching is not None or not self._peers.send(routing, made.of(delta, sent_bytes)):
            metrics.pushes_withheld.labels("busy").inc()
            return False
        peer.told, peer.push_bytes, peer.parts = delta.version, 0, None
        metrics.pushes_sent.inc()
        metrics.served_bytes.labels(metrics.DELTA).inc(delta.data.size - sent_bytes)
        return True
