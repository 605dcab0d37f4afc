"""`ergon up | status | logs | scale | down`: a run on Kubernetes, by helm and Kubernetes' API. Prints nothing itself.

Owns no state: what is there, the cluster knows. The run's TOML is checked before anything is sent. Needs the extra
`kubernetes` and, for `up` and `down`, the program helm.
"""

from __future__ import annotations

import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker.process.config import load_settings
from broker.process.lifecycle import ErgonError

CHART: Final = Path(__file__).parent / "chart"
COMPONENTS: Final = ("broker", "relay", "learner", "actor")
FOLLOW_S: Final = 1.0  # between two looks for pods whose log is not followed yet
_NOT_FOUND: Final = 404


@dataclass(frozen=True, slots=True)
class Release:
    """A run in a cluster."""

    name: str
    namespace: str = "default"

    def selector(self, component: str = "") -> str:
        """Of its pods, or of those of one component."""
        of = f",app.kubernetes.io/component={component}" if component else ""
        return f"app.kubernetes.io/name=ergon,app.kubernetes.io/instance={self.name}{of}"


@dataclass(frozen=True, slots=True)
class PodState:
    """One pod as a row: `state` is ready, its phase, or why it waits."""

    component: str
    name: str
    state: str
    restarts: int
    node: str


def up(release: Release, file: Path, profile: str, values: Sequence[Path], sets: Sequence[str], *, dry: bool) -> str:
    """Install the run, or upgrade it to this TOML and these values; what helm says.

    profile: of the chart, or "" for none. dry: only render. Raises ErgonError for a wrong TOML or profile, and with
    helm's own words.
    """
    load_settings(file)
    command = ["template"] if dry else ["upgrade", "--install", "--create-namespace"]
    command += [release.name, str(CHART), "--namespace", release.namespace, "--set-file", f"run.config={file}"]
    if profile:
        path = CHART / "profiles" / f"{profile}.yaml"
        if not path.exists():
            known = ", ".join(sorted(each.stem for each in path.parent.glob("*.yaml")))
            raise ErgonError(f"--profile {profile!r} is none of the chart's; known are {known}")
        command += ["--values", str(path)]
    for each in values:
        command += ["--values", str(each)]
    for text in sets:
        command += ["--set", text]
    return _helm(*command)


def down(release: Release) -> str:
    """End the run's processes; volumes and keys stay, so that `up` goes on with it. What helm says."""
    return _helm("uninstall", release.name, "--namespace", release.namespace)


