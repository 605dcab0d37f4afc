"""The environment `program`: what its folders may say, and how verdicts are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from envs.interface import Action, EnvironmentFailureError, EnvironmentOptionsError, Message, Task, ToolCall
from envs.program import ProgramResult
from envs.program.folder import FolderEnvironment
from envs.program.verifier import read_verdict, verifier_program
from envs.registry import create_environment

RESULT = ProgramResult(0, b"out", b"err", False, False, 1.25, {"a.txt": b"A"})


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    for split, name in (("train", "b"), ("train", "a"), ("heldout", "c")):
        folder = tmp_path / split / name
        (folder / "files" / "data").mkdir(parents=True)
        (folder / "task.md").write_text(f"Task {name}.")
        (folder / "files" / "data" / "x.txt").write_text(name)
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "a" / "task.toml").write_text(
        'command = ["special"]\nkind = "hard"\nartifacts = ["out.txt"]\nvariables = { A = "1" }\n'
    )
    return tmp_path


def made(tasks: Path, /, **options: Any) -> FolderEnvironment:
    environment = create_environment("program", {"tasks": str(tasks), "command": ["agent", "--fast"]} | options)
    assert isinstance(environment, FolderEnvironment)
    return environment


def test_an_index_is_a_folder_by_name_and_begins_again(tasks: Path) -> None:
    environment = made(tasks, text_by="argument")
    assert [environment.task("train", i).prompt[0].content for i in range(3)] == ["Task a.", "Task b.", "Task a."]
    assert environment.task("heldout", 7).prompt[0].content == "Task c."
    special, plain = (environment.program(environment.task("train", i)) for i in (0, 1))
    assert (special.command, special.artifacts, special.variables) == (("special",), ("out.txt",), {"A": "1"})
    assert (plain.command, plain.files, plain.text_by) == (("agent", "--fast"), {"data/x.txt": b"b"}, "argument")
    assert [environment.task("train", i).kind for i in (0, 1)] == ["hard", ""]
    assert environment.self_driven
    assert environment.tools == ()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reward": "stars"}, "reward is 'stars'; choose exit, report, verifier"),
        ({"reward": "report"}, "only a trusted program is believed"),
        ({"tasks": "/no/such"}, "has no task folder"),
        ({"verifier": "no.such.module:f"}, "must name a function"),
        ({"text_by": "mail"}, "choose stdin"),
        ({"colour": "blue"}, "has no option 'colour'"),
        ({"limits": {"cores": 1}}, "limits has 'cores'"),
    ],
)
def test_options_that_do_not_fit_are_told(tasks: Path, options: dict[str, Any], sentence: str) -> None:
    def make_program() -> None:
        environment = made(tasks, **options)
        environment.program(environment.task("train", 1))

    with pytest.raises(EnvironmentOptionsError, match=sentence):
        make_program()


def test_a_task_file_that_is_wrong_is_told(tasks: Path) -> None:
    path = tasks / "train" / "b" / "task.toml"
    for text, sentence in (('colour = "blue"', "has the key 'colour'"), ("command = [", "task.toml")):
        path.write_text(text)
        with pytest.raises(EnvironmentOptionsError, match=sentence):
            made(tasks).task("train", 1)


def test_a_written_reference_says_its_turns(tasks: Path) -> None:
    environment = made(tasks)
    task = environment.task("train", 1)
    with pytest.raises(EnvironmentFailureError, match=r"reference\.json is missing"):
        environment.reference(task)
    path = tasks / "train" / "b" / "reference.json"
    path.write_text(json.dumps([[{"name": "look", "arguments": {"word": "x"}}], "x"]))
    reference = environment.reference(task)
    said = [Message("user", "?")]
    assert reference.act(said) == Action("", (ToolCall("look", {"word": "x"}),))
    said.append(Message("assistant", "<tool>look x</tool>"))
    assert reference.act(said) == Action("x")
    with pytest.raises(EnvironmentFailureError, match="the program wants another"):
        reference.act([*said, Message("assistant", "x")])
    for wrong in ({"a": 1}, [{"name": "x"}], [5], [[{"name": "x"}]]):
        path.write_text(json.dumps(wrong))
        with pytest.raises(EnvironmentFailureError, match="turn"):
            environment.reference(task)


def judge(task: Task, result: ProgramResult) -> float:
    return 0.5 if result.text == "out" else 0.0


async def test_rewards_come_from_where_the_run_says(tasks: Path) -> None:
    by_exit = made(tasks, reward="exit")
    assert (await by_exit.verify(by_exit.task("train", 0), RESULT, [])).total == 1.0
    by_function = made(tasks, verifier=f"{__name__}:judge")
    assert (await by_function.verify(by_function.task("train", 0), RESULT, [])).total == 0.5
    with pytest.raises(EnvironmentFailureError, match="has no verifier"):
        await made(tasks).verify(made(tasks).task("train", 0), RESULT, [])


def said(text: str, exit_code: int | None = 0) -> ProgramResult:
    return ProgramResult(exit_code, text.encode(), b"why", False, False, 1.0)


def test_a_verdict_is_the_last_line() -> None:
    assert read_verdict(said("checking\n0.25\n")).total == 0.25
    verdict = read_verdict(said('{"reward": 1, "components": {"tests": 0.5}}'))
    assert (verdict.total, verdict.components) == (1.0, {"tests": 0.5})
    for wrong in (
        said(""),
        said("good"),
        said("1", 1),
        said("1", None),
        said("[1]"),
        said('{"score": 1}'),
        said("true"),
    ):
        with pytest.raises(EnvironmentFailureError, match=r"the verifier ended with .*why"):
            read_verdict(wrong)


def test_a_verifier_finds_what_the_program_left() -> None:
    program = verifier_program(("v",), {"verify.py": b"V"}, RESULT)
    assert program.contents == {
        "verify.py": b"V",
        "program/stdout": b"out",
        "program/stderr": b"err",
        "program/result.json": b'{"exit_code": 0, "timed_out": false, "seconds": 1.25}',
        "program/artifacts/a.txt": b"A",
    }
