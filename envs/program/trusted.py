"""Runs a program as a process of this user: for code that may be trusted with network, files and the machine.

Owns its working directory, which is gone afterwards, its process group, which is killed at its end, and the bounds of
its output. What a program that puts itself into another session leaves running, it leaves.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from envs.program.program import TEXT_FILE, Bounds, Program, ProgramResult
from envs.sandbox.bubblewrap import find_program
from envs.sandbox.spawn import Output

GONE_LIMIT_S = 1.0
BASE_VARIABLES = ("PATH", "LANG", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR")


def search_path() -> str:
    """PATH of trusted programs: Ergon's own Python comes first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


async def run_trusted(program: Program, variables: Mapping[str, str], limit_s: float, bounds: Bounds) -> ProgramResult:
    """Run it to its end or for `limit_s` seconds; nothing of its group is left when this returns or raises.

    Raises OSError where it cannot be started.
    """
    directory = Path(await asyncio.to_thread(_furnished, program))
    try:
        return await _run(program, variables, limit_s, bounds, directory)
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


def _furnished(program: Program) -> str:
    directory = tempfile.mkdtemp(prefix="ergon-program-")
    for name, content in program.contents.items():
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


async def _run(
    program: Program, variables: Mapping[str, str], limit_s: float, bounds: Bounds, directory: Path
) -> ProgramResult:
    loop = asyncio.get_running_loop()
    ended, flooded = asyncio.Event(), asyncio.Event()

    def on_flood() -> None:
        flooded.set()
        ended.set()

    began = time.monotonic()
    with ExitStack() as stack:
        process, outputs = _start(program, variables, directory, stack)
        pidfd = os.pidfd_open(process.pid)
        stack.callback(os.close, pidfd)
        loop.add_reader(pidfd, ended.set)
        for output in outputs:
            output.begin(loop, bounds.output_bytes, on_flood)
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), max(0.0, limit_s))
        finally:
            timed_out = not ended.is_set()
            loop.remove_reader(pidfd)
            # Before it is waited for, while its id is surely its own. Also what it has left behind goes.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            await _gone(process.pid)
            stdout, stderr = (output.end(loop) for output in outputs)
        duration_s = time.monotonic() - began
        artifacts = await asyncio.to_thread(_artifacts, program, directory, bounds.output_bytes)
        killed = timed_out or flooded.is_set()
        truncated = any(output.truncated for output in outputs)
        return ProgramResult(None if killed else code, stdout, stderr, truncated, timed_out, duration_s, artifacts)


async def _gone(group: int) -> None:
    """Wait until a killed group is empty; not for ever, since one whose dead nobody buries never is."""
    deadline = time.monotonic() + GONE_LIMIT_S
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            await asyncio.sleep(0.005)


def _start(
    program: Program, variables: Mapping[str, str], directory: Path, stack: ExitStack
) -> tuple[subprocess.Popen[bytes], tuple[Output, Output]]:
    environment = {name: os.environ[name] for name in BASE_VARIABLES if name in os.environ}
    environment |= {"HOME": str(directory), **program.variables, **variables}
    environment["PATH"] = program.variables.get("PATH", search_path())
    source = directory / TEXT_FILE if program.text_by == "stdin" else Path(os.devnull)
    stdin = stack.enter_context(source.open("rb"))
    with ExitStack() as child_ends:
        ends = []
        for _ in range(2):
            reading, writing = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, reading)
            child_ends.callback(os.close, writing)
            ends.append((Output(reading), writing))
        process = subprocess.Popen(
            # It dies with the actor, also where that is killed.
            [find_program("setpriv"), "--pdeathsig=KILL", "--", *program.arguments],
            stdin=stdin,
            stdout=ends[0][1],
            stderr=ends[1][1],
            cwd=directory,
            env=environment,
            start_new_session=True,
        )
    return process, (ends[0][0], ends[1][0])


def _artifacts(program: Program, directory: Path, max_bytes: int) -> dict[str, bytes]:
    """Those that are plain files inside of the directory and not too large."""
    found = {}
    for name in program.artifacts:
        path = directory / name
        if path.resolve().is_relative_to(directory.resolve()) and path.is_file() and path.stat().st_size <= max_bytes:
            found[name] = path.read_bytes()
    return found
