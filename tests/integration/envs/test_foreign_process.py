"""What adapters do with processes and servers that are missing, broken or hostile; no package of others is needed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import WSMsgType, web

from envs.adapters import process as process_module
from envs.adapters.openenv import OpenEnvEnvironment
from envs.adapters.process import ForeignProcess
from envs.adapters.textarena import TextArenaEnvironment
from envs.adapters.verifiers import VerifiersEnvironment, _row
from envs.interface import (
    Action,
    EnvironmentFailureError,
    EnvironmentOptionsError,
    ErgonEnvError,
    SandboxError,
    ToolCall,
)
from envs.registry import create_environment
from tests.integration.envs.support import children

# Stands in for the program of the process: answers what it is told to, whatever was asked.
HOSTILE = """
import os, select, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print(sys.argv[3].replace("OPTIONS", ""), flush=True)
while True:
    if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
        break
    connection, _ = listener.accept()
    connection.sendall(b"{}\\n")
    try:
        for line in connection.makefile():
            connection.sendall(eval(line)["say"].encode() + b"\\n")
    except OSError:
        pass
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ForeignProcess:
    program = tmp_path / "hostile.py"
    program.write_text(HOSTILE)
    monkeypatch.setattr(process_module, "PROGRAM", program)
    return ForeignProcess(None, "any", "a-package", {"id": "x"}, timeout_s=5)


@pytest.mark.parametrize("said", ["[]", "nonsense", "", '{"failed": "no move"}', "x" * (2 << 20)])
async def test_an_answer_that_is_none_breaks_the_episode_and_no_other(hostile: ForeignProcess, said: str) -> None:
    before = children()
    session = await hostile.session()
    with pytest.raises(EnvironmentFailureError, match="a-package"):
        await session.ask({"say": said})
    await session.close()
    session = await hostile.session()
    assert await session.ask({"say": '{"right": 1}'}) == {"right": 1}
    await session.close()
    await hostile.close()
    await hostile.close()
    assert children() == before
    with pytest.raises(EnvironmentFailureError, match="closed"):
        await hostile.session()


async def test_a_process_that_ended_is_infrastructure_and_is_replaced(hostile: ForeignProcess) -> None:
    await hostile.start()
    process = hostile._process
    assert process is not None
    process.kill()
    await process.wait()
    session = await hostile.session()
    assert hostile._process is not process
    assert await session.ask({"say": "{}"}) == {}
    await session.close()
    hostile._socket.unlink()
    with pytest.raises(SandboxError, match="cannot be reached"):
        await hostile.session()
    await (await hostile.session()).close()
    await hostile.close()


async def test_a_package_that_is_missing_is_named_with_the_interpreter() -> None:
    environment = TextArenaEnvironment("GuessTheNumber-v0")
    with pytest.raises(
        EnvironmentOptionsError, match=r"cannot load 'GuessTheNumber-v0' with textarena: ModuleNotFound"
    ):
        await environment.prepare()
    await environment.close()
    with pytest.raises(EnvironmentOptionsError, match="DIR/bin/pip install verifiers"):
        VerifiersEnvironment("x", python="/no/such/python")


def test_rows_of_verifiers_are_in_one_split_only() -> None:
    assert [_row({"train": 3, "heldout": 2}, "heldout", index)["row"] for index in range(3)] == [0, 1, 0]
    sides = [{_row({"train": 5, "heldout": 0}, split, index)["row"] for index in range(9)} for split in SPLITS]
    assert sides == [{0, 2, 4}, {1, 3}]
    with pytest.raises(EnvironmentFailureError, match="too few"):
        _row({"train": 1, "heldout": 0}, "train", 0)


SPLITS: Any = ("train", "heldout")


@pytest_asyncio.fixture
async def server() -> AsyncIterator[str]:
    """Speaks OpenEnv's messages and does what an action's `do` says; `{}` resets."""

    async def socket(request: web.Request) -> web.WebSocketResponse:
        connection = web.WebSocketResponse()
        await connection.prepare(request)
        async for message in connection:
            assert message.type is WSMsgType.TEXT
            asked = json.loads(message.data)
            do = asked["data"].get("do", '{"type": "observation", "data": {"observation": {"a": "b", "done": false}}}')
            if do == "hang up":
                break
            await connection.send_str(do)
        return connection

    async def schema(request: web.Request) -> web.Response:
        fields = {"do": {"type": "string", "description": "what"}, "metadata": {"type": "object"}}
        return web.json_response({"action": {"properties": fields, "required": ["do"]}})

    application = web.Application()
    application.add_routes([web.get("/ws", socket), web.get("/schema", schema)])
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def step(environment: OpenEnvEnvironment, do: str) -> str:
    """What the policy sees of one action in a fresh session."""
    episode = environment.episode(environment.task("train", 0))
    try:
        first = (await episode.start())[0].content
        assert first.endswith("An action has these fields:\n- do: string what\n\na: b")
        return (await episode.step(Action("", (ToolCall("act", {"action": {"do": do}}),)))).messages[0].content
    finally:
        await episode.close()


async def test_a_server_is_shown_and_its_mistakes_are_nobody_elses(server: str) -> None:
    environment = OpenEnvEnvironment(url=server, timeout_s=5)
    over = '{"type": "observation", "data": {"observation": {"text": "c"}, "reward": 2, "done": true}}'
    assert await step(environment, over) == "text: c\nreward: 2\nIt is over."
    refused = '{"type": "error", "data": {"code": "VALIDATION_ERROR", "message": "no", "errors": [{"msg": "why"}]}}'
    assert await step(environment, refused) == "error: no : why"
    for do, error, sentence in (
        (
            '{"type": "error", "data": {"code": "EXECUTION_ERROR", "message": "m"}}',
            EnvironmentFailureError,
            "failed: m",
        ),
        ('{"type": "error", "data": {"code": "CAPACITY_REACHED"}}', SandboxError, "lower the option sessions"),
        ('{"type": "observation", "data": {"reward": "1"}}', EnvironmentFailureError, "no number"),
        ('{"type": "observation", "data": {"reward": NaN}}', EnvironmentFailureError, "no number"),
        ("[]", EnvironmentFailureError, "answered"),
        ("nonsense", SandboxError, "broke off"),
        ("hang up", SandboxError, "broke off"),
    ):
        with pytest.raises(error, match=sentence):
            await step(environment, do)
    await environment.close()


async def test_a_server_that_is_not_there_is_infrastructure() -> None:
    environment = OpenEnvEnvironment(url="http://127.0.0.1:9", timeout_s=2)
    with pytest.raises(SandboxError, match="cannot be reached"):
        await environment.prepare()
    await environment.close()
    started = OpenEnvEnvironment(command=["false", "{port}"])
    with pytest.raises(SandboxError, match="it ended"):
        await started.prepare()
    await started.close()


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("openenv", {}, "give one of the two"),
        ("openenv", {"url": "http://x", "command": ["y"]}, "give one of the two"),
        ("openenv", {"url": "x"}, "must begin with http"),
        ("openenv", {"command": ["no-such-program"]}, "no program 'no-such-program'"),
        ("openenv", {"url": "http://x", "sessions": 0}, "sessions is 0"),
        ("textarena", {"id": "x", "num_players": 2}, "needs an opponent"),
        ("textarena", {"id": "x", "opponent": "json:loads"}, "needs an opponent"),
        ("textarena", {"id": "x", "solver": "nowhere"}, "solver is 'nowhere'"),
        ("verifiers", {"id": "x", "timeout_s": 0}, "timeout_s is 0"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ErgonEnvError, match=sentence):
        create_environment(name, options)
