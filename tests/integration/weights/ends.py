"""What the weight channel's integration tests are made of: relay processes, a learner, actors, random weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
from prometheus_client import REGISTRY

from broker.process.keys import Identity
from broker.process.security import OPEN, Security
from broker.protocol.trajectory import PolicyVersion
from broker.weights.basefile import BaseFile
from broker.weights.publisher import WeightPublisher
from broker.weights.subscriber import WeightSubscriber
from tests.ports import free_port

HEARTBEAT_S = 0.1
LIVENESS = 10
SIZE = 1 << 20
RUN = "weights-test"
ROOT = Path(__file__).parents[3]

Tensors = list[tuple[str, str, tuple[int, ...], np.ndarray]]


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for something that has no event to wait for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.002)


def random_tensors(num_bytes: int, seed: int) -> Tensors:
    """Random bytes as one bf16 matrix and one fp32 vector."""
    data = np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)
    half = num_bytes // 8 * 4
    return [
        ("embed.weight", "bfloat16", (half // 4, 2), data[:half]),
        ("norm.weight", "float32", ((num_bytes - half) // 4,), data[half : half + (num_bytes - half) // 4 * 4]),
    ]


def file_holds(path: Path, tensors: Tensors) -> bool:
    """Whether a safetensors file holds exactly these tensors, bit for bit."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    header.pop("__metadata__")
    assert header.keys() == {name for name, _, _, _ in tensors}
    return all(
        data[header[name]["data_offsets"][0] : header[name]["data_offsets"][1]] == given.tobytes()
        for name, _, _, given in tensors
    )


class RelayProcess:
    """`python -m broker relay` on a port of its own, which stays the same over restarts."""

    def __init__(
        self,
        directory: Path,
        upstream_port: int,
        run: str = RUN,
        port: int | None = None,
        metrics_port: int | None = None,
        max_mb: int = 1024,
        keys: Path | None = None,
    ) -> None:
        self.port, self.metrics_port = port or free_port(), metrics_port or free_port()
        self._config = directory / f"relay-{self.port}-{self.metrics_port}.toml"
        self._config.write_text(
            f'[run]\nname = "{run}"\n[weights]\nport = {upstream_port}\nrelay_port = {self.port}\n'
            f"heartbeat_s = {HEARTBEAT_S}\nliveness = {LIVENESS}\nmax_mb = {max_mb}\n"
            f"[metrics]\nrelay_port = {self.metrics_port}\n"
            + (f'[security]\nmode = "curve"\nkeys = "{keys}"\n' if keys is not None else "")
        )
        self._process: subprocess.Popen[str] | None = None
        self.start()

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "broker", "relay", "--config", str(self._config)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def end(self) -> tuple[int, str]:
        """SIGTERM unless it has ended by itself; exit code and standard error."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        assert self._process is not None
        _, errors = self._process.communicate(timeout=30)
        return self._process.returncode, errors

    def health(self) -> tuple[int, dict[str, object]]:
        """Status (0 while nobody answers) and detail of /healthz."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/healthz", timeout=5) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())
        except OSError:
            return 0, {}

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as reply:
            return str(reply.read().decode())

    def wait_serving(self, version: PolicyVersion) -> None:
        until(lambda: self.health()[1].get("newest") == list(version))

    def dispose(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


class Learner:
    """A publisher and the weights that it changes."""

    def __init__(self, port: int | None = None, size: int = SIZE, security: Security = OPEN) -> None:
        self.publisher = WeightPublisher(
            f"tcp://127.0.0.1:{port or '*'}",
            RUN,
            chunk_bytes=64 << 10,
            heartbeat_s=HEARTBEAT_S,
            liveness=100,
            security=security,
        )
        self._rng = np.random.default_rng(0)
        self._data = self._rng.integers(0, 256, size, np.uint8)
        self.version = PolicyVersion(1, 0)
        self.contents: dict[PolicyVersion, Tensors] = {}

    def publish(self, num_changes: int = 200, lineage: int | None = None) -> PolicyVersion:
        """The next version; so many of its bytes are drawn anew."""
        was = self.version
        self.version = PolicyVersion(was.lineage, was.version + 1) if lineage is None else PolicyVersion(lineage, 0)
        places = self._rng.integers(0, self._data.size, num_changes)
        self._data[places] = self._rng.integers(0, 256, num_changes, np.uint8)
        half = self._data.size // 8 * 4
        tensors: Tensors = [
            ("embed.weight", "bfloat16", (half // 4, 2), self._data[:half]),
            ("norm.weight", "float32", ((self._data.size - half) // 4,), self._data[half:]),
        ]
        self.contents[self.version] = [(*rest, data.copy()) for *rest, data in tensors]  # type: ignore[misc]
        self.publisher.publish(self.version, tensors)
        return self.version

    @property
    def store(self):  # type: ignore[no-untyped-def]
        """What it serves."""
        return self.publisher._store


class Actor:
    """A subscriber and its base file."""

    def __init__(
        self,
        endpoint: str,
        path: Path,
        credit: int = 8,
        push_bytes: int = 1 << 20,
        security: Security = OPEN,
        server: Identity = Identity.RELAY,
    ) -> None:
        self.security = security
        self.subscriber = WeightSubscriber(
            endpoint,
            RUN,
            path.name,
            credit=credit,
            push_bytes=push_bytes,
            heartbeat_s=HEARTBEAT_S,
            liveness=100,
            security=security,
            server=server,
        )
        self.base = BaseFile(path)

    def follow(self, learner: Learner) -> PolicyVersion | None:
        """Fetch the learner's newest version; the parent of what it came as. The file must be right, bit for bit."""
        version = learner.version
        until(lambda: self.subscriber.latest() == version)
        manifest = self.subscriber.fetch_base(version, self.base, 30)
        assert file_holds(self.base.path, learner.contents[version])
        return manifest.parent


def has_watched(learner: Learner, version: PolicyVersion) -> bool:
    """Whether the publisher knows that its one peer holds this version, and may push to it."""
    (peer,) = learner.publisher._server._peers._by_routing.values()
    return peer.have == version and peer.push_bytes > 0


StartRelay = Callable[..., RelayProcess]
ActorAt = Callable[..., Actor]


def total(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0
