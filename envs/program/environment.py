"""The environment whose episodes are runs of a program. Owns how a run is started, bounded, logged and graded.

An author says which program a task needs and what its result is worth. The program finds the policy in
OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL. Grading is in the parent, after the program has ended; nothing of a
task's secret reaches the program unless the author puts it there. Knows nothing of actors or of HTTP.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields

from envs.interface import (
    Endpoint,
    Environment,
    EnvironmentFailureError,
    EnvironmentOptionsError,
    Reward,
    SandboxError,
    SelfDrivenEpisode,
    Task,
    Tool,
)
from envs.program.boxed import run_boxed
from envs.program.program import LIMITS, Bounds, Program, ProgramResult
from envs.program.trusted import run_trusted, search_path
from envs.sandbox import Limits, Sandbox

logger = logging.getLogger(__name__)

LOGGED_BYTES = 2000


class ProgramEnvironment(Environment):
    """A family of tasks that a program works at.

    trusted: run programs as processes of this user, with network and files; otherwise they run in a sandbox. timeout_s,
    output_bytes, mounts: see Bounds; mounts are {"where in the sandbox": "directory here"}. limits: of the sandbox, by
    the names of envs.sandbox.Limits. Raises ValueError.
    """

    self_driven = True
    max_turns = 2**53 - 1  # a program may ask as often as the run allows

    def __init__(
        self,
        *,
        trusted: bool = False,
        timeout_s: float = 600.0,
        output_bytes: int = 64 << 10,
        limits: Mapping[str, int] | None = None,
        mounts: Mapping[str, str] | None = None,
    ) -> None:
        if trusted and (limits or mounts):
            raise ValueError("limits and mounts are of the sandbox, and a trusted program runs in none; leave them out")
        known = {each.name: getattr(LIMITS, each.name) for each in fields(Limits)}
        for name in limits or {}:
            if name not in known:
                raise ValueError(f"limits has {name!r}; there are {', '.join(known)}")
        self.bounds = Bounds(trusted, timeout_s, output_bytes, Limits(**(known | dict(limits or {}))), mounts or {})

    @property
    def tools(self) -> Sequence[Tool]:
        """None: a program brings its own."""
        return ()

    @abstractmethod
    def program(self, task: Task) -> Program:
        """What to run for the task."""

    @abstractmethod
    async def verify(self, task: Task, result: ProgramResult, reports: Sequence[Reward]) -> Reward:
        """What the run is worth; also called where it was cut short.

        reports: what the program has reported of itself; only trusted ones can. `graded_by_exit` and
        `graded_by_report` are two ways.
        """

    def episode(self, task: Task) -> SelfDrivenEpisode:
        """A run of the task's program."""
        return ProgramEpisode(self, task)

    async def run(
        self, program: Program, endpoint: Endpoint | None = None, limit_s: float | None = None
    ) -> ProgramResult:
        """Run a program under this environment's bounds; without an endpoint it can ask nobody.

        Raises EnvironmentFailureError where it cannot be started, and SandboxError.
        """
        limit_s = self.bounds.timeout_s if limit_s is None else min(limit_s, self.bounds.timeout_s)
        variables = {} if endpoint is None else _variables(endpoint, limit_s, self.bounds.trusted)
        if not self.bounds.trusted:
            return await run_boxed(program, variables, endpoint.socket if endpoint else None, limit_s, self.bounds)
        try:
            return await run_trusted(program, variables, limit_s, self.bounds)
        except OSError as error:
            raise EnvironmentFailureError(f"{program.command[0]} cannot be started: {error}") from error

    async def prepare(self) -> None:
        """Try the machine: a trusted program's command must be there, for others a sandbox with its mounts.

        Raises SandboxError and EnvironmentOptionsError with the remedy.
        """
        program = self.program(self.task("train", 0))
        if self.bounds.trusted:
            if shutil.which(program.command[0], path=program.variables.get("PATH", search_path())) is None:
                raise EnvironmentOptionsError(f"the command {program.command[0]!r} is not on PATH: install it")
            return
        async with await Sandbox.create({}, self.bounds.limits, self.bounds.mounts) as sandbox:
            for name in ("python3", program.command[0]):
                if not (await sandbox.exec(f"command -v {shlex.quote(name)}")).ok:
                    raise SandboxError(
                        f"the sandbox has no {name}: install it under /usr, mount its directory (option mounts), or "
                        "run the program with trusted = true"
                    )


def _variables(endpoint: Endpoint, limit_s: float, trusted: bool) -> dict[str, str]:
    variables = {
        "OPENAI_BASE_URL": endpoint.url,  # in a sandbox the launcher puts its own there
        "OPENAI_API_KEY": endpoint.key,
        "OPENAI_MODEL": endpoint.model,
        "ERGON_TIME_LIMIT_S": f"{limit_s:.1f}",
    }
    if trusted:
        variables |= {"ERGON_REWARD_URL": endpoint.report_url, "ERGON_REWARD_KEY": endpoint.report_key}
    return variables


class ProgramEpisode(SelfDrivenEpisode):
    """One run of one task's program."""

    def __init__(self, environment: ProgramEnvironment, task: Task) -> None:
        self.task = task
        self.result: ProgramResult | None = None
        self._environment = environment
        self._reports: Sequence[Reward] = ()

    async def run(self, endpoint: Endpoint) -> None:
        """See SelfDrivenEpisode."""
        self._reports = endpoint.reports
        left_s = max(0.0, endpoint.deadline - time.monotonic())
        self.result = result = await self._environment.run(self._environment.program(self.task), endpoint, left_s)
        log = logger.info if result.exit_code == 0 else logger.warning
        log(
            "program ended task=%s/%d exit_code=%s timed_out=%s seconds=%.2f stderr=%s",
            *(self.task.split, self.task.index, result.exit_code, result.timed_out, result.duration_s),
            result.stderr[-LOGGED_BYTES:].decode(errors="replace").strip(),
        )
        if result.timed_out:
            raise TimeoutError

    async def grade(self) -> Reward:
        """What the author's `verify` says."""
        if self.result is None:
            raise EnvironmentFailureError("the program was never run")
        return await self._environment.verify(self.task, self.result, self._reports)

    async def close(self) -> None:
        """Nothing is left running."""


def graded_by_exit(result: ProgramResult) -> Reward:
    """1 for a program that has ended with exit code 0, else 0: for programs that judge themselves by it."""
    return Reward(float(result.exit_code == 0))


def graded_by_report(result: ProgramResult, reports: Sequence[Reward]) -> Reward:
    """The last thing that the program reported of itself; 0 where it broke off before.

    Raises EnvironmentFailureError for a program that has ended well and reported nothing: no fault of the policy's.
    """
    if reports:
        return reports[-1]
    if result.exit_code == 0:
        raise EnvironmentFailureError("the program has ended well without POSTing a reward to ERGON_REWARD_URL")
    return Reward(0.0)
