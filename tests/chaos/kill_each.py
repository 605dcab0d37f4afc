"""A real run in which every process is killed with SIGKILL once; the trained set must still equal the delivered one.

`python -m tests.chaos.kill_each [--run FILE] [--set KEY=VALUE ...]`. The last line is JSON: what was killed and when,
and the run's own count of what was lost and what counted twice.
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

TARGETS = {
    "actor": ("actors",),
    "broker": ("broker", "serve"),
    "relay": ("broker", "relay"),
    "learner": ("learner",),
}
POLL_S = 0.2


class RunFailedError(Exception):
    """The run did not end well."""


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill `target` a moment after the learner has finished `step`."""

    target: str
    step: int
    delay_s: float


def kill_schedule(num_steps: int, seed: int) -> list[Kill]:
    """Every target once, in random order, spread over the steps but the last one."""
    rng = random.Random(seed)
    targets = sorted(TARGETS)
    rng.shuffle(targets)
    last = max(1, num_steps - 1)
    return [Kill(t, 1 + i * (last - 1) // len(targets), rng.uniform(0, 3)) for i, t in enumerate(targets)]


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
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
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
            os.kill(pid, signal.SIGKILL)
            print(f"killed {kill.target} pid={pid} after step {step}", file=sys.stderr, flush=True)
            done.append({"target": kill.target, "step": step})
        time.sleep(POLL_S)
    return done


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
    """Run the quick start with four kills and print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("deploy/runs/quickstart.toml"))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--num-steps", type=int, default=10)
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
