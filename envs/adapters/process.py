"""The parent's side of other people's environments: one process of another Python, one connection an episode.

Starts it, asks it, ends it. What comes back is JSON of bounded length, which the adapter that asked has to check. The
protocol is in foreign/serve.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from envs.interface import EnvironmentFailureError, EnvironmentOptionsError, SandboxError
from envs.sandbox.bubblewrap import find_program

PROGRAM = Path(__file__).parent / "foreign" / "serve.py"
START_S = 120.0
MAX_LINE = 1 << 20


class ForeignProcess:
    """A process that has loaded an environment and plays episodes of it.

    python: the interpreter that has the package; this one by default. program: the module beside serve.py. package:
    what to install, for the error. timeout_s: for one answer. Belongs to one event loop.
    """

    def __init__(
        self, python: str | None, program: str, package: str, options: Mapping[str, Any], timeout_s: float
    ) -> None:
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s}; it must be greater than 0")
        found = shutil.which(python or sys.executable)
        if found is None:
            raise EnvironmentOptionsError(
                f"python is {python!r}, which is no program: make an environment with {package} in it "
                f"(`python3 -m venv DIR && DIR/bin/pip install {package}`) and give DIR/bin/python"
            )
        self._python = found
        self._program = program
        self._package = package
        self._options = dict(options)
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._folder: Path | None = None
        self._about: dict[str, Any] = {}
        self._closed = False

    async def start(self) -> dict[str, Any]:
        """Start it where it does not run, and what it says of itself.

        Raises EnvironmentOptionsError where it cannot load the environment.
        """
        async with self._lock:
            if self._closed:
                raise EnvironmentFailureError("the environment is closed")
            if self._process is None or self._process.returncode is not None:
                await self._end()
                self._about = await self._start()
            return self._about

    async def _start(self) -> dict[str, Any]:
        self._folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="ergon-foreign-"))
        # Seeds must mean the same in every process, also where a package iterates over a set.
        variables = {"PYTHONHASHSEED": "0", "HOME": str(self._folder), "PATH": os.defpath, "LANG": "C.UTF-8"}
        self._process = await asyncio.create_subprocess_exec(
            *(find_program("setpriv"), "--pdeathsig=KILL", "--", self._python, "-s"),
            *(str(PROGRAM), str(self._socket), self._program, json.dumps(self._options)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=variables,
            cwd=self._folder,
            start_new_session=True,
            limit=MAX_LINE,
        )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_S):
                about = _object(await self._process.stdout.readline())
        except TimeoutError:
            about = {"failed": f"it said nothing for {START_S:g} s"}
        except BaseException:
            await self._end()
            raise
        if "failed" in about:
            await self._end()
            raise EnvironmentOptionsError(
                f"{self._python} cannot load {self._options.get('id')!r} with {self._package}: {about['failed']}"
            )
        return about

    @property
    def _socket(self) -> Path:
        assert self._folder is not None
        return self._folder / "socket"

    async def session(self) -> ForeignSession:
        """A new episode. Raises EnvironmentOptionsError, SandboxError."""
        await self.start()
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._socket), limit=MAX_LINE)
        except OSError as error:
            async with self._lock:
                await self._end()  # the next episode gets a new one
            raise SandboxError(f"the process of {self._package} cannot be reached: {error}") from error
        session = ForeignSession(reader, writer, self._package, self._timeout_s)
        await session.answer()
        return session

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its episodes are of its group
            assert process.stdin is not None
            process.stdin.close()
            await process.communicate()
        folder, self._folder = self._folder, None
        if folder is not None:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def close(self) -> None:
        """Kill it and its episodes; idempotent."""
        async with self._lock:
            self._closed = True
            await self._end()


class ForeignSession:
    """One episode in a fork of the process."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, package: str, timeout_s: float
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._package = package
        self._timeout_s = timeout_s

    async def ask(self, request: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """Send a request; its answer. Raises EnvironmentFailureError, and TimeoutError for a time given here."""
        self._writer.write(json.dumps(dict(request)).encode() + b"\n")
        return await self.answer(timeout_s)

    async def answer(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The next answer. Raises as `ask` does."""
        try:
            async with asyncio.timeout(self._timeout_s if timeout_s is None else timeout_s):
                found = _object(await self._reader.readline())
        except TimeoutError:
            if timeout_s is not None:
                raise
            raise EnvironmentFailureError(f"{self._package} did not answer within {self._timeout_s:g} s") from None
        except (OSError, ValueError) as error:
            raise EnvironmentFailureError(f"{self._package} broke off: {error}") from error
        if "failed" in found:
            raise EnvironmentFailureError(f"{self._package}: {found['failed']}")
        return found

    async def close(self) -> None:
        """Hang up, which ends the fork; idempotent."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


def _object(line: bytes) -> dict[str, Any]:
    """A line as a JSON object; why there is none, where there is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    return {"failed": "it ended without a word" if not line else f"no JSON object: {line[:80]!r}"}
