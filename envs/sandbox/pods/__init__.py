"""The backend `pod`: a sandbox is a Kubernetes pod of its own, made by the library `kubernetes`."""

from envs.sandbox.pods.manifest import PodSettings
from envs.sandbox.pods.sandbox import PodSandbox, configure_pods, pod_settings

__all__ = ["PodSandbox", "PodSettings", "configure_pods", "pod_settings"]