def _helm(*arguments: str) -> str:
    program = shutil.which("helm")
    if program is None:
        raise ErgonError(
            "helm is not installed, and `ergon up` and `ergon down` are its work; install helm 3.14 or later"
        )
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ErgonError(f"helm {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


def connect() -> Any:
    """Kubernetes' API by the usual configuration (KUBECONFIG, ~/.kube/config). Raises ErgonError without one."""
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise ErgonError("the Python package kubernetes is missing; pip install 'ergon[kubernetes]'") from error
    try:
        config.load_kube_config()
    except config.ConfigException as error:
        raise ErgonError(f"no cluster is configured ({error}); set KUBECONFIG, or write ~/.kube/config") from error
    return client.ApiClient()


def status(api: Any, release: Release) -> list[PodState]:
    """The run's pods, in the order of COMPONENTS. Raises ErgonError where there are none."""
    from kubernetes import client

    found = client.CoreV1Api(api).list_namespaced_pod(release.namespace, label_selector=release.selector()).items
    if not found:
        raise ErgonError(f"namespace {release.namespace} has no pod of a run {release.name!r}; `ergon up` starts one")
    rows = [_state(pod) for pod in found]
    order = {component: number for number, component in enumerate(COMPONENTS)}
    return sorted(rows, key=lambda row: (order.get(row.component, len(order)), row.name))


def _state(pod: Any) -> PodState:
    containers = pod.status.container_statuses or []
    state = pod.status.phase
    if pod.metadata.deletion_timestamp is not None:
        state = "ending"
    elif containers and all(each.ready for each in containers):
        state = "ready"
    for each in [*(pod.status.init_container_statuses or []), *containers]:
        if each.state and each.state.waiting and each.state.waiting.reason:
            state = each.state.waiting.reason
    component = (pod.metadata.labels or {}).get("app.kubernetes.io/component", "")
    restarts = sum(each.restart_count for each in containers)
    return PodState(component, pod.metadata.name, state, restarts, pod.spec.node_name or "")


def as_table(rows: Sequence[PodState]) -> str:
    """For people."""
    cells = [("component", "pod", "state", "restarts", "node")]
    cells += [(row.component, row.name, row.state, str(row.restarts), row.node) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def logs(api: Any, release: Release, component: str, num_lines: int) -> Iterator[str]:
    """The last lines of every pod of a component ("": of all), each with its pod's name."""
    from kubernetes import client
    from kubernetes.client.rest import ApiException

    core = client.CoreV1Api(api)
    for row in status(api, release):
        if component and row.component != component:
            continue
        try:
            text = core.read_namespaced_pod_log(row.name, release.namespace, tail_lines=num_lines)
        except ApiException as error:
            text = f"(no log: {error.reason})"  # it is only starting, or has just gone
        yield from (f"{row.name}: {line}" for line in text.splitlines())


def follow(api: Any, release: Release, component: str, num_lines: int, stop: threading.Event) -> Iterator[str]:
    """What `logs` tells, and then every line as it is said, also by pods and containers that are started later.

    Ends when `stop` is set, or the run has no pod any more. Raises ErgonError where it has none at the beginning.
    """
    lines: queue.Queue[str] = queue.Queue()
    followed: set[tuple[str, int]] = set()  # a container that was started again has a log of its own
    looked_at = 0.0
    while not stop.is_set():
        if not looked_at or time.monotonic() - looked_at >= FOLLOW_S:
            try:
                rows = status(api, release)
            except ErgonError:
                if not looked_at:
                    raise
                break
            looked_at = time.monotonic()
            for row in rows:
                if (component and row.component != component) or (row.name, row.restarts) in followed:
                    continue
                followed.add((row.name, row.restarts))
                what = (api, release, row, num_lines, lines, followed)
                threading.Thread(target=_follow_pod, args=what, name=f"log of {row.name}", daemon=True).start()
        try:
            yield lines.get(timeout=0.2)
        except queue.Empty:
            continue
    while not lines.empty():
        yield lines.get()


def _follow_pod(
    api: Any,
    release: Release,
    row: PodState,
    num_lines: int,
    lines: queue.Queue[str],
    followed: set[tuple[str, int]],
) -> None:
    from kubernetes import client, watch
    from kubernetes.client.rest import ApiException

    read = client.CoreV1Api(api).read_namespaced_pod_log
    try:
        for line in watch.Watch().stream(read, name=row.name, namespace=release.namespace, tail_lines=num_lines):
            lines.put(f"{row.name}: {line}")
    except ApiException:
        followed.discard((row.name, row.restarts))  # it is only starting, or has just gone: see at the next look


def scale(api: Any, release: Release, num_actors: int) -> int:
    """Set the number of actors; the number before. Raises ErgonError where an autoscaler would undo it."""
    from kubernetes import client
    from kubernetes.client.rest import ApiException

    if num_actors < 0:
        raise ErgonError(f"{num_actors} actors cannot be; give 0 or more")
    name, apps = f"{release.name}-actor", client.AppsV1Api(api)
    scalers = client.AutoscalingV2Api(api).list_namespaced_horizontal_pod_autoscaler(release.namespace).items
    if any(each.spec.scale_target_ref.name == name for each in scalers):
        raise ErgonError(
            f"the actors of {release.name!r} are scaled automatically; change actors.scaling.min and .max by "
            "`ergon up`, or set actors.scaling.mode=fixed first"
        )
    try:
        before = apps.read_namespaced_deployment_scale(name, release.namespace).spec.replicas or 0
        apps.patch_namespaced_deployment_scale(name, release.namespace, {"spec": {"replicas": num_actors}})
    except ApiException as error:
        if error.status == _NOT_FOUND:
            raise ErgonError(
                f"namespace {release.namespace} has no run {release.name!r}; `ergon up` starts one"
            ) from error
        raise
    return int(before)
