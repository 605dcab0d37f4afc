"""From a name in the configuration to an environment. Imports an environment's module only when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from envs.interface import Environment, EnvironmentOptionsError, UnknownEnvironmentError

ENTRY_POINT_GROUP = "ergon.environments"
BUILT_IN = {
    "browser": "envs.browser:BrowserEnvironment",
    "code": "envs.code:CodeEnvironment",
    "memory": "envs.memory:MemoryEnvironment",
    "program": "envs.program.folder:FolderEnvironment",
    "reason": "envs.reason:ReasonEnvironment",
    "repo": "envs.repo:RepoEnvironment",
    "services": "envs.services:ServicesEnvironment",
    "shop": "envs.shop:ShopEnvironment",
    "signposts": "envs.signposts:SignpostsEnvironment",
    "terminal": "envs.terminal:TerminalEnvironment",
}
# These need an optional extra of the same name, or another Python that has the package.
OPTIONAL = {
    "gymnasium": "envs.adapters.gymnasium:GymnasiumEnvironment",
    "mcp": "envs.adapters.mcp:McpEnvironment",
    "miniwob": "envs.browser.miniwob:MiniwobEnvironment",
    "openenv": "envs.adapters.openenv:OpenEnvEnvironment",
    "reasoning-gym": "envs.reason.gym:ReasoningGymEnvironment",
    "textarena": "envs.adapters.textarena:TextArenaEnvironment",
    "verifiers": "envs.adapters.verifiers:VerifiersEnvironment",
}


def known_environments() -> dict[str, str]:
    """Name -> `module:Class` of the built-in and the installed environments; built-in names cannot be taken over."""
    installed = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    return dict(sorted((installed | OPTIONAL | BUILT_IN).items()))


def create_environment(name: str, options: Mapping[str, Any] | None = None) -> Environment:
    """The environment of this name: a built-in or installed one, or `module:Class`, made with these keyword arguments.

    Raises UnknownEnvironmentError, EnvironmentOptionsError, and whatever the environment's own set-up raises.
    """
    factory = _load(name)
    _check_class(name, factory)
    _check_options(name, factory, options or {})
    try:
        environment = factory(**(options or {}))
    except (TypeError, ValueError) as error:
        raise EnvironmentOptionsError(f"environment {name!r} refused its options: {error}") from error
    if not isinstance(environment, Environment):
        raise UnknownEnvironmentError(f"environment {name!r} made a {type(environment).__name__}, not an Environment")
    return environment


def _load(name: str) -> Callable[..., Any]:
    known = known_environments()
    target = known.get(name, name)
    module_name, separator, attribute = target.partition(":")
    if not separator or not module_name or not attribute:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise UnknownEnvironmentError(
            f"environment {name!r} does not exist: {hint}known are {', '.join(known)}; "
            "one of your own is named `module:Class`"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UnknownEnvironmentError(
            f"environment {name!r}: module {module_name!r} cannot be imported ({error}); "
            "install it, or put its folder on PYTHONPATH"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        classes = [key for key, value in vars(module).items() if _is_environment(value)]
        found = f"its environments are {', '.join(classes)}" if classes else "it has no environments"
        raise UnknownEnvironmentError(f"environment {name!r}: module {module_name!r} has no {attribute!r}; {found}")
    return factory  # type: ignore[no-any-return]


def _is_environment(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Environment) and not inspect.isabstract(value)


def _check_class(name: str, factory: Callable[..., Any]) -> None:
    """A function may make an environment as well; of a class it can be said beforehand whether it is one."""
    if isinstance(factory, type) and not issubclass(factory, Environment):
        raise UnknownEnvironmentError(f"environment {name!r} is no subclass of envs.interface.Environment")
    missing = ", ".join(sorted(getattr(factory, "__abstractmethods__", ())))
    if missing:
        raise UnknownEnvironmentError(f"environment {name!r} is not finished: it does not define {missing}")


def _check_options(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Name the option that is wrong, before Python's own message about an `__init__` that nobody called."""
    parameters = inspect.signature(factory).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return
    taken = ", ".join(parameters) or "none"
    for option in options:
        if option not in parameters:
            near = difflib.get_close_matches(option, parameters, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise EnvironmentOptionsError(f"environment {name!r} has no option {option!r}{hint}; its options: {taken}")
    for each in parameters.values():
        if each.default is each.empty and each.name not in options:
            raise EnvironmentOptionsError(f"environment {name!r} needs the option {each.name!r}; its options: {taken}")
