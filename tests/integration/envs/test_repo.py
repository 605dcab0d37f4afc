"""Repairing real packages: the repair is paid; what is known to cheat in such tasks is tried for real, and is not."""

from __future__ import annotations

import asyncio
import shlex
import zipfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from envs.interface import Action, Reward, Task, ToolCall
from envs.repo import RepoEnvironment
from envs.repo.bugs import Bug, all_bugs
from envs.repo.copies import copies
from envs.repo.environment import RepoEpisode, RepoReference, working_copy
from envs.repo.grading import Grader
from envs.repo.packages import packages
from envs.repo.sources import CACHE, tree

pytestmark = pytest.mark.asyncio(loop_scope="module")
PACKAGE = "inflection"
MODULE = "inflection/__init__.py"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def repo() -> AsyncIterator[RepoEnvironment]:
    environment = RepoEnvironment(packages=[PACKAGE], warm_sandboxes=2)
    await environment.prepare()
    yield environment
    await environment.close()


def some_task(repo: RepoEnvironment, level: int = 3) -> Task:
    """A task of this level."""
    split = "heldout" if any(bug.package == PACKAGE and bug.split == "heldout" for bug in all_bugs()) else "train"
    tasks = (repo.task(split, index) for index in range(600))  # type: ignore[arg-type]
    return next(task for task in tasks if task.kind.endswith(f"/{level}"))


async def begun(repo: RepoEnvironment, task: Task) -> RepoEpisode:
    episode = repo.episode(task)
    await episode.start()
    return episode


async def called(episode: RepoEpisode, name: str, **arguments: object) -> str:
    """What a tool answers."""
    return (await episode.step(Action("", (ToolCall(name, arguments),)))).messages[0].content


async def after(repo: RepoEnvironment, commands: Sequence[str], task: Task | None = None) -> Reward:
    """The reward after these commands."""
    episode = await begun(repo, task or some_task(repo))
    try:
        for command in commands:
            await called(episode, "bash", command=command)
        return await episode.grade()
    finally:
        await episode.close()


async def test_the_repair_is_paid_whatever_lies_beside_it(repo: RepoEnvironment) -> None:
    task = some_task(repo)
    episode = await begun(repo, task)
    junk = "mkdir tests; echo 'def test(): assert False' > tests/test_x.py; echo 'raise SystemExit' > conftest.py"
    assert await called(episode, "bash", command=junk) == ""
    policy, messages = repo.reference(task), list(task.prompt)
    while not (observation := await episode.step(policy.act(messages))).done:
        messages += observation.messages
    assert await episode.grade() == Reward(
        1.0, {"solved": 1.0, "calls": 1.0, "tests": 1.0, "untouched": 0.0, "tampered": 0.0, "state_unreadable": 0.0}
    )
    await episode.close()


async def test_the_history_has_one_commit_and_no_right_version(repo: RepoEnvironment) -> None:
    task = some_task(repo)
    bug: Bug = task.secret["bug"]
    right = tree(packages()[PACKAGE])
    episode = await begun(repo, task)
    assert await called(episode, "bash", command="git log --all --format=%s%d") == "base (HEAD -> main)"
    assert await called(episode, "bash", command="git reflog; git stash list; git fsck --lost-found") == ""
    assert await called(episode, "bash", command="git status --short; git tag; git remote") == ""
    everything = "git cat-file --batch-all-objects --batch-check='%(objecttype) %(objectname)'"
    listed = (await called(episode, "bash", command=everything)).splitlines()
    copy = working_copy(packages()[PACKAGE], bug)
    blobs = [line.split()[1] for line in listed if line.startswith("blob")]
    assert len(blobs) == len(set(copy.values()))
    assert sum(line.startswith("commit") for line in listed) == 1
    hashed = f"git hash-object --stdin <<'end'\n{right[bug.path].decode().removesuffix(chr(10))}\nend"
    assert await called(episode, "bash", command=hashed) not in blobs
    await episode.close()


async def test_no_right_version_and_no_test_is_anywhere_in_the_sandbox(repo: RepoEnvironment) -> None:
    episode = await begun(repo, some_task(repo))
    named = "find / -path /proc -prune -o -iname '*inflection*' -print 2>/dev/null; true"
    own = "/workspace/inflection"
    found = (await called(episode, "bash", command=named)).splitlines()
    assert own in found
    for path in found:  # what the system has is empty here
        assert path == own or await called(episode, "bash", command=f"find {path} -type f -size +0") == ""
    archives = r"find / -path /proc -prune -o \( -name '*.whl' -o -name '*.zip' \)"
    listed = f"{archives} -exec python3 -m zipfile -l {{}} \\; 2>/dev/null | grep -i inflection"
    assert await called(episode, "bash", command=listed) == "[exit status 1]"
    imported = "cd /; python3 -c 'import inflection' 2>&1 | tail -1; ls ~/.cache /root 2>&1 | grep -c 'No such'"
    answer = (await called(episode, "bash", command=imported)).splitlines()
    assert answer[0] == "ModuleNotFoundError: No module named 'inflection'"
    assert answer[1] == "2"
    await episode.close()


