"""A cluster of one process: the pieces of Kubernetes' API that pods need, over real HTTP and WebSockets, and a runtime.

The runtime is bubblewrap: a container's command is PID 1 of namespaces of its own, with the volumes, the environment
and the read-only root that its manifest asks for, and an exec enters these namespaces. What the API server would
refuse by PodSecurity `restricted`, this one does. No scheduler, no limits of CPU and memory, no TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

from envs.sandbox import bubblewrap
from envs.sandbox.pods import PodSettings, configure_pods, pod_settings
from envs.sandbox.pods.manifest import PYTHON
from tests.pod_security import violations

TOKEN = "of-the-tests"
SYSTEM_PYTHON = Path("/usr/bin/python3").resolve()

# What a runtime does for an exec: enters the namespaces of a container, without a capability. bubblewrap's user
# namespace lies in another one, which owns the rest.
ENTER = """
import ctypes, fcntl, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def enter(fd):
    if libc.setns(fd, 0):
        raise OSError(ctypes.get_errno(), "setns")
names = ("ipc", "uts", "net", "pid", "mnt", "user")
spaces = {name: os.open(f"/proc/{sys.argv[1]}/ns/{name}", os.O_RDONLY) for name in names}
enter(fcntl.ioctl(spaces["ipc"], 0xB701))  # NS_GET_USERNS
for fd in spaces.values():
    enter(fd)
