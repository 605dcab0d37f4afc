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

UNITS = {
    "seconds": "seconds",
    "bytes": "bytes",
    "ratio": "share, 0 to 1",
    "fraction": "share, 0 to 1",
    "nats": "nats",
    "tokens": "tokens",
    "versions": "versions",
    "kl": "nats",
    "ergon_weights_compression_ratio": "bytes of one for each byte of the other",
}
"""Units of whole names, and of what a name ends with; all others are numbers of what the name says."""
LABELS = {
    "activity": "what the learner does: waiting, training, publishing, checkpointing",
    "adherence": "kept, over, forced",
    "budget": "thinking budgets by powers of two, none, zero and unlimited; of an evaluation, those of `eval.budgets`",
    "cause": "sandbox, engine, gateway, actor",
    "code": "the protocol's error codes; of the gateway, those of its errors",
    "command": "the protocol's commands, and unknown",
    "end": "complete, short",
    "env": "the run's environments",
    "event": "what the meaning names",
    "fate": "trained, masked",
    "kind": "kinds of tasks that an environment has; of alarms, their names; of versions, anchor and delta",
    "lag": "0, 1, 2, 3-4, 5-8, more, lineage, none",
    "mode": "train, eval, reference",
    "outcome": "a trajectory's outcomes; of pushed deltas, taken and dropped",
    "parameter": "temperature, top_p",
    "part": "blocked, complete",
    "phase": "of an adoption, what the meaning names; of an evaluation, before, after-warm-start, step, after",
    "quantity": "duration, difficulty",
    "reason": "what the meaning names, or classes of errors",
    "result": "what became of it, some five words",
    "role": "actor, learner, operator, relay",
    "route": "the gateway's routes, and unknown",
    "sink": "tensorboard, wandb",
    "solved": "never, sometimes, always",
    "state": "a ticket's seven states",
    "status": "the broker's answers; of the gateway, HTTP's",
    "style": "greedy, sampled",
    "variance": "some, zero",
    "what": "tool, turn, episode",
}
"""Every label of every metric, and what bounds the number of its values."""

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
    yield "| metric | type | labels | unit | meaning |\n| --- | --- | --- | --- | --- |"
    collectors = {id(c): c for c in REGISTRY._names_to_collectors.values()}.values()
    rows, used = set(), set[str]()
    for collector in collectors:
        name, kind = getattr(collector, "_name", ""), getattr(collector, "_type", "")
        if name.startswith("ergon_"):
            labels = getattr(collector, "_labelnames", ())
            used.update(labels)
            suffix = "_total" if kind == "counter" else ""
            facts = (f"`{name}{suffix}`", kind, ", ".join(labels), unit(name), collector._documentation)  # type: ignore[attr-defined]
            rows.add(f"| {' | '.join(facts)} |")
    yield from sorted(rows)
    assert used == set(LABELS), f"labels without a row, or rows without a label: {used ^ set(LABELS)}"
    yield "\n### Labels\n"
    yield "Every label has few values, so that the number of series does not grow with what a run does.\n"
    yield "| label | values |\n| --- | --- |"
    yield from (f"| `{label}` | {values} |" for label, values in sorted(LABELS.items()))


def unit(name: str) -> str:
    """A metric's unit, by the end of its name."""
    return UNITS.get(name) or UNITS.get(name.removesuffix("_total").rpartition("_")[2], "number")


def main() -> None:
    """Write the page, or print it."""
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())


if __name__ == "__main__":
    main()
