"""A small HTTP server for a person on this machine: GET only, loopback only, and not for other people's web pages.

A page from elsewhere could point a name of its own at 127.0.0.1 and then read what is served there (DNS rebinding), so
a request whose Host is not a name of loopback is refused. The port in it may be another one: a forwarded one.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from broker.process.lifecycle import ErgonError

HOST: Final = "127.0.0.1"
_OWN_NAMES: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})
_ALWAYS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, slots=True)
class Reply:
    """What a request is answered with."""

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def plain(status: int, text: str) -> Reply:
    """A sentence."""
    return Reply(status, "text/plain; charset=utf-8", f"{text}\n".encode())


class LoopbackServer(ThreadingHTTPServer, ABC):
    """Answers GET with `reply`. Raises ErgonError where its port is taken."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ErgonError(f"{HOST}:{port} cannot be bound ({error.strerror}); choose another --port") from error

    @abstractmethod
    def reply(self, path: str) -> Reply:
        """What is at this path, with its query. Called in a thread for each request."""


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackServer
    server_version, sys_version = "ergon", ""
    timeout = 30  # of a connection on which nothing comes

    def do_GET(self) -> None:
        host = re.sub(r":\d*$", "", self.headers.get("Host", "")).lower()
        if host not in _OWN_NAMES:
            self._send(plain(403, f"this is served to 127.0.0.1 and localhost only, not to {host!r:.80}"))
        else:
            self._send(self.server.reply(self.path))

    def _refuse(self) -> None:
        self._send(Reply(405, "text/plain", b"only GET is served\n", {"Allow": "GET"}))
        self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        headers = {"Content-Type": reply.content_type, "Content-Length": str(len(reply.body))}
        for name, value in (_ALWAYS | headers | dict(reply.headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
        """Requests are not worth a log line each."""
