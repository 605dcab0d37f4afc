"""Orders and drains as the injector gives them, to real processes that do nothing."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import Child
from tests.chaos.handovers import HANDOVER
from tests.chaos.injector import Injector
from tests.chaos.machine import Clocks, Disk
from tests.chaos.orders import DIRECTORY, WORKING, reach
from tests.chaos.schedule import Fault

NUM_TICKETS = 640


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / DIRECTORY).mkdir()
    return tmp_path


@pytest.fixture
def children(run_dir: Path) -> Iterator[dict[str, Child]]:
    names = ("broker", "actor-0", "actor-1")
    children = {name: Child(name, ("sleep", "60"), run_dir / f"{name}.log") for name in names}
    for child in children.values():
        child.start(time.monotonic())
    yield children
    for child in children.values():
        assert child.process is not None
        child.process.kill()
        child.process.wait()


def injector_of(run_dir: Path, children: dict[str, Child], num_trained: int = 0) -> Injector:
    disk, clocks = Disk(run_dir / "broker", lambda: None), Clocks(run_dir / "clocks")
    log = run_dir / "faults.jsonl"
    return Injector([], NUM_TICKETS, lambda: num_trained, children, {}, disk, clocks, log)


def process_of(child: Child) -> subprocess.Popen[bytes]:
    assert child.process is not None
    return child.process


def works(run_dir: Path, child: Child) -> None:
    (run_dir / f"{WORKING}-{child.name}").write_text(str(process_of(child).pid))


def test_an_actor_is_told_to_end_once_and_when_it_works(run_dir: Path, children: dict[str, Child]) -> None:
    injector, child = injector_of(run_dir, children), children["actor-0"]
    drain = Fault("drain", "actor", 1, 0.0)
    assert not injector._do_drain(drain)
    (run_dir / f"{WORKING}-actor-0").write_text("1")  # its former process did
    assert not injector._do_drain(drain)
    works(run_dir, child)
    assert injector._do_drain(drain)
    assert not injector._do_drain(drain)
    assert process_of(child).wait(10) == -15
    assert injector.drained == {process_of(child).pid}


def test_near_the_end_no_work_is_waited_for(run_dir: Path, children: dict[str, Child]) -> None:
    injector = injector_of(run_dir, children, NUM_TICKETS - 32)
    injector._release()
    assert injector._do_drain(Fault("drain", "actor", 1, 0.0, actor=1))
    assert process_of(children["actor-1"]).wait(10) == -15


def test_kills_in_handovers_wait_for_each_other(run_dir: Path, children: dict[str, Child]) -> None:
    """Or one fault would take the other's order for its own, and be given anew in its place."""
    injector = injector_of(run_dir, children)
    first = Fault("kill_handover", "broker", 1, 0.0, variant="handed_over")
    second = Fault("kill_handover", "broker", 1, 0.0, variant="continuing", actor=1)
    works(run_dir, children["actor-0"])
    works(run_dir, children["actor-1"])
    assert not injector._do_kill_handover(first)
    assert process_of(children["actor-0"]).wait(10) == -15, "the actor of the fault drains"
    assert not injector._do_kill_handover(second)
    broker = process_of(children["broker"])
    reach(run_dir, HANDOVER, "handed_over")
    assert broker.wait(10) == -9
    children["broker"].start(time.monotonic())
    assert not injector._do_kill_handover(second), "the first was carried out, and not yet seen to be"
    reach(run_dir, HANDOVER, "continuing")
    assert process_of(children["broker"]).poll() is None
    assert injector._do_kill_handover(first)
    assert process_of(children["actor-1"]).poll() is None
    assert not injector._do_kill_handover(second)
    assert process_of(children["actor-1"]).wait(10) == -15
    broker = process_of(children["broker"])
    reach(run_dir, HANDOVER, "continuing")
    assert broker.wait(10) == -9
    assert not injector._do_kill_handover(second), "there is no broker to look at"
    children["broker"].start(time.monotonic())
    assert injector._do_kill_handover(second)
