"""What PodSecurity `restricted` objects to in a pod, as an API server of today would say it. Pure; speaks to nobody.

The standard of Kubernetes 1.37, with all that `baseline` forbids, for Linux:
kubernetes.io/docs/concepts/security/pod-security-standards. Where that lets a little more through, this does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

VOLUMES: Final = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SECCOMP: Final = {"RuntimeDefault", "Localhost"}
SYSCTLS: Final = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_syncookies",
}
SELINUX: Final = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
APPARMOR: Final = "container.apparmor.security.beta.kubernetes.io/"
_LISTS: Final = ("initContainers", "containers", "ephemeralContainers")
_PROBES: Final = ("livenessProbe", "readinessProbe", "startupProbe")

Object = Mapping[str, Any]


def violations(pod: Object) -> list[str]:
    """One phrase for each rule that the pod breaks, with the container's name; none where it may run.

    pod: a Pod, or a pod's template: `metadata` may lack, `spec` may not.
    """
    spec = pod["spec"]
    of_pod = spec.get("securityContext") or {}
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    found += [f"volume {each['name']} of a restricted type" for each in spec.get("volumes") or () if not _plain(each)]
    found += [f"sysctl {each['name']}" for each in of_pod.get("sysctls") or () if each["name"] not in SYSCTLS]
    annotations = (pod.get("metadata") or {}).get("annotations") or {}
    for key, value in annotations.items():
        if key.startswith(APPARMOR) and not (value in ("", "runtime/default") or value.startswith("localhost/")):
            found.append(f"AppArmor profile {value}")
    found += [f"pod: {each}" for each in _of_either(of_pod)]
    if of_pod.get("runAsNonRoot") is False:
        found.append("pod: runAsNonRoot != true")
    containers = [each for kind in _LISTS for each in spec.get(kind) or ()]
    if not containers:
        found.append("no container")
    for container in containers:
        found += [f"{container['name']}: {each}" for each in _of_container(container, of_pod)]
    return found


def _plain(volume: Object) -> bool:
    return len(volume.keys() - {"name"}) == 1 and bool(volume.keys() & VOLUMES)


def _of_either(security: Object) -> Iterator[str]:
    """What neither a pod's nor a container's security context may have."""
    if (security.get("windowsOptions") or {}).get("hostProcess"):
        yield "hostProcess"
    if security.get("runAsUser") == 0:
        yield "runAsUser=0"
    selinux = security.get("seLinuxOptions") or {}
    if selinux.get("type", "") not in SELINUX or selinux.get("user") or selinux.get("role"):
        yield "seLinuxOptions"
    if (security.get("appArmorProfile") or {}).get("type", "RuntimeDefault") not in SECCOMP:
        yield "appArmorProfile"
    if (security.get("seccompProfile") or {}).get("type", "RuntimeDefault") not in SECCOMP:
        yield "seccompProfile"


def _of_container(container: Object, of_pod: Object) -> Iterator[str]:
    security = container.get("securityContext") or {}
    yield from _of_either(security)
    if security.get("privileged"):
        yield "privileged"
    if security.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation != false"
    capabilities = security.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or ()) or set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}:
        yield "unrestricted capabilities"
    if security.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot != true"
    if not security.get("seccompProfile") and not of_pod.get("seccompProfile"):
        yield "seccompProfile not set"
    if security.get("procMount", "Default") != "Default":
        yield "procMount"
    if any(port.get("hostPort") for port in container.get("ports") or ()):
        yield "hostPort"
    handlers = [container.get(probe) for probe in _PROBES] + list((container.get("lifecycle") or {}).values())
    if any(((handler or {}).get(kind) or {}).get("host") for handler in handlers for kind in ("httpGet", "tcpSocket")):
        yield "host of a probe"
