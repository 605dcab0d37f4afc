"""What has been taken from the network and not been looked at yet: the learner's messages first.

ZeroMQ serves its connections in turn, a message each. Where hundreds of actors have a megabyte waiting, a learner's
CREDIT of a few bytes would wait for all of them, and the results that it asks for with it. So what has arrived is taken
over at once, within a bound in bytes, and the few peers that speak for the learner or for an operator need not queue.
Messages of one connection keep their order. Owns that order and that bound; looks into no message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import zmq

Parts = list[zmq.Frame]


class Intake:
    """`receive` gives the next message of the network, its sender first, or nothing; `first` says of a sender whether
    it goes before the others. At most `max_bytes` are held, overstepped by one message."""

    def __init__(self, receive: Callable[[], Parts], first: Callable[[bytes], bool], max_bytes: int) -> None:
        self._receive, self._first, self._max_bytes = receive, first, max_bytes
        self._before: deque[tuple[Parts, int]] = deque()
        self._others: deque[tuple[Parts, int]] = deque()
        self.num_bytes = 0
        """Of the messages that are held."""

    def __bool__(self) -> bool:
        return bool(self._before or self._others)

    def fill(self) -> None:
        """Take over what has arrived, as far as there is room."""
        while self.num_bytes < self._max_bytes and (parts := self._receive()):
            size = sum([len(part) for part in parts])
            self.num_bytes += size
            (self._before if self._first(parts[0].bytes) else self._others).append((parts, size))

    def take(self, max_messages: int, max_bytes: int) -> Iterator[Parts]:
        """Messages to be handled now. Whoever goes first does not keep the others from having one."""
        num_messages = num_bytes = 0
        while num_messages < max_messages and num_bytes < max_bytes and self._before:
            parts, size = self._pop(self._before)
            num_messages, num_bytes = num_messages + 1, num_bytes + size
            yield parts
        least = 1
        while self._others and (least or (num_messages < max_messages and num_bytes < max_bytes)):
            parts, size = self._pop(self._others)
            num_messages, num_bytes, least = num_messages + 1, num_bytes + size, 0
            yield parts

    def _pop(self, queue: deque[tuple[Parts, int]]) -> tuple[Parts, int]:
        parts, size = queue.popleft()
        self.num_bytes -= size
        return parts, size
