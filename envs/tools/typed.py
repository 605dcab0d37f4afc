"""Typed Python functions as tools: JSON schema from the signature, arguments checked, bad calls answered with an error.

A tool is a function, plain or async, whose first parameter is the episode that calls it; the others are its arguments;
it returns the observation's text. Its docstring's first paragraph is what the policy is told; an argument is described
with `Annotated[int, "how many"]`. `@tool(...)` says where it runs and for how long (see runner.py). Tools are trusted
code: what is not they hand to a sandbox.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from envs.interface import EnvironmentFailureError, ErgonEnvError, Tool, ToolCall
from envs.timeouts import OutOfTimeError
from envs.tools.runner import Place, ToolRunner, Where

ERROR_PREFIX = "error: "
_PLACE = "__ergon_place__"

F = TypeVar("F", bound=Callable[..., Any])


class ToolError(Exception):
    """Raised by a tool for a call that it refuses; the policy sees `error: MESSAGE`."""


class ToolTimeoutError(ToolError):
    """Raised by a tool that limits its own time; it is counted as a time-out, too."""


def tool(*, where: Where | None = None, timeout_s: float | None = None) -> Callable[[F], F]:
    """Say of a tool where it runs: `loop`, the default of an `async def`; `thread`, that of a plain function; or
    `process`, for a plain function at the top of its module that is heavy or may hang. And how long a call may take, in
    seconds, where that is not what the process that runs the environment allows."""
    if timeout_s is not None and timeout_s <= 0:
        raise ValueError(f"timeout_s is {timeout_s}; it must be greater than 0")

    def declare(function: F) -> F:
        is_async = inspect.iscoroutinefunction(function)
        chosen: Where = where or ("loop" if is_async else "thread")
        if is_async != (chosen == "loop"):
            kind = "an async function, which runs on the loop" if is_async else "a plain function, which would block it"
            raise TypeError(f"tool {function.__name__!r} is {kind}: where = {chosen!r} does not fit")
        setattr(function, _PLACE, Place(chosen, timeout_s))
        return function

    return declare


def _place_of(function: Callable[..., Any]) -> Place:
    """Raises TypeError for a function that a worker process could not find."""
    declared: Place | None = getattr(function, _PLACE, None)
    place = declared or Place("loop" if inspect.iscoroutinefunction(function) else "thread")
    if place.where == "process":
        module = sys.modules.get(function.__module__)
        if (
            module is None
            or function.__module__ == "__main__"
            or getattr(module, function.__name__, None) is not function
        ):
            raise TypeError(
                f"tool {function.__name__!r} runs in a process of its own, which must be able to import it: "
                'define it at the top of a module, or declare it with @tool(where="thread")'
            )
    return place


@dataclass(frozen=True, slots=True)
class ToolOutput:
    """The text that answers a call, whether it is an error, and whether that is that it ran out of time."""

    text: str
    error: bool = False
    timed_out: bool = False


def _described(annotation: Any, default: Any) -> tuple[Any, Any]:
    """What pydantic wants for one argument; a plain string in `Annotated` is its description."""
    description = None
    if get_origin(annotation) is Annotated:
        annotation, *extras = get_args(annotation)
        description = next((extra for extra in extras if isinstance(extra, str)), None)
    return annotation, Field(default=... if default is inspect.Parameter.empty else default, description=description)


def _arguments_model(function: Callable[..., Any]) -> type[BaseModel]:
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters:
        raise TypeError(f"tool {function.__name__!r} needs a first parameter, for the episode that calls it")
    arguments = parameters[1:]
    # The episode's class is usually defined below its tools, so its name must not be looked up yet.
    annotated = {name: hint for name, hint in function.__annotations__.items() if name != parameters[0].name}
    hints = get_type_hints(
        SimpleNamespace(__annotations__=annotated), inspect.unwrap(function).__globals__, include_extras=True
    )
    for parameter in arguments:
        if parameter.name not in hints:
            raise TypeError(f"tool {function.__name__!r}: argument {parameter.name!r} needs a type annotation")
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(f"tool {function.__name__!r}: argument {parameter.name!r} must be an ordinary named one")
    fields: dict[str, Any] = {each.name: _described(hints[each.name], each.default) for each in arguments}
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid"), **fields)


def _without_titles(schema: Any) -> Any:
    """The schema without pydantic's generated titles, which tell a policy nothing and cost tokens."""
    if isinstance(schema, dict):
        return {
            key: {name: _without_titles(value) for name, value in item.items()}
            if key == "properties"
            else _without_titles(item)
            for key, item in schema.items()
            if key != "title"
        }
    return [_without_titles(item) for item in schema] if isinstance(schema, list) else schema


