"""Kubernetes' API of today in front of the control plane that can be built here, for helm, kubectl and `ergon`.

The apiserver is 1.20. The chart is for 1.34 and later and uses two groups that 1.20 has under older names with the
same content (policy/v1, autoscaling/v2), and two fields that it does not know. So that the chart, helm and `ergon`
run unchanged, this passes every request on and only says the other name, and leaves the fields out. It answers
/version with what it plays. A server-side apply becomes a creation or a merge patch: 1.20's own asks for what today's
takes from defaults (a port's protocol). What the newer versions themselves check is proven elsewhere: against their
schemas (`make test-chart`).
"""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.cluster.plane.control import HOST, ControlPlane

VERSION: Final = {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
OLDER: Final = {"policy/v1": "policy/v1beta1", "autoscaling/v2": "autoscaling/v2beta2"}
"""Group and version of today -> of the apiserver."""
UNKNOWN: Final = ("unhealthyPodEvictionPolicy", "persistentVolumeClaimRetentionPolicy")
"""Fields that came after 1.20; both only say what becomes of things in cases that no test here has."""
APPLY: Final = "application/apply-patch"
HOP: Final = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "accept-encoding"}


class Front(ThreadingHTTPServer):
    """Listens on loopback without TLS, as whoever reaches it is cluster-admin; a context manager."""

    daemon_threads = True

    def __init__(self, plane: ControlPlane) -> None:
        super().__init__((HOST, 0), _Handler)
        self.plane_port, self.context = plane.port, plane.context()
        self.kubeconfig = plane.directory / "front.kubeconfig"
        _write_kubeconfig(self.kubeconfig, f"http://{HOST}:{self.server_address[1]}")
        self._thread = threading.Thread(target=self.serve_forever, name="front", daemon=True)

    def __enter__(self) -> Front:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


def _write_kubeconfig(path: Path, server: str) -> None:
    told = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "front", "cluster": {"server": server}}],
        "users": [{"name": "admin", "user": {}}],
        "contexts": [{"name": "front", "context": {"cluster": "front", "user": "admin"}}],
        "current-context": "front",
    }
    path.write_text(yaml.safe_dump(told))


class _Handler(BaseHTTPRequestHandler):
    server: Front
    protocol_version = "HTTP/1.1"

    def _do(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "sendInitialEvents" in query:
            # A watch that begins with a list came later. Whoever is refused it lists and watches.
            self._reply(422, _status(422, "Invalid", "sendInitialEvents is not known"))
            return
        if self.command == "GET" and parts.path == "/version":
            self._reply(200, VERSION)
            return
        if parts.path == "/openapi/v2":
            # No schema at all, an empty protobuf message, so that clients leave validation to the server. `make
            # test-chart` has validated against the versions that are meant.
            self._reply(200, b"")
            return
        pair = _pair(parts.path)
        path = parts.path if pair is None else parts.path.replace(f"/apis/{pair[0]}", f"/apis/{pair[1]}", 1)
        body = _as_older(body)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        if pair is not None or parts.path in ("/apis", "/api", "/api/v1"):
            headers["Accept"] = "application/json"  # and not protobuf, or one answer for all groups
        if headers.get("Content-Type", "").startswith(APPLY):
            self._apply(path, headers, body, pair)
            return
        upstream = self._connection()
        try:
            upstream.request(self.command, f"{path}?{parts.query}" if parts.query else path, body or None, headers)
            reply = upstream.getresponse()
            if query.get("watch", ["0"])[0] in ("1", "true") or query.get("follow", ["0"])[0] in ("1", "true"):
                self._stream(reply, pair)
            else:
                self._pass_back(reply, parts.path, pair)
        except (ConnectionError, ssl.SSLError, http.client.IncompleteRead):
            self.close_connection = True  # one of both ends has gone; the other is told by the end of the stream
        finally:
            upstream.close()

    def _apply(self, path: str, headers: dict[str, str], body: bytes, pair: tuple[str, str] | None) -> None:
        """Create what is not there, change what is: the effect of a server-side apply by the only one who applies."""
        upstream = self._connection()
        try:
            upstream.request("GET", path, headers={"Accept": "application/json"})
            found = upstream.getresponse()
            found.read()
            if found.status == 404:
                headers["Content-Type"] = "application/json"
                upstream.request("POST", path.rpartition("/")[0], body, headers)
            else:
                headers["Content-Type"] = "application/merge-patch+json"
                upstream.request("PATCH", path, body, headers)
            self._pass_back(upstream.getresponse(), path, pair)
        finally:
            upstream.close()

    def _connection(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(HOST, self.server.plane_port, context=self.server.context, timeout=600)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _do

    def _pass_back(self, reply: http.client.HTTPResponse, path: str, pair: tuple[str, str] | None) -> None:
        body = reply.read()
        if reply.status == 200 and path in ("/apis", "/api/v1"):
            body = json.dumps(_discovered(path, json.loads(body))).encode()
        elif pair is not None:
            body = _as_newer(body, pair)
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, reply: http.client.HTTPResponse, pair: tuple[str, str] | None) -> None:
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in HOP:
                self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while piece := (reply.read1(1 << 16) if pair is None else reply.readline()):
            if pair is not None:
                piece = _as_newer(piece, pair)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def _reply(self, status: int, answer: dict[str, Any] | bytes) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", f"application/{'octet-stream' if isinstance(answer, bytes) else 'json'}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
        """Quiet."""


def _pair(path: str) -> tuple[str, str] | None:
    return next(((new, old) for new, old in OLDER.items() if f"{path}/".startswith(f"/apis/{new}/")), None)


def _as_older(body: bytes) -> bytes:
    """A request's body in the apiserver's words."""
    for new, old in OLDER.items():
        body = body.replace(f'"{new}"'.encode(), f'"{old}"'.encode())
    if any(name.encode() in body for name in UNKNOWN):
        body = json.dumps(_without(json.loads(body))).encode()
    return body


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(each) for key, each in value.items() if key not in UNKNOWN}
    return [_without(each) for each in value] if isinstance(value, list) else value


def _as_newer(body: bytes, pair: tuple[str, str]) -> bytes:
    return body.replace(f'"{pair[1]}"'.encode(), f'"{pair[0]}"'.encode())


def _discovered(path: str, found: dict[str, Any]) -> dict[str, Any]:
    """Discovery, with the newer names."""
    if path == "/api/v1":
        for resource in found["resources"]:
            if resource.get("group") == "policy":
                resource["version"] = "v1"
        return found
    for group in found["groups"]:
        for new in OLDER:
            name, _, version = new.partition("/")
            if group["name"] == name:
                told = {"groupVersion": new, "version": version}
                group["versions"].insert(0, told)
                group["preferredVersion"] = told
    return found


def _status(code: int, reason: str, message: str) -> dict[str, Any]:
    told = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return told | {"code": code, "reason": reason, "message": message}
