"""Orders to kill a process in a phase of an update or of a handover: placed by the injector, carried out by whoever
reaches the phase. And the order to the learner to wait with its last batch, while `HOLD` is in the run's folder, and
what an actor says of itself: that it has episodes under way.

One file for each process that can reach a phase, and one for all handovers. It is gone once it was carried out. A
process that is ordered to kill itself dies by SIGKILL, at exactly that line of its work. Knows no fault and no
schedule.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

DIRECTORY = "orders"
HOLD = "hold"
WORKING = "working"
ITSELF = 0  # as a pid


class Order:
    """An order to `place` (a process's name): when it reaches `phase`, to kill a process."""

    def __init__(self, run_dir: Path, place: str, phase: str) -> None:
        self._path = run_dir / DIRECTORY / place
        self._phase = phase

    @property
    def outstanding(self) -> bool:
        """Whether nobody has carried it out yet."""
        return self._path.exists()

    def place(self, pid: int) -> None:
        """Give it, or give it anew: the victim may have another pid by now. Not to be called once it is carried out."""
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(f"{self._phase} {pid}")
        unfinished.replace(self._path)

    def pid(self) -> int | None:
        """Whose pid it names; None once it was carried out."""
        found = _read(self._path)
        return found[1] if found else None

    def withdraw(self) -> bool:
        """Take it back; whether it was still outstanding."""
        try:
            self._path.unlink()
        except FileNotFoundError:
            return False
        return True


def reach(run_dir: Path, place: str, phase: str) -> None:
    """Say that the process named `place` is in this phase; it may not return."""
    path = run_dir / DIRECTORY / place
    order = _read(path)
    if order is None or order[0] != phase:
        return
    pid = order[1] or os.getpid()
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it is dead already, or has just been withdrawn
        os.kill(pid, 0)
        path.unlink()
        os.kill(pid, signal.SIGKILL)


def _read(path: Path) -> tuple[str, int] | None:
    try:
        phase, _, pid = path.read_text().partition(" ")
    except FileNotFoundError:
        return None
    return phase, int(pid)


def say_working(run_dir: Path, place: str) -> None:
    """Say that this process, named `place`, has episodes under way."""
    (run_dir / f"{WORKING}-{place}").write_text(str(os.getpid()))


def is_working(run_dir: Path, place: str, pid: int) -> bool:
    """Whether the process with this pid, named `place`, has said so."""
    path = run_dir / f"{WORKING}-{place}"
    return path.exists() and path.read_text() == str(pid)
