"""What a process says it runs on is what this system says."""

from __future__ import annotations

import os
from importlib.metadata import version

from broker.process.machine import machine, versions


def test_this_machine() -> None:
    found = machine()
    assert found["cores"] == len(os.sched_getaffinity(0))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert abs(found["memory_mb"] - (pages >> 20)) <= 1
    assert found["cpu"]
    assert isinstance(found["gpus"], list)


def test_versions_of_what_is_installed() -> None:
    assert versions(("numpy", "no-such-package")) == {"numpy": version("numpy")}
