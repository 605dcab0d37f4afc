"""The persistent shell, in a sandbox, in a pod and, where the tests are its author, in the trusted backend."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from envs.interface import ErgonEnvError, SandboxError
from envs.sandbox import AnySandbox, Limits, Sandbox, SandboxPool, create_sandbox, shell
from tests.integration.envs.fake_cluster import cluster_of_pods
from tests.integration.envs.support import children, more_descriptors, open_descriptors, processes_with, unique_marker


@pytest_asyncio.fixture(params=["bubblewrap", "trusted", "pod"])
async def sandbox(request: pytest.FixtureRequest) -> AsyncIterator[AnySandbox]:
    async with AsyncExitStack() as stack:
        if request.param == "pod":
            await stack.enter_async_context(cluster_of_pods())
        yield await stack.enter_async_context(await create_sandbox(request.param, {"hello.txt": b"hello"}))


@pytest_asyncio.fixture(params=["bubblewrap", "pod"])
async def walled(request: pytest.FixtureRequest) -> AsyncIterator[AnySandbox]:
    async with AsyncExitStack() as stack:
        if request.param == "pod":
            await stack.enter_async_context(cluster_of_pods())
        yield await stack.enter_async_context(await create_sandbox(request.param))


async def test_folder_variables_functions_and_jobs_live_on(sandbox: AnySandbox) -> None:
    marker = unique_marker()
    begun = await sandbox.shell(f"mkdir d; cd d; x=1; export Y=2; f() {{ echo f$1; }}; sleep {marker} & :")
    assert begun.exit_code == 0
    result = await sandbox.shell("echo ${PWD##*/} $x; sh -c 'echo $Y'; f 3; jobs")
    assert result.output.split()[:4] == [b"d", b"1", b"2", b"f3"]
    assert b"Running" in result.output
    await sandbox.close()
    assert processes_with(marker) == []


async def test_streams_are_one_and_status_is_told(sandbox: AnySandbox) -> None:
    result = await sandbox.shell("echo out; echo err >&2; echo out; (exit 7)")
    assert (result.exit_code, result.output, result.truncated) == (7, b"out\nerr\nout\n", False)
    assert (await sandbox.shell("cat; echo end", timeout_s=10)).output == b"end\n"


async def test_quotes_lines_and_bad_syntax(sandbox: AnySandbox) -> None:
    assert (await sandbox.shell("cat <<'END'\nit's \"!x\"\n\n$y\nEND")).output == b'it\'s "!x"\n\n$y\n'
    assert (await sandbox.shell("if then")).exit_code == 2
    assert (await sandbox.shell("exec > gone; echo swallowed")).output == b""
    assert (await sandbox.shell("cat gone")).output == b"swallowed\n"
    with pytest.raises(ValueError, match="NUL"):
        await sandbox.shell("echo \0")


async def test_a_command_past_its_time_is_interrupted_and_the_shell_goes_on(
    sandbox: AnySandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "GRACE_S", 60.0)  # a busy machine is not what is tested
    marker = unique_marker()
    await sandbox.shell(f"x=kept; sleep {marker} & :")
    for endless in (f"sleep {marker}1; echo not reached", "while :; do :; done"):
        result = await sandbox.shell(endless, timeout_s=0.2)
        assert (result.timed_out, result.restarted, result.exit_code, result.output) == (True, False, 130, b"")
    result = await sandbox.shell("echo $x; jobs")
    assert result.output.startswith(b"kept\n")
    assert b"Running" in result.output
    assert processes_with(f"{marker}1") == []


async def test_commands_are_interrupted_though_this_process_ignores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that a script has put in the background; what it starts would ignore it, too."""
    monkeypatch.setattr(shell, "GRACE_S", 60.0)
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        async with await create_sandbox("trusted") as sandbox:
            result = await sandbox.shell(f"sleep {unique_marker()}", timeout_s=1.0)
    finally:
        signal.signal(signal.SIGINT, former)
    assert (result.timed_out, result.restarted, result.exit_code) == (True, False, 130)


async def test_a_command_that_ignores_the_interrupt_costs_the_shell_not_the_sandbox(sandbox: AnySandbox) -> None:
    marker = unique_marker()
    await sandbox.shell(f"mkdir d; cd d; x=lost; sleep {marker} & :")
    result = await sandbox.shell(f"trap '' INT; sleep {marker}", timeout_s=0.2)
    assert (result.timed_out, result.restarted, result.exit_code) == (True, True, None)
    assert processes_with(marker) == []
    assert (await sandbox.shell("echo ${PWD##*/} [$x]")).output == b"d []\n"


