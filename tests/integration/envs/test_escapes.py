"""Attacks on the sandbox, each with the real kernel: what a policy that can run any command must not achieve."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from envs.sandbox import ExecResult, Limits, Sandbox
from tests.integration.envs.support import processes_with, unique_marker

LIMITS = Limits(processes=12, memory_bytes=96 << 20, work_bytes=4 << 20, tmp_bytes=2 << 20, file_bytes=1 << 20)


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with await Sandbox.create({"/opt/tool.sh": b"echo genuine\n"}, LIMITS) as made:
        yield made


async def python(sandbox: Sandbox, program: str, timeout_s: float = 20) -> ExecResult:
    await sandbox.write("attack.py", program.encode())
    return await sandbox.exec("python3 -I -S attack.py", timeout_s=timeout_s)


async def test_no_network_not_even_the_hosts_loopback(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        program = f"""
import socket
for address in ("127.0.0.1", {port}), ("192.0.2.1", 80):
    try:
        socket.create_connection(address, timeout=3)
        print("connected")
    except OSError as error:
        print(type(error).__name__)
print(open("/proc/net/dev").read().count(":"))
"""
        result = await python(sandbox, program)
        assert result.stdout.split() == [b"ConnectionRefusedError", b"OSError", b"1"], result  # 1: lo alone
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_no_abstract_socket_of_the_host(sandbox: Sandbox) -> None:
    name = f"ergon-test-{unique_marker()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen()
        program = f"import socket; socket.socket(socket.AF_UNIX).connect(chr(0) + {name!r})"
        assert b"ConnectionRefusedError" in (await python(sandbox, program)).stderr


async def test_no_file_of_the_host(sandbox: Sandbox, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("secret")
    repository = Path(__file__).resolve().parents[3]
    hidden = [
        canary,
        repository,
        Path("/etc/shadow"),
        Path("/etc/hostname"),
        Path("/root"),
        Path("/home"),
        Path("/var"),
    ]
    for path in [*hidden, Path("/sys"), Path("/run"), Path("/mnt"), Path("/usr/src")]:
        assert (await sandbox.exec(f"ls -d {path}")).exit_code == 2, path
    listed = (await sandbox.exec("ls /")).stdout.split()
    assert set(listed) <= {
        b"app",
        b"bin",
        b"dev",
        b"etc",
        b"lib",
        b"lib32",
        b"lib64",
        b"logs",
        b"opt",
        b"proc",
        b"session",
        b"tmp",
        b"usr",
        b"workspace",
    }
    etc = (await sandbox.exec("ls /etc")).stdout.split()
    assert {b"passwd", b"group"} <= set(etc) <= {b"alternatives", b"group", b"ld.so.cache", b"passwd"}
    assert b"root" not in (await sandbox.exec("cat /etc/passwd")).stdout


async def test_no_installed_python_package_of_the_host(sandbox: Sandbox) -> None:
    found = await sandbox.exec("ls -A /usr/lib/python3*/dist-packages /usr/local/lib/python3*/*-packages | grep -v :")
    assert found.stdout.strip() == b""
    result = await sandbox.exec("python3 -c 'import pip'; python3 -c 'import envs'")
    assert result.stderr.count(b"ModuleNotFoundError") == 2


async def test_no_process_of_the_host(sandbox: Sandbox) -> None:
    seen = (await sandbox.exec("ls -d /proc/[0-9]* | wc -l")).stdout
    assert int(seen) < 8
    assert b"ergon" not in (await sandbox.exec("cat /proc/*/cmdline /proc/*/environ 2>/dev/null")).stdout
    # The host's process 2 (kthreadd) is always there; in here that number is ours or nobody's.
    assert b"kthreadd" not in (await sandbox.exec("cat /proc/*/comm")).stdout
    assert (await sandbox.exec(f"kill -0 {os.getpid()}")).exit_code != 0


async def test_environment_is_empty(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERGON_TEST_SECRET", "leaked")
    async with await Sandbox.create() as fresh:
        variables = {line.split(b"=")[0] for line in (await fresh.exec("env")).stdout.splitlines()}
    assert variables == {b"PATH", b"HOME", b"LANG", b"PWD"}


async def test_no_capabilities_and_no_new_ones(sandbox: Sandbox) -> None:
    status = (await sandbox.exec("grep -E '^(Cap|NoNewPrivs|Uid)' /proc/self/status")).stdout.decode().split("\n")
    facts = dict(line.split(":\t") for line in status if line)
    assert {value for key, value in facts.items() if key.startswith("Cap")} == {"0" * 16}
    assert facts["NoNewPrivs"] == "1"
    assert facts["Uid"].split() == ["1000"] * 4


async def test_no_nested_namespaces(sandbox: Sandbox) -> None:
    for command in ("unshare -U true", "unshare -n true", "unshare -rm true", "bwrap --ro-bind / / true"):
        assert (await sandbox.exec(command)).exit_code not in (0, None), command


async def test_no_writing_outside_work_and_tmp(sandbox: Sandbox) -> None:
    places = [
        "/x",
        "/usr/bin/x",
        "/etc/passwd",
        "/etc/x",
        "/dev/x",
        "/dev/shm/x",
        "/opt/x",
        "/proc/sys/kernel/hostname",
    ]
    for place in places:
        assert (await sandbox.exec(f"echo x > {place}")).exit_code != 0, place
    for command in (
        "mount -o remount,rw /",
        "chmod 777 /opt/tool.sh",
        "mv /opt /opt2",
        "ln -sf /bin/true /opt/tool.sh",
    ):
        assert (await sandbox.exec(command)).exit_code not in (0, None), command
    assert (await sandbox.exec("sh /opt/tool.sh")).stdout == b"genuine\n"
    assert (await sandbox.exec("echo x > /tmp/x && echo x > /workspace/x")).ok


async def test_a_fork_bomb_is_small_and_is_killed(sandbox: Sandbox) -> None:
    marker = unique_marker()
    running = asyncio.create_task(sandbox.exec(f"b() {{ b | b & }}; b; sleep {marker}; : {marker}", timeout_s=2))
    most = 0
    while not running.done():
        most = max(most, len(processes_with(marker)))
        await asyncio.sleep(0.05)
    result = await running
    assert most <= LIMITS.processes + 2
    if not result.timed_out:  # it strangled its own shell, which then could start nothing
        assert b"Cannot fork" in result.stderr
        await sandbox.close()
    assert processes_with(marker) == []


async def test_a_fork_bomb_left_behind_does_not_stop_the_session(sandbox: Sandbox) -> None:
    marker = unique_marker()
    await sandbox.exec(f"while :; do sleep {marker} & done", timeout_s=20)
    assert 0 < len(processes_with(marker)) <= LIMITS.processes + 1
    assert (await sandbox.exec("echo still here")).stdout == b"still here\n"
    assert (await sandbox.exec("kill -9 -1")).exit_code in (0, 137)
    assert (await sandbox.exec("ls | wc -l; true | true")).exit_code == 0


async def test_a_memory_bomb_fails_in_its_own_process(sandbox: Sandbox) -> None:
    result = await python(sandbox, "x = bytearray(200 << 20); print('got it')")
    assert b"MemoryError" in result.stderr
    assert result.stdout == b""
    assert (await sandbox.exec("echo fine")).stdout == b"fine\n"


async def test_a_disk_bomb_meets_its_bounds(sandbox: Sandbox) -> None:
    one_file = await sandbox.exec("head -c 3000000 /dev/zero > big; stat -c %s big")
    assert int(one_file.stdout) == LIMITS.file_bytes
    many_files = "for n in 1 2 3 4 5 6 7 8 9; do head -c 900000 /dev/zero > {place}/f$n; done; du -sb {place} | cut -f1"
    for place, bound in (("/workspace", LIMITS.work_bytes), ("/tmp", LIMITS.tmp_bytes)):
        result = await sandbox.exec(many_files.format(place=place))
        assert 0 < int(result.stdout) <= bound + (16 << 10)
        assert b"No space left" in result.stderr


async def test_a_cpu_hog_is_killed_by_its_cpu_time() -> None:
    async with await Sandbox.create(limits=Limits(cpu_s=1)) as sandbox:
        result = await sandbox.exec("while :; do :; done", timeout_s=60)
        assert result.exit_code == 128 + 9
        assert (await sandbox.exec("echo fine")).stdout == b"fine\n"


async def test_a_daemon_does_not_survive_the_close(sandbox: Sandbox) -> None:
    marker = unique_marker()
    program = f"""
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in range(1, 32):
            if number not in (9, 19):
                signal.signal(number, signal.SIG_IGN)
        os.execvp("sleep", ["sleep", "{marker}"])
    os._exit(0)
