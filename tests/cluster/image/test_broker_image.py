"""The slim image as buildah has built it (`make test-images`): what it is, and its processes answering.

Its containers are run by buildah in a chroot, with the image's own user and environment, on this machine's network.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_ports

AT = "ERGON_IMAGES"
IMAGE = "localhost/ergon-broker:test"
MOST_MB = 400  # beside the base
RUN = '[run]\nname = "x"\ndirectory = "/tmp/runs"\n[[environments]]\nname = "shop"\n'


@pytest.fixture(scope="module")
def directory() -> Path:
    path = Path(os.environ.get(AT, "/nowhere"))
    if not (path / "broker.json").exists():
        pytest.skip(f"no image in ${AT}: `make test-images` builds it")
    return path


def buildah(directory: Path, *words: str) -> list[str]:
    roots = ("--root", str(directory / "storage"), "--runroot", str(directory / "run"), "--storage-driver", "vfs")
    return ["buildah", *roots, *words]


@pytest.fixture(scope="module")
def container(directory: Path) -> Iterator[tuple[Path, str]]:
    made = subprocess.run(buildah(directory, "from", "--pull-never", IMAGE), capture_output=True, text=True, check=True)
    name = made.stdout.strip()
    yield directory, name
    subprocess.run(buildah(directory, "rm", name), check=True, capture_output=True)


def run(container: tuple[Path, str], *words: str) -> str:
    directory, name = container
    command = buildah(directory, "run", "--isolation", "chroot", "--network", "host", name, "--", *words)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_what_the_dockerfile_says(directory: Path) -> None:
    told: dict[str, Any] = json.loads((directory / "broker.json").read_text())
    config = told["OCIv1"]["config"]
    assert config["User"] == "10001:10001"
    assert config["Cmd"] == ["python", "-m", "broker", "--help"]


def test_its_user_is_nobody_and_has_no_torch_and_no_compiler(container: tuple[Path, str]) -> None:
    assert run(container, "id", "-u").strip() == "10001"
    size_mb = int(run(container, "du", "-sm", "/opt/ergon").split()[0])
    print(f"beside its base the image has {size_mb} MB")
    assert size_mb < MOST_MB
    found = run(
        container, "python", "-c", "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('vllm'))"
    )
    assert found.split() == ["None", "None"]
    assert run(container, "sh", "-c", "command -v gcc || echo none").strip() == "none"
    assert "ergon" in run(container, "ergon", "--help")
    assert (
        run(container, "python", "-c", "from broker.protocol.delta_loops import compiled as c; print(c)").strip()
        == "True"
    )


def test_its_bill_of_materials_names_what_python_imports_there(container: tuple[Path, str]) -> None:
    bill = json.loads((container[0] / "broker.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    named = {component["purl"] for component in bill["components"]}
    version = run(container, "python", "-c", "import msgspec; print(msgspec.__version__)").strip()
    assert f"pkg:pypi/msgspec@{version}" in named
    assert any(url.startswith("pkg:deb/debian/libc6@") for url in named)
    assert not any(url.startswith("pkg:pypi/torch@") for url in named)


@contextlib.contextmanager
def process(container: tuple[Path, str], script: str) -> Iterator[subprocess.Popen[str]]:
    """A container that runs this script, and is told to stop at the end."""
    directory, name = container
    command = buildah(directory, "run", "--isolation", "chroot", "--network", "host", name, "--", "sh", "-c", script)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as started:
        try:
            yield started
        finally:
            started.send_signal(signal.SIGTERM)
            started.wait(60)


@pytest.mark.parametrize("words", [("serve",), ("relay",)], ids=["broker", "relay"])
def test_its_processes_answer_their_health_check(container: tuple[Path, str], words: tuple[str, ...]) -> None:
    port, metrics = free_ports(2)
    sets = {
        "broker.port": port,
        "weights.relay_port": port,
        "metrics.broker_port": metrics,
        "metrics.relay_port": metrics,
    }
    overrides = " ".join(f"--set {key}={value}" for key, value in sets.items())
    serve = f"exec python -m broker {words[0]} --config /tmp/run.toml {overrides}"
    script = f"printf %s {shlex.quote(RUN)} > /tmp/run.toml && {serve}"
    with process(container, script) as started:
        deadline = time.monotonic() + 60
        while True:
            assert started.poll() is None, started.stdout.read() if started.stdout else ""
            assert time.monotonic() < deadline, "no answer"
            with contextlib.suppress(urllib.error.URLError, OSError):
                path = "healthz" if words == ("serve",) else "metrics"  # a relay is ready when it has a version
                with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/{path}", timeout=2) as reply:
                    assert reply.status == 200
                    break
            time.sleep(0.1)
