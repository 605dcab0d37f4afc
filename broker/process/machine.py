"""What a process runs on: processor, memory, GPUs, versions of packages. Reads what the system says; measures nothing.

A GPU is asked of its driver's files, so that no process needs CUDA for it.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_CPU_INFO, _MEMORY_INFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_GPUS = Path("/proc/driver/nvidia/gpus")


def machine() -> dict[str, Any]:
    """system, python, cpu (its name), cores (that this process may use), memory_mb, gpus (their names)."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": _first(_CPU_INFO, r"model name\s*:\s*(.+)") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mb": int(_first(_MEMORY_INFO, r"MemTotal:\s*(\d+) kB") or 0) >> 10,
        "gpus": [_first(path, r"Model:\s*(.+)") or "unknown" for path in sorted(_GPUS.glob("*/information"))],
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of these packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _first(path: Path, pattern: str) -> str:
    """What the pattern's group matches first in a file of the system; empty where it does not, or there is none."""
    if not path.is_file():
        return ""
    found = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"))
    return found[1].strip() if found else ""
