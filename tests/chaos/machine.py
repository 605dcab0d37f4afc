"""What of the machine can be broken for one run: the disk under the broker's store, and the clocks of its processes.

Owns a small file system and a preloaded library, and takes both away again. Where the machine does not allow one of
them it says why, and the run goes without those faults: nothing is pretended.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

DISK_MB = 64
PAGE_BYTES = 4096
SOURCE = Path(__file__).with_name("clock_shift.c")


class Disk:
    """The file system of the broker's store: a small tmpfs where we may mount one; otherwise a limit on file sizes.

    `broker_pid` is for the latter: RLIMIT_FSIZE refuses the broker's writes beyond the first page of any file.
    """

    def __init__(self, directory: Path, broker_pid: Callable[[], int | None]) -> None:
        self._directory, self._broker_pid = directory, broker_pid
        self._filler = directory / "filler"
        self._num_full = 0
        self.mounted = False

    def mount(self) -> None:
        """Put the small file system there, if the machine allows it."""
        self._directory.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m,mode=700", "ergon-chaos", str(self._directory)]
        if shutil.which("mount") is not None and os.geteuid() == 0:
            self.mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0

    def fill(self, leave_mb: int) -> bool:
        """Take all room but `leave_mb`; False where there is no broker to limit at this moment."""
        if not self.mounted:
            return self._limit()
        self._num_full += 1
        self._take(leave_mb << 20)
        return True

    def refill(self) -> None:
        """Take what became free meanwhile, while the disk is to be full."""
        if self.mounted and self._num_full:
            self._take(0)

    def _take(self, leave_bytes: int) -> None:
        with self._filler.open("ab") as file:
            num_bytes = shutil.disk_usage(self._directory).free - leave_bytes
            while num_bytes > 0:
                try:
                    os.posix_fallocate(file.fileno(), file.tell(), num_bytes)
                    break
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    num_bytes = shutil.disk_usage(self._directory).free - leave_bytes

    def free(self) -> None:
        """Make room again, once everyone who filled it has said so."""
        self._num_full = max(0, self._num_full - 1)
        if self.mounted and not self._num_full:
            self._filler.unlink(missing_ok=True)
        elif not self.mounted and (pid := self._broker_pid()) is not None:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def heal(self) -> None:
        """Make room, whoever has filled it."""
        self._num_full = 0
        self.free()

    def unmount(self, keep: bool) -> None:
        """Take the file system away; what is on it stays in the directory where `keep` says so."""
        if not self.mounted:
            return
        self._filler.unlink(missing_ok=True)
        saved = self._directory.with_name(self._directory.name + ".kept")
        if keep:
            shutil.copytree(self._directory, saved)
        subprocess.run(["umount", "-l", str(self._directory)], check=True)
        self.mounted = False
        if keep:
            self._directory.rmdir()
            saved.rename(self._directory)

    def _limit(self) -> bool:
        pid = self._broker_pid()
        if pid is None:
            return False
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (PAGE_BYTES, resource.RLIM_INFINITY))
        return True


class Clocks:
    """A wall clock of its own for every process, by a preloaded library; `problem` where it cannot be built."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._library = directory / "clock_shift.so"
        self.problem = ""

    def build(self) -> None:
        """Compile the library."""
        self._directory.mkdir(parents=True)
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            self.problem = "no C compiler"
            return
        command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(self._library), str(SOURCE), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            self.problem = f"{compiler} failed: {done.stderr.strip()[-200:]}"

    def environment(self, name: str) -> list[str]:
        """NAME=VALUE words that give a process its own clock."""
        if self.problem:
            return []
        path = self._path(name)
        if not path.exists():
            path.write_bytes(struct.pack("q", 0))
        return [f"LD_PRELOAD={self._library}", f"ERGON_CLOCK_SHIFT_FILE={path}"]

    def jump(self, name: str, seconds: float) -> None:
        """Set a process's wall clock forward or back by so much, now and for its successors."""
        with self._path(name).open("r+b") as file:
            (shift,) = struct.unpack("q", file.read(8))
            file.seek(0)
            file.write(struct.pack("q", shift + int(seconds)))

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.shift"
