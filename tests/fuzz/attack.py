"""Attackers: many connections to one server, each sending what it should not. Owns their sockets; judges no answer but
that it is well-formed.

Some say a valid HELLO first and are then known peers of a role; some never read what they are sent; some are no ZeroMQ
at all.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable

import zmq

from broker.protocol.commands import ErrorBody, Role, parse_body
from broker.protocol.frames import Message, decode, encode
from tests.fuzz import corpus
from tests.fuzz.mutate import mutate

MAX_PENDING = 200  # messages that wait inside one attacker's socket
RECONNECT_ONE_IN = 300
RAW_ONE_IN = 1000
HELLO_ONE_IN = 3  # fatal errors make strangers of known peers
DEAF_SHARE = 0.2
STUCK_S = 30.0

_GREETING = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" * 32
_READY = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
RAW = (
    b"GET / HTTP/1.1\r\nHost: broker\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\xff" * 4096,
    _GREETING[:11],
    _GREETING + b"\x04\xff",
    _GREETING + _READY + b"\x02" + struct.pack(">Q", 2**63 - 1) + b"x" * 100,  # a frame of 8 EiB is announced
    _GREETING + _READY + b"\x02" + struct.pack(">Q", 400 << 20) + b"x" * 100,  # within the limit, and never sent
    _GREETING + _READY + b"\x01\x06ERGN\x01\x00" * 3000,  # a message whose frames never end
)


class Attackers:
    """`num` connections to one endpoint, used in random order."""

    def __init__(
        self,
        port: int,
        run_id: str,
        roles: tuple[Role, ...],
        valid: Callable[[random.Random, str, Role], Message],
        rng: random.Random,
        num: int = 48,
    ) -> None:
        self._port, self._run_id, self._valid, self._rng = port, run_id, valid, rng
        self._roles = [rng.choice(roles) for _ in range(num)]
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealers = [self._open(index) for index in range(num)]
        self._deaf = {index for index in range(num) if rng.random() < DEAF_SHARE}
        self._raw: list[socket.socket] = []
        self.num_sent, self.num_connections = 0, num
        self.answers: Counter[str] = Counter()

    def _open(self, index: int) -> zmq.Socket[bytes]:
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.SNDHWM, MAX_PENDING)
        dealer.setsockopt(zmq.RCVHWM, MAX_PENDING)
        dealer.connect(f"tcp://127.0.0.1:{self._port}")
        if self._rng.random() < 0.7:
            self._hello(index, dealer)
        return dealer

    def _hello(self, index: int, dealer: zmq.Socket[bytes]) -> None:
        if self._valid is corpus.weight:
            message = corpus.weight_hello(self._rng, self._run_id)
        else:
            message = corpus.hello(self._rng, self._run_id, self._roles[index])
        with contextlib.suppress(zmq.Again):
            dealer.send_multipart(encode(message), zmq.NOBLOCK)

    def step(self, num: int) -> None:
        """Send `num` messages, wait for the server where it falls behind, and read the answers."""
        for _ in range(num):
            rng = self._rng
            index = rng.randrange(len(self._dealers))
            if rng.randrange(RECONNECT_ONE_IN) == 0:
                self._dealers[index].close()
                self._dealers[index] = self._open(index)
                self.num_connections += 1
            elif rng.randrange(HELLO_ONE_IN) == 0:
                self._hello(index, self._dealers[index])
            if rng.randrange(RAW_ONE_IN) == 0:
                self._send_raw()
            frames = mutate(rng, self._valid(rng, self._run_id, self._roles[index]))
            if index in self._deaf or rng.randrange(10):
                self._send(index, frames)
            else:  # at once: several messages, the last ones valid
                self._send(index, frames)
                self._send(index, [bytes(f) for f in encode(self._valid(rng, self._run_id, self._roles[index]))])
        self._read()

    def _send(self, index: int, frames: list[bytes]) -> None:
        try:
            self._dealers[index].send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            self._read()
            if index in self._deaf or not self._dealers[index].poll(100, zmq.POLLOUT):
                self._dealers[index].close()  # its queue is full: it begins anew
                self._dealers[index] = self._open(index)
                self.num_connections += 1
                return
            self._dealers[index].send_multipart(frames)
        self.num_sent += 1

    def _read(self) -> None:
        """Take the answers of those who listen; a malformed one raises ProtocolError."""
        for index, dealer in enumerate(self._dealers):
            if index in self._deaf:
                continue
            for _ in range(100):
                try:
                    message = decode(dealer.recv_multipart(zmq.NOBLOCK))
                except zmq.Again:
                    break
                code = parse_body(message, ErrorBody).code if message.command == "ERROR" else ""
                self.answers[f"ERROR {code}" if code else message.command] += 1

    def _send_raw(self) -> None:
        """A TCP connection that is no ZeroMQ, or stops in the middle; up to 50 of them stay open."""
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=STUCK_S)
        self._raw.append(connection)
        self.num_connections += 1
        with contextlib.suppress(OSError):  # the server may hang up at any byte
            connection.sendall(self._rng.choice(RAW))
        if len(self._raw) > 50:
            self._raw.pop(self._rng.randrange(50)).close()

    def close(self) -> None:
        """Close all connections."""
        for dealer in self._dealers:
            dealer.close()
        for connection in self._raw:
            connection.close()
        self._context.term()
