"""What the socket monitor says about a peer's handshakes with its server: passing trouble, or a refusal for good.

Reads one connection's events, and asks a server that hangs up what it speaks; owns no ZeroMQ socket.
"""

from __future__ import annotations

import socket
from typing import Final
from urllib.parse import urlsplit

import zmq
from zmq.utils.monitor import recv_monitor_message

from broker.process.keys import PUBLIC_FILE, Identity
from broker.process.lifecycle import ErgonError
from broker.process.security import Security

EVENTS: Final = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
MECHANISM_MISMATCH: Final = 0x11000002  # ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: one side encrypts, one does not
MAX_BROKEN_OFF: Final = 3  # in a row, by a server that greets us
PROBE_S: Final = 1.0
_SIGNATURE: Final = b"\xff" + bytes(8) + b"\x7f" + b"\x03"  # ZMTP 3: enough to be greeted
_GREETING_BYTES: Final = 64
_MECHANISM: Final = slice(12, 32)


class Handshakes:
    """The handshakes of one Connection, over all its sockets.

    A server that cannot read what we seal for the key that we expect of it says nothing and hangs up; so does one that
    dies just then, or a proxy whose server is away. What it greets us with tells these apart.
    """

    def __init__(self, endpoint: str, security: Security, server: Identity) -> None:
        self._endpoint, self._security, self._server = endpoint, security, server
        self._num_broken_off = 0
        self.trouble = ""  # the last one, for who gives up waiting

    def succeeded(self) -> None:
        """The server has sent a WELCOME."""
        self._num_broken_off, self.trouble = 0, ""

    def read(self, monitor: zmq.Socket[bytes]) -> str:
        """Why the socket is lost, from the events that are there. Raises ErgonError where it is refused for good."""
        reason = "the server closed the connection"
        while monitor.poll(0):
            message = recv_monitor_message(monitor)
            event, value = message["event"], message["value"]
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise ErgonError(self._not_let_in())
            if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == MECHANISM_MISMATCH:
                raise ErgonError(self._other_mode())
            if event != zmq.EVENT_DISCONNECTED:
                reason = self.trouble = self._broken_off()
        return reason

    def _not_let_in(self) -> str:
        key = self._security.pair.public.decode() if self._security.pair is not None else ""
        return (
            f"the {self._server} at {self._endpoint} refuses the key of this {self._security.identity}; check that its "
            f"{PUBLIC_FILE} has the line `{self._security.identity} {key}` and that this process belongs on its channel"
        )

    def _other_mode(self) -> str:
        here, there = ("encrypted", "open") if self._security.curve else ("open", "encrypted")
        return (
            f"this side's connection to the {self._server} at {self._endpoint} is {here} and the other side's is "
            f"{there}; set the same security.mode on both"
        )

    def _broken_off(self) -> str:
        mechanism = mechanism_of(self._endpoint)
        if mechanism is None:
            self._num_broken_off = 0
            return f"{self._endpoint} hangs up without a greeting: it is no port of an Ergon process, or a proxy's"
        if mechanism != ("CURVE" if self._security.curve else "NULL"):
            raise ErgonError(self._other_mode())
        self._num_broken_off += 1
        text = f"{self._endpoint} hangs up during the handshake"
        if self._security.curve and self._num_broken_off >= MAX_BROKEN_OFF:
            raise ErgonError(
                f"{text}; the first key of {self._server} in {self._security.directory / PUBLIC_FILE} is not the one "
                f"that it has, or another process of the run is there"
            )
        return text


def mechanism_of(endpoint: str) -> str | None:
    """The security mechanism (NULL, CURVE) that a server greets with; None where it gives no ZMTP greeting in time."""
    parts = urlsplit(endpoint)
    greeting = b""
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 0), PROBE_S) as probe:
            probe.settimeout(PROBE_S)
            probe.sendall(_SIGNATURE)
            while len(greeting) < _GREETING_BYTES and (data := probe.recv(_GREETING_BYTES)):
                greeting += data
    except OSError:
        return None
    if len(greeting) < _GREETING_BYTES or greeting[0] != 0xFF or greeting[9] != 0x7F:
        return None
    return greeting[_MECHANISM].rstrip(b"\0").decode("ascii", errors="replace")
