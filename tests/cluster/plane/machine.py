"""A real node: this machine's kubelet, containerd and runc, for what only containers can show.

    with Machine(plane, directory, programs) as machine:
        machine.load(archive)          # an image, as an OCI or Docker archive
        # pods with machine.placement run here

Everything of it lives in a mount and a PID namespace of its own, so it ends as one, and an address on the loopback
interface. Raises UnavailableError, with what is lacking, where the machine does not allow it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any, Final

import yaml
from kubernetes import client
from kubernetes.client.rest import ApiException

from tests.cluster.plane.control import ControlPlane
from tests.ports import free_ports

ADDRESS: Final = "10.250.7.1"  # no loopback address, which a kubelet refuses, on the loopback interface
PODS: Final = "10.250.8.0/24"
CNI: Final = Path("/usr/lib/cni")
NAME: Final = "machine"
TAINT: Final = "ergon.dev/machine"
PAUSE: Final = "ergon.dev/pause:1"
READY_S: Final = 120.0
_OUTSIDE: Final = ("/var/lib/kubelet", "/var/lib/cni")
_CGROUPS: Final = Path("/sys/fs/cgroup")
_OF_A_CONTAINER: Final = re.compile(r"[0-9a-f]{64}|k8s\.io")
_PAUSE_C: Final = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"


class UnavailableError(Exception):
    """This machine cannot be a node; the message says why."""


class Machine:
    """The node; a context manager. programs: the directory that build.sh makes, which has kubelet."""

    placement: Final[dict[str, Any]] = {
        "nodeSelector": {"kubernetes.io/hostname": NAME},
        "tolerations": [{"key": TAINT, "operator": "Exists"}],
    }

    def __init__(self, plane: ControlPlane, directory: Path, programs: Path) -> None:
        self._plane, self._directory, self._programs = plane, directory, programs
        self._socket = directory / "containerd.sock"
        self._core = client.CoreV1Api(plane.api())
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Machine:
        if lacking := problem(self._programs):
            raise UnavailableError(lacking)
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._stack:
            added = subprocess.run(
                ["ip", "address", "add", f"{ADDRESS}/32", "dev", "lo"], capture_output=True, text=True, check=False
            )
            if added.returncode != 0:
                raise UnavailableError(f"{ADDRESS} cannot be had, another node may have it: {added.stderr.strip()}")
            self._stack.callback(subprocess.run, ["ip", "address", "del", f"{ADDRESS}/32", "dev", "lo"], check=True)
            self._start()
            self._wait_ready()
            self.load(make_pause(self._directory / "pause"))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def load(self, archive: Path) -> None:
        """Import an image."""
        words = ["ctr", "--address", str(self._socket), "--namespace", "k8s.io", "images", "import"]
        words += ["--snapshotter", "native", str(archive)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UnavailableError(f"containerd does not take the image {archive.name}: {done.stderr}")

    def log(self, program: str = "kubelet") -> str:
        """What kubelet or containerd has said."""
        return (self._directory / f"{program}.log").read_text(encoding="utf-8", errors="replace")

    def _start(self) -> None:
        directory = self._directory
        config = self._write_kubelet()
        kubeconfig = self._plane.kubeconfig_of(f"system:node:{NAME}", "system:nodes")
        self._write_containerd()
        kubelet = [
            str(self._programs / "kubelet"),
            f"--config={config}",
            f"--kubeconfig={kubeconfig}",
            f"--root-dir={directory / 'kubelet'}",
            f"--hostname-override={NAME}",
            f"--node-ip={ADDRESS}",
            "--container-runtime=remote",
            f"--container-runtime-endpoint=unix://{self._socket}",
            f"--pod-infra-container-image={PAUSE}",
            f"--register-with-taints={TAINT}=real:NoSchedule",
            f"--cert-dir={directory / 'certificates'}",
        ]
        # Of what both write outside their directories, nothing stays. kubelet is PID 1 of the namespace: when it ends,
        # so does everything that runs there.
        script = f"""set -e
