"""A real run in which every process is killed with SIGKILL; the trained set must still equal the delivered one.

`python -m tests.chaos.kill_each [--run FILE] [--set KEY=VALUE ...]`. Each process is killed once at some moment, and
learner, relay and actor in an update of the weights, as soon as their log says how far that is. The last line is JSON:
what was killed and when, and the run's own count of what was lost and what counted twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.environment import environment

TARGETS = {
    "actor": ("actors",),
    "broker": ("broker", "serve"),
    "relay": ("broker", "relay"),
    "learner": ("learner",),
}
LOGS = {target: f"{target}.log" for target in TARGETS} | {"actor": "actor-0.log"}
# Lines of a log after which the process is killed at once: the learner's as others fetch from it, the relay's as the
# actor does, the actor's as it prepares, and as it pauses and switches.
UPDATE_LINES = (
    ("learner", "published version="),
    ("relay", "serving version="),
    ("actor", "fetched version="),
    ("actor", "prepared version="),
)
POLL_S = 0.2
LINE_POLL_S = 0.005


class RunFailedError(Exception):
    """The run did not end well."""


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill `target` a moment after the learner has finished `step`; `line`: when its log next has this line."""

    target: str
    step: int
    delay_s: float
    line: str = ""


def kill_schedule(num_steps: int, seed: int) -> list[Kill]:
    """Every target once, and once at each of UPDATE_LINES, in random order, spread over the steps but the last two."""
    rng = random.Random(seed)
    rows = [*((target, "") for target in sorted(TARGETS)), *UPDATE_LINES]
    rng.shuffle(rows)
    last = max(1, num_steps - 2)  # after the last kill an update is still to come
    return [
        Kill(target, 1 + i * (last - 1) // len(rows), rng.uniform(0, 3), line) for i, (target, line) in enumerate(rows)
    ]


def run_with_kills(
    run_file: Path, overrides: Sequence[str], kills: Sequence[Kill], directory: Path, timeout_s: float
) -> dict[str, Any]:
    """Start the run, carry out the kills, return its summary with the list of kills done.

    Raises RunFailedError where the run ends badly, too late, or before every kill was done.
    """
    sets = [argument for item in overrides for argument in ("--set", item)]
    command = [sys.executable, "-m", "deploy", "run", str(run_file), "--plain", *sets]
    command += ["--set", f"run.directory={directory}"]
    deadline = time.monotonic() + timeout_s
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as supervisor:
        done = _carry_out(supervisor, list(kills), directory, deadline)
        output, _ = supervisor.communicate(timeout=max(1.0, deadline - time.monotonic()))
    if supervisor.returncode != 0:
        raise RunFailedError(f"the run ended with {supervisor.returncode} after {done}")
    if len(done) != len(kills):
        raise RunFailedError(f"the run ended before all kills were done: {done}")
    return {"kills": done, "summary": json.loads(output.strip().splitlines()[-1])}


def _carry_out(
    supervisor: subprocess.Popen[str], kills: list[Kill], directory: Path, deadline: float
) -> list[dict[str, Any]]:
    done: list[dict[str, Any]] = []
    while kills and supervisor.poll() is None:
        if time.monotonic() > deadline:
            supervisor.terminate()
            raise RunFailedError(f"the run took too long; kills done: {done}")
        step = newest_step(directory)
        if step >= kills[0].step:
            kill = kills.pop(0)
            time.sleep(kill.delay_s)
            pid = find_child(supervisor.pid, TARGETS[kill.target])
            if kill.line and not wait_for_line(directory, LOGS[kill.target], kill.line, deadline, supervisor):
                return done
            os.kill(pid, signal.SIGKILL)
            print(f"killed {kill.target} pid={pid} after step {step} {kill.line}", file=sys.stderr, flush=True)
            done.append({"target": kill.target, "step": step, "line": kill.line})
        time.sleep(POLL_S)
    return done


def wait_for_line(directory: Path, log: str, text: str, deadline: float, supervisor: subprocess.Popen[str]) -> bool:
    """Wait until the log gets another line with this text; False where the run ends or time is up before."""
    (path,) = directory.glob(f"*/logs/{log}")
    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(0, os.SEEK_END)
        rest = ""
        while time.monotonic() < deadline and supervisor.poll() is None:
            rest = rest.rpartition("\n")[2] + file.read()
            if text in rest:
                return True
            time.sleep(LINE_POLL_S)
    return False


def newest_step(directory: Path) -> int:
    """The highest step in any metrics.jsonl below the directory; 0 before the first."""
    newest = 0
    for path in directory.glob("*/metrics.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                if record.get("event") == "step":
                    newest = max(newest, int(record["step"]))
    return newest


def find_child(parent: int, modules: Sequence[str], timeout_s: float = 60.0) -> int:
    """The pid of the supervisor's child that runs `python -m MODULES...`, waiting for it where it is restarting."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
                arguments = (path.parent / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue  # it ended while we looked
            if int(fields[1]) == parent and arguments[1 : 2 + len(modules)] == ["-m", *modules]:
                return int(path.parent.name)
        time.sleep(POLL_S)
    raise RunFailedError(f"no process runs {' '.join(modules)} below the supervisor")


def main() -> None:
    """Run the quick start with eight kills and print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("deploy/runs/quickstart.toml"))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--num-steps", type=int, default=14)
    parser.add_argument("--directory", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--timeout-s", type=float, default=1800)
    arguments = parser.parse_args()
    print(f"seed={arguments.seed}", file=sys.stderr, flush=True)
    directory = arguments.directory / f"seed-{arguments.seed}-{int(time.time())}"
    overrides = [f"learner.num_steps={arguments.num_steps}", *arguments.set]
    kills = kill_schedule(arguments.num_steps, arguments.seed)
    result = run_with_kills(arguments.run, overrides, kills, directory, arguments.timeout_s)
    trajectories = result["summary"]["trajectories"]
    verdict = {
        "faults": len(result["kills"]),
        "kills": result["kills"],
        **trajectories,
        "seed": arguments.seed,
        "restarts": result["summary"]["restarts"],
        "wall_s": result["summary"]["wall_s"],
    }
    print(json.dumps(verdict))
    sys.exit(0 if trajectories["lost"] == 0 == trajectories["duplicated"] else 1)


if __name__ == "__main__":
    main()
