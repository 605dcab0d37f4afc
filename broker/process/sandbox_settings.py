"""What sandboxes that are Kubernetes pods can be told: the section `[sandboxes]`. Starts nothing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from broker.process.section import Section

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]


class SandboxesSection(Section):
    namespace: Name = "ergon-sandboxes"
    """Namespace of sandboxes that are pods, which an environment asks for by its option `sandbox = "pod"`. The chart
    makes it (`sandboxes.create`) and sets this."""
    image: str = Field(default="ergon-sandbox:0.1.0", min_length=1)
    """Their image: what tools can use, and the session's own Python (deploy/images/sandbox.Dockerfile)."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When nodes fetch the image."""
    pull_secrets: tuple[Name, ...] = ()
    """Secrets of the namespace for fetching it."""
    runtime_class: str = ""
    """RuntimeClass of the pods (gVisor, Kata); empty: the cluster's default runtime."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that pods may run on."""
    tolerations: tuple[dict[str, str | int], ...] = ()
    """Taints of nodes that pods put up with, as Kubernetes writes them: {key="...", operator="Exists"}."""
    cpu: float = Field(default=1.0, gt=0, le=64)
    """CPU cores that a pod may use."""
    memory_mb: int = Field(default=1024, ge=64)
    """Memory of a pod, MiB, files included, unless its environment's own limits come to less. A pod that needs more is
    killed whole, which is an infrastructure failure."""
    life_s: int = Field(default=3600, ge=60)
    """Seconds after which Kubernetes ends a pod, whatever became of its actor. None is handed out after half of it."""
    orphan_s: float = Field(default=300.0, ge=5)
    """Seconds without a connection of its actor after which a pod ends itself."""
    start_timeout_s: float = Field(default=120.0, gt=0)
    """Seconds within which a new pod must be ready; scheduling and fetching the image are in it."""
