"""The program of the scoring process: makes reasoning-gym's entries and scores answers, each in a process of its own.

Run as `python -I scorer.py`. Reads one JSON object a line, answers with one JSON object a line that repeats the
request's nonce. Every request is served by a fork that ends with it, so nothing that an answer does to the scorer
outlives the answer. The score of that one answer can still be forged by a scorer that evaluates text: such data sets
are not let in. It is never imported by the environment, and knows nothing of rewards.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
from typing import Any

MAX_BYTES = 2 << 30


def serve(request: dict[str, Any], create: Any) -> Any:
    """What one request asks for."""
    dataset = create(request["dataset"], seed=request["seed"], size=request["size"])
    entry = dataset[request["index"]]
    if request["what"] == "entry":
        return {"question": entry["question"], "answer": str(entry["answer"])}
    return {"score": dataset.score_answer(request["answer"], entry)}


def child(request: dict[str, Any], create: Any, out: int) -> None:
    """Serve one request in this fork and end, whatever happens."""
    status = 1
    try:
        os.closerange(3, out)
        os.closerange(out + 1, 256)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        os.write(out, json.dumps(serve(request, create)).encode())
        status = 0
    except BaseException as error:  # noqa: BLE001  it is told to the parent, and the fork ends
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def in_a_fork(request: dict[str, Any], create: Any) -> dict[str, Any]:
    """The result of one request, or why there is none."""
    inward, outward = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(inward)
        child(request, create, outward)
    os.close(outward)
    payload, timed_out = b"", False
    while True:
        if not select.select([inward], [], [], request["timeout_s"])[0]:
            timed_out = True
            break
        chunk = os.read(inward, 1 << 16)
        if not chunk:
            break
        payload += chunk
    os.close(inward)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if timed_out:
        return {"timed_out": True}
    try:
        found = json.loads(payload)
    except ValueError:
        return {"failed": f"ended with status {status} and {len(payload)} bytes"}
    return found if isinstance(found, dict) else {"failed": "no object"}


def main() -> None:
    """Serve until standard input ends. What the scorers print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.set_inheritable(replies.fileno(), False)
    os.dup2(2, 1)
    from reasoning_gym.factory import create_dataset

    replies.write('{"ready": true}\n')
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        nonce = request.pop("nonce")
        reply = in_a_fork(request, create_dataset) | {"nonce": nonce}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
