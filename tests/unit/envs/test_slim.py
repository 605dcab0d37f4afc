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


OPTIONAL = {
    "gymnasium",
    "mcp",
    "miniwob",
    "reasoning_gym",
    "openai",
    "aiohttp",
    "textarena",
    "verifiers",
    "openenv",
} | {"kubernetes"}


def test_an_environment_pulls_in_nothing_heavy_nor_optional() -> None:
    statement = (
        "import envs.program.folder; from envs.registry import BUILT_IN, create_environment as c; "
        "[c(n).task('train', 0) for n in BUILT_IN if n != 'program']"  # which needs a folder
    )
    assert not modules_after(statement) & (HEAVY | OPTIONAL)


def test_adapters_import_what_they_adapt_only_when_used() -> None:
    statement = "import envs.adapters.gymnasium, envs.adapters.mcp, envs.adapters.openenv, envs.adapters.textarena, "
    statement += "envs.adapters.verifiers, envs.reason.gym, envs.services.serve, envs.browser.miniwob, deploy.cli"
    assert not modules_after(statement) & OPTIONAL