@pytest.mark.parametrize("end", ["exit 3", "kill -9 $$", "exec true", "set -e; false"])
async def test_a_shell_that_ends_is_started_again(sandbox: AnySandbox, end: str) -> None:
    result = await sandbox.shell(end)
    assert (result.exit_code, result.restarted, result.timed_out) == (None, True, False)
    assert (await sandbox.shell("echo again")).output == b"again\n"


async def test_output_is_streamed_and_limited(sandbox: AnySandbox) -> None:
    pieces: list[bytes] = []
    arrived = asyncio.Event()

    def take(piece: bytes) -> None:
        pieces.append(piece)
        arrived.set()

    running = asyncio.create_task(sandbox.shell("echo one; while [ ! -e go ]; do sleep 0.01; done", on_output=take))
    async with asyncio.timeout(10):
        await arrived.wait()
    assert pieces == [b"one\n"]
    assert not running.done()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_long_output_is_cut(sandbox: AnySandbox) -> None:
    result = await sandbox.shell("head -c 300000 /dev/zero; true", output_bytes=1000)
    assert (len(result.output), result.truncated, result.exit_code) == (1000, True, 0)


async def test_a_flood_is_interrupted(walled: AnySandbox) -> None:
    result = await walled.shell("yes", timeout_s=60, output_bytes=10)
    assert (result.timed_out, result.truncated, result.restarted, len(result.output)) == (True, True, False, 10)
    assert (await walled.shell("echo fine")).output == b"fine\n"


async def test_a_policy_that_kills_everything_gets_a_new_shell(walled: AnySandbox) -> None:
    marker = unique_marker()
    await walled.shell(f"sleep {marker} & :")
    await walled.shell("(kill -9 -1)")  # from a subshell, so that the shell dies too
    assert (await walled.shell("echo again")).output == b"again\n"
    assert processes_with(marker) == []


async def test_a_fork_bomb_in_the_shell_leaves_the_sandbox_usable(walled: AnySandbox) -> None:
    await walled.shell("b() { b | b & }; b", timeout_s=1)
    await walled.kill_all()
    async with asyncio.timeout(30):
        while (await walled.shell("echo fine", timeout_s=5)).output != b"fine\n":
            pass


async def test_commands_apart_cannot_reach_the_shells_channels(walled: AnySandbox) -> None:
    await walled.shell("x=1")
    listed = await walled.exec("ls -l /proc/self/fd")
    assert b"socket" not in listed.stdout
    assert listed.stdout.count(b"pipe") == 2


async def test_an_abandoned_command_ends_the_sandbox(sandbox: AnySandbox) -> None:
    marker = unique_marker()
    running = asyncio.create_task(sandbox.shell(f"sleep {marker}"))
    async with asyncio.timeout(10):
        while not processes_with(marker):
            await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    with pytest.raises(SandboxError, match="abandoned"):
        await sandbox.shell("true")


async def test_a_fork_has_the_files_and_no_processes(sandbox: AnySandbox) -> None:
    marker = unique_marker()
    await sandbox.shell(f"mkdir -p a/b; echo x > a/b/c; ln -s /etc/passwd link; chmod 640 a/b/c; sleep {marker} & :")
    async with await sandbox.fork() as fork:
        assert len(processes_with(marker)) <= 1
        assert (await fork.exec("cat a/b/c; readlink link; stat -c %a a/b/c")).stdout == b"x\n/etc/passwd\n640\n"
        await fork.write("a/b/c", b"changed")
    assert await sandbox.read("a/b/c") == b"x\n"


async def test_nothing_is_left_of_either_backend() -> None:
    for backend in ("bubblewrap", "trusted"):
        async with await create_sandbox(backend) as made:
            await made.shell("true")
    before, descriptors = children(), open_descriptors()
    for backend in ("bubblewrap", "trusted"):
        marker = unique_marker()
        async with await create_sandbox(backend) as made:
            await made.shell(f"setsid sleep {marker} & exit")
            assert (await made.exec(f"setsid sleep {marker} & :")).ok
        assert processes_with(marker) == []
    assert children() == before
    assert await more_descriptors(descriptors) == 0


async def test_the_trusted_backend_must_be_asked_for_by_name() -> None:
    with pytest.raises(ErgonEnvError, match=r"no sandbox backend 'trustd': did you mean 'trusted'\?"):
        await create_sandbox("trustd")
    with pytest.raises(ErgonEnvError, match="choose bubblewrap or trusted or pod"):
        SandboxPool(1, backend="docker")
    async with await create_sandbox(limits=Limits(processes=4)) as made:
        assert isinstance(made, Sandbox)
    async with SandboxPool(1, backend="trusted") as pool, await pool.acquire() as made:
        assert not isinstance(made, Sandbox)
        with pytest.raises(ValueError, match="must lie in its folder"):
            await made.read("/etc/passwd")
