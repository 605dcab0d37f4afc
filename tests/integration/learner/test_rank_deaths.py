"""Ranks that die, and the launcher: nobody is left behind, and an end is an end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.environment import environment
from tests.ports import free_port
from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[3]
PATIENCE_S = 90.0
# A trainer without a model: ranks that wait for commands.
IDLE = """
import sys
from learner.training.ranks import Ranks
ranks = Ranks(0, float(sys.argv[1]))
print("ready", flush=True)
if ranks.rank:
    while True:
        print(*ranks.listen(), flush=True)
import time
time.sleep(600)
"""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE_S} s"
        time.sleep(0.1)


def start_idle(world_size: int, timeout_s: float) -> list[subprocess.Popen[str]]:
    """Ranks without a launcher, ready."""
    port = free_port()
    ranks = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        environ = {**environment(), "MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}
        command = [sys.executable, "-c", IDLE, str(timeout_s)]
        ranks.append(
            subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    for process in ranks:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    return ranks


def test_a_rank_that_dies_ends_all_without_a_launcher() -> None:
    """Rank 0 notices by its next beat, the other because rank 0 is gone."""
    ranks = start_idle(3, timeout_s=4.0)
    try:
        ranks[2].kill()
        assert ranks[0].wait(PATIENCE_S) == 1
        assert ranks[1].wait(PATIENCE_S) == 1
        (_, said_0), (_, said_1) = (process.communicate() for process in ranks[:2])
        assert "a rank is gone, so this process ends" in said_0
        assert "RuntimeError" in said_1
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_a_rank_0_that_says_nothing_is_given_up() -> None:
    """Stopped, not dead: its connection stays, its beats do not come."""
    ranks = start_idle(2, timeout_s=4.0)
    try:
        time.sleep(6.0)  # longer than the time-out: beats are heard, and are no commands
        assert ranks[1].poll() is None
        ranks[0].send_signal(signal.SIGSTOP)
        assert ranks[1].wait(PATIENCE_S) == 1
        out, said = ranks[1].communicate()
        assert out == ""
        assert "Timed out" in said
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


class Run:
    """A broker and a learner of two ranks with its launcher, as `ergon run` starts them."""

    def __init__(self, directory: Path, extra: str = "") -> None:
        make_tiny_model(directory / "model")
        ports = [free_port() for _ in range(6)]
        self.config = directory / "run.toml"
        self.config.write_text(
            f"[run]\nname = 'ranks'\ndirectory = '{directory / 'run'}'\n"
            f"[model]\npath = '{directory / 'model'}'\n"
            f"[broker]\nport = {ports[0]}\n[weights]\nport = {ports[1]}\nrelay_port = {ports[2]}\n"
            f"[metrics]\nbroker_port = {ports[3]}\nlearner_port = {ports[4]}\n"
            f"[learner]\nranks = 2\nzero_stage = 2\nmaster_port = {ports[5]}\n{extra}\n"
            "[[environments]]\nname = 'shop'\n"
        )
        self.log = directory / "learner.log"
        self.broker = self._start("broker", "serve", log=directory / "broker.log")

    def start_learner(self) -> subprocess.Popen[bytes]:
        return self._start("learner", log=self.log)

    def _start(self, module: str, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", module, *arguments, "--config", str(self.config)]
        with log.open("ab") as file:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [child for child in psutil.Process(launcher.pid).children() if "learner" in child.cmdline()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(tmp_path_factory.mktemp("run"))
    yield made  # type: ignore[misc]
    made.broker.kill()
    made.broker.wait()


@pytest.mark.parametrize("victim", ["launcher is asked", "rank", "launcher"])
def test_a_learner_of_two_ranks_ends_whole(run: Run, victim: str) -> None:
    num_ready = run.said().count("learner is ready")
    launcher = run.start_learner()
    try:
        wait_until(lambda: launcher.poll() is not None or run.said().count("learner is ready") > num_ready, "a start")
        assert launcher.poll() is None, run.said()[-3000:]
        ranks = ranks_of(launcher)
        assert len(ranks) == 2
        if victim == "launcher is asked":
            launcher.send_signal(signal.SIGTERM)
        elif victim == "rank":
            ranks[1].kill()
        else:
            launcher.kill()
        code = launcher.wait(PATIENCE_S)
        _, alive = psutil.wait_procs(ranks, PATIENCE_S)
        assert not alive
        assert code == {"launcher is asked": 0, "rank": 1, "launcher": -signal.SIGKILL}[victim], run.said()[-3000:]
    finally:
        for process in [launcher, *ranks_of(launcher)] if launcher.poll() is None else [launcher]:
            process.kill()
        launcher.wait()


def test_a_users_mistake_is_one_sentence_and_its_code(run: Run) -> None:
    run.config.write_text(run.config.read_text().replace("/model'", "/absent'", 1))
    launcher = run.start_learner()
    assert launcher.wait(PATIENCE_S) == 2
    assert "error: model.path is" in run.said()
