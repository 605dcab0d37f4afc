"""Supervises the processes of one machine: starts them, restarts any that dies as Kubernetes would, ends them cleanly.

Owns child processes and their logs; never speaks a wire protocol, holds no state of the run. The learner's clean exit
ends the run; a child that exits with a user error (code 2) ends it too, because starting it again cannot help.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from broker.process.lifecycle import EXIT_USER_ERROR, ErgonError
from broker.process.settings import Settings, SupervisorSection

logger = logging.getLogger(__name__)

POLL_S = 0.2


@dataclass(slots=True)
class Child:
    """One supervised process and its history of deaths."""

    name: str
    command: tuple[str, ...]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    restart_at: float = 0.0
    num_restarts: int = 0
    deaths_in_a_row: int = 0

    def start(self, now: float) -> None:
        """Start the process in its own session, so that a Ctrl-C in the terminal reaches the supervisor alone."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "ERGON_DIE_WITH_PARENT": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        self.started_at = now

    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    def tail(self, num_lines: int = 15) -> str:
        """The last lines of its log."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])


def children_of(settings: Settings, config: Path) -> list[Child]:
    """The processes of a run, in the order in which they are started; they are ended in the reverse one."""
    logs = settings.run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    python = (sys.executable, "-m")
    with_config = ("--config", str(config))
    children = [
        Child("broker", (*python, "broker", "serve", *with_config), logs / "broker.log"),
        Child("relay", (*python, "broker", "relay", *with_config), logs / "relay.log"),
        Child("learner", (*python, "learner", *with_config), logs / "learner.log"),
    ]
    for index in range(settings.actor.count):
        name = f"actor-{index}"
        command = (*python, "actors", *with_config, "--index", str(index))
        children.append(Child(name, command, logs / f"{name}.log"))
    return children


def check_ports(settings: Settings) -> None:
    """Raise ErgonError naming every port of the run that somebody else holds."""
    taken = [f"{host}:{port} ({key})" for key, host, port in ports_of(settings) if not _free(host, port)]
    if taken:
        raise ErgonError(
            f"in use: {', '.join(taken)}; stop what holds them, or choose others in the run's TOML or by --set"
        )


def ports_of(settings: Settings) -> Iterator[tuple[str, str, int]]:
    """(setting, host, port) of everything this machine will bind."""
    yield "broker.port", settings.broker.host, settings.broker.port
    yield "weights.port", settings.weights.host, settings.weights.port
    yield "weights.relay_port", settings.weights.relay_host, settings.weights.relay_port
    yield "learner.master_port", "127.0.0.1", settings.learner.master_port
    for key in ("broker_port", "relay_port", "learner_port"):
        yield f"metrics.{key}", settings.metrics.host, getattr(settings.metrics, key)
    for index in range(settings.actor.count):
        yield f"metrics.actor_port + {index}", settings.metrics.host, settings.metrics.actor_port + index
        yield f"gateway.port + {index}", settings.gateway.host, settings.gateway.port + index


def _free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


class Supervisor:
    """Keeps a set of children alive until the learner has finished or somebody asks to stop."""

    def __init__(self, settings: SupervisorSection, children: list[Child], clock: Callable[[], float] = time.monotonic):
        self._settings = settings
        self.children = children
        self._clock = clock

    def run(self, stop: Callable[[], bool], on_poll: Callable[[], None]) -> bool:
        """Supervise until the run ends; True if the learner finished, False if `stop` said so.

        Raises ErgonError where a child cannot be kept alive. Leaves no child behind in any case.
        """
        try:
            for child in self.children:
                child.start(self._clock())
            while not stop():
                if self._tend():
                    return True
                on_poll()
                time.sleep(POLL_S)
            return False
        finally:
            self.stop()

    def _tend(self) -> bool:
        """Look after every child once; True when the learner has ended well."""
        for child in self.children:
            if child.running():
                continue
            now = self._clock()
            if child.restart_at:
                if now >= child.restart_at:
                    child.restart_at = 0.0
                    child.start(now)
                continue
            if child.process and child.process.returncode == 0 and child.name == "learner":
                return True
            self._died(child, now)
        return False

    def _died(self, child: Child, now: float) -> None:
        code = child.process.returncode if child.process else None
        if child.process:
            _kill_session(child.process)  # its workers must not outlive it
        if code == EXIT_USER_ERROR:
            raise ErgonError(f"{child.name} cannot start: {_sentence(child)}")
        lived_s = now - child.started_at
        child.deaths_in_a_row = 1 if lived_s >= self._settings.restart_reset_s else child.deaths_in_a_row + 1
        if child.deaths_in_a_row > self._settings.max_restarts:
            raise ErgonError(
                f"{child.name} died {child.deaths_in_a_row} times in a row (last exit code {code}); "
                f"the end of {child.log}:\n{child.tail()}"
            )
        wait_s = min(
            self._settings.restart_backoff_s * 2 ** (child.deaths_in_a_row - 1), self._settings.restart_max_backoff_s
        )
        child.restart_at = now + wait_s
        child.num_restarts += 1
        logger.warning("%s died exit_code=%s lived_s=%.1f restart_in_s=%.1f", child.name, code, lived_s, wait_s)

    def stop(self) -> None:
        """End all children, last started first: SIGTERM, then SIGKILL to their session after the grace period."""
        deadline = self._clock() + self._settings.grace_s
        for child in reversed(self.children):
            if child.running() and child.process:
                child.process.send_signal(signal.SIGTERM)
        for child in reversed(self.children):
            if not child.process:
                continue
            try:
                child.process.wait(max(0.0, deadline - self._clock()))
            except subprocess.TimeoutExpired:
                logger.warning("%s did not end within grace_s=%.0f, killing it", child.name, self._settings.grace_s)
            _kill_session(child.process)


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of a child's session (engine workers, sandboxes)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _sentence(child: Child) -> str:
    """The error line that the child printed, without its prefix."""
    for line in reversed(child.tail(40).splitlines()):
        _, separator, sentence = line.partition(": error: ")
        if separator:
            return sentence
    return f"see {child.log}"
