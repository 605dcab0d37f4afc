"""The trainers' processes, as the benchmark sees them: started, given orders, ended. Owns no figure."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.training import environment
from tests.bench.training.recipe import Order, Setup
from tests.bench.training.worker import TRL

LIMIT_S = 900.0  # an answer that takes longer is not waited for


class Member:
    """One trainer in a process of its own. Raises RuntimeError where that process fails."""

    def __init__(self, name: str, setup: Setup, first: Order) -> None:
        self.name = name
        interpreter = environment.python() if name == TRL else Path(sys.executable)
        command = [str(interpreter), "-m", "tests.bench.training.worker", name, json.dumps(setup), json.dumps(first)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            command,
            cwd=environment.ROOT,
            env=environment.environ(setup.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
        )
        self._answer()

    def step(self, order: Order) -> dict[str, float]:
        """Take a step; see `worker.Desk.tell` for what is answered."""
        answer: dict[str, float] = self._ask(order)
        return answer

    def save_gradient(self, path: Path) -> None:
        """Write the gradient of the first step."""
        self._ask(str(path))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _ask(self, what: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], LIMIT_S)
        line = self._process.stdout.readline() if readable else ""
        if not line:
            self._errors.seek(0)
            raise RuntimeError(
                f"the trainer {self.name} does not answer; its last words: {self._errors.read()[-3000:]}"
            )
        return json.loads(line)
