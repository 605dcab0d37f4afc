"""The server for people on this machine: GET only, and only under loopback's own names."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator

import pytest

from broker.process.lifecycle import ErgonError
from deploy.loopback import LoopbackServer, Reply, plain


class Echo(LoopbackServer):
    def reply(self, path: str) -> Reply:
        return plain(200, path)


@pytest.fixture
def port() -> Iterator[int]:
    with Echo(0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def ask(port: int, method: str = "GET", host: str | None = None) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, "/a?b=1", headers={} if host is None else {"Host": host})
    reply = connection.getresponse()
    return reply, reply.read()


@pytest.mark.parametrize("host", [None, "localhost", "127.0.0.1:1", "LOCALHOST:9780", "[::1]:80", "[::1]"])
def test_names_of_loopback_are_served(port: int, host: str | None) -> None:
    reply, body = ask(port, host=host)
    assert (reply.status, body) == (200, b"/a?b=1\n")
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "10.0.0.1", "[::2]", "localhost@evil"],
)
def test_other_names_are_refused(port: int, host: str) -> None:
    reply, body = ask(port, host=host)
    assert reply.status == 403
    assert b"/a?b=1" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_only_get_is_served(port: int, method: str) -> None:
    reply, _ = ask(port, method)
    assert (reply.status, reply.headers["Allow"]) == (405, "GET")


def test_a_taken_port_is_one_sentence(port: int) -> None:
    with pytest.raises(ErgonError, match=f"127.0.0.1:{port} cannot be bound .*choose another --port"):
        Echo(port)
