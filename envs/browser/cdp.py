"""The Chrome DevTools Protocol over a pipe: commands, their answers, events. Knows no command by its meaning.

Messages are JSON texts that end with a zero byte. The pipe is the only way to Chromium: no port is open, so neither a
page nor anybody else on the machine can drive it. Protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from envs.interface import SandboxError

MAX_MESSAGE: Final = 32 << 20
COMMAND_LIMIT_S = 60.0
_NUMBER = re.compile(rb'\{"id":(\d+)')

Event = Callable[[str, Mapping[str, Any]], None]


class CdpError(Exception):
    """Chromium refused a command: the target is gone, or does not fit it."""


class Connection(asyncio.Protocol):
    """One Chromium's pipe. Belongs to one event loop.

    closed: set when Chromium has ended or the pipe was closed; what is waited for then raises SandboxError.
    """

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._number = 0
        self._waiting: dict[int, tuple[str, str, asyncio.Future[Any]]] = {}  # method, session, answer
        self._listeners: dict[str, Event] = {}
        self._buffer = bytearray()
        self._skipping = False

    @classmethod
    async def over(cls, end: socket.socket) -> Connection:
        """A connection over this end of a socket pair."""
        _, protocol = await asyncio.get_running_loop().create_unix_connection(cls, sock=end)
        return protocol

    def listen(self, session: str, on_event: Event) -> None:
        """Hand the events of a session (the empty one is the browser's own) to a function, which may not wait."""
        self._listeners[session] = on_event

    def forget(self, session: str) -> None:
        """Hand them to nobody."""
        self._listeners.pop(session, None)

    def give_up(self, session: str, reason: Exception) -> None:
        """Whoever waits for an answer of this session is told the reason why there will be none."""
        for number, (_, of, future) in list(self._waiting.items()):
            if of == session:
                del self._waiting[number]
                if not future.done():
                    future.set_exception(reason)

    def post(self, method: str, session: str = "", **parameters: Any) -> asyncio.Future[Any]:
        """Send a command; its answer comes as a future. One that nobody awaits may fail: that is nobody's business."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.closed.is_set() or self._transport is None:
            future.set_exception(_gone(method))
        else:
            self._number += 1
            message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
            if session:
                message["sessionId"] = session
            self._waiting[self._number] = method, session, future
            self._transport.write(msgspec.json.encode(message) + b"\0")
        future.add_done_callback(_retrieved)
        return future

    async def send(self, method: str, session: str = "", limit_s: float | None = None, **parameters: Any) -> Any:
        """Send a command and wait for its answer, COMMAND_LIMIT_S by default.

        Raises CdpError, TimeoutError, SandboxError.
        """
        async with asyncio.timeout(COMMAND_LIMIT_S if limit_s is None else limit_s):
            return await self.post(method, session, **parameters)

    def close(self) -> None:
        """Close the pipe, upon which Chromium ends; idempotent."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop: nothing will be answered any more."""
        self.closed.set()
        waiting, self._waiting = self._waiting, {}
        for method, _, future in waiting.values():
            if not future.done():
                future.set_exception(_gone(method))
        for on_event in list(self._listeners.values()):
            on_event("closed", {})

    def data_received(self, data: bytes) -> None:
        """Called by the loop: take whole messages out of what has arrived."""
        self._buffer += data
        if b"\0" in data:
            *messages, rest = self._buffer.split(b"\0")
            self._buffer = bytearray(rest)
            for message in messages:
                if self._skipping:
                    self._skipping = False
                else:
                    self._take(message)
        if len(self._buffer) > MAX_MESSAGE:
            self._skip()

    def _skip(self) -> None:
        """A message that is too large is not kept; whoever waits for it is told."""
        number = _NUMBER.match(self._buffer)
        if number is not None:
            self._settle(int(number[1]), CdpError(f"an answer of more than {MAX_MESSAGE >> 20} MiB"))
        self._buffer.clear()
        self._skipping = True

    def _take(self, text: bytearray) -> None:
        message = msgspec.json.decode(text)
        if "id" not in message:
            on_event = self._listeners.get(message.get("sessionId", ""))
            if on_event is not None:
                on_event(message["method"], message.get("params", {}))
        elif "error" in message:
            self._settle(message["id"], CdpError(message["error"].get("message", "no reason given")))
        else:
            self._settle(message["id"], message.get("result", {}))

    def _settle(self, number: int, outcome: Any) -> None:
        method, _, future = self._waiting.pop(number, ("", "", None))
        if future is None or future.done():
            return
        if isinstance(outcome, CdpError):
            future.set_exception(CdpError(f"{method}: {outcome}"))
        else:
            future.set_result(outcome)


def _gone(method: str) -> SandboxError:
    return SandboxError(f"Chromium has ended; {method} was not answered")


def _retrieved(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
