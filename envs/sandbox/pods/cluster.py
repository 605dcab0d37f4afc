"""Kubernetes' API as the pods of one process need it: create, watch, delete, open an exec connection, clean up.

By the library `kubernetes`, its asynchronous half. One Cluster for an event loop, shared by all its pods and closed
with the last. One watch tells of all pods of the process. Never decides what a pod is or what runs in it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final
from urllib.parse import quote
from weakref import WeakKeyDictionary

from envs.interface import SandboxError
from envs.sandbox.pods.finding import find_cluster
from envs.sandbox.pods.manifest import ACTOR_LABEL, CONTAINER, PROCESS_LABEL, RUN_LABEL, PodSettings, label, selector
from envs.sandbox.pods.refusals import is_ready, refusal, why_ended, why_waiting

logger = logging.getLogger(__name__)

CALL_S: Final = 30.0
CONNECT_S: Final = 15.0
WATCH_S: Final = 300  # the server ends a watch after so long; the next one follows
RETRY_S: Final = 1.0
ATTEMPTS: Final = 4
BUSY: Final = (429, 500, 502, 503, 504)

_open: WeakKeyDictionary[asyncio.AbstractEventLoop, Cluster] = WeakKeyDictionary()
_swept: set[tuple[str, str]] = set()  # (namespace, process): once for each


class Cluster:
    """What is known of the pods, and the ways to change it. `acquire` it, `release` it."""

    def __init__(self, settings: PodSettings, configuration: Any) -> None:
        from kubernetes.aio import client
        from kubernetes.aio.stream import WsApiClient

        self.settings = settings
        self._client: Any = client.ApiClient(configuration)
        self._streams: Any = WsApiClient(configuration)
        self._host = str(configuration.host)
        self._users = 0
        self._pods: dict[str, Mapping[str, Any]] = {}
        self._changed: dict[str, asyncio.Event] = {}  # of those that somebody waits for
        self._trouble: SandboxError | None = None
        self._follower: asyncio.Task[None] | None = None

    @classmethod
    async def acquire(cls, settings: PodSettings) -> Cluster:
        """This event loop's cluster. Raises ErgonEnvError where there is none; SandboxError where it cannot be used."""
        loop = asyncio.get_running_loop()
        made = _open.get(loop)
        if made is None or made.settings != settings:
            configuration = await find_cluster()
            made = _open.get(loop)
            if made is None or made.settings != settings:
                made = _open[loop] = cls(settings, configuration)
                made._follower = asyncio.create_task(made._follow(), name="pods-watch")
                made._follower.add_done_callback(made._follower_ended)
        made._users += 1
        try:
            await made._sweep()
        except BaseException:
            await made.release()
            raise
        return made

    async def release(self) -> None:
        """Of one user; the last one closes the connections."""
        self._users -= 1
        if self._users:
            return
        loop = asyncio.get_running_loop()
        if _open.get(loop) is self:
            del _open[loop]
        if self._follower is not None:
            self._follower.cancel()
            with suppress(asyncio.CancelledError):
                await self._follower
        await self._client.close()
        await self._streams.close()

    # --- calls

    async def create(self, manifest: Mapping[str, Any]) -> str:
        """Create a pod; its name. A repeated attempt is no second pod. Raises SandboxError."""
        name = str(manifest["metadata"]["name"])
        for attempt in range(ATTEMPTS):
            status, body = await self._call("create", "pods", "POST", "", body=manifest)
            if status < 300 or (status == 409 and attempt):
                return name
            if status not in BUSY or attempt == ATTEMPTS - 1:
                raise refusal(status, body, "create", "pods", self.settings.namespace)
            await asyncio.sleep(RETRY_S * 2**attempt)
        raise AssertionError

    async def ready(self, name: str, timeout_s: float) -> None:
        """Wait until a pod's sandbox runs. Raises SandboxError where it does not, with why."""
        changed = self._changed[name] = asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                while name not in self._pods or not is_ready(self._pods[name]):
                    if self._trouble is not None:
                        raise self._trouble
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            why = why_waiting(self._pods.get(name))
            raise SandboxError(f"a sandbox's pod was not ready within {timeout_s:g} s: {why}") from None
        finally:
            del self._changed[name]

    async def delete(self, name: str) -> None:
        """Delete a pod; one that has gone already is fine. Raises SandboxError."""
        for attempt in range(ATTEMPTS):
            status, body = await self._call("delete", "pods", "DELETE", name)
            if status < 300 or status == 404:
                self._pods.pop(name, None)
                return
            if status not in BUSY or attempt == ATTEMPTS - 1:
                raise refusal(status, body, "delete", "pods", self.settings.namespace)
            await asyncio.sleep(RETRY_S * 2**attempt)

    def fate(self, name: str) -> str:
        """What is known of why a pod is not there; "" for nothing."""
        pod = self._pods.get(name)
        if pod is None:
            return ""
        ended = pod.get("status", {}).get("phase") in ("Failed", "Succeeded")
        return why_ended(pod) if ended or pod.get("metadata", {}).get("deletionTimestamp") else ""

    async def connect(self, name: str, command: Sequence[str]) -> Any:
        """An exec connection into a pod, an open WebSocket of the protocol v4.channel.k8s.io. Raises SandboxError."""
        import aiohttp

        query = [("command", word) for word in command]
        query += [("container", CONTAINER), ("stdin", "true"), ("stdout", "true"), ("stderr", "true")]
        parts = await self._parts(self._streams, "GET", f"/{name}/exec", query, None)
        try:
            async with asyncio.timeout(CONNECT_S):
                answer = await self._streams.call_api(*parts, _preload_content=False)
                return await answer.response
        except aiohttp.WSServerHandshakeError as error:
            # In a WebSocket's case Kubernetes asks for `get`, from 1.35 on for `create` too.
            raise refusal(error.status, error.message, "get or create", "pods/exec", self.settings.namespace) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._unreachable(error) from error

    async def _call(
        self,
        verb: str,
        resource: str,
        method: str,
        name: str,
        query: Sequence[tuple[str, str]] = (),
        body: Mapping[str, Any] | None = None,
    ) -> tuple[int, str]:
        """Status and text of an answer. Raises SandboxError where there is none."""
        import aiohttp

        try:
            parts = await self._parts(self._client, method, f"/{name}" if name else "", query, body)
            answer = await self._client.call_api(*parts, _request_timeout=aiohttp.ClientTimeout(total=CALL_S))
            return int(answer.status), (await answer.read()).decode(errors="replace")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._unreachable(error) from error

    async def _parts(
        self, client: Any, method: str, path: str, query: Sequence[tuple[str, str]], body: Mapping[str, Any] | None
    ) -> Any:
        """The library's own form of a request, with this process's credentials."""
        return await client.param_serialize(
            method,
            f"/api/v1/namespaces/{quote(self.settings.namespace)}/pods{path}",
            query_params=list(query),
            header_params={"Accept": "*/*" if path.endswith("/exec") else "application/json"},
            body=body,
            auth_settings=["BearerToken"],
        )

    def _unreachable(self, error: BaseException) -> SandboxError:
        return SandboxError(
            f"the cluster at {self._host} cannot be reached ({type(error).__name__}: {str(error) or 'no answer'})"
        )

    # --- what is there

    async def _list(self, labels: Mapping[str, str]) -> Mapping[str, Any]:
        status, body = await self._call("list", "pods", "GET", "", [("labelSelector", selector(labels))])
        if status >= 300:
            raise refusal(status, body, "list", "pods", self.settings.namespace)
        found: Mapping[str, Any] = json.loads(body)
        return found

    async def _sweep(self) -> None:
        """Once for a process: remove what earlier processes of the same actor left, and what has ended of the run."""
        settings = self.settings
        if not settings.run or (settings.namespace, settings.process) in _swept:
            return
        _swept.add((settings.namespace, settings.process))
        try:
            num_removed = await self._remove_orphans()
        except BaseException:
            _swept.discard((settings.namespace, settings.process))
            raise
        if num_removed:
            logger.info("orphaned sandboxes removed pods=%d namespace=%s", num_removed, settings.namespace)

    async def _remove_orphans(self) -> int:
        settings, num_removed = self.settings, 0
        for pod in (await self._list({RUN_LABEL: label(settings.run)}))["items"]:
            labels = pod["metadata"]["labels"]
            of_actor = labels.get(ACTOR_LABEL) == label(settings.actor)
            ended = pod.get("status", {}).get("phase") in ("Failed", "Succeeded")
            if ended or (of_actor and labels.get(PROCESS_LABEL) != settings.process):
                await self.delete(pod["metadata"]["name"])
                num_removed += 1
        return num_removed

    async def _follow(self) -> None:
        """Keep what is known of the pods true, until it is cancelled."""
        while True:
            try:
                await self._watch()
            except SandboxError as error:
                self._trouble = error
                self._tell(*self._changed)
                await asyncio.sleep(RETRY_S)

    def _follower_ended(self, follower: asyncio.Task[None]) -> None:
        if not follower.cancelled() and (error := follower.exception()) is not None:
            self._trouble = SandboxError(f"the watch of sandboxes' pods has ended: {type(error).__name__}: {error}")
            self._tell(*self._changed)

    async def _watch(self) -> None:
        """From a list on, until the server ends the watch. Raises SandboxError."""
        import aiohttp

        mine = {PROCESS_LABEL: self.settings.process}
        found = await self._list(mine)
        self._pods = {pod["metadata"]["name"]: _kept(pod) for pod in found["items"]}
        self._trouble = None
        self._tell(*self._changed)
        query = [("labelSelector", selector(mine)), ("watch", "true"), ("timeoutSeconds", str(WATCH_S))]
        query.append(("resourceVersion", found["metadata"]["resourceVersion"]))
        parts = await self._parts(self._client, "GET", "", query, None)
        try:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CALL_S, sock_read=WATCH_S + CALL_S)
            answer = await self._client.call_api(*parts, _request_timeout=timeout)
            try:
                if answer.status >= 300:
                    body = (await answer.read()).decode(errors="replace")
                    raise refusal(int(answer.status), body, "watch", "pods", self.settings.namespace)
                async for line in answer.response.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        return  # the version is too old: list again
                    self._take(event["type"], event["object"])
            finally:
                answer.response.close()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise self._unreachable(error) from error

    def _take(self, kind: str, pod: Mapping[str, Any]) -> None:
        name = pod["metadata"]["name"]
        if kind == "DELETED":
            self._pods.pop(name, None)
        else:
            self._pods[name] = _kept(pod)
        self._tell(name)

    def _tell(self, *names: str) -> None:
        for name in names:
            if name in self._changed:
                self._changed[name].set()


def _kept(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is worth remembering of a pod: its manifest has the session's text and all its files."""
    metadata = pod["metadata"]
    return {"metadata": {"deletionTimestamp": metadata.get("deletionTimestamp")}, "status": pod.get("status", {})}
