"""The system calls that a sandbox may not make, as a BPF program for bubblewrap's `--seccomp`. Only builds bytes.

Written by hand since libseccomp is no part of every system that has bubblewrap. A refused call fails with EPERM, as if
by lack of privilege; clone3, whose flags lie in memory that a filter cannot see, with ENOSYS, upon which libc uses
clone. A call of another architecture (32-bit, x32) kills its process.

Why these: namespaces, mounts and tracing (ways out); keys, BPF, io_uring, userfaultfd, handles (kernel surface that no
tool needs); memory that no limit of the sandbox counts (memfd, System V shared memory, message queues); sockets of
other families, above all AF_VSOCK, which no network namespace holds back and which reaches the hypervisor.
"""

from __future__ import annotations

import errno
import functools
import platform
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from envs.interface import SandboxError

# Numbers are the kernel's ABI: x86-64 from arch/x86/entry/syscalls/syscall_64.tbl, arm64 from asm-generic/unistd.h;
# None where the architecture lacks the call.
FORBIDDEN: Mapping[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lookup_dcookie": (212, 18),
    "mbind": (237, 235),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "migrate_pages": (256, 238),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "semget": (64, 190),
    "set_mempolicy": (238, 237),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
    "vmsplice": (278, 75),
}

NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
ALLOWED_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
TERMINAL_IOCTLS = (0x5412, 0x541C, 0x5423)  # TIOCSTI, TIOCLINUX, TIOCSETD: put words into another's terminal
CLONE3 = 435  # on both
X32_BIT = 0x40000000

# <linux/bpf_common.h>, <linux/seccomp.h>
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16


@dataclass(frozen=True, slots=True)
class Machine:
    """What differs between architectures. `audit` is <linux/audit.h>'s number; `column` that of FORBIDDEN."""

    audit: int
    column: int
    clone: int
    ioctl: int
    socket: int


MACHINES = {
    "x86_64": Machine(audit=0xC000003E, column=0, clone=56, ioctl=16, socket=41),
    "aarch64": Machine(audit=0xC00000B7, column=1, clone=220, ioctl=29, socket=198),
}


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One `struct sock_filter`; the jumps count the steps that are passed over."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _refuse(number: int) -> bytes:
    return _step(RETURN, ERRNO | number)


def _argument(number: int) -> bytes:
    """Load the low half of an argument; both architectures are little-endian."""
    return _step(LOAD, ARGUMENTS_AT + 8 * number)


def program(machine: str) -> bytes:
    """The filter for an architecture, as `platform.machine` names it. Raises SandboxError for one that is unknown."""
    if machine not in MACHINES:
        raise SandboxError(f"sandboxes have no seccomp filter for {machine!r}; they run on {' and '.join(MACHINES)}")
    here = MACHINES[machine]
    steps = [_step(LOAD, ARCHITECTURE_AT), _step(JUMP_EQUAL, here.audit, 1, 0), _step(RETURN, KILL_PROCESS)]
    steps.append(_step(LOAD, NUMBER_AT))
    if machine == "x86_64":
        steps += [_step(JUMP_AT_LEAST, X32_BIT, 0, 1), _step(RETURN, KILL_PROCESS)]
    for number in sorted(numbers[here.column] or -1 for numbers in FORBIDDEN.values()):
        if number > 0:
            steps += [_step(JUMP_EQUAL, number, 0, 1), _refuse(errno.EPERM)]
    steps += [_step(JUMP_EQUAL, CLONE3, 0, 1), _refuse(errno.ENOSYS)]
    by_argument = {
        here.clone: [_argument(0), _step(JUMP_ANY_BIT, NAMESPACE_FLAGS, 0, 1), _refuse(errno.EPERM)],
        here.socket: [
            _argument(0),
            *(_step(JUMP_EQUAL, family, left, 0) for left, family in zip((3, 2, 1), ALLOWED_FAMILIES, strict=True)),
            _refuse(errno.EAFNOSUPPORT),
        ],
        here.ioctl: [
            _argument(1),
            *(_step(JUMP_EQUAL, call, left, 0) for left, call in zip((3, 2, 1), TERMINAL_IOCTLS, strict=True)),
            _step(RETURN, ALLOW),
            _refuse(errno.EPERM),
        ],
    }
    for number, checks in by_argument.items():
        steps += [_step(JUMP_EQUAL, number, 0, len(checks) + 1), *checks, _step(RETURN, ALLOW)]
    steps.append(_step(RETURN, ALLOW))
    return b"".join(steps)


@functools.cache
def filter_bytes() -> bytes:
    """The filter for this machine. Raises SandboxError."""
    return program(platform.machine())
