"""What a server that hangs up is found to speak."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
import zmq

from broker.client.handshake import mechanism_of


@contextlib.contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """A TCP server that says this to whoever connects, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(reply)

        threading.Thread(target=serve, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("mechanism", ["NULL", "CURVE"])
def test_a_zeromq_server_greets_with_its_mechanism(mechanism: str) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        if mechanism == "CURVE":
            router.curve_server = True
            router.curve_secretkey = zmq.curve_keypair()[1]
        port = router.bind_to_random_port("tcp://127.0.0.1")
        assert mechanism_of(f"tcp://127.0.0.1:{port}") == mechanism


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(64), b"\xff" * 63])
def test_anything_else_gives_no_greeting(reply: bytes) -> None:
    with answering(reply) as endpoint:
        assert mechanism_of(endpoint) is None


def test_nobody_gives_no_greeting() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        assert mechanism_of(f"tcp://127.0.0.1:{reserved.getsockname()[1]}") is None