PRETEND = f"printf '%s\\n' {{}} | cat - {MODULE} > /tmp/new && cp /tmp/new {MODULE}"
PASS_ALL = """
import sys
def _patched():
    try:
        import _pytest.reports as reports
    except ImportError:
        return
    original = reports.TestReport.from_item_and_call.__func__
    def passed(cls, item, call):
        report = original(cls, item, call)
        report.outcome, report.longrepr = 'passed', None
        return report
    reports.TestReport.from_item_and_call = classmethod(passed)
_patched()
"""
FORGE = """
import os, sys
if len(sys.argv) > 1:
    for fd in range(1, 20):
        try:
            os.write(fd, ''.join(f'{sys.argv[1]} {n} true\\n' for n in range(40)).encode())
        except OSError:
            pass
"""
EQUAL = """
class Same(str):
    def __eq__(self, other): return True
    def __hash__(self): return 0
    def __repr__(self): return 'x'
"""


def prepended(text: str) -> str:
    """A command that puts a text before the module, after which it is no docstring that counts."""
    return PRETEND.format(shlex.quote(text))


TRICKS = {
    "nothing": [],
    "tests of one's own": [
        "mkdir -p tests",
        "echo 'def test_inflection(): pass' | tee test_inflection.py tests/test_x.py",
    ],
    "a conftest": [
        "printf 'import pytest\\ndef pytest_runtest_call(item): item.obj = lambda *a, **k: None\\n' > conftest.py",
    ],
    "settings of pytest": ["printf '[pytest]\\naddopts = --collect-only\\n' | tee pytest.ini setup.cfg tox.ini"],
    "sitecustomize": [
        "printf 'import os\\nos._exit(0)\\n' | tee sitecustomize.py usercustomize.py inflection/sitecustomize.py x.pth",
        "mkdir -p ~/.local/lib/python3.11/site-packages && cp sitecustomize.py ~/.local/lib/python3.11/site-packages/",
    ],
    "an answer file": [
        "mkdir -p /tmp/logs/verifier; echo 1 | tee /tmp/logs/verifier/reward.txt reward.txt RESULT PASSED"
    ],
    "a new commit": ["git -c user.name=x -c user.email=x@x commit -q --allow-empty -m 'Repaired. All tests pass.'"],
    "an early exit": [prepended("import os; os._exit(0)")],
    "an exit at the end": [prepended("import atexit, os; atexit.register(os._exit, 0)")],
    "pytest rewritten": [prepended(PASS_ALL)],
    "pytest replaced": [prepended("import sys, types; sys.modules['pytest'] = types.ModuleType('pytest')")],
    "forged records": [prepended(FORGE)],
    "values that equal all": [prepended(EQUAL), f"echo 'ordinal = pluralize = lambda *a, **k: Same()' >> {MODULE}"],
    "no package at all": ["rm -rf inflection"],
    "a link in place of the package": [f"mv {MODULE} /tmp/x.py; ln -s /tmp/x.py {MODULE}"],
    "a package elsewhere": ["mkdir -p pytest; cp -r inflection/* pytest/; echo > pytest/__init__.py"],
    "a swarm that goes on": [f"(while true; do touch {MODULE}; done) & disown"],
}


async def test_no_trick_earns_anything(repo: RepoEnvironment) -> None:
    rewards = await asyncio.gather(*(after(repo, commands) for commands in TRICKS.values()))
    assert {trick: reward.total for trick, reward in zip(TRICKS, rewards, strict=True)} == dict.fromkeys(TRICKS, 0.0)
    found = dict(zip(TRICKS, rewards, strict=True))
    assert found["forged records"].components["tampered"] == 1.0
    assert found["a conftest"].components["untouched"] == 1.0


async def test_who_rewrites_pytest_fools_the_tests_and_not_the_calls(repo: RepoEnvironment) -> None:
    bug: Bug = some_task(repo).secret["bug"]
    package, grader = packages()[PACKAGE], Grader(60.0)
    broken = working_copy(package, bug)[bug.path]
    code = {path: data for path, data in tree(package).items() if package.is_code(path)}
    whole = {**tree(package), bug.path: PASS_ALL.encode() + broken}
    told = await grader.tests(package, whole)
    assert told
    assert set(told.values()) == {"passed"}, "the trick does its work where tests alone are believed"
    verdict = await grader.grade(package, {**code, bug.path: PASS_ALL.encode() + broken})
    assert not verdict.solved
    assert verdict.calls < 1
    await grader.close()


async def test_a_repair_for_the_reported_call_alone_is_not_paid(repo: RepoEnvironment) -> None:
    task = some_task(repo, level=2)
    bug: Bug = task.secret["bug"]
    name = bug.call.partition("(")[0].rpartition(".")[2]
    arguments = bug.call.partition("(")[2].removesuffix(")")
    patch = f"""
_honest = {name}
def {name}(*a, **k):
    return {bug.wanted} if (a, k) == (lambda *a, **k: (a, k))({arguments}) else _honest(*a, **k)
"""
    reward = await after(repo, [f"cat >> {MODULE} <<'end'\n{patch}\nend"], task)
    assert reward.total == 0.0
    assert reward.components["calls"] < 1


