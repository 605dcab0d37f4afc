"""Two threads that meet a type of message for the first time: each waits for the other to have understood it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

# A process of its own: what this guards against is a crash, not an exception.
TWO_THREADS = textwrap.dedent(
    """
    import sys
    import threading

    import msgspec

    from broker.protocol.commands import parse_body
    from broker.protocol.frames import Message
    from broker.protocol.trajectory import Facts

    class Inner(Facts):
        number: int

    class Outer(Facts):
        first: Inner
        second: Inner

    halfway, go_on = threading.Event(), threading.Event()
    resolved = []

    def trace(frame, event, _argument):
        if event == "call" and frame.f_code.co_name == "get_class_annotations":
            resolved.append(frame)
            if len(resolved) == 2:  # Outer is known by name, its fields are not
                halfway.set()
                go_on.wait(10)

    packed = msgspec.msgpack.encode({"first": {"number": 1}, "second": {"number": 2}})
    results = []

    def parse():
        results.append(parse_body(Message("OUTER", packed, ()), Outer))

    def parse_slowly():
        sys.settrace(trace)
        parse()

    threads = [threading.Thread(target=parse_slowly), threading.Thread(target=parse)]
    threads[0].start()
    assert halfway.wait(10), "msgspec resolves types in another way now: look whether the lock is still needed"
    threads[1].start()
    threads[1].join(0.3)
    go_on.set()
    for thread in threads:
        thread.join()
    assert results == [Outer(first=Inner(number=1), second=Inner(number=2))] * 2, results
    """
)


def test_a_type_is_not_used_by_one_thread_while_another_is_still_reading_it() -> None:
    done = subprocess.run([sys.executable, "-c", TWO_THREADS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
