"""The sandbox as a tool author uses it: commands, files, limits of time and output, and its end."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from envs.interface import ErgonEnvError, SandboxError
from envs.sandbox import Limits, Sandbox, bubblewrap, create_sandbox
from tests.integration.envs.support import (
    children,
    files_of_sandboxes,
    more_descriptors,
    open_descriptors,
    processes_with,
    unique_marker,
)


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with await Sandbox.create({"hello.txt": b"hello", "/opt/tool": b"echo tool"}) as made:
        yield made


async def test_a_command_gives_its_status_and_both_streams(sandbox: Sandbox) -> None:
    result = await sandbox.exec("printf out; printf err >&2; exit 7")
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"out", b"err")
    assert not result.ok
    assert not result.truncated
    assert not result.timed_out
    assert 0 < result.duration_s < 10


async def test_commands_share_files_but_not_shells(sandbox: Sandbox) -> None:
    assert (await sandbox.exec("x=1; cd /tmp; echo kept > /workspace/kept")).ok
    result = await sandbox.exec('pwd; cat kept; echo "x=$x"')
    assert result.stdout == b"/workspace\nkept\nx=\n"


async def test_a_command_may_have_many_lines_and_quotes(sandbox: Sandbox) -> None:
    result = await sandbox.exec("cat <<'END'\nit's \\ \"two\"\n\n  lines\nEND\necho $?\n")
    assert result.stdout == b'it\'s \\ "two"\n\n  lines\n0\n'


async def test_standard_input_is_empty(sandbox: Sandbox) -> None:
    assert (await sandbox.exec("cat; echo end", timeout_s=5)).stdout == b"end\n"


async def test_concurrent_commands_take_turns(sandbox: Sandbox) -> None:
    results = await asyncio.gather(*(sandbox.exec(f"echo {number}") for number in range(20)))
    assert [result.stdout for result in results] == [b"%d\n" % number for number in range(20)]


@pytest.mark.parametrize(
    "data", [b"", b"plain", "grüße 'q' \\n $x\n\n".encode(), b"\0\xff" * 50_000, b"x" * 200_000], ids=range(5)
)
async def test_files_survive_a_round_trip(sandbox: Sandbox, data: bytes) -> None:
    await sandbox.write("deep/er/file 'x'", data)
    assert await sandbox.read("/workspace/deep/er/file 'x'") == data


async def test_files_given_at_creation_are_there_and_tools_cannot_be_changed(sandbox: Sandbox) -> None:
    assert await sandbox.read("hello.txt") == b"hello"
    assert (await sandbox.exec("echo changed > hello.txt")).ok
    assert not (await sandbox.exec("echo changed > /opt/tool || chmod 777 /opt/tool || rm -f /opt/tool")).ok
    assert (await sandbox.exec("sh /opt/tool")).stdout == b"tool\n"


async def test_what_is_hidden_of_the_system_is_empty_in_the_sandbox_and_its_forks() -> None:
    folder = next(path for path in sorted(Path("/usr/lib").iterdir()) if path.is_dir() and not path.is_symlink())
    program = Path("/usr/bin/env")
    look = f"ls -A {folder} | wc -l; head -c 9 {program} 2>/dev/null | wc -c"
    async with await Sandbox.create(hidden=[str(folder), str(program)]) as made, await made.fork() as copy:
        assert (await made.exec(look)).stdout == (await copy.exec(look)).stdout == b"0\n0\n"
    async with await Sandbox.create() as made:
        assert (await made.exec(look)).stdout == f"{len(list(folder.iterdir()))}\n9\n".encode()
    with pytest.raises(ErgonEnvError, match="'trusted' hides nothing"):
        await create_sandbox("trusted", hidden=[str(folder)])


async def test_reading_refuses_what_is_missing_or_too_large(sandbox: Sandbox) -> None:
    with pytest.raises(OSError, match="No such file"):
        await sandbox.read("missing")
    with pytest.raises(OSError, match="larger than 3 bytes"):
        await sandbox.read("hello.txt", max_bytes=3)
    assert await sandbox.read("hello.txt", max_bytes=5) == b"hello"


@pytest.mark.parametrize("path", ["../etc/x", "a/../../x", ".", "", "/workspace", "a\0b"])
async def test_paths_that_are_no_files_are_refused(sandbox: Sandbox, path: str) -> None:
    with pytest.raises(ValueError, match="no file path"):
        await sandbox.write(path, b"")


async def test_commands_too_long_or_with_nul_are_refused(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="bytes"):
        await sandbox.exec("x" * 100_000)
    with pytest.raises(ValueError, match="NUL"):
        await sandbox.exec("echo \0")
    assert (await sandbox.exec("echo fine")).stdout == b"fine\n"


async def test_long_output_is_cut_and_does_not_stop_the_command(sandbox: Sandbox) -> None:
    result = await sandbox.exec("head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2; exit 3", output_bytes=1000)
    assert (len(result.stdout), len(result.stderr), result.truncated, result.exit_code) == (1000, 1000, True, 3)
    assert (await sandbox.exec("echo next")).stdout == b"next\n"


async def test_endless_output_ends_the_sandbox_before_its_time(sandbox: Sandbox) -> None:
    result = await sandbox.exec("yes", timeout_s=60)
    assert (result.exit_code, result.truncated, result.timed_out) == (None, True, False)
    assert not sandbox.alive
    with pytest.raises(SandboxError, match="flooded"):
        await sandbox.exec("echo")


async def test_output_of_something_left_behind_is_not_the_next_commands(sandbox: Sandbox) -> None:
    # The writer says that it has written by making a file, so that no wait is guessed.
    assert (await sandbox.exec("(while [ ! -e go ]; do sleep 0.01; done; echo late; touch done) & :")).ok
    await sandbox.write("go", b"")
    assert (await sandbox.exec("while [ ! -e done ]; do sleep 0.01; done >/dev/null")).ok
    assert (await sandbox.exec("echo mine")).stdout == b"mine\n"


async def test_a_timeout_kills_everything_in_the_sandbox(sandbox: Sandbox) -> None:
    marker = unique_marker()
    result = await sandbox.exec(f"echo begun; setsid sleep {marker} & sleep {marker}", timeout_s=0.5)
    assert (result.exit_code, result.timed_out, result.stdout) == (None, True, b"begun\n")
    assert 0.5 <= result.duration_s < 10
    assert processes_with(marker) == []
    assert not sandbox.alive
    with pytest.raises(SandboxError, match="time limit"):
        await sandbox.exec("echo")


async def test_a_cancelled_command_ends_the_sandbox(sandbox: Sandbox) -> None:
    marker = unique_marker()
    running = asyncio.create_task(sandbox.exec(f"sleep {marker}"))
    async with asyncio.timeout(10):
        while not processes_with(marker):
            await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await sandbox.close()
    assert processes_with(marker) == []


async def test_a_sandbox_killed_from_outside_is_a_sandbox_error(sandbox: Sandbox) -> None:
    marker = unique_marker()
    running = asyncio.create_task(sandbox.exec(f"sleep {marker}; :"))
    async with asyncio.timeout(10):
        while not processes_with(marker):
            await asyncio.sleep(0.01)
    os.kill(sandbox._life.spawned.process.pid, signal.SIGKILL)
    with pytest.raises(SandboxError, match="dead"):
        await running
    assert not sandbox.alive
    await sandbox.close()
    assert processes_with(marker) == []


async def test_closing_twice_and_at_once_is_fine(sandbox: Sandbox) -> None:
    await asyncio.gather(sandbox.close(), sandbox.close())
    await sandbox.close()
    with pytest.raises(SandboxError, match="closed"):
        await sandbox.exec("echo")


async def test_two_hundred_sandboxes_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    async with await Sandbox.create():
        pass  # caches, the event loop's own descriptors

    def seen() -> tuple[object, ...]:
        mounts = Path("/proc/self/mountinfo").read_text()
        return children(), mounts, files_of_sandboxes(), list(tmp_path.iterdir())

    before, descriptors = seen(), open_descriptors()
    marker = unique_marker()

    async def one() -> None:
        async with await Sandbox.create({"x": b"y"}) as sandbox:
            assert (await sandbox.exec(f"echo > /tmp/x; sleep {marker} & setsid sleep {marker} &")).ok

    for _ in range(25):
        await asyncio.gather(*(one() for _ in range(8)))
    assert processes_with(marker) == []
    assert seen() == before
    assert await more_descriptors(descriptors) == 0


async def test_sandboxes_die_with_their_process() -> None:
    marker = unique_marker()
    program = f"""
