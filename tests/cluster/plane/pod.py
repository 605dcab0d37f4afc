"""The life of one pod on a played node: its volumes, its processes, its readiness, its end. A thread for each pod.

As a kubelet does it: init containers in turn, the container started again with a growing pause, readiness by the HTTP
probe, SIGTERM on deletion or eviction, SIGKILL after the grace period, and the pod is gone when its process is.
Liveness and startup probes are not played. One container a pod.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Protocol

from kubernetes.client.rest import ApiException

from tests.cluster.plane.box import boxed, command_of, environment, materialise
from tests.cluster.plane.network import Object, container_port, pod_address

logger = logging.getLogger(__name__)

LOOK_S = 0.25
FIRST_PAUSE_S, MOST_PAUSE_S = 1.0, 10.0
NOT_FOUND, CONFLICT = 404, 409


class Host(Protocol):
    """What a pod needs of the node that it is on."""

    core: Any  # kubernetes.client.CoreV1Api
    apiserver_port: int

    def programs(self, words: str) -> str:
        """A command, with simulations in the place of programs."""

    def has_image(self, image: str) -> bool:
        """Whether it can be pulled."""

    def hosts(self, namespace: str) -> Path:
        """The names that are known."""

    def read(self, kind: str, namespace: str, name: str) -> Object:
        """An object; LookupError where there is none."""


class Pod(threading.Thread):
    """One pod. `update` tells what the API says of it now."""

    def __init__(self, host: Host, pod: Object, directory: Path) -> None:
        meta = pod["metadata"]
        super().__init__(name=f"pod-{meta['name']}", daemon=True)
        self.namespace, self.pod_name, self.uid = meta["namespace"], meta["name"], meta["uid"]
        self.directory = directory / f"{self.namespace}_{self.pod_name}_{self.uid[:8]}"
        self.directory.mkdir(parents=True)
        self.killed = False  # its process did not end within the grace period
        self.done = threading.Event()  # no process of it runs, or will
        self._host, self._pod = host, pod
        self._ending = threading.Event()
        self._grace_s = 0.0
        self._restarts = 0
        self._reported: Object = {}
        self._started_at = _now()
        (self._container,) = pod["spec"]["containers"]
        self.update(pod)

    @property
    def log(self) -> Path:
        """What its container has said, over all restarts."""
        return self.directory / f"{self._container['name']}.log"

    def update(self, pod: Object | None) -> None:
        """Its newest state; None: it is gone from the API, so its process ends at once."""
        if pod is None:
            self._grace_s = 0.0
            self._ending.set()
        elif "deletionTimestamp" in pod["metadata"]:
            self._grace_s = float(pod["metadata"].get("deletionGracePeriodSeconds", 0))
            self._ending.set()

    def run(self) -> None:
        try:
            self._live()
            self.done.set()
            self._ending.wait()
            with contextlib.suppress(_GoneError):
                self._remove()
        except _GoneError:
            logger.info("pod is gone pod=%s", self.pod_name)
        except Exception:
            logger.exception("pod died of a fault of the harness pod=%s", self.pod_name)
            raise
        finally:
            self.done.set()

    def _live(self) -> None:
        for container in [*self._pod["spec"].get("initContainers", []), self._container]:
            if not self._host.has_image(container["image"]):
                self._report("Pending", self._waiting("ImagePullBackOff", f"no image {container['image']}"))
                return
        volumes = self._volumes()
        if volumes is None:
            return
        for container in self._pod["spec"].get("initContainers", []):
            if not self._until_done(container, volumes):
                return
        policy = self._pod["spec"].get("restartPolicy", "Always")
        while not self._ending.is_set():
            code = self._run_once(self._container, volumes)
            if self._ending.is_set():
                return
            if policy == "Never" or (policy == "OnFailure" and code == 0):
                ended = {"exitCode": code, "reason": "Completed" if code == 0 else "Error", "finishedAt": _now()}
                self._report("Succeeded" if code == 0 else "Failed", self._state({"terminated": ended}, ready=False))
                return
            self._restarts += 1
            self._report("Running", self._waiting("CrashLoopBackOff", f"ended with {code}"))
            self._ending.wait(min(MOST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._restarts - 1)))

    def _volumes(self) -> dict[str, Path] | None:
        self._report("Pending", self._waiting("ContainerCreating", ""))
        while not self._ending.is_set():
            try:
                return materialise(self._pod, self.directory / "volumes", self._host.read)
            except LookupError as error:
                logger.info("pod waits pod=%s reason=%s", self.pod_name, error)
                self._ending.wait(0.5)
        return None

    def _until_done(self, container: Object, volumes: dict[str, Path]) -> bool:
        for attempt in range(1000):
            code = self._run_once(container, volumes, is_init=True)
            if self._ending.is_set():
                return False
            if code == 0:
                return True
            self._ending.wait(min(MOST_PAUSE_S, FIRST_PAUSE_S * 2**attempt))
        return False

    def _run_once(self, container: Object, volumes: dict[str, Path], *, is_init: bool = False) -> int:
        """Run the container's process to its end; its exit code."""
        process, pid = self._spawn(container, volumes)
        state = self._waiting("PodInitializing", "") if is_init else self._state({"running": {"startedAt": _now()}})
        try:
            if not is_init and "readinessProbe" not in container:
                state = self._state({"running": {"startedAt": _now()}}, ready=True)
            self._report("Pending" if is_init else "Running", state)
            looked_at = 0.0
            while process.poll() is None:
                if self._ending.wait(LOOK_S):
                    self._terminate(process, pid)
                    break
                probe = None if is_init else container.get("readinessProbe")
                if probe and time.monotonic() - looked_at >= probe.get("periodSeconds", 10):
                    looked_at = time.monotonic()
                    ready = self._answers(probe["httpGet"], probe.get("timeoutSeconds", 1))
                    self._report("Running", self._state({"running": {"startedAt": _now()}}, ready=ready))
        finally:
            if process.poll() is None:
                process.kill()  # bubblewrap; the process dies with it
            process.wait()
        return process.returncode

    def _spawn(self, container: Object, volumes: dict[str, Path]) -> tuple[subprocess.Popen[bytes], int]:
        command = command_of(container, self._host.programs)
        told, tell = os.pipe()
        try:
            words = boxed(self._pod, container, command, volumes, self._host.hosts(self.namespace), tell)
            with (self.directory / f"{container['name']}.log").open("ab") as log:
                process = subprocess.Popen(
                    words,
                    env=environment(self._pod, container, self._host.apiserver_port),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(tell,),
                )
        finally:
            os.close(tell)
        text = b""
        while b"}" not in text and (piece := os.read(told, 4096)):  # the process may hold the other end for its life
            text += piece
        os.close(told)
        pid = int(json.loads(text)["child-pid"]) if text else process.pid  # it could not be started, and says so
        return process, pid

    def _terminate(self, process: subprocess.Popen[bytes], pid: int) -> None:
        """SIGTERM to the process itself, and SIGKILL after the grace period, which the API may shorten meanwhile."""
        begun = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        while process.poll() is None:
            if time.monotonic() - begun > self._grace_s:
                self.killed = True
                logger.warning("pod killed after its grace period pod=%s seconds=%g", self.pod_name, self._grace_s)
                process.kill()
                process.wait()
            time.sleep(0.05)

    def _answers(self, probe: Object, timeout_s: float) -> bool:
        port = container_port(self._pod, probe["port"])
        url = f"http://{pod_address(self.namespace, self.pod_name)}:{port}{probe['path']}"
        try:
            with urllib.request.urlopen(url, timeout=max(timeout_s, 2.0)) as reply:
                return 200 <= reply.status < 400
        except (urllib.error.URLError, OSError):
            return False

    def _waiting(self, reason: str, message: str) -> Object:
        return self._state({"waiting": {"reason": reason, "message": message}})

    def _state(self, state: Object, *, ready: bool = False) -> Object:
        return {
            "name": self._container["name"],
            "image": self._container["image"],
            "imageID": "",
            "ready": ready,
            "started": "running" in state,
            "restartCount": self._restarts,
            "state": state,
        }

    def _report(self, phase: str, container: Object) -> None:
        """Tell the API, where it is news. Raises _GoneError where it knows the pod no more."""
        ready = "True" if container["ready"] else "False"
        news = {"phase": phase, "ready": ready, "restarts": self._restarts, "state": _kind(container["state"])}
        if news == self._reported:
            return
        at = _now()
        conditions = [
            {"type": kind, "status": status, "lastTransitionTime": at}
            for kind, status in (("Initialized", "True"), ("Ready", ready), ("ContainersReady", ready))
        ]
        status = {
            "phase": phase,
            "conditions": conditions,
            "containerStatuses": [container],
            "startTime": self._started_at,
            "hostIP": "127.0.0.1",
            "podIP": pod_address(self.namespace, self.pod_name),
        }
        try:
            self._host.core.patch_namespaced_pod_status(self.pod_name, self.namespace, {"status": status})
        except ApiException as error:
            if error.status in (NOT_FOUND, CONFLICT):
                raise _GoneError from error
            raise
        self._reported = news

    def _remove(self) -> None:
        """The process has ended, and so has the pod."""
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}}
        try:
            self._host.core.delete_namespaced_pod(self.pod_name, self.namespace, body=options)
        except ApiException as error:
            if error.status not in (NOT_FOUND, CONFLICT):
                raise


class _GoneError(Exception):
    """The API knows the pod no more."""


def _kind(state: Object) -> str:
    (kind,) = state
    return f"{kind} {state[kind].get('reason', '')}"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
