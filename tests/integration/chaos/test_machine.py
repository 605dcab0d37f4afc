"""The faults themselves: a link, a disk and a clock do what the matrix says they do."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.store.datafile import FILE_NAME
from tests.chaos.machine import Clocks, Disk
from tests.chaos.proxy import Link, Network
from tests.ports import free_ports

WRITER = """
import sys
path = sys.argv[1]
for line in sys.stdin:
    try:
        with open(path, "ab", buffering=0) as file:
            num = file.write(bytes(int(line)))
        print("written" if num == int(line) else "refused", flush=True)
    except OSError as error:
        print("refused", flush=True)
"""
CLOCK = "import sys, time\nfor line in sys.stdin: print(time.time(), time.monotonic(), flush=True)"


@contextlib.contextmanager
def child(*command: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def ask(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.fixture
def link() -> Iterator[Link]:
    """A link to a server that sends everything back."""
    listen_port, target_port = free_ports(2)
    with socket.create_server(("127.0.0.1", target_port)) as server:

        def echo() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=_echo, args=(connection,), daemon=True).start()

        threading.Thread(target=echo, daemon=True).start()
        link = Link("client-server", listen_port, target_port)
        with Network([link]):
            yield link


def _echo(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        while data := connection.recv(4096):
            connection.sendall(data)


@contextlib.contextmanager
def connected(link: Link) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", link.listen_port), timeout=20) as client:
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"
        yield client


def test_a_reset_ends_the_connection_and_the_next_one_works(link: Link) -> None:
    with connected(link) as client:
        link.reset()
        with pytest.raises(ConnectionResetError):
            assert client.recv(1) == b"anything but an orderly end"
    with connected(link):
        assert link.num_connections == 1


@pytest.mark.parametrize("direction", ["up", "down", "both"])
def test_a_stall_delays_and_loses_nothing(link: Link, direction: str) -> None:
    with connected(link) as client:
        link.stall(direction, 3600.0)
        client.sendall(b"later")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)
        link.heal()
        client.settimeout(20)
        assert client.recv(5) == b"later"


def test_a_black_hole_swallows_and_resets_afterwards(link: Link) -> None:
    with connected(link) as client:
        started = time.monotonic()
        link.black_hole(0.5)
        client.sendall(b"lost")
        with pytest.raises(ConnectionResetError):
            assert client.recv(1) == b"anything"
        assert time.monotonic() - started >= 0.4
    time.sleep(max(0.0, started + 0.6 - time.monotonic()))  # whoever comes before the end is reset, too
    with connected(link):
        pass


@pytest.mark.parametrize("may_mount", [True, False])
def test_a_full_disk_refuses_writes_until_it_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may_mount: bool
) -> None:
    if not may_mount:
        monkeypatch.setattr("os.geteuid", lambda: 1000)
    directory = tmp_path / "broker"
    pids: list[int] = []
    disk = Disk(directory, lambda: pids[0])
    disk.mount()
    try:
        with child(sys.executable, "-c", WRITER, str(directory / FILE_NAME)) as writer:
            pids.append(writer.pid)
            assert ask(writer, "100000") == "written"
            assert disk.fill(0)
            assert ask(writer, "100000") == "refused"
            disk.free()
            assert ask(writer, "100000") == "written"
    finally:
        disk.unmount(keep=False)
    assert not disk.mounted


def test_a_clock_jumps_and_the_monotonic_one_does_not(tmp_path: Path) -> None:
    clocks = Clocks(tmp_path / "clocks")
    clocks.build()
    if clocks.problem:
        pytest.skip(clocks.problem)
    with child("env", *clocks.environment("broker"), sys.executable, "-c", CLOCK) as process:
        wall, monotonic = map(float, ask(process, "").split())
        clocks.jump("broker", -3600)
        later_wall, later_monotonic = map(float, ask(process, "").split())
    assert -3600 <= later_wall - wall < -3000
    assert 0 <= later_monotonic - monotonic < 600
