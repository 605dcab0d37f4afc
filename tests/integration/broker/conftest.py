"""A real broker process on free ports, with timers short enough for tests."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.client import LearnerClient
from broker.process.config import save_settings
from broker.process.settings import BrokerSection, MetricsSection, RunSection, SecuritySection, Settings
from tests.ports import free_port

RUN_ID = "test-run"
HEARTBEAT_S = 0.2
LIVENESS = 10


class BrokerProcess:
    """`python -m broker serve`, to be killed and started again at will."""

    def __init__(
        self,
        directory: Path,
        lease_s: float = 3.0,
        max_attempts: int = 3,
        security: SecuritySection | None = None,
        **broker: Any,
    ) -> None:
        self.settings = Settings(
            run=RunSection(name=RUN_ID, directory=directory),
            broker=BrokerSection(
                port=free_port(),
                lease_s=lease_s,
                max_attempts=max_attempts,
                **{"heartbeat_s": HEARTBEAT_S, "liveness": LIVENESS, "min_free_mb": 0, **broker},
            ),
            security=security or SecuritySection(),
            metrics=MetricsSection(broker_port=free_port()),
        )
        self.config = directory / "run.toml"
        save_settings(self.settings, self.config)
        self.process: subprocess.Popen[str] | None = None
        self.start()

    @property
    def endpoint(self) -> str:
        """Where clients connect."""
        return f"tcp://127.0.0.1:{self.settings.broker.port}"

    def command(self) -> list[str]:
        """The command line of the process."""
        return [sys.executable, "-m", "broker", "serve", "--config", str(self.config)]

    def start(self) -> None:
        """Start it; clients wait for it by themselves."""
        self.process = subprocess.Popen(self.command(), text=True)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def terminate(self) -> int:
        """SIGTERM; its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)

    def http(self, path: str) -> str:
        """A page of its metrics port, also where the status is 503."""
        url = f"http://127.0.0.1:{self.settings.metrics.broker_port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=10) as page:
                return str(page.read().decode())
        except urllib.error.HTTPError as error:
            return str(error.read().decode())

    def learner(self, window: int = 64) -> LearnerClient:
        """A learner, connected."""
        client = LearnerClient(self.endpoint, RUN_ID, window=window, heartbeat_s=HEARTBEAT_S, liveness=LIVENESS)
        client.connect(30)
        return client


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    """A broker process of this test's own."""
    running = BrokerProcess(tmp_path)
    yield running
    running.kill()