import asyncio
from envs.sandbox import Sandbox
async def main():
    sandbox = await Sandbox.create()
    idle = await Sandbox.create()
    await sandbox.exec("setsid sleep {marker} & :")
    print("up", flush=True)
    await sandbox.exec("sleep {marker}", timeout_s=600)
asyncio.run(main())
"""
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    bubblewraps = children(owner.pid)
    assert len(bubblewraps) == 2
    pidfds = [os.pidfd_open(pid) for pid in (*bubblewraps, *processes_with(marker)) if pid != owner.pid]
    assert len(pidfds) >= 3
    owner.kill()
    owner.wait()
    owner.stdout.close()
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], 10)[0], "a process of a sandbox outlived its owner"
        os.close(pidfd)
    async with asyncio.timeout(10):  # the last `sleep` may have begun after we looked
        while processes_with(marker):
            await asyncio.sleep(0.01)


async def test_sandboxes_that_are_starting_die_with_their_process_too() -> None:
    marker = unique_marker()
    program = f"""
import asyncio
from envs.sandbox import Sandbox
async def main():
    print("up", flush=True)
    while True:
        await asyncio.gather(*(Sandbox.create({{"/opt/{marker}": b""}}) for _ in range(4)))
asyncio.run(main())
"""
    for number in range(10):
        owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        await asyncio.sleep(number * 0.006)  # no event to wait for: the moment is what is tried
        owner.kill()
        owner.wait()
        owner.stdout.close()
    async with asyncio.timeout(10):
        while processes_with(marker):
            await asyncio.sleep(0.01)


async def test_missing_bubblewrap_is_one_sentence_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="not installed: type `apt-get install bubblewrap`"):
        await Sandbox.create()


async def test_an_old_bubblewrap_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "bwrap"
    old.write_text("#!/bin/sh\necho bubblewrap 0.4.1\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=r"0\.8 or newer.*0\.4\.1"):
        await Sandbox.create()


@pytest.mark.parametrize(
    ("identity", "sentence"),
    [
        (["--uid", "1000"], r"may not make the namespaces .*`sysctl -w kernel\.unprivileged_userns_clone=1`"),
        (["--uid", "0"], r"may not drop root's identity here .*run as an ordinary user"),
    ],
)
def test_forbidden_namespaces_are_one_sentence_with_a_remedy(identity: list[str], sentence: str) -> None:
    # The same bubblewrap makes a place in which namespaces and other identities are really forbidden.
    program = """
