"""The servers that are compared, as processes of this benchmark's own: started on free ports, stopped at the end.

Owns their configuration and what /proc says of them (CPU seconds, resident memory).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from broker.process.config import save_settings
from broker.process.settings import BrokerSection, MetricsSection, RunSection, SecuritySection, Settings
from tests.bench.exchange.load import RUN_ID
from tests.ports import free_ports

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
START_S = 120.0  # a busy machine takes half a minute for the imports alone


class Server:
    """A running server. `directory` is its own and goes with it."""

    def __init__(self, command: list[str], port: int, directory: Path) -> None:
        self.port, self.directory = port, directory
        self.log = directory / "server.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise RuntimeError(f"{command[0]} did not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def cpu_s(self) -> float:
        """CPU seconds of all its threads so far."""
        return _cpu_s(Path(f"/proc/{self.pid}/stat"))

    def thread_cpu_s(self) -> dict[int, float]:
        """CPU seconds of each of its threads so far, by the thread's number; the first one has the process's."""
        found: dict[int, float] = {}
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                found[int(task.name)] = _cpu_s(task / "stat")
        return found

    def reset_peak(self) -> None:
        """Begin a new peak of resident memory."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def memory_mib(self, key: str = "VmHWM") -> float:
        """Resident memory: VmHWM its peak since `reset_peak`, VmRSS now."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    def stop(self) -> None:
        """End it and remove its files."""
        self.end()
        shutil.rmtree(self.directory)

    def end(self) -> None:
        """End it; its files stay."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _cpu_s(stat: Path) -> float:
    fields = stat.read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def ergon_settings(directory: Path, keys: Path | None = None) -> Settings:
    """A broker with the defaults, fsync=always among them, but for leases: they outlast every run.

    `keys`: the key directory of a broker with CURVE.
    """
    port, metrics_port = free_ports(2)
    return Settings(
        run=RunSection(name=RUN_ID, directory=directory),
        broker=BrokerSection(port=port, lease_s=3600.0, fsync="always"),
        metrics=MetricsSection(broker_port=metrics_port),
        security=SecuritySection() if keys is None else SecuritySection(mode="curve", keys=keys),
    )


def start_ergon(directory: Path, settings: Settings | None = None, keys: Path | None = None) -> Server:
    """`python -m broker serve`, with these settings or with those of `ergon_settings`."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = settings or ergon_settings(directory, keys)
    config = directory / "run.toml"
    save_settings(settings, config)
    command = [sys.executable, "-m", "broker", "serve", "--config", str(config)]
    return Server(command, settings.broker.port, directory)


def start_floor(directory: Path) -> Server:
    """The shortest durable queue; see `durable_floor.py`."""
    directory.mkdir(parents=True)
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "tests.bench.exchange.durable_floor"]
    return Server([*command, "--port", str(port), "--log", str(directory / "log")], port, directory)


def start_redis(directory: Path, appendfsync: str) -> Server:
    """`redis-server` with an append-only file. It is spared the rewriting of that file, which would cost it time."""
    directory.mkdir(parents=True)
    (port,) = free_ports(1)
    options = {
        "port": port,
        "bind": "127.0.0.1",
        "dir": directory,
        "appendonly": "yes",
        "appendfsync": appendfsync,
        "save": "",
        "auto-aof-rewrite-percentage": 0,
    }
    command = ["redis-server", *(str(word) for key, value in options.items() for word in (f"--{key}", value))]
    return Server(command, port, directory)
