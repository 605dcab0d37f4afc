"""What a sandbox's pod is: its manifest, and the settings behind it. Asks nothing of a cluster.

A pod satisfies PodSecurity `restricted`: no token, no capability, a user that is not root and that no other pod has
(so that the kernel's limit of a user's processes is the sandbox's own), a read-only root, and room to write that is
memory of a fixed size. It ends by itself after `life_s`, and after `orphan_s` without an actor.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import re
import secrets
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from envs.sandbox.bubblewrap import WORK_DIR, check_path
from envs.sandbox.limits import Limits

PYTHON: Final = "/usr/libexec/ergon/python"
"""Of the image: a Python that everybody may run and nobody may read (deploy/images/sandbox.Dockerfile)."""
CONTAINER: Final = "sandbox"
GIVEN: Final = "/given"  # where the first container finds the volume of immutable files
MAX_GIVEN_BYTES: Final = 512 << 10  # packed; a manifest has 1.5 MiB at most
CHUNK_BYTES: Final = 96 << 10  # the kernel takes 128 KiB in one variable
FIRST_USER, NUM_USERS = 1_000_000_000, 1_000_000_000
TAKEN: Final = (
    "bin",
    "boot",
    "dev",
    "etc",
    "lib",
    "lib32",
    "lib64",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "usr",
    "var",
)

PROCESS_LABEL: Final = "ergon.dev/process"
RUN_LABEL: Final = "ergon.dev/run"
ACTOR_LABEL: Final = "ergon.dev/actor"
COMPONENT: Final = {"app.kubernetes.io/name": "ergon", "app.kubernetes.io/component": "sandbox"}

UNPACK: Final = (
    "import base64, gzip, io, os, tarfile; "
    "data = ''.join(os.environ[f'ERGON_FILES_{i}'] for i in range(int(os.environ['ERGON_FILES']))); "
    f"tarfile.open(fileobj=io.BytesIO(gzip.decompress(base64.b64decode(data)))).extractall({GIVEN!r})"
)
RUN_TEXT: Final = "import os; exec(os.environ[{!r}])"


@dataclass(frozen=True, slots=True)
class PodSettings:
    """What the pods of this process are like.

    runtime_class: "" for the cluster's default. life_s: seconds after which Kubernetes ends a pod, whatever it does.
    orphan_s: seconds without its actor after which a pod ends itself. start_timeout_s: until a new one must be ready.
    run, actor: who makes them; the next process of the same run and actor removes what this one leaves behind, so give
    an actor only to what cannot be there twice. owner: name and uid of this process's own pod, where that is in the
    same namespace: Kubernetes then removes them with it.
    """

    namespace: str = "ergon-sandboxes"
    image: str = "ergon-sandbox:0.1.0"
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    runtime_class: str = ""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, str | int], ...] = ()
    cpu: float = 1.0
    memory_mb: int = 1024
    life_s: int = 3600
    orphan_s: float = 300.0
    start_timeout_s: float = 120.0
    run: str = ""
    actor: str = ""
    owner: tuple[str, str] | None = None
    process: str = field(default_factory=lambda: secrets.token_hex(8))


def label(text: str) -> str:
    """A text as the value of a label: at most 63 letters of those allowed; a changed one has a digest of the whole."""
    clean = re.sub(r"[^A-Za-z0-9._-]", "-", text).strip("._-")
    if clean == text and len(text) <= 63:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{clean[:54].rstrip('._-')}-{digest}" if clean else digest


def selector(labels: Mapping[str, str]) -> str:
    """As Kubernetes' API takes it."""
    return ",".join(f"{key}={value}" for key, value in {**COMPONENT, **labels}.items())


