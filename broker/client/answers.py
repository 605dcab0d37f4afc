"""What calls of an actor wait for: each one's answer, over reconnections, or why there will be none.

For the event loop alone. Sends nothing and reads nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Generic, TypeVar

A = TypeVar("A")


class Answers(Generic[A]):
    """By ticket id or request id."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[A]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._waiting

    @contextlib.contextmanager
    def expect(self, key: str) -> Iterator[asyncio.Future[A]]:
        """What the broker will say of this."""
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        try:
            yield future
        finally:
            del self._waiting[key]

    def settle(self, key: str, outcome: A | Exception) -> None:
        """It has said it; nothing, where nobody waits for it any more."""
        future = self._waiting.get(key)
        if future is None or future.done():
            return
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def fail(self, error: Exception) -> None:
        """No answer will come to anyone."""
        for key in list(self._waiting):
            self.settle(key, error)