import asyncio
from envs.sandbox import Sandbox, SandboxError
try:
    asyncio.run(Sandbox.create())
except SandboxError as error:
    print(error)
"""
    prison = [
        bubblewrap.find_bubblewrap(),
        "--unshare-user",
        "--disable-userns",
        "--dev-bind",
        "/",
        "/",
        "--proc",
        "/proc",
    ]
    prison += identity
    ended = subprocess.run(
        [*prison, sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert re.search(sentence, ended.stdout), ended
    assert ended.stdout.count("\n") == 1


async def test_a_sandbox_that_is_not_ready_in_time_is_an_error() -> None:
    with pytest.raises(SandboxError, match=r"not ready within 0\.0001 s"):
        await Sandbox.create(limits=Limits(start_timeout_s=0.0001))


async def test_a_start_given_up_at_any_moment_leaves_nothing_behind() -> None:
    marker = unique_marker()
    num_given_up = 0
    for number in range(100):
        starting = asyncio.create_task(Sandbox.create({f"/opt/{marker}": b""}))
        await asyncio.sleep(number * 0.0002)
        starting.cancel()
        try:
            await (await starting).close()
        except asyncio.CancelledError:
            num_given_up += 1
    assert num_given_up > 10
    async with asyncio.timeout(10):
        while processes_with(marker):
            await asyncio.sleep(0.01)


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="limit processes is 0"):
        Limits(processes=0)
