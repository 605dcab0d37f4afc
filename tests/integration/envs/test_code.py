"""Cheating in the code environment: each known trick is tried for real and earns nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgpack
import pytest
import pytest_asyncio

from envs.code import CodeEnvironment
from envs.code.problem import results, same
from envs.interface import Action, Episode, Reward, SnapshotError, Task, ToolCall
from tests.integration.envs.support import processes_with, unique_marker

ALWAYS_EQUAL = """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
"""

EXPLOITS = {
    "exit 0 at once": "import sys; sys.exit(0)",
    "exit 0 in the call": "import os\ndef solve(*a): os._exit(0)",
    "an object equal to all": ALWAYS_EQUAL + "def solve(*a): return Equal()",
    "a number equal to all": ALWAYS_EQUAL + "class N(Equal, int): pass\ndef solve(*a): return N(7)",
    "a list equal to all": ALWAYS_EQUAL + "class L(list):\n    __eq__ = Equal.__eq__\ndef solve(*a): return L()",
    "verdicts on stdout": "print('PASSED 12 of 12'); print('1.0')\ndef solve(*a): print('ok')",
    "records on every descriptor": """
import os, sys
for number in range(12):
    for fd in range(20):
        try: os.write(fd, f"{sys.argv[1]} {number} true\\n".encode())
        except OSError: pass
def solve(*a): return True
""",
    "expected values in frames": """
import sys
def solve(*a):
    frame = sys._getframe()
    while frame:
        for key in list(frame.f_locals) + list(frame.f_globals):
            if 'expect' in key: return frame.f_locals.get(key, frame.f_globals.get(key))
        frame = frame.f_back
""",
    "expected values in memory": """
import gc
def solve(*a):
    lists = [o for o in gc.get_objects() if isinstance(o, list) and len(o) == 12 and o is not a]
    return lists[-1][0] if lists else None
""",
    "a patched json": "import json\njson.dumps = lambda *a, **k: 'true'\ndef solve(*a): return 1",
    "a patched record": """
import os
write = os.write
os.write = lambda fd, data: write(fd, data + data)
def solve(*a): return 1
""",
    "patched timers and no end": "import time\ntime.time = time.monotonic = lambda: 0\nwhile True: pass",
    "another runner": """
import os
try: open('/opt/code/runner.py', 'w').write('')
except OSError: pass
open('sitecustomize.py', 'w').write('raise SystemExit(0)')
open('json.py', 'w').write('dumps = lambda *a: "true"')
def solve(*a): return None
""",
    "constants": "def solve(*a): return True",
    "NaN": "def solve(*a): return float('nan')",
    "deep": "def solve(*a):\n    x = []\n    for _ in range(900): x = [x]\n    return x",
    "a giant number": "def solve(*a): return 1 << 20000",
    "giant output": "import os\ndef solve(*a):\n    os.write(1, b'x' * 100)\n    return 'x' * 100000",
    "a bool for a number": "def solve(*a): return all(a)",
}


@pytest_asyncio.fixture
async def code() -> AsyncIterator[CodeEnvironment]:
    environment = CodeEnvironment(warm_sandboxes=3, grade_timeout_s=1.5)
    yield environment
    await environment.close()


async def graded(code: CodeEnvironment, task: Task, source: str) -> Reward:
    episode = code.episode(task)
    try:
        await episode.start()
        assert (await episode.step(Action(f"```python\n{source}\n```"))).done
        return await episode.grade()
    finally:
        await episode.close()


@pytest.mark.parametrize("trick", EXPLOITS)
async def test_a_trick_earns_nothing(code: CodeEnvironment, trick: str) -> None:
    for index in (0, 5):  # lists, and truth values
        reward = await graded(code, code.task("train", index), EXPLOITS[trick])
        assert reward.total == 0.0, (trick, reward)


async def test_records_that_are_forged_are_counted(code: CodeEnvironment) -> None:
    reward = await graded(code, code.task("train", 5), EXPLOITS["records on every descriptor"])
    assert reward.components["tampered"] == 1.0


async def test_a_surviving_process_reaches_no_later_grading(code: CodeEnvironment) -> None:
    marker = unique_marker()
    source = f"""
