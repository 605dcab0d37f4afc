"""The box of a container whose image is this checkout: what its process sees, as a command of bubblewrap.

A read-only root, the pod's volumes where they are mounted, the pod's user, host name and environment, and PID 1, as
the pod says and as a container runtime would have it. The network is the machine's: where a container binds every
address it binds its pod's here. Resources are not limited.
"""

from __future__ import annotations

import base64
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from tests.cluster.plane.network import Object, pod_address
from tests.cluster.rendering import ROOT

BWRAP: Final = shutil.which("bwrap") or "bwrap"
ANYWHERE: Final = "0.0.0.0"
_FIELD: Final = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


def materialise(pod: Object, directory: Path, read: Callable[[str, str, str], Object]) -> dict[str, Path]:
    """The pod's volumes as directories below `directory`, by name; a claim's is its volume's own.

    read: (kind, namespace, name) -> the object; raises LookupError where it is not there yet.
    """
    namespace = pod["metadata"]["namespace"]
    made = {}
    for volume in pod["spec"].get("volumes", []):
        name = volume["name"]
        path = made[name] = directory / name
        if claim := volume.get("persistentVolumeClaim"):
            bound = read("PersistentVolumeClaim", namespace, claim["claimName"])["spec"].get("volumeName")
            if not bound:
                raise LookupError(f"the claim {claim['claimName']} has no volume")
            made[name] = Path(read("PersistentVolume", "", bound)["spec"]["hostPath"]["path"])
            made[name].mkdir(parents=True, exist_ok=True)
            continue
        files: dict[str, bytes] = {}
        if config := volume.get("configMap"):
            data = read("ConfigMap", namespace, config["name"]).get("data") or {}
            files = {key: text.encode() for key, text in data.items()}
        elif secret := volume.get("secret"):
            data = read("Secret", namespace, secret["secretName"]).get("data") or {}
            files = {key: base64.b64decode(text) for key, text in data.items()}
        elif "emptyDir" not in volume:
            raise ValueError(f"volume {name} of pod {pod['metadata']['name']} is of a kind that no box has")
        path.mkdir(parents=True, exist_ok=True)
        for key, content in files.items():
            (path / key).write_bytes(content)
            (path / key).chmod(0o440)
    return made


def environment(pod: Object, container: Object, apiserver_port: int) -> dict[str, str]:
    """What the process has in its environment. Raises ValueError for a source that is not played."""
    meta = pod["metadata"]
    address = pod_address(meta["namespace"], meta["name"])
    python = Path(sys.executable).parent
    told = {
        "PATH": f"{python}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOSTNAME": meta["name"],
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(apiserver_port),
    }
    for each in container.get("env", []):
        value = each.get("value", "")
        if source := each.get("valueFrom"):
            value = _field(pod, source.get("fieldRef", {}).get("fieldPath", ""), address)
        told[each["name"]] = address if value == ANYWHERE else value
    return told


def _field(pod: Object, path: str, address: str) -> str:
    if path == "status.podIP":
        return address
    if path == "metadata.name":
        return str(pod["metadata"]["name"])
    if found := _FIELD.fullmatch(path):
        return str(pod["metadata"].get(found[1], {}).get(found[2], ""))
    raise ValueError(f"the field {path!r} of a pod is not played")


def boxed(
    pod: Object, container: Object, command: list[str], volumes: dict[str, Path], hosts: Path, info_fd: int
) -> list[str]:
    """The command that runs `command` in the box. info_fd: where bubblewrap tells the process's pid."""
    spec = pod["spec"]
    security = spec.get("securityContext", {}) | container.get("securityContext", {})
    user, group = str(security.get("runAsUser", 0)), str(security.get("runAsGroup", 0))
    words = [BWRAP, "--die-with-parent", "--unshare-user", "--uid", user, "--gid", group]
    words += ["--unshare-pid", "--as-pid-1", "--unshare-ipc", "--unshare-uts", "--hostname", pod["metadata"]["name"]]
    words += ["--info-fd", str(info_fd), *_system(), "--proc", "/proc", "--dev", "/dev"]
    words += ["--ro-bind", str(hosts), "/etc/hosts"]
    for mount in sorted(container.get("volumeMounts", []), key=lambda mount: len(mount["mountPath"])):
        source = volumes[mount["name"]] / mount.get("subPath", "")
        words += ["--ro-bind" if mount.get("readOnly") else "--bind", str(source), mount["mountPath"]]
    if security.get("readOnlyRootFilesystem"):
        words += ["--remount-ro", "/"]
    return [*words, "--chdir", "/tmp" if _has(container, "/tmp") else "/", "--", *command]


def _has(container: Object, path: str) -> bool:
    return any(mount["mountPath"] == path for mount in container.get("volumeMounts", []))


def _system() -> Iterator[str]:
    """The image: this machine's programs, this Python and this checkout, none of which can be written."""
    for path in ("/usr", "/etc/ld.so.cache", "/etc/ssl", "/etc/alternatives"):
        yield from ("--ro-bind-try", path, path)
    for path in ("bin", "lib", "lib64", "sbin"):
        yield from ("--symlink", f"usr/{path}", f"/{path}")
    for path in dict.fromkeys((sys.base_prefix, sys.prefix, str(ROOT))):
        yield from ("--ro-bind", path, path)


def command_of(container: Object, programs: Callable[[str], str]) -> list[str]:
    """The words that are run; each is passed through `programs`, which may put a simulation in a program's place."""
    words: list[Any] = [*container.get("command", []), *container.get("args", [])]
    if not words:
        raise ValueError(f"container {container['name']} has no command, and there is no image to name one")
    return programs("\0".join(words)).split("\0")
