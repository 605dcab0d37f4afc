"""What stands between Prometheus and the autoscaler in a cluster, small: a Prometheus that watches pods, and an
adapter.

`prometheus_config` is what the operator of Prometheus makes of the chart's PodMonitor. `Adapter` serves external
metrics (external.metrics.k8s.io/v1beta1) behind the apiserver's aggregation: METRIC is `run:METRIC:count` of the
recording rules, for the namespace and the run that the autoscaler names.
"""

from __future__ import annotations

import json
import logging
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, quote, urlsplit

from kubernetes import client

from tests.cluster.plane.control import HOST, ControlPlane

logger = logging.getLogger(__name__)

GROUP: Final = "external.metrics.k8s.io"
RULES: Final = Path(__file__).parents[3] / "deploy" / "monitoring" / "rules" / "recording.yml"


def prometheus_config(monitor: Mapping[str, Any], targets: Path) -> dict[str, Any]:
    """Prometheus' configuration for a PodMonitor, with the pods that `Discovery` writes to `targets`. What the monitor
    and the rules leave open is as the operator of Prometheus has it."""
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    keep = [
        {"source_labels": ["__meta_kubernetes_pod_phase"], "regex": "Running", "action": "keep"},
        {
            "source_labels": ["__meta_kubernetes_pod_container_port_name"],
            "regex": endpoint["port"],
            "action": "keep",
        },
        {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
    ]
    for name, value in monitor["spec"]["selector"]["matchLabels"].items():
        keep.append({"source_labels": [_label(name)], "regex": value, "action": "keep"})
    words = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    relabelings = [{words.get(key, key): value for key, value in each.items()} for each in endpoint["relabelings"]]
    interval = endpoint["interval"]
    job = {
        "job_name": "pods",
        "scrape_interval": interval,
        "scrape_timeout": interval,
        "file_sd_configs": [{"files": [str(targets)]}],
        "relabel_configs": [*keep, *relabelings],
    }
    return {
        "global": {"scrape_interval": "30s", "evaluation_interval": "30s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [job],
    }


class Discovery(threading.Thread):
    """What Prometheus' own discovery of pods would tell it, written to a file: Debian's Prometheus is built without."""

    def __init__(self, api: Any, namespace: str, path: Path) -> None:
        super().__init__(name="discovery", daemon=True)
        self._core, self._namespace, self._path = client.CoreV1Api(api), namespace, path
        self._ended = threading.Event()

    def __enter__(self) -> Discovery:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(1.0):
            reply = self._core.list_namespaced_pod(self._namespace, _preload_content=False)
            told = [target for pod in json.loads(reply.data)["items"] for target in _targets(pod)]
            draft = self._path.with_suffix(".new")
            draft.write_text(json.dumps(told))
            draft.rename(self._path)


def _targets(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """A pod's ports, with the labels that the discovery of role `pod` gives them."""
    meta, status = pod["metadata"], pod["status"]
    labels = {
        "__meta_kubernetes_namespace": meta["namespace"],
        "__meta_kubernetes_pod_name": meta["name"],
        "__meta_kubernetes_pod_phase": status["phase"],
    }
    labels |= {_label(name): value for name, value in meta.get("labels", {}).items()}
    ports = [port for container in pod["spec"]["containers"] for port in container.get("ports", [])]
    return [
        {
            "targets": [f"{status['podIP']}:{port['containerPort']}"],
            "labels": labels | {"__meta_kubernetes_pod_container_port_name": port["name"]},
        }
        for port in ports
        if "podIP" in status
    ]


def _label(name: str) -> str:
    return "__meta_kubernetes_pod_label_" + "".join(c if c.isalnum() else "_" for c in name)


class Adapter(ThreadingHTTPServer):
    """Serves what Prometheus at `prometheus_url` knows; a context manager. Registers itself at the apiserver."""

    daemon_threads = True

    def __init__(self, plane: ControlPlane, prometheus_url: str) -> None:
        super().__init__((HOST, 0), _Handler)
        self.prometheus_url = prometheus_url
        self.answers: list[tuple[float, float]] = []  # (monotonic seconds, what the autoscaler was told)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(plane.pki / "kubelet.crt", plane.pki / "kubelet.key")
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self._api = plane.api()

    def __enter__(self) -> Adapter:
        threading.Thread(target=self.serve_forever, name="adapter", daemon=True).start()
        # A Service that is another name for this machine: the apiserver asks loopback.
        ports = [{"port": self.server_address[1]}]
        service = {"type": "ExternalName", "externalName": "localhost", "ports": ports}
        client.CoreV1Api(self._api).create_namespaced_service(
            "kube-system", {"metadata": {"name": "external-metrics"}, "spec": service}
        )
        # As adapters bring it along: the autoscaler may read what is served here.
        rights, name = client.RbacAuthorizationV1Api(self._api), {"name": "external-metrics"}
        rule = {"apiGroups": [GROUP], "resources": ["*"], "verbs": ["get", "list"]}
        rights.create_cluster_role({"metadata": name, "rules": [rule]})
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", **name}
        subject = {"kind": "ServiceAccount", "name": "horizontal-pod-autoscaler", "namespace": "kube-system"}
        rights.create_cluster_role_binding({"metadata": name, "roleRef": role, "subjects": [subject]})
        client.ApiregistrationV1Api(self._api).create_api_service(
            {
                "metadata": {"name": f"v1beta1.{GROUP}"},
                "spec": {
                    "group": GROUP,
                    "version": "v1beta1",
                    "groupPriorityMinimum": 100,
                    "versionPriority": 100,
                    "insecureSkipTLSVerify": True,
                    "service": {
                        "name": "external-metrics",
                        "namespace": "kube-system",
                        "port": self.server_address[1],
                    },
                },
            }
        )
        return self

    def __exit__(self, *_error: object) -> None:
        # What 1.20 answers is not what the client of today expects of it.
        client.ApiregistrationV1Api(self._api).delete_api_service(f"v1beta1.{GROUP}", _preload_content=False)
        core = client.CoreV1Api(self._api)
        core.delete_namespaced_service("external-metrics", "kube-system", _preload_content=False)
        self.shutdown()
        self.server_close()

    def value(self, metric: str, labels: Mapping[str, str]) -> float | None:
        """What the recording rule says, or None where it says nothing."""
        matchers = ",".join(f'{name}="{value}"' for name, value in labels.items())
        found = query(self.prometheus_url, f"max(run:{metric}:count{{{matchers}}})")
        return found[0][1] if found else None


def query(prometheus_url: str, expression: str) -> list[tuple[dict[str, str], float]]:
    """(labels, value) of every series of the result."""
    with urllib.request.urlopen(f"{prometheus_url}/api/v1/query?query={quote(expression)}", timeout=10) as reply:
        result = json.load(reply)["data"]["result"]
    return [(series["metric"], float(series["value"][1])) for series in result]


class _Handler(BaseHTTPRequestHandler):
    server: Adapter
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        words = parts.path.strip("/").split("/")
        base = {"apiVersion": "v1", "groupVersion": f"{GROUP}/v1beta1"}
        if words[:3] != ["apis", GROUP, "v1beta1"] or len(words) not in (3, 6):
            self._reply(404, {"kind": "Status", "code": 404})
        elif len(words) == 3:
            self._reply(200, base | {"kind": "APIResourceList", "resources": [_resource()]})
        else:
            self._metric(words[5], parse_qs(parts.query).get("labelSelector", [""])[0])

    def _metric(self, metric: str, selector: str) -> None:
        labels = dict(each.split("=", 1) for each in selector.split(",") if each)
        value = self.server.value(metric, labels)
        items = []
        logger.info("asked metric=%s labels=%s value=%s", metric, labels, value)
        if value is not None:
            self.server.answers.append((time.monotonic(), value))
            at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            told = f"{round(value * 1000)}m"
            items = [{"metricName": metric, "metricLabels": labels, "timestamp": at, "value": told}]
        told_list = {"kind": "ExternalMetricValueList", "apiVersion": f"{GROUP}/v1beta1", "metadata": {}}
        self._reply(200, told_list | {"items": items})

    def _reply(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
        """Quiet."""


def _resource() -> dict[str, Any]:
    return {"name": "ergon_actors_wanted", "namespaced": True, "kind": "ExternalMetricValueList", "verbs": ["get"]}
