"""The `ergon` command: parses arguments and hands over; every mistake is one sentence and a non-zero exit."""

from __future__ import annotations

import argparse
from pathlib import Path

from broker.process.config import load_settings
from broker.process.lifecycle import run_main
from deploy.run import run_local
from envs.registry import known_environments


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; REFERENCE.md is made from it."""
    parser = argparse.ArgumentParser(
        prog="ergon", description="Reinforcement learning for agents inside real toolchains."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="start every process of a run on this machine and watch it to its end")
    run.add_argument("file", type=Path, help="the run's TOML")
    run.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting")
    run.add_argument("--new", action="store_true", help="start a new run where one of this name was not finished")
    run.add_argument("--plain", action="store_true", help="a plain log instead of the live view")
    run.set_defaults(act=_run)

    env = commands.add_parser("env", help="environments")
    env_commands = env.add_subparsers(dest="env_command", required=True)
    listing = env_commands.add_parser("list", help="the environments that can be named in a run's TOML")
    listing.set_defaults(act=_env_list)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.file, arguments.set)
    run_local(settings, new=arguments.new, plain=arguments.plain)


def _env_list(_arguments: argparse.Namespace) -> None:
    for name, summary in sorted(known_environments().items()):
        print(f"{name:16} {summary}")


def main() -> None:
    """Entry point of the `ergon` command."""
    arguments = build_parser().parse_args()
    run_main(arguments.command, lambda: arguments.act(arguments))
