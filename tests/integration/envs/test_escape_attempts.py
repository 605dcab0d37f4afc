"""Seventy attempts on one sandbox: each is a command that must fail, and after all of them sandbox and host are well.

Attacks that need a sandbox of their own, or look at the host while they run, are in test_escapes.py.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from envs.sandbox import Limits, Sandbox
from tests.integration.envs.support import processes_with, unique_marker

LIMITS = Limits(processes=12, memory_bytes=128 << 20, work_bytes=4 << 20, tmp_bytes=2 << 20, file_bytes=1 << 20)
SYSCALL = "import ctypes, os; l = ctypes.CDLL(None, use_errno=True)\n"
CONNECT = "import socket; s = socket.socket(socket.{family}, socket.{kind}); s.settimeout(2); s.{act}"

# Shell commands. Each must end with a status other than 0.
SHELL = {
    "the host's passwords": "cat /etc/shadow",
    "the host's home": "ls /root",
    "the host's root through PID 1": "ls /proc/1/root/",
    "the host's files by ..": "cat ../../../../etc/hostname",
    "the kernel's memory": "head -c 1 /proc/kcore",
    "the kernel's log": "dmesg",
    "the kernel's settings": "echo 1 > /proc/sys/kernel/core_pattern",
    "sysrq": "echo b > /proc/sysrq-trigger",
    "sysfs": "ls /sys/kernel",
    "cgroups": "ls /sys/fs/cgroup",
    "a disk": "ls /dev/vda /dev/sda",
    "memory devices": "head -c 1 /dev/mem",
    "a tty": "echo x > /dev/console && cat /dev/tty",
    "making a device": "mknod d b 8 0",
    "a set-user-id copy": "cp /usr/bin/id i && chmod 4755 i && ./i -u | grep -x 0",
    "su": "echo | su root -c true",
    "mounting a tmpfs": "mount -t tmpfs none /workspace",
    "mounting proc": "mount -t proc none /workspace",
    "binding the root": "mount --bind / /workspace",
    "changing root": "chroot /workspace /bin/true",
    "a user namespace": "unshare -U true",
    "a network namespace": "unshare -n true",
    "a mount namespace": "unshare -m true",
    "entering PID 1's namespaces": "nsenter -t 1 -a true",
    "another user": "setpriv --reuid=0 true",
    "raising a limit": "ulimit -H -n 100000",
    "killing PID 1": "kill -9 1; sleep 0.05; kill -0 1 && exit 1",
    "a pipe into PID 1": "echo forged > /proc/1/fd/0",
    "a host name": "hostname taken",
    "the clock": "date -s 2001-01-01",
    "priority": "nice -n -5 sh -c '[ $(nice) -lt 0 ]'",
    "writing a system program": "echo x > /usr/bin/env",
    "a library for all": "echo /tmp/x.so > /etc/ld.so.preload",
    "a file that is too large": "head -c 3000000 /dev/zero > big",
    "more than the disk": "for i in 1 2 3 4 5 6; do head -c 1000000 /dev/zero > f$i || exit 1; done",
    "shared memory": "echo x > /dev/shm/x",
}

# Python programs. Each must raise, and so end with a status other than 0.
PYTHON = {
    "the metadata address": CONNECT.format(
        family="AF_INET", kind="SOCK_STREAM", act="connect(('169.254.169.254', 80))"
    ),
    "a name server": CONNECT.format(family="AF_INET", kind="SOCK_DGRAM", act="connect(('8.8.8.8', 53))"),
    "IPv6": CONNECT.format(family="AF_INET6", kind="SOCK_STREAM", act="connect(('2001:4860:4860::8888', 53))"),
    "raw packets": "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "packet sockets": "import socket; socket.socket(17, socket.SOCK_RAW)",
    "the hypervisor's sockets": "import socket; socket.socket(40, socket.SOCK_STREAM).connect((2, 1024))",
    "netlink": "import socket; socket.socket(16, socket.SOCK_RAW, 0)",
    "kernel crypto sockets": "import socket; socket.socket(38, socket.SOCK_SEQPACKET)",
    "memory without a limit": "x = bytearray(512 << 20)",
    "files in memory": "import os; os.memfd_create('x')",
    "typing into a terminal": "import fcntl; fcntl.ioctl(0, 0x5412, b'x')",
    "more descriptors": "f = [open('/dev/null') for _ in range(100)]",
    "more threads": "import threading, time\n"
    "for _ in range(40): threading.Thread(target=time.sleep, args=(1,), daemon=True).start()",
}

# System calls that the filter refuses: name -> number and arguments (x86-64).
CALLS = {
    "ptrace": (101, 16, 1, 0, 0),
    "process_vm_readv": (310, 1, 0, 0, 0, 0, 0),
    "bpf": (321, 0, 0, 0),
    "io_uring_setup": (425, 1, 0),
    "userfaultfd": (323, 0),
    "perf_event_open": (298, 0, 0, -1, -1, 0),
    "keyctl": (250, 0, -3, 0),
    "add_key": (248, 0, 0, 0, 0, -3),
    "open_by_handle_at": (304, -100, 0, 0),
    "kexec_load": (246, 0, 0, 0, 0),
    "init_module": (175, 0, 0, 0),
    "fsopen": (430, 0, 0),
    "open_tree": (428, -100, 0, 1),
    "setns": (308, 0, 0),
    "clone with CLONE_NEWUSER": (56, 0x10000011, 0, 0, 0, 0),
    "shmget": (29, 0, 1 << 30, 0o1600),
    "mq_open": (240, 0, 0o102, 0o600, 0),
    "pivot_root": (155, 0, 0),
    "swapon": (167, 0, 0),
    "personality": (135, 0x40000),
    "clone3": (435, 0, 0),
}


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    async with await Sandbox.create(limits=LIMITS) as made:
        yield made


async def clean(sandbox: Sandbox) -> None:
    """Nothing of one attempt helps or hinders the next."""
    await sandbox.kill_all()
    await sandbox.exec("rm -rf /workspace/* /tmp/*")


async def well(sandbox: Sandbox) -> bool:
    """The session answers, and what it answers is genuine."""
    return (await sandbox.exec("echo well; exit 7")).stdout == b"well\n"


async def test_commands_that_must_fail(sandbox: Sandbox) -> None:
    name = socket.gethostname()
    for what, command in SHELL.items():
        result = await sandbox.exec(command, timeout_s=20)
        assert result.exit_code not in (0, None), (what, result)
        assert await well(sandbox), what
        await clean(sandbox)
    assert socket.gethostname() == name


async def test_programs_that_must_fail(sandbox: Sandbox) -> None:
    for what, program in PYTHON.items():
        await sandbox.write("attack.py", program.encode())
        result = await sandbox.exec("exec python3 -I -S attack.py", timeout_s=20)
        assert result.exit_code not in (0, None), (what, result)
        assert b"Error" in result.stderr, (what, result)
        await clean(sandbox)
    assert await well(sandbox)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86-64")
async def test_system_calls_that_are_refused(sandbox: Sandbox) -> None:
    lines = [
        f"ctypes.set_errno(0); r = l.syscall(*map(ctypes.c_long, {numbers})); print({name!r}, r, ctypes.get_errno())"
        for name, numbers in CALLS.items()
    ]
    await sandbox.write("calls.py", (SYSCALL + "\n".join(lines)).encode())
    told = (await sandbox.exec("exec python3 -I calls.py")).stdout.decode().splitlines()
    refused = {name: "-1 38" if name == "clone3" else "-1 1" for name in CALLS}  # ENOSYS, EPERM
    assert told == [f"{name} {code}" for name, code in refused.items()]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x32 is of x86-64")
async def test_a_call_of_another_architecture_kills_its_process(sandbox: Sandbox) -> None:
    await sandbox.write("x32.py", (SYSCALL + "l.syscall(ctypes.c_long(0x40000000 | 39)); print('survived')").encode())
    result = await sandbox.exec("python3 -I x32.py")
    assert (result.exit_code, result.stdout) == (128 + 31, b"")  # SIGSYS
    assert await well(sandbox)


async def test_another_episode_is_out_of_reach(sandbox: Sandbox) -> None:
    marker = unique_marker()
    async with await Sandbox.create({"secret.txt": marker.encode()}) as other:
        await other.exec(f"sleep {marker} & echo {marker} > /tmp/secret")
        assert processes_with(marker)
        looked = await sandbox.exec(f"grep -rs {marker} /workspace /tmp /proc/[0-9]*/cmdline /opt; pkill -f {marker}")
        assert looked.stdout.replace(b"/proc/", b"").count(b"sleep") == 0
        assert processes_with(marker)
        assert (await other.read("/tmp/secret")).strip() == marker.encode()


async def test_escape_sequences_stay_in_the_output(sandbox: Sandbox) -> None:
    result = await sandbox.shell(
        "printf '\\033]0;title\\007\\033[6n\\033P$q\\033\\\\'; read -t 0.1 answer; echo \"[$answer]\""
    )
    assert result.output.endswith(b"[]\n")  # nobody answers them


async def test_a_daemon_with_its_own_session_ends_with_kill_all(sandbox: Sandbox) -> None:
    marker = unique_marker()
    await sandbox.exec(f"(trap '' TERM HUP INT; setsid setsid sleep {marker} &) ; true")
    await sandbox.shell(f"setsid nohup sleep {marker} >/dev/null 2>&1 & disown; true")
    await sandbox.kill_all()
    assert processes_with(marker) == []
    assert await well(sandbox)


async def test_a_fork_bomb_and_a_flood_at_once(sandbox: Sandbox) -> None:
    result = await sandbox.shell("b() { yes | b & b; }; b", timeout_s=1, output_bytes=100)
    assert result.timed_out or result.restarted or result.exit_code != 0
    await sandbox.kill_all()
    assert await well(sandbox)
