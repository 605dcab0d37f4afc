"""Large blocks that were freed are used again without the kernel's pages being fetched anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SCRIPT = """
import resource, sys
if sys.argv[1] == "keep":
    from broker.process.memory import keep_freed_memory
    keep_freed_memory()
bytearray(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block = bytearray(8 << 20)
    block[:] = b"x" * len(block)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", SCRIPT, how]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def test_freed_blocks_cost_no_page_faults_any_more() -> None:
    pages = 20 * (8 << 20) // 4096
    assert faults("plain") > pages // 2
    assert faults("keep") < pages // 5
