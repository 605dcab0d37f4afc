"""Free ports for tests that start processes of a run.

They lie outside the range from which the kernel gives ports to who asks for any, so nobody takes one between the choice
and the bind of the process that it is for; and all test runs of a user draw from one sequence, so none is given twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

PORT_KEYS = (
    "broker.port",
    "weights.port",
    "weights.relay_port",
    "learner.master_port",
    "metrics.broker_port",
    "metrics.relay_port",
    "metrics.learner_port",
    "metrics.actor_port",
    "gateway.port",
)
LOWEST, HIGHEST = 10_000, 65_535


def own_range(kernels: tuple[int, int]) -> range:
    """The wider of the two ranges beside the kernel's own."""
    below, above = range(LOWEST, kernels[0]), range(kernels[1] + 1, HIGHEST + 1)
    return max(below, above, key=len)


def free_ports(num: int) -> list[int]:
    """Ports of loopback that nobody holds, all different, and different from those of the calls before."""
    low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    ports = own_range((int(low), int(high)))
    with _sequence() as sequence:
        start = int(sequence.read_text() or 0)
        tried = itertools.count(start)
        found: list[int] = []
        while len(found) < num:
            at = next(tried)
            if at - start == len(ports):
                raise OSError(f"{len(found)} of the {num} ports wanted are free in {ports.start}-{ports.stop - 1}")
            if _free(port := ports[at % len(ports)]):
                found.append(port)
        sequence.write_text(str(next(tried)))
    return found


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]


def port_overrides() -> list[str]:
    """--set values that put every port of a run on a free one."""
    return [f"{key}={port}" for key, port in zip(PORT_KEYS, free_ports(len(PORT_KEYS)), strict=True)]


@contextlib.contextmanager
def _sequence() -> Iterator[Path]:
    """The file that says how many ports were tried so far, held."""
    path = Path(tempfile.gettempdir()) / f"ergon-test-ports-{os.getuid()}"
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield path


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
