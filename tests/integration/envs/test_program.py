"""Programs as episodes: started, bounded, reached by nobody, gone afterwards; trusted ones and those in a sandbox."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from envs.interface import (
    Endpoint,
    EnvironmentFailureError,
    EnvironmentOptionsError,
    Message,
    ReferencePolicy,
    Reward,
    SandboxError,
    Split,
    Task,
)
from envs.program import Program, ProgramEnvironment, ProgramResult
from envs.program.environment import graded_by_exit, graded_by_report
from tests.integration.envs.support import (
    files_of_sandboxes,
    more_descriptors,
    open_descriptors,
    processes_with,
    unique_marker,
)

PYTHON = "python3"


class Scripts(ProgramEnvironment):
    """Runs what the test says."""

    name = "scripts"

    def __init__(self, program: Program, **options: Any) -> None:
        super().__init__(**options)
        self._program = program

    def task(self, split: Split, index: int) -> Task:
        return Task(self.name, split, index, "", (Message("user", self._program.text),))

    def program(self, task: Task) -> Program:
        return self._program

    async def verify(self, task: Task, result: ProgramResult, reports: Sequence[Reward]) -> Reward:
        return graded_by_exit(result)

    def reference(self, task: Task) -> ReferencePolicy:
        raise NotImplementedError


@dataclass
class Service:
    """Stands where the gateway would: says which key it was asked with, or never answers."""

    keys: list[str] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    async def echo(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers.get("Authorization", ""))
        return web.json_response({"got": await request.text()})

    async def silence(self, request: web.Request) -> web.Response:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.hung_up.set()
            raise
        raise AssertionError


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[tuple[Service, Endpoint]]:
    service = Service()
    app = web.Application()
    app.router.add_post("/v1/echo", service.echo)
    app.router.add_post("/v1/silence", service.silence)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    for directory in [tmp_path, *tmp_path.parents]:  # pytest's own are closed to the sandbox's user
        if "pytest" in str(directory):
            directory.chmod(0o711)
    socket = tmp_path / "socket"
    await web.UnixSite(runner, str(socket)).start()
    socket.chmod(0o666)
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield service, Endpoint(url, "the-key", str(socket), "policy", time.monotonic() + 60, f"{url}/reward", "report-key")
    await runner.cleanup()


@pytest.fixture(params=[True, False], ids=["trusted", "boxed"])
def trusted(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def script(code: str, **changes: Any) -> Program:
    return Program((PYTHON, "-c", code), **changes)


SHOW = """
import json, os, sys
from pathlib import Path
seen = {"stdin": sys.stdin.read(), "arguments": sys.argv[1:], "cwd": os.getcwd(), "home": os.environ["HOME"]}
seen["files"] = {str(p): p.read_text() for p in Path(".").rglob("*") if p.is_file()}
seen["variables"] = dict(os.environ)
Path("out").mkdir()
Path("out/seen.json").write_text(json.dumps(seen))
Path("link").symlink_to("/etc/hostname")
print("said")
print("complained", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("text_by", ["stdin", "argument", "file"])
async def test_a_program_gets_its_task_and_leaves_what_is_asked_for(
    trusted: bool, text_by: Any, service: tuple[Service, Endpoint]
) -> None:
    program = script(
        SHOW,
        text="What is it?\n",
        text_by=text_by,
        files={"data/a.txt": b"A"},
        variables={"COLOUR": "blue"},
        artifacts=("out/seen.json", "missing", "link"),
    )
    result = await Scripts(program, trusted=trusted).run(program, service[1])
    assert (result.exit_code, result.stdout, result.stderr, result.timed_out) == (3, b"said\n", b"complained\n", False)
    assert list(result.artifacts) == ["out/seen.json"]
    seen = json.loads(result.artifacts["out/seen.json"])
    assert (seen["stdin"], seen["arguments"]) == {
        "stdin": ("What is it?\n", []),
        "argument": ("", ["What is it?\n"]),
        "file": ("", []),
    }[text_by]
    assert ("task.txt" in seen["files"]) == (text_by != "argument")
    assert (seen["files"]["data/a.txt"], seen["variables"]["COLOUR"]) == ("A", "blue")
    assert seen["cwd"] == seen["home"]
    assert (seen["variables"]["OPENAI_API_KEY"], seen["variables"]["OPENAI_MODEL"]) == ("the-key", "policy")
    # Only who may be believed gets the key for reports, and nobody gets what else the actor's environment holds.
    assert ("ERGON_REWARD_KEY" in seen["variables"]) == trusted
    assert "PYTEST_CURRENT_TEST" not in seen["variables"]
    assert not Path(seen["cwd"]).exists() or not trusted


ASK = """
import json, os, sys, urllib.request
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/echo", b"x" * 300000)
request.add_header("Authorization", "Bearer " + os.environ["OPENAI_API_KEY"])
for _ in range(2):
    with urllib.request.urlopen(request) as reply:
        print(len(json.loads(reply.read())["got"]))
"""


async def test_a_program_reaches_the_policy(trusted: bool, service: tuple[Service, Endpoint]) -> None:
    result = await Scripts(script(ASK), trusted=trusted).run(script(ASK), service[1])
    assert (result.exit_code, result.stdout) == (0, b"300000\n300000\n"), result.stderr
    assert service[0].keys == ["Bearer the-key"] * 2


async def test_a_sandboxed_program_reaches_nothing_else(service: tuple[Service, Endpoint]) -> None:
    port = service[1].url.split(":")[2].split("/")[0]
    code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
    result = await Scripts(script(code)).run(script(code), service[1])
    assert b"ConnectionRefusedError" in result.stderr


LINGER = """
import subprocess, sys, time
from pathlib import Path
Path("half.txt").write_text("half done")
for new_session in (False, {detach}):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "{marker}"], start_new_session=new_session)
print("begun", flush=True)
time.sleep({wait})
"""


@pytest.mark.parametrize("wait", [600, 0], ids=["at its limit", "at its end"])
async def test_nothing_of_a_program_is_left(trusted: bool, wait: int, service: tuple[Service, Endpoint]) -> None:
    marker = unique_marker()
    # Only a sandbox also ends what has left the program's session.
    program = script(LINGER.format(marker=marker, wait=wait, detach=not trusted), artifacts=("half.txt",))
    before = open_descriptors()
    episode = Scripts(program, trusted=trusted, timeout_s=1.5 if wait else 60).episode(Task("s", "train", 0, "", ()))
    if wait:
        with pytest.raises(TimeoutError):
            await episode.run(service[1])
    else:
        await episode.run(service[1])
    result = episode.result  # type: ignore[attr-defined]
    assert (result.exit_code, result.timed_out, result.stdout) == ((None, True) if wait else (0, False)) + (b"begun\n",)
    assert result.artifacts == {"half.txt": b"half done"}
    assert (await episode.grade()).total == float(not wait)
    assert processes_with(marker) == []
    assert await more_descriptors(before) == 0
    assert files_of_sandboxes() == []


async def test_the_tickets_deadline_counts_as_well(trusted: bool, service: tuple[Service, Endpoint]) -> None:
    endpoint = replace(service[1], deadline=time.monotonic() + 0.5)
    episode = Scripts(script("import time; time.sleep(600)"), trusted=trusted).episode(Task("s", "train", 0, "", ()))
    with pytest.raises(TimeoutError):
        await episode.run(endpoint)


async def test_a_cancelled_episode_ends_its_program(trusted: bool, service: tuple[Service, Endpoint]) -> None:
    marker = unique_marker()
    code = (
        "import os, urllib.request; urllib.request.urlopen("
        f"urllib.request.Request(os.environ['OPENAI_BASE_URL'] + '/silence', b'{marker}'))"
    )
    episode = Scripts(script(code), trusted=trusted).episode(Task("s", "train", 0, "", ()))
    running = asyncio.create_task(episode.run(service[1]))
    await service[0].asked.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert processes_with(marker) == []
    await asyncio.wait_for(service[0].hung_up.wait(), 30)  # the gateway sees it, and would stop the engine


async def test_a_flood_of_output_ends_the_program(trusted: bool) -> None:
    program = script("import sys\nwhile True: sys.stdout.write('x' * 1000000)")
    result = await Scripts(program, trusted=trusted, output_bytes=1000).run(program)
    assert (result.exit_code, result.truncated, result.timed_out) == (None, True, False)
    assert result.stdout == b"x" * 1000


async def test_a_command_that_is_not_there_is_told_before_anything_runs(trusted: bool) -> None:
    environment = Scripts(Program(("no-such-agent",)), trusted=trusted)
    with pytest.raises((EnvironmentOptionsError, SandboxError), match="no-such-agent"):
        await environment.prepare()
    await Scripts(script("pass"), trusted=trusted).prepare()


async def test_a_mount_that_cannot_be_shown_is_told() -> None:
    with pytest.raises(SandboxError, match="a mount cannot be shown"):
        await Scripts(script("pass"), mounts={"/opt/agent": "/no/such/directory"}).prepare()


async def test_a_mount_is_shown_and_cannot_be_written() -> None:
    code = "from pathlib import Path; print(Path('/opt/here/passwd').exists()); Path('/opt/here/new').touch()"
    result = await Scripts(script(code), mounts={"/opt/here": "/etc/security"}).run(script(code))
    assert b"Read-only file system" in result.stderr


def test_mistakes_of_an_author_are_named() -> None:
    for wrong in ({"command": ()}, {"command": ("x",), "text_by": "mail"}, {"command": ("x",), "files": {"../a": b""}}):
        with pytest.raises(ValueError, match=r"command|mail|\.\./a"):
            Program(**wrong)  # type: ignore[arg-type]
    mistakes: list[dict[str, Any]] = [
        {"trusted": True, "mounts": {"/a": "/b"}},
        {"timeout_s": 0},
        {"limits": {"cores": 1}},
        {"mounts": {"a": "/b"}},
    ]
    for options in mistakes:
        with pytest.raises(ValueError, match=r"leave them out|timeout_s|cores|absolute"):
            Scripts(script("pass"), **options)


def test_what_a_program_says_of_itself() -> None:
    ended = ProgramResult(0, b"", b"", False, False, 1.0)
    broken = replace(ended, exit_code=1)
    assert (graded_by_exit(ended).total, graded_by_exit(broken).total) == (1.0, 0.0)
    assert graded_by_report(ended, [Reward(0.2), Reward(0.7)]).total == 0.7
    assert graded_by_report(broken, []).total == 0.0
    with pytest.raises(EnvironmentFailureError, match="without POSTing"):
        graded_by_report(ended, [])
