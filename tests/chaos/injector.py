"""Carries out a schedule on a live run: signals, broken links, a full disk, jumping clocks.

Owns one thread. Waits for a process that is just being restarted, so that every fault it counts has hit something;
never restarts anything itself and never looks at results.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deploy.local import Child
from tests.chaos.handovers import HANDOVER
from tests.chaos.machine import Clocks, Disk
from tests.chaos.orders import HOLD, ITSELF, Order, is_working
from tests.chaos.proxy import Link
from tests.chaos.schedule import ORDERED, Fault

logger = logging.getLogger(__name__)

TICK_S = 0.02
LOW_DISK_MB = 2
REFILL_S = 0.2


class Injector(threading.Thread):
    """`num_trained` says how far the work is; what was done is in `done` and, line by line, in `log`."""

    def __init__(
        self,
        schedule: Sequence[Fault],
        num_tickets: int,
        num_trained: Callable[[], int],
        children: Mapping[str, Child],
        links: Mapping[str, Link],
        disk: Disk,
        clocks: Clocks,
        log: Path,
    ) -> None:
        super().__init__(name="injector", daemon=True)
        self.done: list[Fault] = []
        self.drained: set[int] = set()  # pids of processes that were told to end
        self.error: BaseException | None = None
        self._schedule, self._num_tickets, self._num_trained = list(schedule), num_tickets, num_trained
        self._children, self._links, self._disk, self._clocks, self._log = children, links, disk, clocks, log
        self._run_dir = log.parent
        self._orders: dict[int, Order] = {}  # by the identity of the fault
        self._ordered_at: set[str] = set()  # places that have one
        # The work does not end before these are done; a kill in an update, or handover, needs one that is to come.
        self._num_held = sum(fault.kind not in ORDERED for fault in schedule)
        self._hold = self._run_dir / HOLD
        if self._num_held:
            self._hold.touch()
        self._due: list[tuple[float, int, Callable[[], bool]]] = []
        self._numbers = itertools.count()
        self._nearly_done = False
        self._ended = threading.Event()
        self._started_at = time.monotonic()

    def finish(self) -> None:
        """Stop injecting and take back whatever would still end by itself."""
        self._ended.set()
        if self.ident is not None:
            self.join()
        self._hold.unlink(missing_ok=True)
        for child in self._children.values():
            _signal(child, signal.SIGCONT)
        for link in self._links.values():
            link.heal()
        while self._due:
            heapq.heappop(self._due)
        for order in self._orders.values():
            order.withdraw()
        self._disk.heal()

    def run(self) -> None:
        try:
            while not self._ended.wait(TICK_S):
                self._release()
                now = time.monotonic()
                while self._due and self._due[0][0] <= now:
                    _, _, act = heapq.heappop(self._due)
                    if not act():
                        self._at(now + TICK_S, act)
        except BaseException as error:
            self.error = error
            raise

    def _release(self) -> None:
        """Faults whose moment of the work has come get their delay; near the end all that are left."""
        num_trained = self._num_trained()
        self._nearly_done = nearly_done = num_trained >= self._num_tickets - 32
        while self._schedule and (nearly_done or self._schedule[0].at_tickets <= num_trained):
            fault = self._schedule.pop(0)
            delay_s = 0.0 if nearly_done else fault.delay_s
            self._at(time.monotonic() + delay_s, functools.partial(self._inject, fault))

    def _at(self, moment: float, act: Callable[[], bool]) -> None:
        heapq.heappush(self._due, (moment, next(self._numbers), act))

    def _later(self, seconds: float, act: Callable[[], object]) -> None:
        def once() -> bool:
            act()
            return True

        self._at(time.monotonic() + seconds, once)

    def _inject(self, fault: Fault) -> bool:
        """Whether it could be done now."""
        if not getattr(self, f"_do_{fault.kind}")(fault):
            return False
        self.done.append(fault)
        self._num_held -= fault.kind not in ORDERED
        if not self._num_held:
            self._hold.unlink(missing_ok=True)
        with self._log.open("a") as file:
            at_s = round(time.monotonic() - self._started_at, 2)
            names = ("kind", "place", "seconds", "variant", "pair")
            file.write(json.dumps({"at_s": at_s} | {name: getattr(fault, name) for name in names}) + "\n")
        return True

    def _do_kill(self, fault: Fault) -> bool:
        return _signal(self._children[fault.place], signal.SIGKILL)

    def _do_kill_update(self, fault: Fault) -> bool:
        """Give the order, and look whether it was carried out: by the victim itself, or for a relay, which runs no
        line of the tests, by whoever it is dealing with."""
        if fault.target != "relay":
            return self._ordered(fault, fault.place, fault.variant, ITSELF)
        place, phase = {"fetching": ("learner", "published"), "serving": ("actor-0", "fetching")}[fault.variant]
        pid = _pid(self._children["relay"])
        return pid is not None and self._ordered(fault, place, phase, pid)

    def _do_kill_handover(self, fault: Fault) -> bool:
        """Give the order, and let an actor drain, again and again where it had nothing to hand over, until an actor
        has carried it out: on itself, or on the broker, which runs no line of the tests."""
        pid = ITSELF if fault.target == "actor" else _pid(self._children[fault.target])
        if pid is None:
            return False
        if self._ordered(fault, HANDOVER, fault.variant, pid):
            return True
        if id(fault) in self._orders:
            self._drain(f"actor-{fault.actor}")
        return False

    def _ordered(self, fault: Fault, place: str, phase: str, pid: int) -> bool:
        """Whether the order to kill this process was carried out; it is given as soon as no other fault has one at this
        place, and that was seen to be carried out."""
        order = self._orders.get(id(fault))
        if order is None:
            if place not in self._ordered_at:
                self._ordered_at.add(place)
                order = self._orders[id(fault)] = Order(self._run_dir, place, phase)
                order.place(pid)
            return False
        named = order.pid()
        if named is not None and named != pid and order.withdraw():
            order.place(pid)  # the victim died of something else and has another pid now
        if order.outstanding:
            return False
        self._ordered_at.discard(place)
        return True

    def _do_drain(self, fault: Fault) -> bool:
        return self._drain(fault.place, at_once=self._nearly_done)

    def _drain(self, place: str, *, at_once: bool = False) -> bool:
        """Tell an actor to end, as Kubernetes would; once, and when it has episodes under way, or `at_once`."""
        child = self._children[place]
        pid = _pid(child)
        if pid is None or pid in self.drained or not (at_once or is_working(self._run_dir, place, pid)):
            return False
        self.drained.add(pid)
        return _signal(child, signal.SIGTERM)

    def _do_stop(self, fault: Fault) -> bool:
        child = self._children[fault.place]
        if not _signal(child, signal.SIGSTOP):
            return False
        self._later(fault.seconds, lambda: _signal(child, signal.SIGCONT))
        return True

    _do_stop_long = _do_stop

    def _do_reset(self, fault: Fault) -> bool:
        link = self._links[fault.target]
        if not link.num_connections:
            return False
        link.reset()
        return True

    def _do_stall(self, fault: Fault) -> bool:
        self._links[fault.target].stall(fault.variant, fault.seconds)
        return True

    def _do_black_hole(self, fault: Fault) -> bool:
        self._links[fault.target].black_hole(fault.seconds)
        return True

    def _do_disk_full(self, fault: Fault) -> bool:
        if not self._fill(0, fault.seconds):
            return False
        if fault.variant == "greedy":  # as a neighbour whose log grows
            for n in range(1, int(fault.seconds / REFILL_S) + 1):
                self._later(n * REFILL_S, self._disk.refill)
        return True

    def _do_disk_low(self, fault: Fault) -> bool:
        return self._fill(LOW_DISK_MB, fault.seconds)

    def _fill(self, leave_mb: int, seconds: float) -> bool:
        if not self._disk.fill(leave_mb):
            return False
        self._later(seconds, self._disk.free)
        return True

    def _do_clock(self, fault: Fault) -> bool:
        self._clocks.jump(fault.place, fault.seconds)
        return True


def _pid(child: Child) -> int | None:
    """The pid of a child's process, where it has one at this moment."""
    process = child.process
    return None if process is None or process.poll() is not None else process.pid


def _signal(child: Child, number: signal.Signals) -> bool:
    """Send a signal to a child's process; False where there is none at this moment."""
    pid = _pid(child)
    if pid is None:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