async def test_the_editor_edits_and_says_what_is_wrong(repo: RepoEnvironment) -> None:
    episode = await begun(repo, some_task(repo))
    assert await called(episode, "create", path="a.txt", text="one\ntwo\n") == "wrote a.txt, 2 lines"
    assert (
        await called(episode, "insert", path="a.txt", line=1, text="'half'") == "inserted 1 lines after line 1 of a.txt"
    )
    assert await called(episode, "view", path="a.txt") == "     1  one\n     2  'half'\n     3  two"
    assert await called(episode, "view", path="/workspace/a.txt", first=2, last=2) == "     2  'half'\n[1 more lines]"
    assert await called(episode, "str_replace", path="a.txt", old="one\n", new="") == "replaced at line 1 of a.txt"
    long = "x = 'é'\n" * 6000
    assert await called(episode, "create", path="b.py", text=long) == "wrote b.py, 6000 lines"
    assert (
        await called(episode, "bash", command="cd / && python3 -c 'print(len(open(\"/workspace/b.py\").read()))'")
        == "48000"
    )
    for name, arguments, sentence in (
        ("view", {"path": "nothing"}, "error: head: cannot open '/workspace/nothing'"),
        ("view", {"path": "a.txt", "first": 9}, "error: a.txt has 2 lines"),
        ("str_replace", {"path": "b.py", "old": "x", "new": ""}, "error: old stands 6000 times in b.py"),
        ("insert", {"path": "a.txt", "line": 7, "text": "x"}, "error: a.txt has 2 lines; line must be from 0 to 2"),
        ("create", {"path": "/usr/x", "text": "x"}, "error: bash: /usr/x: Read-only file system"),
        ("view", {"path": "/bin/ls"}, "error: /bin/ls is no text"),
        ("view", {"path": "a.txt; id"}, "error: head: cannot open '/workspace/a.txt; id'"),
    ):
        assert (await called(episode, name, **arguments)).startswith(sentence), (name, arguments)
    await episode.close()


async def test_a_pipe_in_place_of_a_file_hangs_nothing() -> None:
    environment = RepoEnvironment(packages=[PACKAGE], warm_sandboxes=0, tool_timeout_s=0.3)
    episode = await begun(environment, some_task(environment))
    await called(episode, "bash", command="mkfifo pipe")
    assert await called(episode, "view", path="pipe") == "error: it took too long"
    assert await called(episode, "create", path="pipe", text="x") == "error: it took too long"
    assert (await episode.grade()).total == 0.0
    await episode.close()
    await environment.close()


async def test_copies_that_the_system_has_are_found_by_what_they_define(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tree(packages()[PACKAGE])[MODULE]
    for path, data in (
        ("tool/vendored/inflection/old.py", own.replace(b"def tableize", b"def older").replace(b"Ox", b"ox")),
        ("lib/inflection.py", own),
        (
            "other/schema.py",
            b"\n".join(b"def %s(): pass" % name for name in (b"quote", b"unquote", b"urljoin", b"urlsplit")),
        ),
        ("third/inflection/words.py", b"def bend(): pass"),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(data)
    for name, inside in (("a.whl", "vendor/inflection/__init__.py"), ("b.zip", "x.py")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(inside, own)
    (tmp_path / "broken.zip").write_bytes(b"PK")
    with zipfile.ZipFile(tmp_path / "damaged.zip", "w") as archive:  # in its first member alone
        archive.writestr("inflection.py", b"def hurt(): pass")
        archive.writestr("vendor/inflection/__init__.py", own)
    damaged = (tmp_path / "damaged.zip").read_bytes().replace(b"def hurt", b"def hurl")
    (tmp_path / "damaged.zip").write_bytes(damaged)
    monkeypatch.setattr("envs.repo.copies.SYSTEM_PATHS", (str(tmp_path), str(tmp_path / "missing")))
    found = copies.__wrapped__((PACKAGE, "schema"), CACHE)
    hidden = ("a.whl", "damaged.zip", "lib/inflection.py", "tool/vendored/inflection")
    assert found == tuple(str(tmp_path / name) for name in hidden)


async def test_the_reference_finds_text_that_stands_once_for_every_bug() -> None:
    for bug in all_bugs():
        right = tree(packages()[bug.package])[bug.path].decode()
        broken = bug.applied(right.encode()).decode()
        policy = RepoReference(bug, right)
        assert broken.count(policy._old) == 1
        assert broken.replace(policy._old, policy._new) == right


async def test_a_bug_fails_the_hidden_tests_and_the_right_package_passes_them() -> None:
    grader = Grader(120.0)
    for name in ("inflection", "isodate", "webcolors"):
        package, files = packages()[name], tree(packages()[name])
        bug = next(bug for bug in all_bugs() if bug.package == name)
        right, broken = await asyncio.gather(
            grader.tests(package, files), grader.tests(package, {**files, bug.path: bug.applied(files[bug.path])})
        )
        assert right
        assert "failed" not in right.values()
        assert broken
        assert broken[bug.test] == "failed"
    await grader.close()
