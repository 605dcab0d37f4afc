"""What Kubernetes says when it will not, or cannot, as one sentence with the remedy. Pure; speaks to nobody."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from envs.interface import SandboxError
from envs.sandbox.pods.manifest import CONTAINER

HOPELESS: Final = {
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "CrashLoopBackOff",
}
"""Why a container waits, where waiting longer does not help."""


class RefusedError(SandboxError):
    """Kubernetes has answered, and the answer is no."""


def refusal(status: int, body: str, verb: str, resource: str, namespace: str) -> RefusedError:
    """The sentence for an answer that is not a success.

    status: HTTP's. body: of the answer, a Status object as a rule. verb, resource: what was asked, as RBAC has it.
    """
    said = _message(body)
    asked = f"{verb} {resource} in the namespace {namespace!r}"
    if status == 401:
        reason = "the cluster does not know this process; renew its credentials (kubeconfig, or the pod's token)"
    elif status == 403 and "exceeded quota" in said:
        reason = (
            "the namespace's quota is used up; raise sandboxes.maxPods of the chart, or have fewer episodes at once"
        )
    elif status == 403 and "PodSecurity" in said:
        reason = f"the namespace's PodSecurity level refuses the pod ({said})"
    elif status == 403 and "usage per" in said:
        reason = (
            f"a pod is larger than the namespace's LimitRange lets it be ({said}); lower sandboxes.cpu or "
            "sandboxes.memory_mb of the run, or raise sandboxes.pod of the chart"
        )
    elif status == 403 and "being terminated" in said:
        reason = "the namespace is being deleted"
    elif status == 403:
        reason = (
            f"this process may not {asked}; set sandboxes.actors=true of the chart, which grants it to actors, or bind "
            "such a role to its service account"
        )
    elif status == 404 and "namespace" in said:
        reason = "there is no such namespace; set sandboxes.create=true of the chart, or name it in sandboxes.namespace"
    elif status == 404:
        reason = "it is not there any more"
    else:
        reason = said or "without a word"
    return RefusedError(f"Kubernetes refused to {asked} (HTTP {status}): {reason}")


def _message(body: str) -> str:
    try:
        found = json.loads(body)
    except ValueError:
        return " ".join(body.split())[:300]
    return str(found.get("message", ""))[:500] if isinstance(found, dict) else ""


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Whether the sandbox's container runs. Raises SandboxError where it never will."""
    status = pod.get("status", {})
    if status.get("phase") in ("Failed", "Succeeded"):
        raise SandboxError(f"a sandbox's pod ended before it was ready: {why_ended(pod)}")
    for container in _containers(status):
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting.get("reason") in HOPELESS:
            raise SandboxError(f"a sandbox's pod does not start: {_waits(waiting)}")
    return any(
        container["name"] == CONTAINER and "running" in container.get("state", {})
        for container in status.get("containerStatuses") or ()
    )


def why_waiting(pod: Mapping[str, Any] | None) -> str:
    """What a pod that is not ready waits for."""
    if pod is None:
        return "the cluster has not told of it yet"
    status = pod.get("status", {})
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"no node can take it ({condition.get('reason')}: {condition.get('message', '')})"
    for container in _containers(status):
        waiting = container.get("state", {}).get("waiting")
        if waiting:
            return _waits(waiting)
    return f"its phase is {status.get('phase', 'unknown')}"


def why_ended(pod: Mapping[str, Any]) -> str:
    """Why a pod is not there, or not for long."""
    status = pod.get("status", {})
    for container in _containers(status):
        ended = container.get("state", {}).get("terminated")
        if ended and ended.get("reason") != "Completed":
            detail = " ".join(str(ended.get("message", "")).split())[:300]
            if "no such file" in detail:
                detail += "; build the image from deploy/images/sandbox.Dockerfile, or on it"
            return f"{ended.get('reason')} (exit code {ended.get('exitCode')}){': ' if detail else ''}{detail}"
    if status.get("reason"):
        return f"{status['reason']}: {status.get('message', '')}"
    if pod.get("metadata", {}).get("deletionTimestamp"):
        return "it was deleted"
    return f"its phase is {status.get('phase', 'unknown')}"


def _containers(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _waits(waiting: Mapping[str, Any]) -> str:
    return f"{waiting.get('reason')}: {' '.join(str(waiting.get('message', '')).split())[:300]}"
