"""Orders to kill: carried out once, by whoever reaches the phase, on whom they name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.orders import DIRECTORY, ITSELF, Order, reach

ROOT = Path(__file__).parents[3]
REACHES = (
    "import sys; from pathlib import Path; from tests.chaos.orders import reach; reach(Path(sys.argv[1]), 'a', 'x')"
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / DIRECTORY).mkdir()
    return tmp_path


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_only_the_place_and_the_phase_that_an_order_names_carry_it_out(
    run_dir: Path, victim: subprocess.Popen[bytes]
) -> None:
    order = Order(run_dir, "a", "x")
    reach(run_dir, "a", "x")  # nothing was ordered
    order.place(victim.pid)
    reach(run_dir, "b", "x")
    reach(run_dir, "a", "y")
    assert order.outstanding
    assert (order.pid(), victim.poll()) == (victim.pid, None)
    reach(run_dir, "a", "x")
    assert victim.wait(10) == -9
    assert not order.outstanding


def test_a_process_that_is_ordered_to_kills_itself(run_dir: Path) -> None:
    order = Order(run_dir, "a", "x")
    order.place(ITSELF)
    assert subprocess.run([sys.executable, "-c", REACHES, str(run_dir)], cwd=ROOT, check=False).returncode == -9
    assert not order.outstanding
    assert subprocess.run([sys.executable, "-c", REACHES, str(run_dir)], cwd=ROOT, check=False).returncode == 0


def test_an_order_on_one_who_is_dead_stays_until_it_is_given_anew(
    run_dir: Path, victim: subprocess.Popen[bytes]
) -> None:
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    order = Order(run_dir, "a", "x")
    order.place(dead.pid)
    reach(run_dir, "a", "x")
    assert order.outstanding
    assert order.withdraw()
    order.place(victim.pid)
    reach(run_dir, "a", "x")
    assert victim.wait(10) == -9


def test_an_order_that_was_withdrawn_kills_nobody(run_dir: Path, victim: subprocess.Popen[bytes]) -> None:
    order = Order(run_dir, "a", "x")
    order.place(victim.pid)
    assert order.withdraw()
    assert not order.withdraw()
    reach(run_dir, "a", "x")
    assert victim.poll() is None
