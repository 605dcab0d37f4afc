"""Makes deploy/REFERENCE.md, every setting, command and metric, from the code, so that the page cannot drift from it.

`python -m tests.reference --write` rewrites the page; tests/contract/test_documentation.py compares.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from prometheus_client import REGISTRY
from pydantic import BaseModel

from broker.process.settings import Settings
from deploy.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "deploy" / "REFERENCE.md"
METRIC_MODULES = ("broker.exchange.metrics", "broker.weights.metrics", "actors.metrics", "learner.metrics")

HEAD = """# Reference

Every command, setting and metric. Made from the code by `make reference`; a test fails where the two differ.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *commands(), *settings(), *metrics()]) + "\n"


def commands() -> Iterator[str]:
    """The command line, one table row per argument."""
    yield "## Commands\n"
    yield "| command | argument | meaning |\n| --- | --- | --- |"
    yield from _command_rows("ergon", build_parser())


def _command_rows(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for choice, sub in action.choices.items():
                yield f"| `{name} {choice}` | | {helps[choice]} |"
                yield from _command_rows(f"{name} {choice}", sub)
        elif action.dest != "help":
            shown = ", ".join(action.option_strings) or f"{action.dest.upper()}"
            yield f"| | `{shown}` | {action.help} |"


def settings() -> Iterator[str]:
    """One table per section of a run's TOML."""
    yield "\n## Settings\n"
    yield (
        "One TOML file is one run. `ERGON__SECTION__KEY=value` in the environment overrides the file, "
        "`--set section.key=value` overrides both."
    )
    for name, field in Settings.model_fields.items():
        section = _section(field.annotation)
        many = section is not field.annotation
        yield from _section_rows(f"[[{name}]]" if many else f"[{name}]", section)


def _section(annotation: Any) -> type[BaseModel]:
    candidates = [annotation, *get_args(annotation)]
    return next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))


def _section_rows(title: str, section: type[BaseModel]) -> Iterator[str]:
    yield f"\n### `{title}`\n"
    yield "| key | default | meaning |\n| --- | --- | --- |"
    nested = []
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            nested.append((title.replace("]", f".{key}]"), field.annotation))
            continue
        default = "" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
        assert field.description, f"{title} {key} has no docstring"
        yield f"| `{key}` | {default} | {' '.join(field.description.split())} |"
    for sub_title, sub in nested:
        yield from _section_rows(sub_title, sub)


def metrics() -> Iterator[str]:
    """Every metric of every process, vLLM's own aside."""
    for module in METRIC_MODULES:
        importlib.import_module(module)
    yield "\n## Metrics\n"
    yield "Served by every process at `/metrics`, beside `/healthz`. An actor passes vLLM's `vllm:` metrics on.\n"
    yield "| metric | type | labels | meaning |\n| --- | --- | --- | --- |"
    collectors = {id(c): c for c in REGISTRY._names_to_collectors.values()}.values()
    rows = set()
    for collector in collectors:
        name, kind = getattr(collector, "_name", ""), getattr(collector, "_type", "")
        if name.startswith("ergon_"):
            labels = ", ".join(getattr(collector, "_labelnames", ()))
            suffix = "_total" if kind == "counter" else ""
            rows.add(f"| `{name}{suffix}` | {kind} | {labels} | {collector._documentation} |")  # type: ignore[attr-defined]
    yield from sorted(rows)


def main() -> None:
    """Write the page, or print it."""
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())


if __name__ == "__main__":
    main()