os.chdir("/workspace")
child = os.fork()
if not child:
    if libc.capset(struct.pack("II", 0x20080522, 0), bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")
    os.execvp(sys.argv[2], sys.argv[2:])
for fd in (0, 1, 2):
    os.close(fd)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
os._exit(status if status >= 0 else 128 - status)
"""


def identity() -> list[str]:
    """What drops root's identity, where tests have it: bubblewrap's user, as in the other backend."""
    if os.geteuid():
        return []
    number = bubblewrap.SANDBOX_ID
    return ["setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups", "--"]


@dataclass(slots=True)
class Running:
    """A container and its first process, as this machine numbers it."""

    process: asyncio.subprocess.Process
    init: int
    environment: dict[str, str]


@dataclass(slots=True)
class FakePod:
    """A pod, what runs of it, and its volumes."""

    manifest: dict[str, Any]
    folder: Path
    running: Running | None = None
    life: asyncio.Task[None] | None = None
    connections: list[web.WebSocketResponse] = field(default_factory=list)


class FakeCluster:
    """Start it, and `write_config` for who shall find it."""

    def __init__(self) -> None:
        self.pods: dict[str, FakePod] = {}
        self.namespaces = {"ergon-sandboxes"}
        self.denied: set[tuple[str, str]] = set()  # (verb, resource)
        self.quota: int | None = None
        self.stuck: dict[str, Any] | None = None  # the status that new pods get and keep
        self.num_busy = 0  # answers of 503 that come next
        self.created: list[dict[str, Any]] = []
        self._version = 0
        self._events: list[tuple[int, str, dict[str, Any]]] = []
        self._changed = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def start(self) -> None:
        """Listen on a port of its own."""
        app = web.Application(client_max_size=4 << 20)
        base = "/api/v1/namespaces/{namespace}/pods"
        app.router.add_post(base, self._create)
        app.router.add_get(base, self._list)
        app.router.add_delete(base + "/{name}", self._delete)
        app.router.add_get(base + "/{name}/exec", self._exec)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def stop(self) -> None:
        """End all pods and stop listening."""
        for name in list(self.pods):
            await self.remove(name)
        if self._runner is not None:
            await self._runner.cleanup()

    def write_config(self, path: Path) -> Path:
        """A kubeconfig file."""
        cluster = {"name": "fake", "cluster": {"server": self.url}}
        user = {"name": "tests", "user": {"token": TOKEN}}
        context = {"name": "fake", "context": {"cluster": "fake", "user": "tests"}}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "fake"}
        path.write_text(json.dumps({**config, "clusters": [cluster], "users": [user], "contexts": [context]}))
        return path

    # --- the API

    def _refused(self, request: web.Request, verb: str, resource: str = "pods") -> web.Response | None:
        namespace = request.match_info["namespace"]
        if request.headers.get("Authorization", "").lower() != f"bearer {TOKEN}":
            return said(401, "Unauthorized")
        if self.num_busy:
            self.num_busy -= 1
            return said(503, "the server is busy")
        if (verb, resource) in self.denied:
            what = f'cannot {verb} resource "{resource}" in API group "" in the namespace "{namespace}"'
            return said(403, f'{resource} is forbidden: User "tests" {what}')
        if namespace not in self.namespaces and verb == "create":
            return said(404, f'namespaces "{namespace}" not found')
        return None

    async def _create(self, request: web.Request) -> web.Response:
        if refused := self._refused(request, "create"):
            return refused
        pod = await request.json()
        name = pod["metadata"]["name"]
        self.created.append(json.loads(json.dumps(pod)))
        if self.quota is not None and len(self.pods) >= self.quota:
            return said(403, f'pods "{name}" is forbidden: exceeded quota: sandboxes, requested: pods=1')
        if found := violations(pod):
            return said(403, f'pods "{name}" is forbidden: violates PodSecurity "restricted:latest": {found}')
        folder = Path(tempfile.mkdtemp(prefix="fake-pod-", dir="/var/tmp"))
        folder.chmod(0o777)
        made = self.pods[name] = FakePod(pod, folder)
        pod["status"] = {"phase": "Pending"} if self.stuck is None else self.stuck
        self._tell("ADDED", pod)
        if self.stuck is None:
            made.life = asyncio.create_task(self._live(made))
        return web.json_response(pod, status=201)

    async def _list(self, request: web.Request) -> web.StreamResponse:
        watches = request.query.get("watch") == "true"
        if refused := self._refused(request, "watch" if watches else "list"):
            return refused
        wanted = dict(pair.split("=") for pair in request.query["labelSelector"].split(","))
        if not watches:
            items = [each.manifest for each in self.pods.values() if carries(each.manifest, wanted)]
            return web.json_response({"items": items, "metadata": {"resourceVersion": str(self._version)}})
        answer = web.StreamResponse()
        await answer.prepare(request)
        seen = int(request.query["resourceVersion"])
        while True:
            changed = self._changed
            fresh = [event for event in self._events if event[0] > seen]
            for version, kind, pod in fresh:
                seen = version
                if carries(pod, wanted):
                    await answer.write(json.dumps({"type": kind, "object": pod}).encode() + b"\n")
            if not fresh:
                await changed.wait()

    async def _delete(self, request: web.Request) -> web.Response:
        if refused := self._refused(request, "delete"):
            return refused
        name = request.match_info["name"]
        if name not in self.pods:
            return said(404, f'pods "{name}" not found')
        await self.remove(name)
        return web.json_response({"kind": "Status", "status": "Success"})

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        refused = self._refused(request, "get", "pods/exec")
        pod = self.pods.get(request.match_info["name"])
        if request.headers.get("Accept") != "*/*":
            return said(406, "only the following media types are accepted: */*")  # as the real one does
        if refused is not None or pod is None or pod.running is None:
            return refused or said(404, "container not found")
        stream = web.WebSocketResponse(protocols=("v4.channel.k8s.io",), max_msg_size=1 << 20)
        await stream.prepare(request)
        pod.connections.append(stream)
        process = await asyncio.create_subprocess_exec(
            *(*identity(), SYSTEM_PYTHON, "-I", "-S", "-c", ENTER, str(pod.running.init)),
            *request.query.getall("command"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=pod.running.environment,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        outputs = [
            asyncio.create_task(send(stream, channel, out))
            for channel, out in ((1, process.stdout), (2, process.stderr))
        ]
        ending = asyncio.create_task(self._tell_end(stream, process, outputs))
        try:
            async for message in stream:
                if message.type is WSMsgType.BINARY and message.data[:1] == b"\0":
                    with contextlib.suppress(ConnectionError):
                        process.stdin.write(message.data[1:])
                        await process.stdin.drain()
        finally:
            pod.connections.remove(stream)
            process.stdin.close()  # all that the kubelet does: the process goes on if it wants to
            await ending
        return stream

    async def _tell_end(
        self, stream: web.WebSocketResponse, process: asyncio.subprocess.Process, outputs: list[asyncio.Task[None]]
    ) -> None:
        code = await process.wait()
        await asyncio.gather(*outputs)
        status: dict[str, Any] = {"metadata": {}, "status": "Success"}
        if code:
            cause = {"reason": "ExitCode", "message": str(code)}
            status = {"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": [cause]}}
        if not stream.closed:
            with contextlib.suppress(ConnectionError):
                await stream.send_bytes(b"\3" + json.dumps(status).encode())
                await stream.close()

    # --- the node

    async def _live(self, pod: FakePod) -> None:
        """A pod's life, as the kubelet leads it."""
        spec = pod.manifest["spec"]
        for container in spec["initContainers"]:
            running = await self._run(pod, container)
            if code := await running.process.wait():
                self._phase(pod, "Failed", {"terminated": {"reason": "Error", "exitCode": code}})
                return
        pod.running = await self._run(pod, spec["containers"][0])
        self._phase(pod, "Running", {"running": {}})
        try:
            async with asyncio.timeout(spec["activeDeadlineSeconds"]):
                code = await pod.running.process.wait()
        except TimeoutError:
            pod.manifest["status"] = {"phase": "Failed", "reason": "DeadlineExceeded", "message": "active too long"}
            self._tell("MODIFIED", pod.manifest)
            await end(pod.running)
            return
        ended = {"terminated": {"reason": "Error" if code else "Completed", "exitCode": code}}
        self._phase(pod, "Failed" if code else "Succeeded", ended)

    async def _run(self, pod: FakePod, container: Mapping[str, Any]) -> Running:
        """Start a container's command."""
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod.manifest["spec"]["volumes"]}
        told, telling = os.pipe()
        python, python_end = os.pipe()
        args = [bubblewrap.find_bubblewrap(), "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
        args += ["--as-pid-1", "--cap-drop", "ALL", "--hostname", "sandbox", "--uid", "1000", "--gid", "1000"]
        args += ["--info-fd", str(telling), *bubblewrap.system_mounts(), "--proc", "/proc", "--dev", "/dev"]
        args += ["--tmpfs", "/usr/libexec", "--perms", "0755", "--dir", str(Path(PYTHON).parent)]
        args += ["--perms", "0111", "--file", str(python), PYTHON, "--remount-ro", "/usr/libexec"]
        for mount in container["volumeMounts"]:
            args += mounted(pod.folder, mount, volumes[mount["name"]])
        args += ["--remount-ro", "/", "--chdir", container.get("workingDir", "/"), "--", *container["command"]]
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
        environment |= {each["name"]: each["value"] for each in container["env"]}
        process = await asyncio.create_subprocess_exec(
            *identity(), *args, env=environment, pass_fds=(telling, python), cwd="/", stdin=subprocess.DEVNULL
        )
        os.close(telling)
        os.close(python)

        def feed() -> int:
            with open(python_end, "wb") as file:  # noqa: PTH123  a descriptor
                file.write(SYSTEM_PYTHON.read_bytes())
            with open(told) as file:  # noqa: PTH123  a descriptor
                init = int(json.load(file)["child-pid"])
            while command_of(init).startswith(b"bwrap\0") or command_of(init).startswith(args[0].encode()):
                time.sleep(0.002)  # until bubblewrap has made all and become the container's command
            return init

        return Running(process, await asyncio.to_thread(feed), environment)

    async def remove(self, name: str) -> None:
        """Kill a pod and forget it."""
        pod = self.pods.pop(name)
        if pod.life is not None:
            pod.life.cancel()
            await asyncio.gather(pod.life, return_exceptions=True)
        if pod.running is not None:
            await end(pod.running)
        shutil.rmtree(pod.folder)
        self._tell("DELETED", pod.manifest)

    def cut(self) -> None:
        """Break all exec connections, as a node or a load balancer might."""
        for pod in self.pods.values():
            for stream in pod.connections:
                transport = stream._req.transport if stream._req is not None else None
                if transport is not None:
                    transport.abort()

    def _phase(self, pod: FakePod, phase: str, state: dict[str, Any]) -> None:
        container = {"name": "sandbox", "state": state, "ready": phase == "Running"}
        pod.manifest["status"] = {"phase": phase, "containerStatuses": [container]}
        self._tell("MODIFIED", pod.manifest)

    def _tell(self, kind: str, pod: dict[str, Any]) -> None:
        self._version += 1
        self._events.append((self._version, kind, json.loads(json.dumps(pod))))
        self._changed.set()
        self._changed = asyncio.Event()


async def send(stream: web.WebSocketResponse, channel: int, output: asyncio.StreamReader) -> None:
    """Pass a process's output on."""
    while data := await output.read(32 << 10):
        if not stream.closed:
            with contextlib.suppress(ConnectionError):
                await stream.send_bytes(bytes((channel,)) + data)


async def end(running: Running) -> None:
    """Kill a container."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(running.init, signal.SIGKILL)
    await running.process.wait()


def command_of(pid: int) -> bytes:
    """A process's command line; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def mounted(folder: Path, mount: Mapping[str, Any], volume: Mapping[str, Any]) -> Iterator[str]:
    """bubblewrap's arguments for a mount of a volume; `given` is shared by containers, the others are one's own."""
    if mount["name"] == "given":
        source = folder / mount["name"] / mount.get("subPath", "")
        source.mkdir(parents=True, exist_ok=True)
        for each in (folder / mount["name"], source):
            each.chmod(0o777)
        yield from ("--ro-bind" if mount.get("readOnly") else "--bind", str(source), mount["mountPath"])
    else:
        yield from ("--size", volume["sizeLimit"], "--perms", "0777", "--tmpfs", mount["mountPath"])


def carries(pod: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    """Whether a pod has these labels."""
    labels = pod["metadata"]["labels"]
    return all(labels.get(key) == value for key, value in wanted.items())


def said(status: int, message: str) -> web.Response:
    """A Status object as an answer."""
    body = {"kind": "Status", "status": "Failure", "message": message, "code": status}
    return web.json_response(body, status=status)


@contextlib.asynccontextmanager
async def cluster_of_pods(**settings: Any) -> AsyncIterator[FakeCluster]:
    """A cluster that this process's pods are made in."""
    made, before, config = FakeCluster(), pod_settings(), os.environ.get("KUBECONFIG")
    await made.start()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KUBECONFIG"] = str(made.write_config(Path(folder) / "config"))
        configure_pods(PodSettings(**settings))
        try:
            yield made
        finally:
            configure_pods(before)
            os.environ.pop("KUBECONFIG")
            if config is not None:
                os.environ["KUBECONFIG"] = config
            await made.stop()
