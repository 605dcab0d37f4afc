"""`ergon env show`, `play` and `rollout`, as a person uses them; the endpoint is a real one on a real socket."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from broker.process.lifecycle import ErgonError
from deploy.cli import build_parser
from deploy.environments import described, parsed_options
from deploy.play import CommandError, parse_command
from deploy.rollout import Rollout, as_table, policy_maker, roll_out
from envs.interface import Environment, EnvironmentFailureError, Reward, Task
from envs.memory import MemoryEnvironment
from envs.services import ServicesEnvironment
from tests.unit.envs.example_environment import LettersEnvironment, LettersEpisode

LETTERS = "tests.unit.envs.example_environment:LettersEnvironment"


def ergon(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy", "env", *arguments]
    return subprocess.run(command, input=typed, capture_output=True, text=True, check=False)


def test_a_person_plays_an_episode_with_the_tools_as_commands() -> None:
    played = ergon("play", LETTERS, typed="help\nfly\ncount_letters plate\ncount_letters\nanswer 5\n")
    assert played.returncode == 0
    lines = played.stdout.splitlines()
    assert lines[0] == "user: How many letters are in the word plate"
    assert "  count_letters word: How many letters a word has." in lines
    assert [line.removeprefix("> ") for line in lines if line.startswith(("> tool", "> '"))] == [
        "'fly' is no command; type help",
        "tool: 5",
        "tool: error: count_letters needs the argument word",
    ]
    assert lines[-1] == "reward 1 after 3 turns ()"


def test_a_person_may_give_up_and_is_graded() -> None:
    played = ergon("play", "reason", "--split", "heldout", "--index", "3", "--option", "levels=[1]", typed="quit\n")
    assert (played.returncode, played.stdout.splitlines()[-1]) == (0, "reward 0 after 0 turns (correct 0, parsed 0)")


def test_show_tells_options_tools_and_a_task() -> None:
    memory = MemoryEnvironment()
    shown = described(memory, "train", 2)
    for part in (
        "memory: Facts told",
        "  capacity = 700",
        "  memory_write key text: Store a text",
        "task train 2 (exp",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("show", "memry"), "did you mean 'memory'"),
        (("show", "memory", "--option", "capacity"), "--option 'capacity' is not KEY=VALUE"),
        (("play", "memory", "--option", "capacity=3"), "capacity is 3; it must be 240 or more"),
        (("play", "memory", "--index", "-1"), "from index 0, not 'train' -1"),
        (("rollout", "reason", "--episodes", "0"), "--episodes is 0; it must be 1 or more"),
        (("rollout", "reason", "--policy", "me"), "choose reference, or the URL"),
        (("rollout", "reason", "--policy", "http://127.0.0.1:1/v1"), "an endpoint needs --model"),
        (("rollout", "reason", "--output", "/nowhere/x"), "--output /nowhere/x cannot be written"),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    parsed = build_parser().parse_args(["env", *arguments])
    with pytest.raises(ErgonError) as caught:
        parsed.act(parsed)
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_reference_policy_is_rolled_out_into_a_table_and_json_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "episodes.jsonl"
    command = ["env", "rollout", "services", "--episodes", "9", "--option", "faults=none", "--output", str(output)]
    parsed = build_parser().parse_args(command)
    parsed.act(parsed)
    assert capsys.readouterr().out.splitlines()[-1].split()[:4] == ["all", "9", "1.00", "9"]
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(9))
    assert {(record["outcome"], record["reward"]) for record in records} == {("completed", 1.0)}
    assert all(record["messages"][0]["role"] == "user" and record["num_tool_calls"] for record in records)


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("http GET /files", {"method": "GET", "path": "/files"}),
        ('http POST /a {"b": "c d"} token=t', {"method": "POST", "path": "/a", "body": {"b": "c d"}, "token": "t"}),
        ('http {"method": "GET"}', {"method": "GET"}),
        ("http path='/a b' GET", {"path": "/a b", "method": "GET"}),
        ("http GET /files?page=2", {"method": "GET", "path": "/files?page=2"}),
    ],
)
def test_a_line_becomes_a_call(line: str, arguments: dict[str, Any]) -> None:
    (call,) = parse_command(line, ServicesEnvironment().tools).tool_calls
    assert (call.name, call.arguments) == ("http", arguments)


def test_values_are_of_the_types_that_tools_want() -> None:
    tools = ServicesEnvironment().tools
    assert parse_command("wait 5", tools).tool_calls[0].arguments == {"seconds": 5}
    assert parse_command("answer wait 5", tools).text == "wait 5"
    for line in ("http a b {} c d", "http GET /a {b", "http {"):
        with pytest.raises(CommandError):
            parse_command(line, tools)
    assert parsed_options(["a=[1]", "b=x", "c=true"]) == {"a": [1], "b": "x", "c": True}


@contextmanager
def endpoint(answers: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-compatible server that says these things in turn, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            said = {"role": "assistant", "content": None} | answers[min(len(asked), len(answers)) - 1]
            choice = {"index": 0, "finish_reason": "stop", "message": said}
            body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            payload = json.dumps(body).encode()
            self.send_response(400 if "refuse" in said else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def tool_call(number: int, name: str, arguments: str) -> dict[str, Any]:
    return {"id": f"call-{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


async def rolled_out(environment: Environment, answers: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    with endpoint(answers) as (url, asked):
        policy = policy_maker(environment, url, "m", 0.5)
        (record,) = await roll_out(environment, Rollout("train", 0, 1, 1), policy)
    return record, asked


async def test_an_endpoint_plays_with_the_tools_as_functions() -> None:
    calls = [tool_call(1, "count_letters", '{"word": "plate"}'), tool_call(2, "fly", "{}")]
    record, asked = await rolled_out(LettersEnvironment(), [{"tool_calls": calls}, {"content": "5"}])
    assert (record.outcome, record.reward, record.num_tool_calls) == ("completed", 1.0, 2)
    assert asked[0]["tools"][0]["function"]["parameters"]["required"] == ["word"]
    assert (asked[0]["model"], asked[0]["temperature"]) == ("m", 0.5)
    assert [message["role"] for message in asked[1]["messages"]] == ["user", "assistant", "tool", "tool"]
    answers = {message["tool_call_id"]: message["content"] for message in asked[1]["messages"][2:]}
    assert answers["call-1"] == "5"
    assert answers["call-2"].startswith("error: unknown tool fly")


async def test_broken_arguments_are_told_to_the_endpoint() -> None:
    calls = [tool_call(1, "count_letters", "{"), tool_call(2, "count_letters", "[]")]
    record, asked = await rolled_out(LettersEnvironment(), [{"tool_calls": calls}, {"content": "5"}])
    assert record.reward == 1.0
    told = [message["content"] for message in asked[1]["messages"] if message["role"] == "tool"]
    assert told == ["error: the arguments of count_letters are not a JSON object"] * 2


async def test_a_cleared_context_is_cleared_for_the_endpoint_too() -> None:
    record, asked = await rolled_out(MemoryEnvironment(kinds=["told"]), [{"content": "noted"}])
    assert (record.outcome, record.reward, record.components["last_session"]) == ("completed", 0.0, 1.0)
    assert [len(request["messages"]) for request in asked] == [2, 2, 2]
    assert "Session 3" in asked[2]["messages"][1]["content"]


async def test_an_endpoint_that_refuses_is_a_failure_and_no_zero() -> None:
    record, _ = await rolled_out(LettersEnvironment(), [{"refuse": True}])
    assert (record.outcome, record.reward) == ("infra_failure", None)
    assert "BadRequestError" in as_table([record])


class BrokenEpisode(LettersEpisode):
    async def grade(self) -> Reward:
        raise EnvironmentFailureError("the grader broke")


class BrokenEnvironment(LettersEnvironment):
    def episode(self, task: Task) -> LettersEpisode:
        return BrokenEpisode(task, self.toolset)


async def test_a_broken_environment_is_a_failure_and_no_zero() -> None:
    environment = BrokenEnvironment()
    records = await roll_out(environment, Rollout("train", 0, 3, 2), environment.reference)
    assert {(record.outcome, record.reward, record.error) for record in records} == {
        ("env_failure", None, "the grader broke")
    }
    assert as_table(records).splitlines()[1].split() == ["letters", "3", "-", "0", "-", "0", "3", "0.00"]
    assert "first failure: task 0, env_failure: the grader broke" in as_table(records)


async def test_an_episode_that_has_no_end_is_truncated_and_graded() -> None:
    environment = LettersEnvironment()
    (record,) = await roll_out(environment, Rollout("train", 0, 1, 1, max_turns=1), environment.reference)
    assert (record.outcome, record.reward) == ("truncated_turns", 0.0)
