"""Ergon's side: `ergon run` as a user runs it, watched from outside.

A snapshot is what a checkpoint holds, linked out of it as soon as it is complete, at no cost; the run pays for writing
its checkpoints. Owns no figure but the times.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.bench.endtoend.plan import ROOT, RUN, Course, Snapshot
from tests.ports import port_overrides

POLL_S = 0.5
GRACE_S = 60.0
EXTRA = ["eval.tasks=0", "eval.every=0", "learner.keep_checkpoints=3"]


def train(
    model: Path, place: Path, seed: int, num_steps: int, every: int, run: Path = RUN, more: Sequence[str] = ()
) -> Course:
    """Reinforcement learning from this model. more: further --set values. Raises RuntimeError where the run fails."""
    overrides = [f"model.path={model}", f"learner.num_steps={num_steps}", f"learner.checkpoint_every={every}", *more]
    return _watched(place, seed, [*overrides, "learner.warm_start.episodes=0"], _is_trained, run)


def warm_start(model: Path, place: Path, seed: int) -> Path:
    """The weights of the main job's warm start: a run that ends soon after it. One snapshot file."""
    course = _watched(place, seed, [f"model.path={model}", "learner.num_steps=1"], _is_warm)
    return Path(course.snapshots[0].file)


def _is_trained(state: dict[str, Any]) -> bool:
    """Whether a checkpoint holds what reinforcement learning made."""
    return bool(state["step"] > 0)


def _is_warm(state: dict[str, Any]) -> bool:
    """Whether a checkpoint holds what the warm start made, and nothing more."""
    return state["phase"] in ("after_warm_start", "train") and state["step"] == 0


def _watched(
    place: Path, seed: int, overrides: list[str], wanted: Callable[[dict[str, Any]], bool], run: Path = RUN
) -> Course:
    """A run, from its command to its end, and the weights of its wanted checkpoints, one for each number of steps."""
    settings = [f"run.seed={seed}", "run.name=run", f"run.directory={place}", *EXTRA, *port_overrides(), *overrides]
    command = [sys.executable, "-m", "deploy", "run", str(run), "--plain"]
    command += [word for setting in settings for word in ("--set", setting)]
    place.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(place / "run", ignore_errors=True)
    snapshots: dict[int, Snapshot] = {}
    cpu_s: dict[int, float] = {}  # by process
    started = time.time()
    with (place / "run.log").open("wb") as log, _process(command, log) as process:
        while process.poll() is None:
            time.sleep(POLL_S)
            _link_new(place, wanted, started, snapshots)
            _note_cpu(process.pid, cpu_s)
    _link_new(place, wanted, started, snapshots)
    if process.returncode:
        raise RuntimeError(f"the run failed ({process.returncode}): {(place / 'run.log').read_text()[-2000:]}")
    return Course(_without_start(place, list(snapshots.values()), started), sum(cpu_s.values()))


@contextmanager
def _process(command: list[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ))
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _note_cpu(pid: int, cpu_s: dict[int, float]) -> None:
    """The CPU seconds of a process and all below it, so far: some of them are nobody's children at the end."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                cpu_s[process.pid] = times.user + times.system


def _link_new(
    place: Path, wanted: Callable[[dict[str, Any]], bool], started: float, snapshots: dict[int, Snapshot]
) -> None:
    """Keep the weights of checkpoints that have become visible, before the run forgets them."""
    for directory in sorted((place / "run" / "checkpoints").glob("[0-9]*")):
        try:
            state = json.loads((directory / "state.json").read_text())
            step = int(state["step"])
            weights = next(directory.rglob("mp_rank_00_model_states.pt"), None)
            if step in snapshots or weights is None or not wanted(state):
                continue
            visible = directory.stat().st_ctime  # of its rename
            target = place / f"weights-{step:06d}.pt"
            for old in (target, target.with_suffix(".safetensors")):
                old.unlink(missing_ok=True)
            os.link(weights, target)
        except FileNotFoundError:  # it is being removed
            continue
        snapshots[step] = Snapshot(step, visible - started, 0.0, str(target))


def _without_start(place: Path, snapshots: list[Snapshot], started: float) -> list[Snapshot]:
    """The snapshots with the seconds since the learner was ready, which its first line of metrics tells."""
    with (place / "run" / "metrics.jsonl").open() as lines:
        begun = json.loads(lines.readline())["time"]
    return [s._replace(training_s=s.wall_s - (begun - started)) for s in snapshots]
