"""What is on its way to one peer: results that wait for room, and bytes that the network has not taken yet.

Owns the bounds in bytes of sending: the peer's own (`CREDIT.credit_bytes`) and the broker's. Never sends: the server
asks what may go next. Small messages are bounded by their number, see `peers.SEND_HWM`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import zmq

from broker.protocol.frames import Frame, Message

TRACKED_BYTES: Final = 65_536  # smaller frames are copied into ZeroMQ's own memory, which cannot be watched


@dataclass(slots=True)
class Run:
    """Results that lie in one parcel of the store: the index of each there, and its ticket."""

    parcel: int
    indexes: list[int]
    ticket_ids: list[str]


class Outflow:
    """One connection's. It ends with the connection, and so does what waits in it."""

    def __init__(self) -> None:
        self._waiting: deque[Run | Message] = deque()
        self._credit_bytes: int | None = None
        self._sent_bytes = 0
        self._window_bytes: int | None = None  # the first credit: what the peer can have untaken
        self._on_the_way: deque[tuple[zmq.MessageTracker, int]] = deque()
        self._queued_bytes = 0

    def add(self, message: Message) -> None:
        """Queue a message that must not overtake a result."""
        self._waiting.append(message)

    def add_results(self, results: Iterable[tuple[int, int, str]]) -> None:
        """Queue results, each with its parcel, its index there and its ticket; neighbours of one parcel go out in one
        message."""
        last = self._waiting[-1] if self._waiting else None
        run = last if isinstance(last, Run) else None
        for parcel, index, ticket_id in results:
            if run is None or run.parcel != parcel:
                run = Run(parcel, [], [])
                self._waiting.append(run)
            run.indexes.append(index)
            run.ticket_ids.append(ticket_id)

    def allow(self, credit_bytes: int | None) -> None:
        """The peer is ready for so many bytes of arrays in all since its HELLO; None for any number."""
        if self._window_bytes is None:
            self._window_bytes = credit_bytes
        if credit_bytes is None or self._credit_bytes is None:
            self._credit_bytes = credit_bytes
        else:
            self._credit_bytes = max(self._credit_bytes, credit_bytes)

    def next(self, max_queued_bytes: int) -> Run | Message | None:
        """Take what is to be sent now. None where nothing waits, the credit is used up, or `max_queued_bytes` of large
        frames are queued already; each bound is overstepped by one message at most."""
        if not self._waiting or self.blocked(max_queued_bytes):
            return None
        if self._credit_bytes is not None and self._sent_bytes >= self._credit_bytes:
            return None
        return self._waiting.popleft()

    def sent(self, message: Message) -> None:
        """Results went out: their arrays count against the credit."""
        self._sent_bytes += message.array_bytes

    def blocked(self, max_queued_bytes: int) -> bool:
        """Whether something waits for the network alone, which does not say when it is ready: look again soon."""
        return bool(self._waiting) and self.queued_bytes >= max_queued_bytes

    @property
    def queued_bytes(self) -> int:
        """Bytes of large frames that were handed to ZeroMQ and not yet taken by the operating system."""
        while self._on_the_way and self._on_the_way[0][0].done:
            self._queued_bytes -= self._on_the_way.popleft()[1]
        return self._queued_bytes

    def track(self, frames: Sequence[Frame | zmq.Frame], max_queued_bytes: int = 0) -> list[Frame | zmq.Frame]:
        """The frames as they are to be sent: the large ones are neither copied nor lost from sight.

        One that ZeroMQ has already is sent on as it is, which costs least and cannot be watched: only to a peer whose
        own credit keeps what waits for it within `max_queued_bytes`."""
        parts = list(frames)
        bounded = self._credit_bytes is not None and (self._window_bytes or 0) <= max_queued_bytes
        for index, frame in enumerate(frames):
            if isinstance(frame, zmq.Frame):
                if bounded:
                    continue
                frame = frame.buffer
            if len(frame) >= TRACKED_BYTES:
                part = zmq.Frame(frame, track=True, copy=False, copy_threshold=0)
                if part.tracker is None:
                    raise AssertionError("ZeroMQ gave no tracker for a tracked frame")
                self._on_the_way.append((part.tracker, len(frame)))
                self._queued_bytes += len(frame)
                parts[index] = part
        return parts
