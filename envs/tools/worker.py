"""What a worker process does (see processes.py): it runs tools, one at a time, until its stdin ends or it is killed.

    in:  8 bytes length, pickle of (function, first argument, other arguments)
    out: 8 bytes length, pickle of (ok, result or exception); first of all, of (True, "ready")

Trusted code on both ends: what a policy writes reaches it as checked arguments only.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import signal
import struct
import sys
from typing import Any, BinaryIO

LENGTH = struct.Struct("<q")
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Import the module that the command line names, then serve calls."""
    if sys.platform == "linux":  # a tool that hangs must not outlive a killed actor
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what a tool prints goes where the log goes, not between the answers
    importlib.import_module(sys.argv[1])
    _write(answers, (True, "ready"))
    while (call := _read(calls)) is not None:
        _write(answers, _answer(call))


def _answer(call: bytes) -> tuple[bool, Any]:
    try:
        function, first, arguments = pickle.loads(call)
        return True, function(first, **arguments)
    except Exception as error:  # noqa: BLE001  whoever asked is told
        return False, error
    except SystemExit as wish:
        return False, RuntimeError(f"it called for the end of the process: {wish!r}")


def _read(stream: BinaryIO) -> bytes | None:
    header = stream.read(LENGTH.size)
    return stream.read(*LENGTH.unpack(header)) if len(header) == LENGTH.size else None


def _write(stream: BinaryIO, answer: tuple[bool, Any]) -> None:
    try:
        data = pickle.dumps(answer)
        if not answer[0]:
            pickle.loads(data)  # an exception may be pickled and yet not come back
    except Exception as error:  # noqa: BLE001  whatever pickling raises
        reason = answer[1] if not answer[0] else error
        data = pickle.dumps((False, RuntimeError(f"{type(reason).__name__}: {reason}")))
    stream.write(LENGTH.pack(len(data)) + data)
    stream.flush()
