"""Makes bugs.jsonl and calls.json: `python -m envs.repo.make [PACKAGE...]`. Minutes a package; not needed to use them.

The tests of the right package are watched for calls that can be made again. Then bugs go in one by one, in an order
that follows from the package's name. One is kept where at least two calls have another outcome, yet not most of them,
and the package's own tests fail. Everything runs where repairs are graded, by the same programs.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import hashlib
import itertools
import json
import random
import re
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from envs.code.problem import same
from envs.interface import SandboxError
from envs.repo.bugs import BUGS, CALLS, Bug
from envs.repo.grading import HERE, KIT, PYTHON, Grader
from envs.repo.mutations import Mutation, mutations
from envs.repo.packages import Package, packages
from envs.repo.sources import tree

MAX_BUGS = 32  # of one package
MAX_OF_A_FUNCTION = 6
MAX_TRIED = 120
BATCH = 16  # that are tried in one sandbox
TRIALS = "/opt/trials.json"
TRIALS_TIMEOUT_S = 1200.0
MAX_CALLS_OF_A_FUNCTION = 14
MAX_CALLS = 420
KEPT_CALLS = 4  # that a bug changes
MAX_SHOWN = 220
MAX_TRACEBACK = 900


class Maker:
    """Makes the bugs of one package."""

    def __init__(self, package: Package, grader: Grader) -> None:
        self.package = package
        self.grader = grader
        self.files = tree(package)
        self.bugs: list[Bug] = []
        self.calls: Sequence[Any] = []
        self.right: Mapping[int, Any] = {}
        self.changed: Counter[int] = Counter()
        self.of_function: Counter[str] = Counter()

    async def run(self) -> None:
        """Make them, some at a time: of each function a few only, so that the next ones are chosen by what was kept."""
        tested = await self.grader.tests(self.package, self.files) or {}
        if not tested or "failed" in tested.values():
            raise SandboxError(f"{self.package.name} fails its own tests as it is: {tested}")
        found = self._mutations(await self._watch())
        allowed_ones = (each for each in found if self.of_function[each[1].function] < MAX_OF_A_FUNCTION)
        mutations_left = itertools.islice(allowed_ones, MAX_TRIED)
        while len(self.bugs) < MAX_BUGS and (allowed := list(itertools.islice(mutations_left, BATCH))):
            for (path, mutation), became in zip(allowed, await self._tried(allowed), strict=False):
                if became and self.of_function[mutation.function] < MAX_OF_A_FUNCTION and len(self.bugs) < MAX_BUGS:
                    self._take(path, mutation, became)

    async def _watch(self) -> set[str]:
        """Note the calls of the tests and what they came to; the functions that ran."""
        package = self.package
        modules = {f"/workspace/{path}": package.module(path) for path in self.files if package.is_code(path)}
        contents = {KIT: await self.grader.kit()}
        async with await self.grader.sandbox("tracer.py", self.files, contents) as fresh:
            await self.grader.unpack(fresh, f"tar -xf {KIT} -C /tmp --strip-components=1")
            arguments = shlex.join([f"/workspace/{package.root}", json.dumps(modules), *package.tests])
            watched = await fresh.exec(f"{PYTHON} /opt/tracer.py {arguments}", timeout_s=120, output_bytes=32 << 20)
        found = json.loads(watched.stdout)
        of_function: dict[tuple[str, bool], list[Any]] = defaultdict(list)
        for call in found["calls"]:
            of_function[call[0], len(call) > 3].append(call)
        draw = random.Random(f"repo/calls/{package.name}")
        chosen = []
        for calls in of_function.values():
            chosen += calls if len(calls) <= MAX_CALLS_OF_A_FUNCTION else draw.sample(calls, MAX_CALLS_OF_A_FUNCTION)
        chosen = draw.sample(chosen, MAX_CALLS) if len(chosen) > MAX_CALLS else chosen
        first, second = [await self.grader.outcomes(package, self.files, chosen) for _ in range(2)]
        if first is None or second is None:
            raise SandboxError(f"the calls of {package.name} cannot be made again")
        year = time.strftime("%Y")
        kept = [
            number
            for number, value in first.items()
            if number in second
            and same(second[number], value)
            and year not in json.dumps(value)
            and value != {"failed": "TypeError"}
        ]
        self.calls = [chosen[number] for number in kept]
        self.right = {place: first[number] for place, number in enumerate(kept)}
        return set(found["ran"])

    def _mutations(self, ran: set[str]) -> Iterator[tuple[str, Mutation]]:
        """Those of functions that the tests run; the kinds take turns."""
        of_kind: dict[str, list[tuple[str, Mutation]]] = defaultdict(list)
        for path, data in sorted(self.files.items()):
            if self.package.is_code(path):
                module = self.package.module(path)
                for mutation in mutations(data.decode()):
                    if f"{module}:{mutation.function}" in ran and compiles(mutation.applied(data.decode())):
                        of_kind[mutation.kind].append((path, mutation))
        draw = random.Random(f"repo/bugs/{self.package.name}")
        for found in of_kind.values():
            draw.shuffle(found)
        rounds = itertools.zip_longest(*(of_kind[kind] for kind in sorted(of_kind)))
        return (each for turn in rounds for each in turn if each is not None)

    async def _tried(self, batch: Sequence[tuple[str, Mutation]]) -> list[dict[str, Any]]:
        """What becomes of the package with each of these, by trials.py; fewer where the time was up."""
        package = self.package
        texts = [(path, mutation.applied(self.files[path].decode())) for path, mutation in batch]
        asked = {
            "trials": [(f"/workspace/{path}", text) for path, text in texts],
            "calls": self.calls,
            "right": [self.right[number] for number in range(len(self.calls))],
        }
        programs = {f"/opt/{name}": (HERE / name).read_bytes() for name in ("runner.py", "hidden.py")}
        contents = {KIT: await self.grader.kit(), TRIALS: json.dumps(asked).encode(), **programs}
        async with await self.grader.sandbox("trials.py", self.files, contents) as fresh:
            await self.grader.unpack(fresh, f"tar -xf {KIT} -C /tmp --strip-components=1")
            arguments = shlex.join([f"/workspace/{package.root}", TRIALS, *package.tests])
            command = f"{PYTHON} /opt/trials.py {arguments}"
            ended = await fresh.exec(command, timeout_s=TRIALS_TIMEOUT_S, output_bytes=64 << 20)
        return [json.loads(line) for line in ended.stdout.splitlines()]

    def _take(self, path: str, mutation: Mutation, found: Mapping[str, Any]) -> None:
        """Keep a bug, unless it cannot be told in a few words."""
        changed = {int(number): value for number, value in found["changed"].items()}
        order = sorted(changed, key=lambda number: len(written(self.calls[number])) + len(shown(self.right[number])))
        first = order[0]
        texts = [written(self.calls[first]), shown(changed[first]), shown(self.right[first])]
        if max(map(len, texts)) > MAX_SHOWN or texts[1] == texts[2]:
            return
        self.changed.update(order[:KEPT_CALLS])
        self.of_function[mutation.function] += 1
        sha256 = hashlib.sha256(mutation.applied(self.files[path].decode()).encode()).hexdigest()
        place = (mutation.kind, mutation.start, mutation.end, mutation.new, sha256)
        test, why = found["why"]
        self.bugs.append(Bug(self.package.name, path, mutation.function, *place, test, cut(why), *texts))

    def kept_calls(self) -> list[Any]:
        """The calls that bugs change, and one more of each function, so that a repair breaks nothing else."""
        seen = {self.calls[number][0] for number in self.changed}
        kept = set(self.changed)
        for number, call in enumerate(self.calls):
            if call[0] not in seen:
                seen.add(call[0])
                kept.add(number)
        return [self.calls[number] for number in sorted(kept)]


def compiles(text: str) -> bool:
    """Whether it is a program."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def cut(text: str) -> str:
    """A traceback of bounded length, without what is different every time."""
    text = re.sub(r"0x[0-9a-f]{6,}", "0x...", text.replace("/workspace/", "")).strip()
    half = MAX_TRACEBACK // 2
    return text if len(text) <= MAX_TRACEBACK else f"{text[:half]}\n[...]\n{text[-half:]}"


