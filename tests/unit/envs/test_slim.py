"""An environment can be used without anything heavy, and without the rest of the project."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"torch", "vllm", "deepspeed", "transformers", "numpy", "zmq", "actors", "learner", "broker", "deploy"}


def modules_after(statement: str) -> set[str]:
    program = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in ended.stdout.split()}


def test_the_package_alone_imports_nothing_else() -> None:
    assert not modules_after("import envs, envs.interface, envs.registry") & (HEAVY | {"pydantic"})


def test_an_environment_pulls_in_nothing_heavy() -> None:
    statement = "from envs.registry import create_environment; create_environment('shop').task('train', 0)"
    assert not modules_after(statement) & HEAVY