def divide(files: Mapping[str, bytes]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Files by absolute path: those that commands may change (in /workspace and /tmp), and the immutable ones.

    Raises ValueError for a path that is none, or where the image has its own files.
    """
    changeable, given = {}, {}
    for path, data in files.items():
        absolute = check_path(path)
        top = PurePosixPath(absolute).parts[1]
        if top in ("workspace", "tmp"):
            changeable[absolute] = data
        elif top in TAKEN or PurePosixPath(absolute).parent == PurePosixPath("/"):
            raise ValueError(f"a pod's image has its own files at {absolute}: put the file below /opt, for example")
        else:
            given[absolute] = data
    return changeable, given


def _outermost(paths: Iterable[str]) -> list[str]:
    """The directories of these files, without those that lie in another of them."""
    folders = {PurePosixPath(path).parent for path in paths}
    return sorted(str(folder) for folder in folders if not folders & set(folder.parents))


def _packed(given: Mapping[str, bytes]) -> list[dict[str, str]]:
    """Variables of the first container, which unpacks them. Raises ValueError where there is too much."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path, data in sorted(given.items()):
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    text = base64.b64encode(gzip.compress(stream.getvalue(), mtime=0)).decode()
    if len(text) > MAX_GIVEN_BYTES:
        raise ValueError(
            f"the immutable files of a sandbox come to {len(text)} bytes, packed; a pod takes {MAX_GIVEN_BYTES}"
        )
    chunks = [text[start : start + CHUNK_BYTES] for start in range(0, len(text), CHUNK_BYTES)]
    variables = [{"name": f"ERGON_FILES_{number}", "value": chunk} for number, chunk in enumerate(chunks)]
    return [{"name": "ERGON_FILES", "value": str(len(chunks))}, *variables]


def bounds(limits: Limits) -> str:
    """The `ulimit` command for everything that is started in the pod.

    Beside the sandbox's processes there are PID 1 and the session, and one that a command begins with.
    """
    given = {
        "u": limits.processes + 3,
        "v": max(1, limits.memory_bytes >> 10),
        "f": max(1, limits.file_bytes >> 10),
        "n": limits.open_files,
        "t": limits.cpu_s,
        "c": 0,
    }
    return "ulimit " + " ".join(f"-{flag} {value}" for flag, value in given.items())


def _source(name: str) -> str:
    return (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")


def session_command() -> list[str]:
    """What an exec connection runs in the pod: the agent, from the variable that has its text."""
    return [PYTHON, "-I", "-S", "-c", RUN_TEXT.format("ERGON_AGENT")]


def memory_bytes(settings: PodSettings, limits: Limits) -> int:
    """The pod's memory: what its limits come to, or the settings' bound where that is less."""
    most = limits.processes * limits.memory_bytes + limits.work_bytes + limits.tmp_bytes + (64 << 20)
    return min(settings.memory_mb << 20, most)


def make_manifest(settings: PodSettings, limits: Limits, given: Mapping[str, bytes]) -> dict[str, Any]:
    """A pod. given: its immutable files, absolute path -> content. Raises ValueError where these are too many."""
    user = FIRST_USER + secrets.randbelow(NUM_USERS)
    memory = memory_bytes(settings, limits)
    resources = {
        "requests": {"cpu": f"{min(100, int(settings.cpu * 1000))}m", "memory": str(min(128 << 20, memory))},
        "limits": {"cpu": f"{int(settings.cpu * 1000)}m", "memory": str(memory), "ephemeral-storage": "64Mi"},
    }
    closed = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
    }
    volumes = [_memory_volume("workspace", limits.work_bytes), _memory_volume("tmp", limits.tmp_bytes)]
    mounts: list[dict[str, Any]] = [
        {"name": "workspace", "mountPath": WORK_DIR},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    image = {"image": settings.image, "imagePullPolicy": settings.pull_policy}
    first: list[dict[str, Any]] = []
    if given:
        size = sum((len(data) + 4095) // 4096 * 4096 for data in given.values()) + (1 << 20)
        volumes.append(_memory_volume("given", size))
        mounts += [
            {"name": "given", "mountPath": folder, "subPath": folder.lstrip("/"), "readOnly": True}
            for folder in _outermost(given)
        ]
        first.append(
            {
                "name": "files",
                **image,
                "command": [PYTHON, "-I", "-S", "-c", UNPACK],
                "env": _packed(given),
                "resources": resources,
                "securityContext": closed,
                "volumeMounts": [{"name": "given", "mountPath": GIVEN}],
            }
        )
    container = {
        "name": CONTAINER,
        **image,
        "command": [PYTHON, "-I", "-S", "-c", RUN_TEXT.format("ERGON_KEEPER"), f"{settings.orphan_s:g}"],
        "env": [
            {"name": "ERGON_KEEPER", "value": _source("keeper")},
            {"name": "ERGON_AGENT", "value": _source("agent")},
            {"name": "ERGON_BOUNDS", "value": bounds(limits)},
        ],
        "workingDir": WORK_DIR,
        "resources": resources,
        "securityContext": closed,
        "volumeMounts": mounts,
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": settings.life_s,
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "hostname": "sandbox",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "initContainers": first,
        "containers": [container],
        "volumes": volumes,
    }
    if settings.runtime_class:
        spec["runtimeClassName"] = settings.runtime_class
    if settings.node_selector:
        spec["nodeSelector"] = dict(settings.node_selector)
    if settings.tolerations:
        spec["tolerations"] = [dict(each) for each in settings.tolerations]
    if settings.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.pull_secrets]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": _metadata(settings), "spec": spec}


def _memory_volume(name: str, num_bytes: int) -> dict[str, Any]:
    return {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": str(num_bytes)}}


def _metadata(settings: PodSettings) -> dict[str, Any]:
    made = {RUN_LABEL: label(settings.run), ACTOR_LABEL: label(settings.actor), PROCESS_LABEL: settings.process}
    metadata: dict[str, Any] = {
        "name": f"ergon-sandbox-{secrets.token_hex(8)}",
        "namespace": settings.namespace,
        "labels": {**COMPONENT, **made},
    }
    if settings.owner is not None:
        name, uid = settings.owner
        metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}]
    return metadata