def written(call: Sequence[Any]) -> str:
    """A recorded call as a person writes it."""

    def with_arguments(name: str, arguments: str, keywords: str) -> str:
        args = arguments[1:-1].removesuffix(",")
        kwargs = ", ".join(f"{key}={value}" for key, value in _pairs(keywords))
        return f"{name}({', '.join(part for part in (args, kwargs) if part)})"

    begun = with_arguments(call[0].replace(":", "."), call[1], call[2])
    if len(call) == 3:
        return begun
    steps = "; ".join(f"it.{with_arguments(*step)}" for step in call[3])
    return f"it = {begun}; {steps}"


def _pairs(keywords: str) -> list[tuple[str, str]]:
    return [(key, repr(value)) for key, value in ast.literal_eval(keywords).items()]


def shown(value: Any) -> str:
    """An outcome as a person writes it."""
    if not isinstance(value, dict):
        return f"[{', '.join(map(shown, value))}]" if isinstance(value, list) else repr(value)
    ((kind, inner),) = value.items()
    if kind in ("raised", "failed"):
        return f"a {inner}"
    if kind == "float":
        return str(inner)
    if isinstance(inner, list):
        if inner and all(isinstance(each, list) and len(each) == 2 for each in inner) and "ict" in kind:
            text = f"{{{', '.join(f'{shown(key)}: {shown(each)}' for key, each in inner)}}}"
            return text if kind == "dict" else f"{kind}({text})"
        text = ", ".join(map(shown, inner))
        return {"tuple": f"({text})", "set": f"{{{text}}}"}.get(kind, f"{kind}: {text}")
    return str(inner)


async def make(names: Sequence[str]) -> None:
    """Make the bugs of these packages; what is known of others stays."""
    grader = Grader(timeout_s=20.0)
    for name in names:
        began = time.monotonic()
        maker = Maker(packages()[name], grader)
        await maker.run()
        kept = maker.kept_calls()
        bugs = [Bug(**json.loads(line)) for line in BUGS.read_text().splitlines()] if BUGS.exists() else []
        calls = json.loads(CALLS.read_text()) if CALLS.exists() else {}
        bugs = [bug for bug in bugs if bug.package != name] + maker.bugs
        calls[name] = kept
        made = f"{name}: {len(maker.bugs)} bugs, {len(kept)} of {len(maker.calls)} calls"
        sys.stdout.write(f"{made}, {time.monotonic() - began:.0f} s\n")
        sys.stdout.flush()
        lines = (json.dumps(asdict(bug), ensure_ascii=False) for bug in sorted(bugs, key=lambda bug: bug.package))
        BUGS.write_text("".join(f"{line}\n" for line in lines))
        rows = (
            f"{json.dumps(each)}: [\n" + ",\n".join(json.dumps(call) for call in found) + "\n]"
            for each, found in sorted(calls.items())
        )
        CALLS.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    await grader.close()


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", help="all by default")
    chosen = parser.parse_args().packages or list(packages())
    if unknown := set(chosen) - set(packages()):
        sys.exit(f"error: no package {', '.join(sorted(unknown))}; there are {', '.join(packages())}")
    asyncio.run(make(chosen))


if __name__ == "__main__":
    main()
