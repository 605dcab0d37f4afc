"""What a repaired package comes to: the outcomes of recorded calls, compared in the parent, and its own hidden tests.

Both are asked, each in a fresh sandbox with the parent's own files, into which nothing comes of the policy's but the
package's Python files. The tests run in one process with the policy's code, which might forge their records, exit
early or rewrite pytest; so they can only cost the reward, never earn it alone. The recorded calls earn it: the sandbox
has their arguments and not their outcomes, which come from the right package and stay here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.code.problem import results, same
from envs.interface import EnvironmentFailureError, SandboxError
from envs.repo.bugs import recorded_calls
from envs.repo.packages import Package, kit
from envs.repo.sources import CACHE, archive, fetch, tree
from envs.sandbox import ExecResult, Limits, Sandbox

LIMITS = Limits(
    processes=16,
    memory_bytes=1 << 30,
    file_bytes=32 << 20,
    work_bytes=32 << 20,
    tmp_bytes=64 << 20,
    cpu_s=120,
    output_bytes=4 << 20,
)
HERE = Path(__file__).parent
PYTHON = "PYTHONHASHSEED=0 exec python3 -s -S -B"
KIT = "/opt/kit.tar"
TREE = "/opt/tree.tar"
CALLS = "/opt/calls.json"


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the right package does on this machine: the outcome of each recorded call, and the tests that pass."""

    outcomes: Mapping[int, Any]
    passed: frozenset[str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a package came to: the shares of right outcomes and of passed tests; `sound` is False for bad records."""

    calls: float
    tests: float
    sound: bool

    @property
    def solved(self) -> bool:
        """All of both."""
        return self.sound and self.calls == 1.0 and self.tests == 1.0


class Grader:
    """Grades packages, and remembers what the right ones do. One for an environment; belongs to one event loop.

    hidden: what of the system its sandboxes hide.
    """

    def __init__(self, timeout_s: float, cache: str = CACHE) -> None:
        self._timeout_s = timeout_s
        self.hidden: Sequence[str] = ()
        self._cache = cache
        self._python = b""
        self._kit: asyncio.Task[bytes] | None = None
        self._baselines: dict[str, asyncio.Task[Baseline]] = {}

    async def grade(self, package: Package, code: Mapping[str, bytes]) -> Verdict:
        """What these Python files, path -> content, in place of the package's own come to.

        Raises SandboxError, and EnvironmentFailureError where the right package fails its tests on this machine.
        """
        right = await self.baseline(package)
        files = {path: data for path, data in self._tree(package).items() if not package.is_code(path)} | dict(code)
        found = await self.outcomes(package, files)
        if found is None:
            return Verdict(0.0, 0.0, sound=False)
        num_right = sum(number in found and same(found[number], value) for number, value in right.outcomes.items())
        if num_right < len(right.outcomes):
            return Verdict(num_right / len(right.outcomes), 0.0, sound=True)
        tested = await self.tests(package, files)
        if tested is None:
            return Verdict(1.0, 0.0, sound=False)
        passed = sum(tested.get(test) == "passed" for test in right.passed)
        return Verdict(1.0, passed / len(right.passed), sound=True)

    async def baseline(self, package: Package) -> Baseline:
        """What the right package does here, found out once for this machine. Raises as `grade` does."""
        task = self._baselines.get(package.name)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._baselines[package.name] = asyncio.create_task(self._baseline(package))
        return await asyncio.shield(task)

    async def _baseline(self, package: Package) -> Baseline:
        """It is kept beside the source distributions, for the same package, programs, calls and Python."""
        programs = [(HERE / name).read_bytes() for name in ("runner.py", "hidden.py")]
        calls = recorded_calls(package.name)
        kept = await self._kept_at(f"baseline-{package.name}", repr((package, kit(), calls, programs)), "json")
        if (data := await asyncio.to_thread(_read, kept)) is not None:
            found = json.loads(data)
            return Baseline(dict(enumerate(found["outcomes"])), frozenset(found["passed"]))
        made = await self._find_out(package)
        outcomes = [made.outcomes[number] for number in range(len(calls))]
        await asyncio.to_thread(_keep, kept, json.dumps({"outcomes": outcomes, "passed": sorted(made.passed)}).encode())
        return made

    async def _find_out(self, package: Package) -> Baseline:
        files = await asyncio.to_thread(self._tree, package)
        outcomes = await self.outcomes(package, files)
        tested = await self.tests(package, files)
        passed = frozenset(test for test, outcome in (tested or {}).items() if outcome == "passed")
        failed = [test for test, outcome in (tested or {}).items() if outcome == "failed"]
        if not outcomes or len(outcomes) != len(recorded_calls(package.name)) or not passed or failed:
            raise EnvironmentFailureError(
                f"{package.name} {package.pin.version} fails tests of its own in a sandbox of this machine "
                f"({', '.join(failed[:3]) or 'none of them ran'}): leave it out with the option packages"
            )
        return Baseline(outcomes, passed)

    def _tree(self, package: Package) -> Mapping[str, bytes]:
        return tree(package, self._cache)

    async def outcomes(
        self, package: Package, files: Mapping[str, bytes], calls: Sequence[Any] | None = None
    ) -> dict[int, Any] | None:
        """Number -> outcome of each call that had one; None where the records are not sound. Raises SandboxError."""
        wanted = recorded_calls(package.name) if calls is None else calls
        shown = {path: data for path, data in files.items() if package.is_shown(path)}
        async with await self.sandbox("runner.py", shown, {CALLS: json.dumps(wanted).encode()}) as fresh:
            nonce = secrets.token_hex(16)
            arguments = shlex.join([nonce, f"/workspace/{package.root}", CALLS])
            ended = await self._exec(fresh, f"{PYTHON} /opt/runner.py {arguments}")
        return None if ended.truncated else results(ended.stdout, nonce, len(wanted))

    async def tests(self, package: Package, files: Mapping[str, bytes]) -> dict[str, str] | None:
        """Id -> outcome of each of the package's own tests that ran; None where the records are not sound."""
        tested = await self.tested(package, files, "untold")
        return None if tested is None else {test: outcome for what, test, outcome in tested if what == "test"}

    async def tested(self, package: Package, files: Mapping[str, bytes], told: str) -> list[list[str]] | None:
        """The records of hidden.py. Raises SandboxError."""
        async with await self.sandbox("hidden.py", files, {KIT: await self.kit()}) as fresh:
            await self.unpack(fresh, f"tar -xf {KIT} -C /tmp --strip-components=1")
            nonce = secrets.token_hex(16)
            arguments = shlex.join([nonce, f"/workspace/{package.root}", told, *package.tests])
            ended = await self._exec(fresh, f"{PYTHON} /opt/hidden.py {arguments}")
        return None if ended.truncated else _records(ended.stdout, nonce)

    async def _exec(self, sandbox: Sandbox, command: str) -> ExecResult:
        return await sandbox.exec(command, timeout_s=self._timeout_s)

    async def sandbox(self, program: str, files: Mapping[str, bytes], more: Mapping[str, bytes]) -> Sandbox:
        """A fresh sandbox with one of our programs and a tree of files in /workspace."""
        packed = await asyncio.to_thread(archive, files)
        contents = {f"/opt/{program}": (HERE / program).read_bytes(), TREE: packed, **more}
        made = await Sandbox.create(contents, LIMITS, hidden=self.hidden)
        try:
            await self.unpack(made, f"tar -xzf {TREE} -C /workspace")
        except BaseException:
            await made.close()
            raise
        return made

    async def unpack(self, sandbox: Sandbox, command: str) -> None:
        """Run a command of ours that fills a sandbox. Raises SandboxError."""
        if not (ended := await sandbox.exec(command)).ok:
            raise SandboxError(f"a grading sandbox could not be filled: {ended.stderr[:300]!r}")

    async def kit(self) -> bytes:
        """pytest and what it needs, compiled for the Python of this machine's sandboxes, as a tar of tmp/kit."""
        if self._kit is None or (self._kit.done() and (self._kit.cancelled() or self._kit.exception() is not None)):
            self._kit = asyncio.create_task(self._make_kit())
        return await asyncio.shield(self._kit)

    async def _make_kit(self) -> bytes:
        """Compiling takes two seconds, so that the cache keeps what it comes to."""
        wheels = await asyncio.to_thread(fetch, kit(), self._cache)
        kept = await self._kept_at("kit", repr(kit()), "tar")
        if (data := await asyncio.to_thread(_read, kept)) is not None:
            return data
        async with await Sandbox.create({f"/opt/{path.name}": path.read_bytes() for path in wheels}, LIMITS) as fresh:
            unpack = " && ".join(f"python3 -m zipfile -e /opt/{path.name} /tmp/kit" for path in wheels)
            prune = "find /tmp/kit/pygments/lexers -name '*.py' ! -name '__init__.py' ! -name '_mapping.py' "
            prune += "! -name 'python.py' ! -name 'diff.py' -delete"  # hundreds of languages that pytest never colours
            ended = await fresh.exec(f"{unpack} && {prune} && python3 -S -m compileall -q /tmp/kit", timeout_s=60.0)
            if not ended.ok:
                raise SandboxError(f"pytest could not be made ready in a sandbox: {ended.stderr[-300:]!r}")
            data = await fresh.snapshot()
        await asyncio.to_thread(_keep, kept, data)
        return data

    async def _kept_at(self, name: str, content: str, ending: str) -> Path:
        """Where the cache keeps what follows from this content and the Python of this machine's sandboxes."""
        if not self._python:
            async with await Sandbox.create(limits=LIMITS) as fresh:
                self._python = (await fresh.exec("exec python3 -VV")).stdout
        key = hashlib.sha256(self._python + content.encode()).hexdigest()[:16]
        return Path(self._cache).expanduser() / f"{name}-{key}.{ending}"

    async def check(self, wanted: Sequence[Package]) -> None:
        """That sandboxes have what is needed, and none of the packages. Raises SandboxError."""
        names = [package.code[0].rpartition("/")[2] for package in wanted]
        looked = f"import importlib.util as u; print(*[n for n in {names!r} if u.find_spec(n)])"
        async with await Sandbox.create(limits=LIMITS, hidden=self.hidden) as fresh:
            ended = await fresh.exec(
                f"command -v git tar gzip find >/dev/null && exec python3 -c {shlex.quote(looked)}"
            )
        if not ended.ok:
            raise SandboxError(
                "the environment repo needs python3 and git in /usr/bin: type `apt-get install git python3-minimal`"
            )
        if ended.stdout.strip():
            raise SandboxError(
                f"sandboxes of this machine can import {ended.stdout.decode().strip()}, where a policy could read the "
                "right version: remove it from the system's Python, or leave it out with the option packages"
            )

    async def close(self) -> None:
        """End what is being found out."""
        tasks = [task for task in (self._kit, *self._baselines.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _keep(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(f".{secrets.token_hex(4)}")
    temporary.write_bytes(data)
    temporary.replace(path)


def _records(output: bytes, nonce: str) -> list[list[str]] | None:
    """The records of hidden.py; None where anything else is there, or two of one test."""
    found: list[list[str]] = []
    tests = set()
    for line in output.splitlines():
        word, _, rest = line.partition(b" ")
        try:
            record = json.loads(rest)
        except (ValueError, RecursionError):
            return None
        if word != nonce.encode() or not isinstance(record, list) or [type(each) for each in record] != [str] * 3:
            return None
        if record[0] == "test":
            if record[1] in tests:
                return None
            tests.add(record[1])
        found.append(record)
    return found
