"""The control plane: etcd, apiserver, controller-manager and scheduler, the real programs, on loopback.

    with ControlPlane(directory, programs) as plane:
        plane.kubeconfig          # of cluster-admin, for helm, kubectl and the Python client
        plane.api()               # a kubernetes.client.ApiClient

Owns the processes, their certificates and their logs, all below `directory`, and ends all that it started. Knows no
node: `nodes.py` plays those. A real kubelet joins with `plane.kubeconfig_of("system:node:NAME", "system:nodes")`.
"""

from __future__ import annotations

import contextlib
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, config

from tests.cluster.plane.certificates import Authority, make_signing_key
from tests.ports import free_ports

HOST = "127.0.0.1"
PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
READY_S = 120.0
SERVICES = "10.96.0.0/16"


class PlaneError(Exception):
    """The control plane did not come up; the message has the end of the log that says why."""


class ControlPlane:
    """A control plane; a context manager. programs: the directory that build.sh makes."""

    def __init__(self, directory: Path, programs: Path) -> None:
        self.directory, self._programs = directory, programs
        self._stack = contextlib.ExitStack()
        self._started: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        client_port, peer_port, self.port = free_ports(3)
        self._etcd = f"http://{HOST}:{client_port}"
        self._etcd_peer = f"http://{HOST}:{peer_port}"
        self.server = f"https://{HOST}:{self.port}"

    def __enter__(self) -> ControlPlane:
        self.pki = self.directory / "pki"
        self._authority = Authority(self.pki)
        hosts = (HOST, "localhost", "kubernetes.default.svc", "10.96.0.1")
        self._authority.issue("apiserver", "kube-apiserver", hosts=hosts)
        # Nodes are played on this machine, and their log servers show this certificate.
        self._authority.issue("kubelet", "kubelet", hosts=(HOST,))
        Authority(self.pki, "front-proxy-ca").issue("front-proxy-client", "front-proxy-client")
        self._signing = make_signing_key(self.pki / "service-accounts.key")
        self.kubeconfig = self.kubeconfig_of("admin", "system:masters")
        with self._stack:
            self._start_etcd()
            self._start_apiserver()
            self._start_controllers()
            self._start_scheduler()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def api(self) -> Any:
        """A client of cluster-admin."""
        return config.new_client_from_config(str(self.kubeconfig))

    def kubeconfig_of(self, user: str, group: str = "") -> Path:
        """A kubeconfig file for a new certificate of this user and group."""
        name = user.replace(":", "-")
        certificate = self._authority.issue(f"client-{name}", user, group)
        path = self.directory / f"{name}.kubeconfig"
        cluster = {"server": self.server, "certificate-authority": str(self.pki / "ca.crt")}
        credentials = {"client-certificate": str(certificate), "client-key": str(certificate.with_suffix(".key"))}
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "plane", "cluster": cluster}],
                    "users": [{"name": user, "user": credentials}],
                    "contexts": [{"name": "plane", "context": {"cluster": "plane", "user": user}}],
                    "current-context": "plane",
                }
            )
        )
        return path

    def issue(self, name: str, common_name: str, hosts: tuple[str, ...]) -> Path:
        """A server's certificate of the cluster's authority: NAME.crt, and NAME.key beside it."""
        return self._authority.issue(name, common_name, hosts=hosts)

    def context(self, user: str = "admin") -> ssl.SSLContext:
        """What a connection to the apiserver is made with, by a user of `kubeconfig_of`."""
        context = ssl.create_default_context(cafile=str(self.pki / "ca.crt"))
        name = f"client-{user.replace(':', '-')}"
        context.load_cert_chain(str(self.pki / f"{name}.crt"), str(self.pki / f"{name}.key"))
        return context

    def log(self, program: str) -> str:
        """What a program has said so far."""
        return (self.directory / f"{program}.log").read_text(encoding="utf-8", errors="replace")

    def _start_etcd(self) -> None:
        program = shutil.which("etcd")
        if program is None:
            raise PlaneError("etcd is not installed; `make test-cluster` installs it")
        self._start(
            [program],
            {
                "data-dir": self.directory / "etcd",
                "listen-client-urls": self._etcd,
                "advertise-client-urls": self._etcd,
                "listen-peer-urls": self._etcd_peer,
                "initial-advertise-peer-urls": self._etcd_peer,
                "initial-cluster": f"default={self._etcd_peer}",
            },
        )
        self._wait("etcd", lambda: _answers(f"{self._etcd}/health", None))

    def _start_apiserver(self) -> None:
        pki = self.pki
        self._start(
            [str(self._programs / "kube-apiserver")],
            {
                "etcd-servers": self._etcd,
                "bind-address": HOST,
                "secure-port": self.port,
                "advertise-address": "192.0.2.1",  # of documentation; loopback is refused, and nobody asks for it
                "endpoint-reconciler-type": "none",
                "service-cluster-ip-range": SERVICES,
                "cert-dir": self.directory / "apiserver",
                "tls-cert-file": pki / "apiserver.crt",
                "tls-private-key-file": pki / "apiserver.key",
                "client-ca-file": pki / "ca.crt",
                "authorization-mode": "Node,RBAC",
                # Its code for maps does not bear the Go that it is built with, as that of custom resources does not.
                "feature-gates": "ServerSideApply=false",
                "service-account-issuer": "https://kubernetes.default.svc",
                "service-account-key-file": self._signing.with_suffix(".pub"),
                "service-account-signing-key-file": self._signing,
                "kubelet-certificate-authority": pki / "ca.crt",
                "kubelet-client-certificate": pki / "client-admin.crt",
                "kubelet-client-key": pki / "client-admin.key",
                "kubelet-preferred-address-types": "InternalIP",
                "requestheader-client-ca-file": pki / "front-proxy-ca.crt",
                "requestheader-allowed-names": "front-proxy-client",
                "requestheader-extra-headers-prefix": "X-Remote-Extra-",
                "requestheader-group-headers": "X-Remote-Group",
                "requestheader-username-headers": "X-Remote-User",
                "proxy-client-cert-file": pki / "front-proxy-client.crt",
                "proxy-client-key-file": pki / "front-proxy-client.key",
            },
        )
        self._wait("kube-apiserver", lambda: _answers(f"{self.server}/readyz", self.context()))

    def _start_controllers(self) -> None:
        self._start(
            [str(self._programs / "kube-controller-manager")],
            {
                "kubeconfig": self.kubeconfig_of("system:kube-controller-manager"),
                "leader-elect": "false",
                "use-service-account-credentials": "true",
                "service-account-private-key-file": self._signing,
                "root-ca-file": self.pki / "ca.crt",
                "port": 0,
                "secure-port": 0,
                # What needs a cloud, or kubelets that mount.
                "controllers": "*,-attachdetach,-persistentvolume-expander,-service,-route,-cloud-node-lifecycle",
                "flex-volume-plugin-dir": self.directory / "plugins",
            },
        )
        core = client.CoreV1Api(self.api())
        self._wait(
            "kube-controller-manager",
            lambda: any(account.secrets for account in core.list_namespaced_service_account("default").items),
        )

    def _start_scheduler(self) -> None:
        kubeconfig = self.kubeconfig_of("system:kube-scheduler")
        options = {"kubeconfig": kubeconfig, "leader-elect": "false", "port": 0, "secure-port": 0}
        self._start([str(self._programs / "kube-scheduler")], options)

    def _start(self, command: list[str], options: dict[str, object]) -> None:
        name = Path(command[0]).name
        log = self.directory / f"{name}.log"
        arguments = [f"--{key}={value}" for key, value in options.items()]
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*command, *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=self.directory
            )
        self._started.append((name, process, log))
        self._stack.callback(_end, process)

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_S
        while not ready():
            for program, process, log in self._started:
                if process.poll() is not None:
                    raise PlaneError(f"{program} ended with {process.returncode}: {_last(log)}")
            if time.monotonic() > deadline:
                raise PlaneError(f"{name} was not ready after {READY_S:g} s: {_last(self.directory / f'{name}.log')}")
            time.sleep(0.2)


def _answers(url: str, context: ssl.SSLContext | None) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5, context=context) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
