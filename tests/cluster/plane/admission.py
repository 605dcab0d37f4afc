"""PodSecurity for an API server that has none: a validating webhook that judges as today's would.

    with ControlPlane(...) as plane, PodSecurity(plane):
        ...  # a pod that breaks `restricted` is refused in a namespace that bears the label

1.20 is older than that admission. The rules are `tests/pod_security.py`; what is real is that the API server asks at
every creation of a pod, of whoever makes it, and what it asks about: the pod with all defaults, as it would be stored.
"""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from kubernetes import client
from kubernetes.client.rest import ApiException

from tests.cluster.plane.control import HOST, ControlPlane
from tests.pod_security import violations

LABEL: Final = {"pod-security.kubernetes.io/enforce": "restricted"}
NAME: Final = "pod-security"
ASKED_S: Final = 60.0  # until the apiserver asks
_REFUSED: Final = 403


class PodSecurity(ThreadingHTTPServer):
    """The webhook; a context manager, which begins when the apiserver asks it."""

    daemon_threads = True

    def __init__(self, plane: ControlPlane) -> None:
        super().__init__((HOST, 0), _Handler)
        self.judged: list[tuple[str, str, list[str]]] = []  # (namespace, the pod's name or its maker's prefix, found)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(plane.pki / "kubelet.crt", plane.pki / "kubelet.key")
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self._authority = base64.b64encode((plane.pki / "ca.crt").read_bytes()).decode()
        self._hooks = client.AdmissionregistrationV1Api(plane.api())
        self._core = client.CoreV1Api(plane.api())

    def __enter__(self) -> PodSecurity:
        threading.Thread(target=self.serve_forever, name="pod security", daemon=True).start()
        rule = {"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}
        hook = {
            "name": f"{NAME}.ergon.dev",
            "clientConfig": {
                "url": f"https://{HOST}:{self.server_address[1]}/",
                "caBundle": self._authority,
            },
            "rules": [rule | {"scope": "Namespaced"}],
            "namespaceSelector": {"matchLabels": LABEL},
            "failurePolicy": "Fail",
            "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
        }
        self._hooks.create_validating_webhook_configuration({"metadata": {"name": NAME}, "webhooks": [hook]})
        self._core.create_namespace({"metadata": {"name": NAME, "labels": LABEL}})
        deadline = time.monotonic() + ASKED_S
        while not self._refuses():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the apiserver did not ask about a pod within {ASKED_S:g} s")
            time.sleep(0.2)
        return self

    def __exit__(self, *_error: object) -> None:
        self._hooks.delete_validating_webhook_configuration(NAME, _preload_content=False)
        self.shutdown()
        self.server_close()

    def _refuses(self) -> bool:
        """Whether a pod that says nothing of its security is refused for that; it is not made in any case."""
        pod = {"metadata": {"name": "bare"}, "spec": {"containers": [{"name": "bare", "image": "none"}]}}
        try:
            self._core.create_namespaced_pod(NAME, pod, dry_run="All")
        except ApiException as error:
            return error.status == _REFUSED and "violates PodSecurity" in str(error.body)
        return False


class _Handler(BaseHTTPRequestHandler):
    server: PodSecurity
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["request"]
        found = violations(asked["object"])
        meta = asked["object"]["metadata"]
        name = meta.get("name") or meta.get("generateName", "")
        self.server.judged.append((asked["namespace"], name, found))
        answer: dict[str, Any] = {"uid": asked["uid"], "allowed": not found}
        if found:
            message = f'pods "{name}" is forbidden: violates PodSecurity "restricted:latest": {", ".join(found)}'
            answer["status"] = {"code": _REFUSED, "reason": "Forbidden", "message": message}
        review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": answer}
        body = json.dumps(review).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
        """Quiet."""