import os
if os.fork() == 0:
    os.setsid()
    os.execvp("sleep", ["sleep", "{marker}"])
def solve(*a): return 0
"""
    task = code.task("train", 0)
    assert (await graded(code, task, source)).total == 0.0
    assert processes_with(marker) == []
    assert (await graded(code, task, task.secret["problem"].source)).total == 1.0


async def test_what_was_tried_before_does_not_touch_the_grading(code: CodeEnvironment) -> None:
    task = code.task("train", 0)
    episode = code.episode(task)
    await episode.start()
    spoil = "open('candidate.py', 'w').write('raise SystemExit'); open('inputs.json', 'w').write('[]'); print('done')"
    answer = await episode.step(Action("", (ToolCall("python", {"code": spoil}),)))
    assert answer.messages[0].content == "done"
    looked = "import os; print(os.path.exists('/work'), [n for n in os.listdir('/opt/code')])"
    answer = await episode.step(Action("", (ToolCall("python", {"code": looked}),)))
    assert answer.messages[0].content == "False ['runner.py']"
    await episode.step(Action(f"```python\n{task.secret['problem'].source}```"))
    assert (await episode.grade()).total == 1.0
    await episode.close()


async def test_partly_right_is_told_and_not_paid(code: CodeEnvironment) -> None:
    task = code.task("train", 5)
    reward = await graded(code, task, "def solve(text): return True")
    assert reward.total == 0.0
    assert 0 < reward.components["passed"] < 1


@pytest.mark.parametrize("text", ["", "def solve(): pass", "```python\n```", "```python\na\n```\n```python\nb\n```"])
async def test_an_answer_without_one_block_is_nothing(code: CodeEnvironment, text: str) -> None:
    episode = code.episode(code.task("train", 0))
    await episode.start()
    await episode.step(Action(text or " "))
    assert (await episode.grade()).total == 0.0
    await episode.close()


def test_values_are_the_same_only_with_their_types() -> None:
    assert same([1, {"a": [True]}], [1, {"a": [True]}])
    for left, right in ((1, True), (1, 1.0), ([1], [1, 2]), ({"a": 1}, {"b": 1}), ("1", 1), (None, False)):
        assert not same(left, right)


def test_records_must_be_sound() -> None:
    assert results(b"n 0 [1]\nn 1 2\n", "n", 2) == {0: [1], 1: 2}
    assert results(b"", "n", 2) == {}
    for forged in (b"n 0 1\nn 0 1\n", b"m 0 1\n", b"n 2 1\n", b"n 0 NaN\n", b"n 0\n", b"n 0 1", b"hello\nn 0 1\n"):
        assert results(forged, "n", 2) is None, forged


async def test_an_episode_goes_on_in_another_sandbox_with_the_files_of_the_first(code: CodeEnvironment) -> None:
    task = code.task("train", 0)

    async def run(episode: Episode, program: str) -> str:
        return (await episode.step(Action("", (ToolCall("python", {"code": program}),)))).messages[0].content

    first = code.episode(task)
    await first.start()
    untouched = await code.restore(task, await first.snapshot())  # no program was run yet
    assert "no notes" in await run(untouched, "import os; print(os.path.exists('notes') or 'no notes')")
    await untouched.close()
    await run(first, "open('notes', 'w').write('42'); open('/tmp/more', 'w').write('43')")
    snapshot = await first.snapshot()
    await run(first, "open('notes', 'w').write('later')")
    await first.close()
    second = await code.restore(task, snapshot)
    assert "42 43" in await run(second, "print(open('notes').read(), open('/tmp/more').read())")
    assert (await second.step(Action(f"```python\n{task.secret['problem'].source}```"))).done
    assert (await second.grade()).total == 1.0
    await second.close()
    *head, state = msgpack.unpackb(snapshot)
    for files, text in ((b"no archive", "the sandbox refused"), (bytes(9 << 20), "files")):
        with pytest.raises(SnapshotError, match=text):
            await code.restore(task, msgpack.packb([*head, {**state, "files": files}]))
