"""Names become environments; every mistake in a name or an option is one sentence that says what is allowed."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from envs import registry
from envs.interface import EnvironmentOptionsError, UnknownEnvironmentError
from envs.registry import create_environment, known_environments
from envs.shop import ShopEnvironment
from tests.unit.envs.example_environment import LettersEnvironment

EXAMPLE = "tests.unit.envs.example_environment"


def install(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    found = [EntryPoint(name, value, registry.ENTRY_POINT_GROUP) for name, value in points.items()]

    def entry_points(*, group: str) -> list[EntryPoint]:
        return [point for point in found if point.group == group]

    monkeypatch.setattr(registry, "entry_points", entry_points)


class Demanding(LettersEnvironment):
    def __init__(self, size: int, colour: str = "red") -> None:
        if size < 0:
            raise ValueError(f"size is {size}; it must be 0 or more")
        self.size = size


def make_nothing() -> None:
    pass


def test_built_in_by_name_with_options() -> None:
    assert isinstance(create_environment("shop", {"kinds": ["change"]}), ShopEnvironment)


def test_installed_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, letters=f"{EXAMPLE}:LettersEnvironment")
    assert isinstance(create_environment("letters"), LettersEnvironment)
    assert set(known_environments()) >= {"letters", "shop"}


def test_an_entry_point_cannot_take_over_a_built_in_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, shop=f"{EXAMPLE}:LettersEnvironment")
    assert isinstance(create_environment("shop"), ShopEnvironment)


def test_one_of_your_own_by_module_and_class() -> None:
    environment = create_environment(f"{__name__}:Demanding", {"size": 3})
    assert isinstance(environment, LettersEnvironment)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("shpo", r"'shpo' does not exist: did you mean 'shop' or 'repo'\? known are .*shop"),
        ("zzz", r"'zzz' does not exist: known are .*shop.*; one of your own is named `module:Class`"),
        ("no_such_module:Thing", r"module 'no_such_module' cannot be imported .*PYTHONPATH"),
        (f"{EXAMPLE}:Letters", r"has no 'Letters'; its environments are LettersEnvironment"),
        ("json:Thing", r"has no 'Thing'; it has no environments"),
        ("builtins:dict", r"is no subclass of envs.interface.Environment"),
        (f"{__name__}:make_nothing", r"made a NoneType, not an Environment"),
        ("envs.interface:Environment", r"is not finished: it does not define episode, reference, task, tools"),
        (":", r"':' does not exist"),
    ],
)
def test_unknown_names_are_refused_with_what_is_known(name: str, sentence: str) -> None:
    with pytest.raises(UnknownEnvironmentError, match=sentence) as caught:
        create_environment(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("shop", {"knids": []}, r"no option 'knids' \(did you mean 'kinds'\?\); its options: kinds, "),
        ("shop", {"kinds": ["minus"]}, r"refused its options: kinds is \['minus'\]; choose .* of discount, shipping"),
        ("shop", {"kinds": []}, r"choose one or more"),
        ("shop", {"demonstrations": "sloppy"}, r"demonstrations is 'sloppy'; choose perfect or careless"),
        ("shop", {"kinds": ["boxes", "boxes"]}, r"each once"),
        ("shop", {"tool_timeout_s": 0}, r"tool_timeout_s is 0; it must be greater than 0"),
        ("shop", {"warm_sandboxes": -1}, r"size -1"),
        (f"{__name__}:Demanding", {}, r"needs the option 'size'; its options: size, colour"),
        (f"{__name__}:Demanding", {"size": -1}, r"refused its options: size is -1; it must be 0 or more"),
        (f"{__name__}:Demanding", {"size": "x"}, r"refused its options: .*not supported"),
    ],
)
def test_wrong_options_are_refused_with_the_right_ones(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EnvironmentOptionsError, match=sentence) as caught:
        create_environment(name, options)
    assert "\n" not in str(caught.value)
