"""Bugs: how they are made, that those in the repository keep their promises, and what a policy is told of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from envs.interface import EnvironmentOptionsError, SandboxError
from envs.repo import RepoEnvironment, runner, sources
from envs.repo.bugs import LEVELS, all_bugs, recorded_calls, report
from envs.repo.make import shown, written
from envs.repo.mutations import mutations
from envs.repo.packages import Pin, kit, packages

SOURCE = '''
def first(items, size=1, strict=True):
    """The first 3."""
    if not items:
        return None
    total = 0
    for item in items[0:size]:  # é, two bytes
        if item < 2 and strict:
            continue
        total += max(item, size)
    return total
'''


def made() -> dict[str, set[str]]:
    """Kind -> the lines that its mutations put in place of the file's."""
    lines = set(SOURCE.splitlines())
    found: dict[str, set[str]] = {}
    for mutation in mutations(SOURCE):
        new = set(mutation.applied(SOURCE).splitlines()) - lines
        found.setdefault(mutation.kind, set()).update(line.strip() for line in new)
    return found


def test_each_kind_of_bug_is_a_small_slip() -> None:
    found = made()
    assert found["comparison"] == {"if item <= 2 and strict:"}
    assert "if item < 2 or strict:" in found["condition"]
    assert "if items:" in found["condition"]
    assert {"for item in items[1:size]:  # é, two bytes", "if item < 1 and strict:"} <= found["off by one"]
    assert found["wrong default"] == {"def first(items, size=1, strict=False):"}
    assert found["swapped arguments"] == {"total += max(size, item)"}
    assert found["wrong function"] == {"total += min(item, size)"}
    assert found["missing return"] == {"total"}
    assert found["loop"] == {"break"}
    assert "pass" in found["dropped statement"]
    assert "return item" in found["wrong variable"] or "return strict" in found["wrong variable"]


def test_every_mutation_changes_the_file_in_one_place_only() -> None:
    found = list(mutations(SOURCE))
    assert len({mutation.applied(SOURCE) for mutation in found}) == len(found) > 20
    for mutation in found:
        text = mutation.applied(SOURCE)
        assert text.startswith(SOURCE[: mutation.start])
        assert text.endswith(SOURCE[mutation.end :])
        assert '"""The first 3."""' in text


@pytest.mark.parametrize("name", ["sources.py", "bugs.py", "mutations.py"])
def test_nearly_every_mutation_is_still_a_program(name: str) -> None:
    text = (Path(sources.__file__).parent / name).read_text()
    broken = 0
    for mutation in (found := list(mutations(text))):
        try:
            ast.parse(mutation.applied(text))
        except SyntaxError:
            broken += 1
    assert broken <= len(found) / 50


def test_there_are_hundreds_of_bugs_and_no_function_is_in_two_splits() -> None:
    bugs = all_bugs()
    assert len({(bug.package, bug.sha256) for bug in bugs}) == len(bugs) >= 190
    assert {bug.package for bug in bugs} == set(packages())
    sides = {
        split: {(b.package, b.path, b.function) for b in bugs if b.split == split} for split in ("train", "heldout")
    }
    assert not sides["train"] & sides["heldout"]
    assert min(sum(bug.split == split for bug in bugs) for split in ("train", "heldout")) >= 90
    assert len(Counter(bug.kind for bug in bugs)) >= 9


def test_a_bug_is_told_at_three_levels_and_the_repair_at_none() -> None:
    for bug in all_bugs():
        told = [report(bug, level) for level in LEVELS]
        assert len(set(told)) == 3
        assert bug.traceback in told[0]
        assert bug.call in told[1]
        assert bug.path not in told[2]
        assert bug.got != bug.wanted
        assert not any("/workspace/" in text.partition("calling a tool.")[2] or "0x7f" in text for text in told)


def test_every_package_has_calls_and_one_that_the_reader_is_not_shown() -> None:
    for name in packages():
        calls = [written(call) for call in recorded_calls(name)]
        shown_ones = {bug.call for bug in all_bugs() if bug.package == name}
        assert shown_ones < set(calls)


def test_tasks_begin_again_at_another_level() -> None:
    environment = RepoEnvironment(packages=["toolz"])
    number = sum(bug.package == "toolz" and bug.split == "train" for bug in all_bugs())
    kinds = [{environment.task("train", place + again * number).kind for again in range(3)} for place in (0, 1)]
    assert [{kind.rpartition("/")[2] for kind in each} for each in kinds] == [{"1", "2", "3"}] * 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"packages": ["nothing"]}, "choose one or more, each once, of cachetools"),
        ({"packages": []}, "packages is"),
        ({"levels": [4]}, r"levels is \[4\]"),
        ({"grade_timeout_s": 0}, "grade_timeout_s is 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(EnvironmentOptionsError, match=sentence):
        RepoEnvironment(**options)  # type: ignore[arg-type]


def test_a_package_that_is_not_to_be_had_is_one_sentence_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    pin = Pin("no-such-package", "1.0", "no_such_package-1.0.tar.gz", "0" * 64)
    with pytest.raises(SandboxError, match=r"needs no_such_package-1\.0\.tar\.gz .*0000.*ERROR.*pip config set"):
        sources.fetch([pin], str(tmp_path / "cache"))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_another_file_of_the_same_name_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    pin = next(pin for pin in kit() if pin.name == "iniconfig")
    for folder in ("links", "cache"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / pin.file).write_bytes(b"another file")
    with pytest.raises(SandboxError, match="iniconfig"):
        sources.fetch([pin], str(tmp_path / "cache"))


def test_outcomes_tell_types_apart_and_show_no_address() -> None:
    values = [1, 1.0, True, "1", (1,), [1], {1}, frozenset({1}), {1: 1}, b"1", None, iter([1]), float("nan")]
    found = [repr(runner.encoded(value)) for value in values]
    assert len(set(found)) == len(values)
    assert runner.encoded({3, 1, 2}) == {"set": [1, 2, 3]}
    assert "0x" not in repr(runner.encoded(object()))
    assert runner.outcome(list.sort, "([2, 1],)", "{}") == [None, {"after": "(([1, 2],), {})"}]
    assert runner.outcome(int, "('x',)", "{}") == {"raised": "ValueError"}
    assert shown({"tuple": [{"float": "1.5"}, "a"]}) == "(1.5, 'a')"


def test_the_programs_of_sandboxes_need_nothing_but_python() -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import runner, hidden, tracer"
    folder = str(Path(sources.__file__).parent)
    subprocess.run([sys.executable, "-I", "-S", "-c", program, folder], check=True)
