"""One run on this machine, from its settings to its summary: prepares the folder and the model, supervises, reports.

Owns `runs/NAME/config.toml` and the last line that a run prints; everything else in that folder is the learner's.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from broker.process.config import load_settings, save_settings
from broker.process.keys import Identity
from broker.process.lifecycle import EXIT_USER_ERROR, ErgonError, install_stop
from broker.process.security import load_security
from broker.process.settings import Settings
from broker.process.sink_settings import check_sinks
from deploy.local import Supervisor, check_ports, children_of
from deploy.progress import make_view
from envs.interface import ErgonEnvError
from envs.registry import create_environment

logger = logging.getLogger(__name__)

CONFIG = "config.toml"
SUMMARY = "summary.json"


def run_local(settings: Settings, new: bool = False, plain: bool = False) -> None:
    """Run to the end, or until SIGINT/SIGTERM, and print the summary as the last line.

    A run of this name that was interrupted is continued; a finished one is left alone and a free name is taken.
    Raises ErgonError for everything the user can mend.
    """
    started_at = time.time()
    stop = install_stop()
    check_environments(settings)
    check_security(settings)
    check_sinks(settings.sinks)
    settings = claim(settings, new)
    check_ports(settings)
    settings = with_model(settings)
    config = settings.run_dir / CONFIG
    save_settings(settings, config)
    view = make_view(settings, started_at, plain)
    supervisor = Supervisor(settings.supervisor, children_of(settings, config))
    with view:
        finished = supervisor.run(stop.is_set, lambda: view.update(supervisor.children))
    if not finished:
        raise ErgonError(f"stopped before the end; the same command continues the run in {settings.run_dir}")
    logger.info("finished; to look at it: ergon report %s, ergon view %s", settings.run_dir, settings.run_dir)
    print(json.dumps(finish(settings, started_at, supervisor)))  # noqa: T201  the command's result


def finish(settings: Settings, started_at: float, supervisor: Supervisor) -> dict[str, Any]:
    """Complete the learner's summary with what only the supervisor knows, and return it."""
    path = settings.run_dir / SUMMARY
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    summary["wall_s"] = round(time.time() - started_at, 1)
    summary["restarts"] = {child.name: child.num_restarts for child in supervisor.children}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return summary


def check_environments(settings: Settings) -> None:
    """Raise ErgonError where an environment of the run cannot be made, before anything is started."""
    for section in settings.environments:
        try:
            create_environment(section.name, section.options)
        except ErgonEnvError as error:
            raise ErgonError(f"environments: {error}") from error


def check_security(settings: Settings) -> None:
    """Raise ErgonError where an address may not be open, or a key of one of this run's processes is missing."""
    for identity in (Identity.BROKER, Identity.RELAY, Identity.LEARNER, Identity.ACTOR):
        load_security(settings, identity)


def claim(settings: Settings, new: bool) -> Settings:
    """The settings with a run name whose folder may be used: new, or that of an unfinished run with equal settings."""
    directory = settings.run_dir
    if not (directory / CONFIG).exists():
        directory.mkdir(parents=True, exist_ok=True)
        return settings
    if new or (directory / SUMMARY).exists():
        return _with_free_name(settings)
    previous = load_settings(directory / CONFIG, environ={})
    if _comparable(previous) != _comparable(settings):
        raise ErgonError(
            f"{directory} holds an unfinished run with other settings ({_difference(previous, settings)}); "
            "continue it with its own settings, or start afresh with --new or --set run.name=OTHER"
        )
    logger.info("continuing an unfinished run directory=%s", directory)
    return settings


def _with_free_name(settings: Settings) -> Settings:
    number = 2
    while (settings.run.directory / f"{settings.run.name}-{number}").exists():
        number += 1
    run = settings.run.model_copy(update={"name": f"{settings.run.name}-{number}"})
    settings = settings.model_copy(update={"run": run})
    settings.run_dir.mkdir(parents=True)
    return settings


def _comparable(settings: Settings) -> dict[str, Any]:
    """What must be equal for a run to go on. The model's path is compared unresolved only where it still is."""
    data = settings.model_dump(mode="json")
    data["model"].pop("path")
    return data


def _difference(one: Settings, other: Settings) -> str:
    left, right = _comparable(one), _comparable(other)
    return "; ".join(
        f"{section}.{key}: {left[section][key]!r} there, {right[section][key]!r} here"
        for section in left
        if isinstance(left[section], dict)
        for key in left[section]
        if left[section][key] != right[section][key]
    )


def with_model(settings: Settings) -> Settings:
    """The settings with `model.path` resolved to a local directory; converting takes a minute, once."""
    command = [
        sys.executable,
        "-m",
        "learner.model",
        "--path",
        settings.model.path,
        "--cache",
        str(settings.model.cache),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == EXIT_USER_ERROR:
        raise ErgonError(done.stderr.strip().splitlines()[-1].partition(": error: ")[2])
    if done.returncode != 0:
        raise ErgonError(f"the model {settings.model.path!r} could not be prepared:\n{done.stderr.strip()}")
    path = Path(done.stdout.strip().splitlines()[-1]).resolve()
    return settings.model_copy(update={"model": settings.model.model_copy(update={"path": str(path)})})
