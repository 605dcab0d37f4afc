"""The supervisor on real child processes: restarts, gives up, ends everything it started."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from broker.process.lifecycle import ErgonError
from broker.process.settings import BrokerSection, Settings, SupervisorSection
from deploy.local import Child, Supervisor, check_ports, ports_of

QUICK = SupervisorSection(restart_backoff_s=0.01, restart_max_backoff_s=0.02, max_restarts=3, grace_s=5)


def child(tmp_path: Path, name: str, code: str) -> Child:
    return Child(name, (sys.executable, "-c", code), tmp_path / f"{name}.log")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_child_is_started_again_and_the_learners_end_ends_the_run(tmp_path: Path) -> None:
    marker = tmp_path / "go"
    other = child(tmp_path, "broker", "import time; time.sleep(60)")
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(marker)!r}).exists(): time.sleep(0.02)"
    learner = child(tmp_path, "learner", wait)
    supervisor = Supervisor(QUICK, [other, learner])
    pids: list[int] = []

    def on_poll() -> None:
        assert other.process is not None
        if not pids:
            pids.append(other.process.pid)
            os.kill(other.process.pid, signal.SIGKILL)
        elif other.process.pid != pids[-1]:
            pids.append(other.process.pid)
            marker.touch()

    assert supervisor.run(lambda: False, on_poll) is True
    assert other.num_restarts == 1
    assert not any(alive(pid) for pid in pids)


def test_a_child_that_keeps_dying_ends_the_run_with_its_log(tmp_path: Path) -> None:
    broken = child(tmp_path, "relay", "import sys; print('no wheels', file=sys.stderr); sys.exit(1)")
    with pytest.raises(ErgonError, match=r"(?s)relay died 4 times in a row.*no wheels"):
        Supervisor(QUICK, [broken]).run(lambda: False, lambda: None)


def test_a_user_error_of_a_child_ends_the_run_at_once(tmp_path: Path) -> None:
    code = "import sys; print('ergon broker: error: the port 1 is in use', file=sys.stderr); sys.exit(2)"
    with pytest.raises(ErgonError, match="broker cannot start: the port 1 is in use"):
        Supervisor(QUICK, [child(tmp_path, "broker", code)]).run(lambda: False, lambda: None)


def test_stopping_kills_what_ignores_sigterm_and_its_workers(tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    code = (
        "import pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(pidfile)!r}).write_text(str(worker.pid))\n"
        "time.sleep(60)"
    )
    stubborn = child(tmp_path, "actor-0", code)
    quick = QUICK.model_copy(update={"grace_s": 0.3})
    assert Supervisor(quick, [stubborn]).run(pidfile.exists, lambda: None) is False
    assert stubborn.process is not None
    assert not alive(stubborn.process.pid)
    worker = int(pidfile.read_text())
    deadline = time.monotonic() + 5
    while alive(worker) and Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the worker outlived its parent"


def test_a_port_in_use_is_named_with_its_setting() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        settings = Settings(broker=BrokerSection(port=port))
        with pytest.raises(ErgonError, match=rf"127\.0\.0\.1:{port} \(broker\.port\)"):
            check_ports(settings)


def test_the_ports_of_a_run_do_not_collide_by_default() -> None:
    ports = [port for _, _, port in ports_of(Settings())]
    assert len(ports) == len(set(ports)) >= 8
