"""Runs a program in a sandbox: no network but the way to the policy, no file of the host but what is mounted.

The gateway's Unix socket is shown in the sandbox; `launcher.py` makes a port of it there. Never weaker than the
sandbox: without bubblewrap nothing runs.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from envs.program.launcher import TIMED_OUT
from envs.program.program import TEXT_FILE, Bounds, Program, ProgramResult
from envs.sandbox import Sandbox
from envs.sandbox.bubblewrap import WORK_DIR

SOCKET = "/run/ergon/gateway"
LAUNCHER = "/opt/ergon/launcher.py"
SPECIFICATION = "/opt/ergon/program.json"
GRACE_S = 10.0  # beyond its limit, until the launcher has ended it


async def run_boxed(
    program: Program, variables: Mapping[str, str], socket: str | None, limit_s: float, bounds: Bounds
) -> ProgramResult:
    """Run it to its end or for `limit_s` seconds. Raises SandboxError; the sandbox is gone when this returns or raises.

    socket: of the gateway, None for a program that asks nobody.
    """
    specification = {
        "arguments": program.arguments,
        "variables": {**program.variables, **variables},
        "socket": socket and SOCKET,
        "stdin": f"{WORK_DIR}/{TEXT_FILE}" if program.text_by == "stdin" else None,
        "limit_s": limit_s,
    }
    files = {
        **program.contents,
        LAUNCHER: Path(__file__).with_name("launcher.py").read_bytes(),
        SPECIFICATION: json.dumps(specification).encode(),
    }
    mounts = {**bounds.mounts, **({SOCKET: socket} if socket else {})}
    async with await Sandbox.create(files, bounds.limits, mounts) as sandbox:
        command = f"exec python3 -I -S {LAUNCHER} {SPECIFICATION}"
        ran = await sandbox.exec(command, timeout_s=limit_s + GRACE_S, output_bytes=bounds.output_bytes)
        timed_out = ran.timed_out or (ran.exit_code == TIMED_OUT and ran.duration_s >= limit_s)
        artifacts = {}
        if ran.exit_code is not None:  # else the sandbox is dead, and its files with it
            await sandbox.exec("kill -9 -1")  # all that the program has left running, so that nothing changes any more
            artifacts = await _artifacts(sandbox, program, bounds.output_bytes)
        return ProgramResult(
            None if timed_out else ran.exit_code,
            ran.stdout,
            ran.stderr,
            ran.truncated,
            timed_out,
            ran.duration_s,
            artifacts,
        )


async def _artifacts(sandbox: Sandbox, program: Program, max_bytes: int) -> dict[str, bytes]:
    found = {}
    for name in program.artifacts:
        there = await sandbox.exec(f"test -f {shlex.quote(name)} && test ! -L {shlex.quote(name)}")
        if there.ok:
            try:
                found[name] = await sandbox.read(name, max_bytes)
            except OSError:
                continue  # larger than allowed, or closed to its reader: as good as not there
    return found
