"""Nodes of a control plane on which no container runs, but each pod's process does.

    with Nodes(plane, directory, {"node-1": 8, "node-2": 8}) as nodes:  # GPUs of each
        ...

Registers the nodes and keeps them alive, makes volumes for claims, runs a `pod.py::Pod` for every pod that the
scheduler puts on them, serves their Services (`network.py`) and their logs, which the apiserver asks for as it asks a
kubelet. Ends every process that it started.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kubernetes import client, watch
from kubernetes.client.rest import ApiException

from tests.cluster.plane.control import HOST, ControlPlane
from tests.cluster.plane.network import Network, Object
from tests.cluster.plane.pod import NOT_FOUND, Pod

BEAT_S = 5.0
IMAGES = ("ergon-broker", "ergon-actor", "ergon-learner", "ergon-cpu")
TAG = "0.1.0"
_READERS = {
    "ConfigMap": "read_namespaced_config_map",
    "Secret": "read_namespaced_secret",
    "PersistentVolumeClaim": "read_namespaced_persistent_volume_claim",
    "PersistentVolume": "read_persistent_volume",
}


class Nodes:
    """Played nodes; a context manager. gpus: of each node, by name. programs: rewrites the words of a command, which
    are joined by NUL; what it puts in a program's place is what runs."""

    def __init__(
        self,
        plane: ControlPlane,
        directory: Path,
        gpus: Mapping[str, int],
        programs: Callable[[str], str] = lambda words: words,
    ) -> None:
        self.directory, self.gpus, self.programs = directory, gpus, programs
        self.apiserver_port = plane.port
        self.pods: dict[str, Pod] = {}  # by uid; those that have ended stay
        self.core = client.CoreV1Api(plane.api())
        self._plane, self._lock = plane, threading.Lock()
        self._newest: dict[str, Object] = {}  # by uid, those that are there
        self._stop = threading.Event()
        self._network = Network(directory / "network", self._known)
        self._logs = _Logs(self, plane)

    def __enter__(self) -> Nodes:
        self._network.start()
        for name, gpus in self.gpus.items():
            self.core.create_node(_node(name, gpus))
        for work in (self._beat, self._follow_pods, self._follow_services, self._make_volumes):
            threading.Thread(target=self._until_stopped, args=(work,), name=work.__name__, daemon=True).start()
        threading.Thread(target=self._logs.serve_forever, name="kubelet logs", daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        with self._lock:
            pods = list(self.pods.values())
        for pod in pods:
            pod.update(None)
        for pod in pods:
            pod.join()
        self._logs.shutdown()
        self._logs.server_close()
        self._network.close()

    def has_image(self, image: str) -> bool:
        """The project's own of this version are there, from whatever registry."""
        name, _, tag = image.rpartition("/")[2].partition(":")
        return name in IMAGES and tag == TAG

    def hosts(self, namespace: str) -> Path:
        """The names that the pods of a namespace know."""
        return self._network.hosts(namespace)

    def read(self, kind: str, namespace: str, name: str) -> Object:
        """An object of those that volumes are made of. Raises LookupError where there is none."""
        arguments = (name, namespace) if namespace else (name,)
        try:
            reply = getattr(self.core, _READERS[kind])(*arguments, _preload_content=False)
        except ApiException as error:
            if error.status == NOT_FOUND:
                raise LookupError(f"there is no {kind} {name}") from error
            raise
        found: Object = json.loads(reply.data)
        return found

    def claim(self, namespace: str, name: str) -> Path:
        """The directory of a claim's volume."""
        return self.directory / "claims" / namespace / name

    def of(self, namespace: str, pod_name: str) -> Pod:
        """The newest pod of this name, also one that has ended."""
        with self._lock:
            found = [pod for pod in self.pods.values() if (pod.namespace, pod.pod_name) == (namespace, pod_name)]
        return found[-1]

    def _known(self) -> list[Object]:
        with self._lock:
            return list(self._newest.values())

    def _until_stopped(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            if not self._stop.is_set():  # a watch that breaks because the control plane has ended is no fault
                raise

    def _beat(self) -> None:
        while not self._stop.is_set():
            for name in self.gpus:
                self.core.patch_node_status(name, {"status": _node_status(self._logs.port)})
            self._stop.wait(BEAT_S)

    def _follow_pods(self) -> None:
        for kind, pod in self._follow(self.core.list_pod_for_all_namespaces):
            uid = pod["metadata"]["uid"]
            if pod["spec"].get("nodeName") not in self.gpus:
                continue
            with self._lock:
                running = self.pods.get(uid)
                if kind == "DELETED":
                    self._newest.pop(uid, None)
                else:
                    self._newest[uid] = pod
                if running is None and kind != "DELETED":
                    running = self.pods[uid] = Pod(self, pod, self.directory / "pods")
                    running.start()
            if running is not None:
                running.update(None if kind == "DELETED" else pod)

    def _follow_services(self) -> None:
        for kind, service in self._follow(self.core.list_service_for_all_namespaces):
            self._network.update(service, gone=kind == "DELETED")

    def _follow(self, listing: Callable[..., Any]) -> Any:
        """(event, object) for ever; after a break, what is there is told anew, and what has gone meanwhile, too."""
        known: dict[str, Object] = {}
        while not self._stop.is_set():
            reply = json.loads(listing(_preload_content=False).data)
            found = {each["metadata"]["uid"]: each for each in reply["items"]}
            yield from (("DELETED", known[uid]) for uid in known.keys() - found.keys())
            yield from (("ADDED", each) for each in found.values())
            known = found
            version = reply["metadata"]["resourceVersion"]
            with contextlib.suppress(ApiException):  # the version is too old: list again
                for event in watch.Watch().stream(listing, resource_version=version, timeout_seconds=30):
                    thing = event["raw_object"]
                    if event["type"] == "DELETED":
                        known.pop(thing["metadata"]["uid"], None)
                    else:
                        known[thing["metadata"]["uid"]] = thing
                    yield event["type"], thing
                    if self._stop.is_set():
                        return

    def _make_volumes(self) -> None:
        """A volume for every claim that has none."""
        made: set[str] = set()
        while not self._stop.wait(0.5):
            for claim in self.core.list_persistent_volume_claim_for_all_namespaces().items:
                if claim.status.phase == "Bound" or claim.metadata.uid in made:
                    continue
                made.add(claim.metadata.uid)
                meta, spec = claim.metadata, claim.spec
                self.core.create_persistent_volume(
                    {
                        "metadata": {"name": f"volume-{meta.uid}"},
                        "spec": {
                            "capacity": spec.resources.requests,
                            "accessModes": spec.access_modes,
                            "hostPath": {"path": str(self.claim(meta.namespace, meta.name))},
                            "claimRef": {"namespace": meta.namespace, "name": meta.name},
                            "persistentVolumeReclaimPolicy": "Retain",
                        },
                    }
                )


def _node(name: str, gpus: int) -> Object:
    labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "topology.kubernetes.io/zone": name}
    amounts = {"cpu": "64", "memory": "512Gi", "pods": "110", "ephemeral-storage": "1Ti", "nvidia.com/gpu": str(gpus)}
    return {"metadata": {"name": name, "labels": labels}, "status": {"capacity": amounts, "allocatable": amounts}}


def _node_status(log_port: int) -> Object:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now}
    return {
        "conditions": [ready],
        "addresses": [{"type": "InternalIP", "address": HOST}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": log_port}},
        "nodeInfo": dict.fromkeys(
            (
                *("machineID", "systemUUID", "bootID", "kernelVersion", "osImage", "containerRuntimeVersion"),
                *("kubeletVersion", "kubeProxyVersion", "operatingSystem", "architecture"),
            ),
            "played",
        ),
    }


class _Logs(ThreadingHTTPServer):
    """The logs of all nodes' containers, as the apiserver asks a kubelet for them."""

    daemon_threads = True

    def __init__(self, nodes: Nodes, plane: ControlPlane) -> None:
        super().__init__((HOST, 0), _LogHandler)
        self.nodes = nodes
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(plane.pki / "kubelet.crt", plane.pki / "kubelet.key")
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _LogHandler(BaseHTTPRequestHandler):
    server: _Logs
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        words, query = parts.path.strip("/").split("/"), parse_qs(parts.query)
        if len(words) != 4 or words[0] != "containerLogs":
            self.send_error(404)
            return
        try:
            pod = self.server.nodes.of(words[1], words[2])
        except IndexError:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        follow = query.get("follow", ["false"])[0] in ("1", "true")
        with contextlib.suppress(ConnectionError, ssl.SSLError):  # whoever read it has gone
            self._send(pod, int(query.get("tailLines", ["-1"])[0]), follow=follow)
            self.wfile.write(b"0\r\n\r\n")

    def _send(self, pod: Pod, num_lines: int, *, follow: bool) -> None:
        while follow and not pod.log.exists() and not pod.done.is_set():
            time.sleep(0.1)
        if not pod.log.exists():
            return
        with pod.log.open("rb") as log:
            if num_lines >= 0:
                lines = log.read().splitlines(keepends=True)
                self._chunk(b"".join(lines[len(lines) - num_lines :] if num_lines else []))
            while True:
                done = pod.done.is_set()
                if piece := log.read(1 << 16):
                    self._chunk(piece)
                elif not follow or done:
                    return
                else:
                    time.sleep(0.1)

    def _chunk(self, piece: bytes) -> None:
        if piece:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
        """Quiet."""
