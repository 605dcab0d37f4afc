"""The same world behind a real HTTP server or an MCP server, for agents that bring their own client.

`python -m envs.services.serve --split train --index 3 --port 8080` serves one task's world on loopback until Ctrl-C and
then prints the grade; `--mcp` speaks MCP on standard input and output (needs the package `mcp`) and grades at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from envs.interface import EnvironmentOptionsError, Message, Task
from envs.services.api import document
from envs.services.environment import ServicesEnvironment, ServicesEpisode, docs, grade, http, make_world, wait
from envs.services.world import MAX_BODY, RealClock, World
from envs.tools import ToolError
from envs.tools.typed import ERROR_PREFIX

DOCUMENTATION = "/docs/"


class _Handler(BaseHTTPRequestHandler):
    """One connection; the server has the world."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def _serve(self) -> None:
        if self.path.startswith(DOCUMENTATION):
            self._send_documentation(self.path.removeprefix(DOCUMENTATION))
            return
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY:
            self.close_connection = True
            self._send(400, json.dumps({"error": f"the body may have up to {MAX_BODY} bytes"}))
            return
        try:
            body = json.loads(self.rfile.read(int(length)) or b"{}")
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            self._send(400, json.dumps({"error": "the body must be a JSON object"}))
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        answer = self.server.world.request(self.command, self.path, body, token)
        self.server.sleep(answer.delay_s)
        self._send(answer.status, answer.text, answer.num_bytes)

    def _send_documentation(self, service: str) -> None:
        try:
            self._send(200, document(service), kind="text/plain")
        except KeyError:
            self._send(404, json.dumps({"error": f"no documentation of {service[:40]}"}))

    def _send(self, status: int, text: str, num_bytes: int | None = None, kind: str = "application/json") -> None:
        """Answer; one that is cut says how long it should have been, and then the connection ends."""
        payload = text.encode()
        length = len(payload) if num_bytes is None else num_bytes
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(payload)
        self.close_connection = self.close_connection or length != len(payload)

    do_GET = do_POST = do_PATCH = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Requests are the agent's business."""


class _Server(ThreadingHTTPServer):
    """Serves one world."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], world: World, sleep: Callable[[float], None]) -> None:
        super().__init__(address, _Handler)
        self.world = world
        self.sleep = sleep


@contextmanager
def http_server(world: World, port: int = 0, sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """Serve the world on loopback meanwhile; its URL. sleep: how a slow answer is waited for.

    The token travels as `Authorization: Bearer TOKEN`; the documentation is at /docs/overview.
    """
    server = _Server(("127.0.0.1", port), world, sleep)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def mcp_server(episode: ServicesEpisode) -> Any:
    """An `mcp.server.MCPServer` with the environment's three tools on this episode's world; the caller runs it.

    Raises EnvironmentOptionsError without the package `mcp`.
    """
    try:
        from mcp.server import MCPServer
    except ImportError as error:
        raise EnvironmentOptionsError("an MCP server needs the package mcp: type `pip install ergon[mcp]`") from error
    server = MCPServer("ergon-services", instructions=episode.task.prompt[0].content)

    def read_docs(service: str = "overview") -> str:
        try:
            return document(service)
        except KeyError:
            return f"{ERROR_PREFIX}no documentation of {service[:40]}"

    def send_http(method: str, path: str, body: dict[str, Any] | None = None, token: str = "") -> str:
        try:
            return http(episode, cast(Any, method), path, body, token)  # any method is answered
        except ToolError as error:
            return f"{ERROR_PREFIX}{error}"

    def pass_time(seconds: int) -> str:
        try:
            return wait(episode, seconds)
        except ToolError as error:
            return f"{ERROR_PREFIX}{error}"

    for function, tool in ((read_docs, docs), (send_http, http), (pass_time, wait)):
        server.add_tool(function, name=tool.__name__, description=tool.__doc__)
    return server


def main() -> None:
    """Serve one task until it is over, then print the grade."""
    parser = argparse.ArgumentParser(prog="python -m envs.services.serve", description=main.__doc__)
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--faults", default="mild")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--mcp", action="store_true")
    arguments = parser.parse_args()
    environment = ServicesEnvironment(faults=arguments.faults)
    task = environment.task(arguments.split, arguments.index)
    (_serve_mcp if arguments.mcp else _serve_http)(environment, task, arguments.port)


def _say(text: str) -> None:
    """To standard error: on standard output MCP is spoken."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _serve_mcp(environment: ServicesEnvironment, task: Task, _port: int) -> None:
    episode = environment.episode(task)
    mcp_server(episode).run("stdio")
    _say(f"grade: {dict(grade(task, episode.world).components)}")


def _serve_http(_environment: ServicesEnvironment, task: Task, port: int) -> None:
    world = make_world(task, RealClock())
    question: Message = task.prompt[0]
    with http_server(world, port) as url:
        _say(f"{question.content}\n\n{url}, documentation at {url}{DOCUMENTATION}overview; Ctrl-C ends it")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            _say(f"grade: {dict(grade(task, world).components)}")


if __name__ == "__main__":
    main()