def _complaint(name: str, model: type[BaseModel], error: ValidationError) -> str:
    """One short sentence for the policy, without pydantic's jargon."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    known = ", ".join(model.model_fields) or "none"
    if first["type"] == "missing":
        return f"{name} needs the argument {where}"
    if first["type"] == "extra_forbidden":
        return f"{name} has no argument {where}; it takes: {known}"
    return f"{name}: {where}: {first['msg']}"


class ToolSet:
    """The tools of an environment. Stateless: one instance serves all episodes.

    Raises TypeError for a function that cannot be a tool.
    """

    def __init__(self, *functions: Callable[..., Any]) -> None:
        self._functions: dict[str, tuple[Callable[..., Any], type[BaseModel], Place]] = {}
        tools = []
        for function in functions:
            name = function.__name__
            if name in self._functions:
                raise TypeError(f"two tools are named {name!r}")
            model = _arguments_model(function)
            self._functions[name] = function, model, _place_of(function)
            description = inspect.getdoc(function)
            if not description:
                raise TypeError(f"tool {name!r} needs a docstring: it is what the policy is told")
            paragraph = " ".join(description.split("\n\n")[0].split())
            tools.append(Tool(name, paragraph, _without_titles(model.model_json_schema())))
        self.tools: tuple[Tool, ...] = tuple(tools)

    async def call(self, episode: Any, call: ToolCall, process_state: Callable[[], Any] = lambda: None) -> ToolOutput:
        """Run one call. A bad call, or one that runs out of time, is an error output; errors of environment and sandbox
        are raised as they are.

        process_state: makes what a tool in a process of its own gets in place of the episode. Raises
        EnvironmentFailureError where the tool itself broke.
        """
        if call.name not in self._functions:
            known = ", ".join(self._functions)
            return ToolOutput(f"{ERROR_PREFIX}unknown tool {call.name[:32]}; the tools are: {known}", error=True)
        function, model, place = self._functions[call.name]
        try:
            arguments = self._checked(model, call.arguments)
        except ValidationError as error:
            return ToolOutput(ERROR_PREFIX + _complaint(call.name, model, error), error=True)
        try:
            first = process_state() if place.where == "process" else episode
            text = await ToolRunner.current().run(place, function, first, arguments)
        except ToolError as error:
            return ToolOutput(f"{ERROR_PREFIX}{error}", error=True, timed_out=isinstance(error, ToolTimeoutError))
        except OutOfTimeError as error:
            message = f"{ERROR_PREFIX}{call.name} timed out after {error.limit_s:g} s"
            return ToolOutput(message, error=True, timed_out=True)
        except ErgonEnvError:
            raise
        except Exception as error:
            raise EnvironmentFailureError(f"tool {call.name!r} broke: {type(error).__name__}: {error}") from error
        return ToolOutput(str(text))

    @staticmethod
    def _checked(model: type[BaseModel], arguments: Mapping[str, Any]) -> dict[str, Any]:
        checked = model.model_validate(dict(arguments))
        return {name: getattr(checked, name) for name in model.model_fields}
