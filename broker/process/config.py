"""Reads a run's TOML into `Settings`: file, environment, --set, in this order of strength; one sentence per mistake."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from broker.process.lifecycle import ErgonError
from broker.process.settings import Settings

ENV_PREFIX = "ERGON__"


def load_settings(
    path: Path | None, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ
) -> Settings:
    """The validated settings of a run.

    path: the TOML, or None for the defaults. overrides: "section.key=value" texts. environ: ERGON__SECTION__KEY=value.
    Raises ErgonError for a missing file, TOML that does not parse, unknown keys and bad values, naming each.
    """
    data = _read(path) if path else {}
    for name, value in sorted(environ.items()):
        if name.startswith(ENV_PREFIX):
            _assign(data, name[len(ENV_PREFIX) :].lower().split("__"), value, f"environment variable {name}")
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise ErgonError(f"--set {text!r} is not of the form section.key=value, for example --set run.seed=1")
        _assign(data, key.strip().split("."), value, f"--set {text!r}")
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise ErgonError(f"{path or 'the settings'}: {describe(error)}") from error


def save_settings(settings: Settings, path: Path) -> None:
    """Write the resolved settings as TOML, whole or not at all."""
    data = _without_none(settings.model_dump(mode="json"))
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(tomli_w.dumps(data), encoding="utf-8")
    temporary.replace(path)


def describe(error: ValidationError) -> str:
    """All mistakes of a validation in one line, unknown keys with the nearest known one."""
    sentences = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            sentences.append(f"unknown key {where}{_nearest(item['loc'])}")
        else:
            sentences.append(f"{where} = {item['input']!r:.80}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return "; ".join(sentences)


def _nearest(location: tuple[int | str, ...]) -> str:
    known = _fields_at(location[:-1])
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([str(part) for part in location[:-1]] + close)}?"
    return f"; known keys there: {', '.join(sorted(known))}"


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        # A list of sections is annotated tuple[Section, ...].
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ErgonError(f"the run file {path} does not exist; name an existing TOML file") from None
    except OSError as error:
        raise ErgonError(f"the run file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ErgonError(f"the run file {path} is not valid TOML: {error}") from error


def _assign(data: dict[str, Any], keys: list[str], text: str, source: str) -> None:
    """Put a value, given as text, at a dotted key; a number in the key indexes a list of sections."""
    node: dict[str, Any] | list[Any] = data
    for key in keys[:-1]:
        node = _child(node, key, source)
    if isinstance(node, list):
        raise ErgonError(f"{source}: a list of sections is indexed by a number and then a key, as environments.0.name")
    node[keys[-1]] = _parse(text)


def _child(node: dict[str, Any] | list[Any], key: str, source: str) -> dict[str, Any] | list[Any]:
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise ErgonError(f"{source}: index {key!r} is not one of the {len(node)} sections of the file")
        child = node[int(key)]
    else:
        child = node.setdefault(key, {})
    if not isinstance(child, dict | list):
        raise ErgonError(f"{source}: {key} is a value, not a section")
    return cast(dict[str, Any] | list[Any], child)


def _parse(text: str) -> Any:
    """A TOML value where the text is one (3, 1e-6, true, [1, 2], "x"), else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _without_none(value: Any) -> Any:
    """TOML has no null: an absent key means the default None."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
