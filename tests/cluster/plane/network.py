"""The cluster's network on loopback: an address for each pod and Service, names, and what a Service does.

All of 127.0.0.0/8 is this machine, so every pod has an address of its own and binds the ports that it always binds. A
Service's address passes connections on to a pod that is ready. Names are in a hosts file for each namespace. Network
policies are not enforced.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Object = dict[str, Any]
_PODS, _SERVICES = 64, 96  # second number of their addresses
NUM_NAMED = 8  # pods of a StatefulSet that have names, at most


def pod_address(namespace: str, name: str) -> str:
    """A pod's; the same for the next pod of this name."""
    return _address(_PODS, namespace, name)


def service_address(namespace: str, name: str) -> str:
    """A Service's, which is not the one that the apiserver has given it."""
    return _address(_SERVICES, namespace, name)


def _address(second: int, namespace: str, name: str) -> str:
    digest = hashlib.sha256(f"{namespace}/{name}".encode()).digest()
    return f"127.{second}.{digest[0]}.{1 + digest[1] % 254}"


def container_port(pod: Object, port: int | str) -> int:
    """A port of a pod by its name, or itself."""
    if isinstance(port, int):
        return port
    for container in pod["spec"]["containers"]:
        for each in container.get("ports", []):
            if each["name"] == port:
                return int(each["containerPort"])
    raise KeyError(f"pod {pod['metadata']['name']} has no port {port!r}")


def is_ready(pod: Object) -> bool:
    """Whether its status says so."""
    conditions = pod.get("status", {}).get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


class Network(threading.Thread):
    """Serves all Services; its one thread. pods: the newest of those that the nodes know."""

    def __init__(self, directory: Path, pods: Callable[[], list[Object]]) -> None:
        super().__init__(name="network", daemon=True)
        self._directory, self._pods = directory, pods
        directory.mkdir(parents=True, exist_ok=True)
        self._services: dict[tuple[str, str], Object] = {}
        self._servers: dict[tuple[str, str], list[asyncio.Server]] = {}
        self._loop = asyncio.new_event_loop()

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def close(self) -> None:
        """Serve no more."""
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join()

    async def _shut(self) -> None:
        for servers in self._servers.values():
            for server in servers:
                server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def hosts(self, namespace: str) -> Path:
        """The hosts file of a namespace; it is kept true in place."""
        path = self._directory / f"{namespace}.hosts"
        if not path.exists():
            self._write_hosts(namespace)
        return path

    def update(self, service: Object, *, gone: bool) -> None:
        """A Service is there, or has gone."""
        asyncio.run_coroutine_threadsafe(self._update(service, gone), self._loop).result(10)

    async def _update(self, service: Object, gone: bool) -> None:
        namespace, _ = key = service["metadata"]["namespace"], service["metadata"]["name"]
        known = key in self._services
        if gone:
            self._services.pop(key, None)
            for server in self._servers.pop(key, []):
                server.close()
        else:
            self._services[key] = service
            if not known and service["spec"].get("clusterIP") != "None" and service["spec"].get("selector"):
                self._servers[key] = [await self._serve(key, port) for port in service["spec"]["ports"]]
        if known != (not gone):
            self._write_hosts(namespace)

    async def _serve(self, key: tuple[str, str], port: Object) -> asyncio.Server:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            target = self._backend(self._services.get(key), port.get("targetPort", port["port"]))
            await _join(reader, writer, target)

        return await asyncio.start_server(connected, service_address(*key), port["port"])

    def _backend(self, service: Object | None, port: int | str) -> tuple[str, int] | None:
        if service is None:
            return None
        selector = service["spec"]["selector"].items()
        for pod in self._pods():
            meta = pod["metadata"]
            if meta["namespace"] != service["metadata"]["namespace"] or "deletionTimestamp" in meta:
                continue
            if selector <= meta.get("labels", {}).items() and is_ready(pod):
                return pod_address(meta["namespace"], meta["name"]), container_port(pod, port)
        return None

    def _write_hosts(self, namespace: str) -> None:
        lines = ["127.0.0.1 localhost"]
        for of, name in self._services:
            if of != namespace:
                continue
            if self._services[of, name]["spec"].get("clusterIP") != "None":
                lines.append(f"{service_address(of, name)} {name}")
            for index in range(NUM_NAMED):
                lines.append(f"{pod_address(of, f'{name}-{index}')} {name}-{index}.{name}")
        (self._directory / f"{namespace}.hosts").write_text("\n".join(lines) + "\n")


async def _join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: tuple[str, int] | None) -> None:
    """Pass bytes on, both ways, until one side has had enough. No target: as a port that nobody listens on."""
    try:
        if target is None:
            return
        inner_reader, inner_writer = await asyncio.open_connection(*target)
        try:
            await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
        finally:
            inner_writer.close()
    except OSError:
        pass  # whoever connected sees its connection closed, and tries again
    finally:
        writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(1 << 16):
        writer.write(piece)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()
