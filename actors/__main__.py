"""`python -m actors --config FILE --index N`: one actor process."""

from __future__ import annotations

import argparse
from pathlib import Path

from broker.process.lifecycle import run_main


def main() -> None:
    """Parse the command line, load the settings, run."""
    parser = argparse.ArgumentParser(prog="python -m actors", description="One Ergon actor: vLLM and environments.")
    parser.add_argument("--config", type=Path, required=True, help="the run's resolved TOML")
    parser.add_argument("--index", type=int, default=0, help="number of this actor on its machine, from 0")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    arguments = parser.parse_args()

    from actors.process import run_actor
    from broker.process.config import load_settings

    run_actor(load_settings(arguments.config, arguments.set), arguments.index)


if __name__ == "__main__":
    run_main("actor", main)
