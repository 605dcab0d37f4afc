"""Runs in a sandbox when bugs are made: puts one bug after the other into the package and says what becomes of it.

Each is tried in forks of this process, which has pytest and never imports the package: one makes the recorded calls
(runner.py), and where enough of their outcomes change, another runs the tests to the first that fails (hidden.py).
"""

import importlib
import json
import os
import select
import signal
import sys
from typing import Any

LIMIT_S = 20.0
MIN_CHANGED = 2
MAX_SHARE = 0.6


def in_a_fork(act: Any) -> bytes:
    """What `act(descriptor)` writes in a fork of this process; what there is of it where it takes too long."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            act(writing)
        finally:
            os._exit(0)
    os.close(writing)
    data = b""
    while select.select([reading], [], [], LIMIT_S)[0] and (piece := os.read(reading, 1 << 16)):
        data += piece
    os.close(reading)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return data


def outcomes(calls: "list[Any]", writing: int) -> None:
    """The outcome of every call, one a line."""
    runner = importlib.import_module("runner")
    for number, call in enumerate(calls):
        try:
            value = runner.made(call)
        except Exception as error:  # noqa: BLE001  as the runner does
            value = {"failed": type(error).__name__}
        os.write(writing, json.dumps([number, value]).encode() + b"\n")


def failure(tests: "list[str]", writing: int) -> None:
    """The first test that fails, and why."""
    hidden, pytest = importlib.import_module("hidden"), importlib.import_module("pytest")
    options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir=.", "--color=no", "--tb=short", "-x"]
    pytest.main([*options, *tests], plugins=[hidden.Records("x", writing, True)])


def tried(path: str, broken: str, calls: "list[Any]", right: "list[Any]", tests: "list[str]") -> "dict[str, Any]":
    """What becomes of the package with this file in it."""
    with open(path) as file:  # noqa: PTH123
        whole = file.read()
    with open(path, "w") as file:  # noqa: PTH123
        file.write(broken)
    try:
        lines = in_a_fork(lambda writing: outcomes(calls, writing)).splitlines()
        found = dict(json.loads(line) for line in lines)
        changed = [number for number in found if json.dumps(found[number]) != json.dumps(right[number])]
        if len(found) < len(right) or not MIN_CHANGED <= len(changed) <= MAX_SHARE * len(right):
            return {}
        records = in_a_fork(lambda writing: failure(tests, writing)).splitlines()
        whys = [record for line in records if (record := json.loads(line.partition(b" ")[2]))[0] == "why"]
        return {"changed": {number: found[number] for number in changed}, "why": whys[0][1:]} if whys else {}
    except ValueError:
        return {}  # it was cut off in the middle of a line
    finally:
        with open(path, "w") as file:  # noqa: PTH123
            file.write(whole)


def main() -> None:
    """Arguments: the folder for the path, the file of what to try, and what pytest is to be given."""
    root, wanted, *tests = sys.argv[1:]
    told = os.fdopen(os.dup(1), "w")
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    with open(wanted) as file:  # noqa: PTH123
        asked = json.load(file)
    sys.path[0:1] = [root, "/tmp/kit", "/opt"]
    importlib.import_module("pytest")  # so that the forks have it
    for path, broken in asked["trials"]:
        told.write(json.dumps(tried(path, broken, asked["calls"], asked["right"], tests)) + "\n")
        told.flush()


if __name__ == "__main__":
    main()
