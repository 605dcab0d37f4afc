"""What has been taken from the network and not been looked at yet: the learner's messages first.

ZeroMQ serves its connections in turn, a message each. Where hundreds of actors have a megabyte waiting, a learner's
CREDIT of a few bytes would wait for all of them, and the results that it asks for with it. So what has arrived is taken
over at once, within a bound in bytes, and the few peers that speak for the learner or for an operator need not queue.
Messages of one connection keep their order. Owns that order and that bound; looks into no message.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import zmq

Parts = list[zmq.Frame]
Clock = Callable[[], float]


class _Held(NamedTuple):
    parts: Parts
    num_bytes: int
    after: float  # when the network was found empty before it arrived


class Intake:
    """`receive` gives the next message of the network, its sender first, or nothing; `first` says of a sender whether
    it goes before the others. At most `max_bytes` are held, overstepped by one message."""

    def __init__(
        self,
        receive: Callable[[], Parts],
        first: Callable[[bytes], bool],
        max_bytes: int,
        clock: Clock = time.monotonic,
    ) -> None:
        self._receive, self._first, self._max_bytes, self._clock = receive, first, max_bytes, clock
        self._before: deque[_Held] = deque()
        self._others: deque[_Held] = deque()
        self._filled_at = clock()
        self.num_bytes = 0
        """Of the messages that are held."""

    def __bool__(self) -> bool:
        return bool(self._before or self._others)

    @property
    def read_until(self) -> float:
        """By the clock: what had arrived by then is neither held nor waits for room."""
        return min([queue[0].after for queue in (self._before, self._others) if queue], default=self._filled_at)

    def fill(self) -> None:
        """Take over what has arrived, as far as there is room."""
        now = self._clock()
        while self.num_bytes < self._max_bytes:
            if not (parts := self._receive()):
                self._filled_at = now
                break
            size = sum([len(part) for part in parts])
            self.num_bytes += size
            (self._before if self._first(parts[0].bytes) else self._others).append(_Held(parts, size, self._filled_at))

    def take(self, max_messages: int, max_bytes: int) -> Iterator[Parts]:
        """Messages to be handled now. Whoever goes first does not keep the others from having one."""
        num_messages = num_bytes = 0
        while num_messages < max_messages and num_bytes < max_bytes and self._before:
            held = self._pop(self._before)
            num_messages, num_bytes = num_messages + 1, num_bytes + held.num_bytes
            yield held.parts
        least = 1
        while self._others and (least or (num_messages < max_messages and num_bytes < max_bytes)):
            held = self._pop(self._others)
            num_messages, num_bytes, least = num_messages + 1, num_bytes + held.num_bytes, 0
            yield held.parts

    def _pop(self, queue: deque[_Held]) -> _Held:
        held = queue.popleft()
        self.num_bytes -= held.num_bytes
        return held
