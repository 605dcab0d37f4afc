"""Runs in the grading sandbox only: calls the package's functions and writes down what comes back.

The package is the policy's, which may do with this process whatever it likes. So the process holds no expected value:
one record `NONCE NUMBER JSON` a call goes out, and the parent compares. Whoever forges records must still know the
right values.

A call is [`module:name`, arguments, keyword arguments] with Python literals as text; a fourth entry makes it an object:
the calls of its methods that follow, [method, arguments, keyword arguments] each.
"""

import ast
import importlib
import itertools
import json
import os
import re
import sys
from typing import Any

MAX_ITEMS = 300
MAX_TEXT = 4000
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def encoded(value: Any, depth: int = 0) -> Any:
    """A value as JSON that tells its types; two values are the same where their JSON is."""
    if value is None or isinstance(value, bool) or type(value) is int:
        return value
    if type(value) is str:
        return value[:MAX_TEXT]
    if isinstance(value, float):
        return {"float": repr(value)}
    if depth > 8:
        return {"deep": type(value).__name__}
    kind = type(value).__name__
    if isinstance(value, dict):
        pairs = itertools.islice(value.items(), MAX_ITEMS)
        return {kind: [[encoded(key, depth + 1), encoded(each, depth + 1)] for key, each in pairs]}
    if isinstance(value, (set, frozenset)):
        members = [encoded(each, depth + 1) for each in itertools.islice(value, MAX_ITEMS)]
        return {kind: sorted(members, key=lambda each: json.dumps(each, sort_keys=True))}
    if isinstance(value, (list, tuple)) or (hasattr(value, "__next__") and hasattr(value, "__iter__")):
        items = [encoded(each, depth + 1) for each in itertools.islice(value, MAX_ITEMS)]
        return items if type(value) is list else {kind: items}
    return {kind: ADDRESS.sub("", repr(value))[:MAX_TEXT]}


def outcome(function: Any, arguments: str, keywords: str) -> Any:
    """What a call came to: its value or the kind of its error, and its arguments where it changed them."""
    args, kwargs = ast.literal_eval(arguments), ast.literal_eval(keywords)
    try:
        found = encoded(function(*args, **kwargs))
    except Exception as error:  # noqa: BLE001  a call that fails has an outcome too
        return {"raised": type(error).__name__}
    now = repr((args, kwargs))
    return found if now == repr((ast.literal_eval(arguments), ast.literal_eval(keywords))) else [found, {"after": now}]


def made(call: "list[Any]") -> Any:
    """The outcome of one call, or of all the calls of an object."""
    module, _, name = call[0].partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if len(call) == 3:
        return outcome(found, call[1], call[2])
    target = found(*ast.literal_eval(call[1]), **ast.literal_eval(call[2]))
    return [step(target, *each) for each in call[3]]


def step(target: Any, method: str, arguments: str, keywords: str) -> Any:
    """The outcome of a method; a property has a value already."""
    try:
        found = getattr(target, method)
    except Exception as error:  # noqa: BLE001  a property may fail as a method does
        return {"raised": type(error).__name__}
    return outcome(found, arguments, keywords) if callable(found) else encoded(found)


def main() -> None:
    """Arguments: a nonce, the folder for the path, the file of calls. Their outcomes go to standard output."""
    nonce, root, calls = sys.argv[1:]
    records = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.path.insert(0, root)
    with open(calls) as file:  # noqa: PTH123  runs without site-packages, and quickly
        wanted = json.load(file)
    for number, call in enumerate(wanted):
        try:
            value = json.dumps(made(call), sort_keys=True)
        except Exception as error:  # noqa: BLE001  what the parent compares is that it failed
            value = json.dumps({"failed": type(error).__name__})
        os.write(records, f"{nonce} {number} {value}\n".encode())


if __name__ == "__main__":
    main()
