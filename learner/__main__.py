"""python -m learner --config RUN.toml: the learner process."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from broker.process.config import load_settings
from broker.process.lifecycle import run_main
from broker.process.sink_settings import check_sinks
from learner import launch


def main() -> None:
    """Read the settings and train."""
    parser = argparse.ArgumentParser(prog="python -m learner", description="The learner of an Ergon run")
    parser.add_argument("--config", type=Path, required=True, help="the run's TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    settings = load_settings(arguments.config, arguments.overrides)
    check_sinks(settings.sinks)
    if launch.is_needed(settings):
        sys.exit(launch.launch(settings, sys.argv[1:]))

    from learner.trainer import run_learner  # after the settings were found to be good: importing torch takes seconds

    run_learner(settings)


if __name__ == "__main__":
    rank = os.environ.get("RANK", "0")
    run_main("learner" if rank == "0" else f"learner-rank-{rank}", main)
