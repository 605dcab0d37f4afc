"""The filter of system calls, interpreted as the kernel would."""

from __future__ import annotations

import errno
import struct

import pytest

from envs.interface import SandboxError
from envs.sandbox import seccomp


def verdict(machine: str, number: int, *arguments: int, audit: int | None = None) -> int:
    """What classic BPF makes of a call."""
    audit = seccomp.MACHINES[machine].audit if audit is None else audit
    padded = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("=IIQ6Q", number, audit, 0, *padded)
    program = seccomp.program(machine)
    steps = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator = at = 0
    while True:
        code, if_true, if_false, value = steps[at]
        at += 1
        if code == seccomp.LOAD:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == seccomp.RETURN:
            return value
        else:
            holds = {
                seccomp.JUMP_EQUAL: accumulator == value,
                seccomp.JUMP_AT_LEAST: accumulator >= value,
                seccomp.JUMP_ANY_BIT: bool(accumulator & value),
            }[code]
            at += if_true if holds else if_false


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_verdicts(machine: str) -> None:
    here = seccomp.MACHINES[machine]
    refused = seccomp.ERRNO | errno.EPERM
    for name, numbers in seccomp.FORBIDDEN.items():
        number = numbers[here.column]
        if number is not None:
            assert verdict(machine, number) == refused, name
    assert verdict(machine, seccomp.CLONE3) == seccomp.ERRNO | errno.ENOSYS
    assert verdict(machine, here.clone, 0x11) == seccomp.ALLOW
    for bit in (17, 25, 26, 27, 28, 29, 30):
        assert verdict(machine, here.clone, 1 << bit) == refused
    for family in range(64):
        allowed = family in seccomp.ALLOWED_FAMILIES
        assert verdict(machine, here.socket, family) == (
            seccomp.ALLOW if allowed else seccomp.ERRNO | errno.EAFNOSUPPORT
        )
    for call in seccomp.TERMINAL_IOCTLS:
        assert verdict(machine, here.ioctl, 0, call) == refused
    assert verdict(machine, here.ioctl, 0, 0x5401) == seccomp.ALLOW
    for plain in (500, 1000):
        assert verdict(machine, plain) == seccomp.ALLOW
    assert verdict(machine, 0, audit=0x40000003) == seccomp.KILL_PROCESS


def test_x32_calls_are_killed() -> None:
    assert verdict("x86_64", 0x40000000 | 39) == seccomp.KILL_PROCESS


def test_numbers_are_used_once() -> None:
    for column in (0, 1):
        numbers = [row[column] for row in seccomp.FORBIDDEN.values() if row[column] is not None]
        assert len(set(numbers)) == len(numbers)


def test_an_unknown_machine_has_no_sandbox() -> None:
    with pytest.raises(SandboxError, match="no seccomp filter for 'riscv64'"):
        seccomp.program("riscv64")
