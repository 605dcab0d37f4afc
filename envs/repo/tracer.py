"""Runs in a sandbox when bugs are made: watches a package's tests and writes down the calls that they make of it.

A call is kept where its arguments are literals, so that it can be made again elsewhere (runner.py says how it is
written). Of objects that are made from literals the calls of their methods are kept, as long as all of them can be.
"""

import ast
import contextlib
import json
import os
import sys
from typing import Any

MAX_STEPS = 10
MAX_LENGTH = 240


def literal(value: Any) -> "str | None":
    """The value as a literal; None where it is none."""
    try:
        text = repr(value)
        back = ast.literal_eval(text) if len(text) <= MAX_LENGTH else None
    except Exception:  # noqa: BLE001  whatever its repr does
        return None
    return text if type(back) is type(value) and repr(back) == text and back == value else None


def arguments(frame: Any, skip: int) -> "list[str] | None":
    """The arguments of the call that began this frame, as two literals; None where they are none."""
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount]
    args = [frame.f_locals[name] for name in names[skip:]]
    place = code.co_argcount + code.co_kwonlyargcount
    kwargs = {name: frame.f_locals[name] for name in code.co_varnames[code.co_argcount : place]}
    if code.co_flags & 4:
        args += frame.f_locals[code.co_varnames[place]]
        place += 1
    if code.co_flags & 8:
        kwargs |= frame.f_locals[code.co_varnames[place]]
    texts = literal(tuple(args)), literal(kwargs)
    return None if None in texts else [text for text in texts if text is not None]


class Tracer:
    """A profile function for `sys.setprofile`."""

    def __init__(self, modules: "dict[str, str]") -> None:
        self.modules = modules
        self.known = set(modules.values())
        self.calls: dict[str, Any] = {}
        self.objects: dict[int, list[Any]] = {}
        self.ran: set[str] = set()
        self.open: dict[int, list[Any]] = {}

    def __call__(self, frame: Any, event: str, value: Any) -> None:
        """Note which function runs, and the call where it comes from outside the package."""
        if event == "return" and (call := self.open.pop(id(frame), None)) and type(value).__module__ in self.known:
            self.objects[id(value)] = [value, call, [], True]
        if event != "call":
            return
        module = self.modules.get(frame.f_code.co_filename)
        outside = frame.f_back
        if module is not None:
            self.ran.add(f"{module}:{frame.f_code.co_qualname.partition('.<locals>')[0]}")
        if module is None or outside is None or outside.f_code.co_filename in self.modules:
            return
        with contextlib.suppress(Exception):  # an object of the tests that cannot be looked at is not noted
            self.note(module, frame)

    def note(self, module: str, frame: Any) -> None:
        """Note the call that began this frame."""
        name = frame.f_code.co_qualname
        if "<" in name:
            return
        owner, _, method = name.rpartition(".")
        if not owner:
            if (texts := arguments(frame, 0)) is not None:
                self.keep(frame, [f"{module}:{name}", *texts])
            return
        names = frame.f_code.co_varnames
        first = frame.f_locals.get(names[0]) if frame.f_code.co_argcount else None
        if isinstance(first, type):
            if (texts := arguments(frame, 1)) is not None:
                self.keep(frame, [f"{first.__module__}:{first.__qualname__}.{method}", *texts])
        elif names[:1] == ("self",):
            self.step(first, method, arguments(frame, 1))

    def keep(self, frame: Any, call: "list[Any]") -> None:
        """Keep a call of a function, and wait for the object that it may make."""
        if call[0].partition(":")[0] in self.known:
            self.calls.setdefault(json.dumps(call), call)
            self.open[id(frame)] = call

    def step(self, target: Any, method: str, texts: "list[str] | None") -> None:
        """A step in the life of an object."""
        kind = type(target)
        if kind.__module__ not in self.known:
            return
        if method == "__init__":
            known = [target, [f"{kind.__module__}:{kind.__qualname__}", *(texts or ())], [], texts is not None]
            self.objects[id(target)] = known
        elif (seen := self.objects.get(id(target))) and seen[3] and seen[0] is target:
            if texts is None or len(seen[2]) >= MAX_STEPS:
                seen[3] = False
            else:
                seen[2].append([method, *texts])

    def found(self) -> "list[Any]":
        """All calls, those of objects last."""
        whole = [[*made, steps] for _, made, steps, _ in self.objects.values() if len(made) == 3 and steps]
        return [*self.calls.values(), *{json.dumps(call): call for call in whole}.values()]


def main() -> None:
    """Arguments: the folder for the path, {file: module} as JSON, and what pytest is to be given."""
    root, modules, *tests = sys.argv[1:]
    records = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.path[0:1] = [root, "/tmp/kit"]
    import pytest

    tracer = Tracer(json.loads(modules))

    class Plugin:
        """Watches the tests only, not what pytest does in between."""

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_call(self, item: Any) -> Any:
            """One test."""
            sys.setprofile(tracer)
            try:
                return (yield)
            finally:
                sys.setprofile(None)

    options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir=.", "--color=no"]
    pytest.main([*options, *tests], plugins=[Plugin()])
    data = json.dumps({"calls": tracer.found(), "ran": sorted(tracer.ran)}).encode()
    with os.fdopen(records, "wb") as file:
        file.write(data)


if __name__ == "__main__":
    main()
