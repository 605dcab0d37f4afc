"""The /metrics and /healthz endpoint of every process. Owns the HTTP server; each room defines its own metrics."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest

from broker.process.lifecycle import ErgonError


class Health(NamedTuple):
    """Whether the process can do its work, and what it knows about itself."""

    ok: bool
    detail: dict[str, object]


class MetricsServer:
    """Serves until closed, from a daemon thread."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port being served (useful where 0 was asked for)."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_metrics(
    host: str, port: int, health: Callable[[], Health], registry: CollectorRegistry = REGISTRY
) -> MetricsServer:
    """Serve /metrics (Prometheus text) and /healthz (200 or 503, JSON detail) on host:port.

    Raises ErgonError where the port cannot be bound.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.split("?", 1)[0]
            if path == "/metrics":
                self._reply(200, CONTENT_TYPE_LATEST, generate_latest(registry))
            elif path == "/healthz":
                state = health()
                body = json.dumps({"ok": state.ok, **state.detail}, default=str).encode()
                self._reply(200 if state.ok else 503, "application/json", body)
            else:
                self._reply(404, "text/plain", b"not found: this server has /metrics and /healthz\n")

        def _reply(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
            """Scrapes are not worth a log line each."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise ErgonError(
            f"the metrics port {host}:{port} cannot be bound ({error.strerror}); "
            "set another one in [metrics] or stop the process that holds it"
        ) from error
    server.daemon_threads = True
    return MetricsServer(server)