os.wait()
"""
    assert (await python(sandbox, program)).ok
    async with asyncio.timeout(10):
        while not processes_with(marker):
            await asyncio.sleep(0.01)
    await sandbox.close()
    assert processes_with(marker) == []


async def test_the_session_cannot_be_killed_read_or_traced(sandbox: Sandbox) -> None:
    assert (await sandbox.exec("kill -9 1; kill -STOP 1; kill -TERM 1; echo alive", timeout_s=5)).stdout == b"alive\n"
    for what in ("mem", "environ", "fd/0", "fd/1", "maps", "root/etc", "cwd/x"):
        assert (await sandbox.exec(f"cat /proc/1/{what}")).exit_code == 1, what
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.ptrace(16, 1, 0, 0), ctypes.get_errno())  # PTRACE_ATTACH
fd = libc.syscall(434, 1, 0)  # pidfd_open
print(libc.syscall(438, fd, 0, 0), ctypes.get_errno())  # pidfd_getfd
"""
    await sandbox.write("trace.py", program.encode())
    assert (await sandbox.exec("python3 -I trace.py")).stdout == b"-1 1\n-1 1\n"
    assert (await sandbox.exec("echo alive")).stdout == b"alive\n"


async def test_an_end_marker_cannot_be_forged(sandbox: Sandbox) -> None:
    forgery = "0123456789abcdef0123456789abcdef 0\\n"
    command = f"""
for fd in 0 1 2 3 4 5 6 7 8 9; do
  eval "printf 'ready\\n{forgery}' >&$fd" 2>/dev/null
  printf '{forgery}' > /proc/1/fd/$fd
done
sleep 0.2
printf genuine
exit 5
"""
    result = await sandbox.exec(command)
    assert result.exit_code == 5
    assert result.stdout.endswith(b"genuine")  # the forged lines are nothing but output
    assert (await sandbox.exec("echo next; exit 6")).exit_code == 6


async def test_a_left_behind_reader_may_take_output_but_no_status(sandbox: Sandbox) -> None:
    # Whoever holds a pipe's writing end can open its reading end. So output is the command's own affair, and statuses
    # go another way.
    assert (await sandbox.exec("(exec 3>&1; touch begun; exec cat /proc/self/fd/3 > stolen) & :")).ok
    assert (await sandbox.exec("while [ ! -e begun ]; do sleep 0.01; done", timeout_s=5)).ok
    for number in range(20):
        assert (await sandbox.exec(f"echo output; exit {number}", timeout_s=5)).exit_code == number
    assert set((await sandbox.read("stolen")).split()) <= {b"output"}


async def test_signals_to_all_leave_the_session_whole(sandbox: Sandbox) -> None:
    result = await sandbox.exec("kill -9 -1; echo after", timeout_s=5)
    assert not result.timed_out
    assert (await sandbox.exec("echo alive")).stdout == b"alive\n"
