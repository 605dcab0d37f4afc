"""Holds the scoring process: starts it, asks it, and kills and replaces it on a time-out or on anything unexpected.

Third-party scorers run there and never here: some evaluate the policy's text. Believes only a number from 0 to 1 that
comes with the request's nonce.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from envs.interface import EnvironmentFailureError, EnvironmentOptionsError

PROGRAM = Path(__file__).with_name("scorer.py")
START_S = 60.0


class ScoringWorker:
    """One process, one request at a time; may be asked from several threads.

    timeout_s: seconds of one request. python: the interpreter, this one by default. num_replaced: how many processes
    had to be replaced so far. Raises EnvironmentOptionsError for an interpreter that is none.
    """

    def __init__(self, timeout_s: float = 10.0, python: str | None = None) -> None:
        found = shutil.which(python or sys.executable)
        if found is None:
            raise EnvironmentOptionsError(
                f"python is {python!r}, which is no program: give that of an environment with reasoning-gym in it"
            )
        self._python = found
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.num_replaced = 0

    def start(self) -> None:
        """Start the process now, which takes seconds, not with the first request. Raises EnvironmentOptionsError."""
        with self._lock:
            self._process = self._process or self._start()

    def entry(self, dataset: str, seed: int, index: int) -> tuple[str, str]:
        """Question and answer of one entry. Raises EnvironmentFailureError."""
        reply = self._ask({"what": "entry", "dataset": dataset, "seed": seed, "index": index, "size": index + 1})
        question, answer = reply.get("question"), reply.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise EnvironmentFailureError(f"reasoning-gym's {dataset} made no entry {index}: {reply.get('failed')}")
        return question, answer

    def score(self, dataset: str, seed: int, index: int, answer: str) -> float:
        """The score of an answer, 0 to 1; 0 where the scorer broke on it or said anything but such a number.

        Raises EnvironmentFailureError where there was no reply in time.
        """
        wanted = {"dataset": dataset, "seed": seed, "index": index, "size": index + 1}
        reply = self._ask({"what": "score", "answer": answer, **wanted})
        if reply.get("timed_out"):
            raise EnvironmentFailureError(f"reasoning-gym's {dataset} did not score entry {index} in time")
        score = reply.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            return 0.0
        return float(score)

    def close(self) -> None:
        """Kill the process; idempotent."""
        with self._lock:
            self._kill()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request. A suspicious one costs the process its life, and counts as a failure."""
        with self._lock:
            process = self._process or self._start()
            nonce = secrets.token_hex(8)
            line = json.dumps(request | {"nonce": nonce, "timeout_s": self._timeout_s})
            assert process.stdin is not None
            try:
                process.stdin.write(line.encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                return self._replaced(timed_out=True)
            reply = self._line(process, self._timeout_s + 5)
            if reply is None:
                return self._replaced(timed_out=True)
            if reply.get("nonce") != nonce:
                return self._replaced(failed="it answered another request")
            assert process.stdout is not None
            if select.select([process.stdout], [], [], 0)[0]:
                return self._replaced(failed="it said more than was asked")
            return reply

    def _replaced(self, **reply: Any) -> dict[str, Any]:
        """End the process, so that the next request starts another one."""
        self._kill()
        self.num_replaced += 1
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = process = subprocess.Popen(
            [self._python, "-I", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
            cwd="/",
            start_new_session=True,
        )
        if self._line(process, START_S) != {"ready": True}:
            self._kill()
            raise EnvironmentOptionsError(
                "reasoning-gym cannot be started: type `pip install ergon[reasoning-gym]`, the package may be missing"
            )
        return process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], timeout_s: float) -> dict[str, Any] | None:
        """The next line, as an object; an empty one for anything else, None for none in time."""
        assert process.stdout is not None
        end, line = time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                return None
            line += chunk
        try:
            found = json.loads(line)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # what was not yet read is of no use to anybody