mount --make-rshared /
mkdir -p {" ".join(_OUTSIDE)}
for each in /run /var/log {" ".join(_OUTSIDE)}; do mount -t tmpfs tmpfs $each; done
containerd --config {directory}/containerd.toml > {directory}/containerd.log 2>&1 &
for _ in $(seq 300); do [ -S {self._socket} ] && break; sleep 0.1; done
exec {" ".join(kubelet)} > {directory}/kubelet.log 2>&1
"""
        words = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = subprocess.Popen([*words, "sh", "-c", script], stdin=subprocess.DEVNULL, start_new_session=True)
        self._stack.callback(_remove_what_is_left)
        self._stack.callback(_end, process)

    def _write_kubelet(self) -> Path:
        certificate = self._plane.issue("machine", NAME, (ADDRESS,))
        (port,) = free_ports(1)
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": ADDRESS,
            "port": port,
            "healthzPort": 0,
            "tlsCertFile": str(certificate),
            "tlsPrivateKeyFile": str(certificate.with_suffix(".key")),
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": False},
                "x509": {"clientCAFile": str(self._plane.pki / "ca.crt")},
            },
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "cgroupsPerQOS": False,
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "evictionHard": {"memory.available": "1Mi"},
            "imageGCHighThresholdPercent": 100,
            "volumePluginDir": str(self._directory / "plugins"),
            "nodeStatusUpdateFrequency": "5s",
            "resolvConf": "/etc/resolv.conf",
        }
        path = self._directory / "kubelet.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def _write_containerd(self) -> None:
        directory = self._directory
        networks = directory / "cni"
        networks.mkdir()
        network = {
            "cniVersion": "0.3.1",
            "name": "pods",
            "plugins": [
                {"type": "ptp", "ipam": {"type": "host-local", "subnet": PODS, "dataDir": f"{directory}/ipam"}}
            ],
        }
        (networks / "pods.conflist").write_text(json.dumps(network))
        (directory / "containerd.toml").write_text(
            f"""version = 2
root = "{directory}/containerd"
state = "{directory}/state"
[grpc]
  address = "{self._socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI}"
    conf_dir = "{networks}"
"""
        )

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(ApiException):  # it has not registered yet
                conditions = self._core.read_node(NAME).status.conditions or []
                if any(each.type == "Ready" and each.status == "True" for each in conditions):
                    return
            if time.monotonic() > deadline:
                logs = [self._directory / f"{name}.log" for name in ("containerd", "kubelet")]
                ends = "\n".join("\n".join(log.read_text().splitlines()[-8:]) for log in logs if log.exists())
                raise UnavailableError(f"the node was not ready after {READY_S:g} s:\n{ends}")
            time.sleep(0.5)


def problem(programs: Path) -> str:
    """What this machine lacks to be a node; empty where nothing does."""
    if os.geteuid() != 0:
        return "containers of a node need root"
    missing = [name for name in ("containerd", "ctr", "runc", "ip", "gcc", "unshare") if shutil.which(name) is None]
    missing += [] if (programs / "kubelet").exists() else ["kubelet"]
    missing += [] if (CNI / "ptp").exists() else [f"{CNI}/ptp"]
    return f"{', '.join(missing)} not installed; `make test-cluster` does it as root" if missing else ""


def make_pause(directory: Path) -> Path:
    """The image of the container that holds a pod's namespaces: one static program. As a Docker archive."""
    directory.mkdir()
    source, program = directory / "pause.c", directory / "pause"
    source.write_text(_PAUSE_C)
    subprocess.run(["gcc", "-static", "-Os", "-o", program, source], check=True)
    layer = directory / "layer.tar"
    with tarfile.open(layer, "w") as tar:
        tar.add(program, "pause")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/pause"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{_sha256(layer)}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [PAUSE], "Layers": ["layer.tar"]}]
    archive = directory / "pause.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(layer, "layer.tar")
        for name, told in (("config.json", config), ("manifest.json", manifest)):
            body = json.dumps(told).encode()
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return archive


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _end(process: subprocess.Popen[bytes]) -> None:
    """The namespace's PID 1 is the child of unshare, which takes it along."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def _remove_what_is_left() -> None:
    """Empty directories: mount points, and the groups of containers that have ended."""
    groups = [each for each in _CGROUPS.glob("*/*") if _OF_A_CONTAINER.fullmatch(each.name)]
    found = [each for group in groups for each in [*group.rglob("*"), group] if each.is_dir()]
    for path in [*sorted(found, key=lambda each: -len(each.parts)), *map(Path, _OUTSIDE)]:
        with contextlib.suppress(OSError):  # somebody else's, who is still in it
            path.rmdir()
