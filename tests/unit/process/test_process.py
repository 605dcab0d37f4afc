"""Exit codes, logs and the metrics endpoint, on real processes and sockets."""

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from broker.process.lifecycle import ErgonError
from broker.process.metrics import Health, start_metrics


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"from broker.process.lifecycle import *\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env={"PATH": "/usr/bin", **environ})


def test_a_user_error_is_one_line_and_code_2() -> None:
    done = run_python("def main(): raise ErgonError('the key x is wrong')\nrun_main('relay', main)")
    assert done.returncode == 2
    assert done.stderr == "ergon relay: error: the key x is wrong\n"


def test_a_crash_has_a_traceback_and_code_1_even_with_a_living_thread() -> None:
    code = "import threading, time\ndef main():\n threading.Thread(target=time.sleep, args=(60,)).start()\n 1/0\n"
    done = run_python(code + "run_main('x', main)")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_json_logs_are_one_object_a_line() -> None:
    code = "import logging\nrun_main('actor', lambda: logging.getLogger('a.b').info('hello n=%d', 3))"
    done = run_python(code, ERGON_LOG_FORMAT="json")
    line = json.loads(done.stderr)
    assert (line["process"], line["logger"], line["message"]) == ("actor", "a.b", "hello n=3")


def test_sigterm_sets_the_stop_event_and_the_end_is_clean() -> None:
    code = (
        "def main():\n stop = install_stop()\n print('ready', flush=True)\n assert stop.wait(20)\nrun_main('x', main)"
    )
    command = [sys.executable, "-c", f"from broker.process.lifecycle import *\n{code}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metrics_and_health_are_served() -> None:
    registry = CollectorRegistry()
    Counter("ergon_test_events_total", "Events.", registry=registry).inc(3)
    state = [Health(False, {"phase": "starting"})]
    server = start_metrics("127.0.0.1", 0, lambda: state[0], registry)
    url = f"http://127.0.0.1:{server.port}"
    try:
        assert "ergon_test_events_total 3.0" in get(f"{url}/metrics")[1]
        assert get(f"{url}/healthz") == (503, '{"ok": false, "phase": "starting"}')
        state[0] = Health(True, {})
        assert get(f"{url}/healthz") == (200, '{"ok": true}')
        assert get(f"{url}/other")[0] == 404
    finally:
        server.close()


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ErgonError, match=f"127.0.0.1:{port} cannot be bound"):
            start_metrics("127.0.0.1", port, lambda: Health(True, {}))
