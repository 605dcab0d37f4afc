"""`python -m broker serve|relay --config FILE`: wires and starts one of the broker's two processes."""

from __future__ import annotations

import argparse
from pathlib import Path

from broker.process.config import load_settings
from broker.process.lifecycle import run_main


def main() -> None:
    """Parse the command line and run the chosen process until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m broker", description=__doc__)
    parser.add_argument(
        "process", choices=("serve", "relay"), help="the experience channel, or the weight channel's relay"
    )
    parser.add_argument("--config", type=Path, help="the run's TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    arguments = parser.parse_args()

    def start() -> None:
        settings = load_settings(arguments.config, arguments.set)
        if arguments.process == "serve":
            from broker.exchange.server import serve

            serve(settings)
        else:
            from broker.weights.relay import serve_relay

            serve_relay(settings)

    run_main("broker" if arguments.process == "serve" else "relay", start)


if __name__ == "__main__":
    main()
