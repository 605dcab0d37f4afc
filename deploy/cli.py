"""The `ergon` command: parses arguments and hands over; every mistake is one sentence and a non-zero exit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from broker.process.config import load_settings
from broker.process.keys import make_keys
from broker.process.lifecycle import ErgonError, install_stop, run_main
from broker.protocol.commands import MAX_ROWS
from deploy import broker_admin, cluster, environments
from deploy.export import export_run
from deploy.monitoring import monitor as watch
from deploy.play import play_in_terminal
from deploy.report import check_packages
from deploy.rollout import Record, Rollout, as_table, policy_maker, roll_out, write_records
from deploy.run import run_local
from envs.interface import Environment
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

    monitor = commands.add_parser(
        "monitor", help="a Prometheus for a run on this machine, and its dashboards as a page"
    )
    monitor.add_argument("file", type=Path, help="the run's TOML, for example runs/NAME/config.toml")
    monitor.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting")
    monitor.add_argument("--port", type=int, default=9790, help="port of the page; Prometheus has the next one")
    monitor.add_argument("--interval", type=float, default=5.0, metavar="SECONDS", help="between two scrapes")
    monitor.add_argument("--alertmanager", metavar="HOST:PORT", help="where alerts are sent to")
    monitor.set_defaults(act=_monitor)

    report = commands.add_parser("report", help="one HTML page about a run: curves, outcomes, sample trajectories")
    report.add_argument(
        "--output", type=Path, metavar="FILE", help="not report.html in the run's folder; - for standard output"
    )
    report.set_defaults(act=_report)
    view = commands.add_parser("view", help="browse the trajectories of a run, live or finished, on this machine")
    view.add_argument("--port", type=int, default=9780, help="port of the page, on 127.0.0.1")
    view.set_defaults(act=_view)
    for parser_of_run in (report, view):
        parser_of_run.add_argument("run", type=Path, help="the run's folder, for example runs/NAME, or its TOML")
        parser_of_run.add_argument(
            "--model", type=Path, metavar="DIRECTORY", help="where the tokenizer is, if not at the run's model.path"
        )

    export = commands.add_parser("export", help="a run's weights as a Hugging Face directory")
    export.add_argument("run", type=Path, help="the run's folder, for example runs/NAME, finished or not")
    export.add_argument("directory", type=Path, help="where to, a new directory")
    export.add_argument(
        "--checkpoint",
        default="best",
        metavar="best|last|NUMBER",
        help="the one with the best held-out reward (the default), the newest, or a number of runs/NAME/checkpoints",
    )
    export.set_defaults(act=_export)

    keys = commands.add_parser("keys", help="encryption and identities of a run's processes")
    keys_commands = keys.add_subparsers(dest="keys_command", required=True)
    making = keys_commands.add_parser("make", help="make a key pair for every identity, and the list of who is let in")
    making.add_argument("directory", type=Path, help="where to put them; security.keys names it in a run's TOML")
    making.set_defaults(act=_keys_make)

    _add_broker(commands.add_parser("broker", help="look after the broker of a run"))

    _add_cluster(commands)

    env = commands.add_parser("env", help="environments")
    env_commands = env.add_subparsers(dest="env_command", required=True)
    listing = env_commands.add_parser("list", help="the environments that can be named in a run's TOML")
    listing.set_defaults(act=_env_list)
    _add_env_commands(env_commands)
    return parser


def _add_cluster(commands: Any) -> None:
    up = commands.add_parser("up", help="start a run on Kubernetes, or upgrade it, by the chart")
    up.add_argument("file", type=Path, help="the run's TOML")
    up.add_argument("--profile", default="", help="of the chart: cpu, one-gpu, eight-gpus, many-nodes")
    up.add_argument(
        "--values", action="append", default=[], type=Path, metavar="FILE", help="further values of the chart"
    )
    up.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the chart")
    up.add_argument("--dry-run", action="store_true", help="print the manifests and send nothing")
    up.set_defaults(act=_up)
    status = commands.add_parser("status", help="the pods of a run on Kubernetes")
    status.set_defaults(act=_status)
    logs = commands.add_parser("logs", help="what the pods of a run on Kubernetes say")
    logs.add_argument("component", nargs="?", choices=cluster.COMPONENTS, help="of these pods only")
    logs.add_argument("--tail", type=int, default=100, metavar="LINES", help="the last lines of each")
    logs.add_argument("--follow", "-f", action="store_true", help="go on with what they say from now on")
    logs.set_defaults(act=_logs)
    scale = commands.add_parser("scale", help="set the number of actors of a run on Kubernetes")
    scale.add_argument("actors", type=int, help="how many")
    scale.set_defaults(act=_scale)
    down = commands.add_parser(
        "down", help="end a run on Kubernetes; its volumes and keys stay, and `up` goes on with it"
    )
    down.set_defaults(act=_down)
    for parser in (up, status, logs, scale, down):
        parser.add_argument("--name", default="ergon", help="the release's name")
        parser.add_argument("--namespace", "-n", default="default", help="the release's namespace")


def _add_env_commands(commands: Any) -> None:
    show = commands.add_parser("show", help="an environment's options, tools and a task of it")
    play = commands.add_parser("play", help="play an episode in the terminal, with the tools as commands")
    rollout = commands.add_parser("rollout", help="let a policy play episodes: a table, and JSONL where asked for")
    for parser in (show, play, rollout):
        parser.add_argument("name", help="the environment: a name of `ergon env list`, or module:Class")
        parser.add_argument(
            "--option",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="an option of it, in JSON or as text",
        )
        parser.add_argument("--split", choices=("train", "heldout"), default="train", help="the tasks' split")
        parser.add_argument("--index", type=int, default=0, metavar="NUMBER", help="the (first) task's index")
    show.set_defaults(act=_env_show)
    play.set_defaults(act=_env_play)
    rollout.add_argument(
        "--policy",
        default="reference",
        metavar="reference|URL",
        help="who plays; the URL of an OpenAI-compatible endpoint",
    )
    rollout.add_argument("--model", default="", help="the endpoint's model")
    rollout.add_argument("--temperature", type=float, default=1.0, help="the endpoint's sampling temperature")
    rollout.add_argument("--episodes", type=int, default=20, metavar="NUMBER", help="so many tasks, one episode each")
    rollout.add_argument("--concurrency", type=int, default=4, metavar="NUMBER", help="so many episodes at once")
    rollout.add_argument("--max-turns", type=int, default=None, metavar="NUMBER", help="not the environment's own")
    rollout.add_argument(
        "--output", type=Path, default=None, metavar="FILE", help="write the episodes, one JSON a line"
    )
    rollout.set_defaults(act=_env_rollout)


def _add_broker(broker: argparse.ArgumentParser) -> None:
    commands = broker.add_subparsers(dest="broker_command", required=True)
    inspect = commands.add_parser("inspect", help="tickets by state, environment and actor, peers, dead letters")
    requeue = commands.add_parser("requeue", help="issue dead tickets again, with no attempt used")
    purge = commands.add_parser("purge", help="give dead letters up; their groups close without them")
    for parser in (inspect, requeue, purge):
        parser.add_argument("file", type=Path, help="the run's TOML, for example runs/NAME/config.toml")
        parser.add_argument(
            "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting"
        )
        parser.add_argument(
            "--timeout", type=float, default=10.0, metavar="SECONDS", help="wait so long for the broker"
        )
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    inspect.add_argument(
        "--max-dead", type=int, default=100, metavar="NUMBER", help="list so many dead letters, up to 1000"
    )
    inspect.set_defaults(act=_inspect)
    for parser, option in ((requeue, "--dead"), (purge, "--all")):
        which = parser.add_mutually_exclusive_group(required=True)
        which.add_argument("ticket_ids", nargs="*", default=[], metavar="TICKET_ID", help="dead tickets")
        which.add_argument(option, action="store_true", dest="everything", help="every dead letter")
    requeue.set_defaults(act=_requeue)
    purge.set_defaults(act=_purge)


def _inspect(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.max_dead <= MAX_ROWS:
        raise ErgonError(f"--max-dead {arguments.max_dead} is not within 0 to {MAX_ROWS}")
    with broker_admin.connect(arguments.file, arguments.set, arguments.timeout) as operator:
        reply = operator.inspect(arguments.max_dead)
    print(broker_admin.as_json(reply) if arguments.json else broker_admin.as_tables(reply))


def _requeue(arguments: argparse.Namespace) -> None:
    with broker_admin.connect(arguments.file, arguments.set, arguments.timeout) as operator:
        done = operator.requeue_all() if arguments.everything else operator.requeue(arguments.ticket_ids)
    print(broker_admin.outcome(done, arguments.everything))


def _purge(arguments: argparse.Namespace) -> None:
    with broker_admin.connect(arguments.file, arguments.set, arguments.timeout) as operator:
        done = operator.purge_all() if arguments.everything else operator.purge(arguments.ticket_ids)
    print(broker_admin.outcome(done, arguments.everything))


def _run(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.file, arguments.set)
    run_local(settings, new=arguments.new, plain=arguments.plain)


def _monitor(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.file, arguments.set)
    watch.monitor(settings, arguments.port, arguments.interval, install_stop().wait, arguments.alertmanager)


def _report(arguments: argparse.Namespace) -> None:
    check_packages()
    from deploy.report.page import make_report, write_report

    if str(arguments.output) == "-":
        print(make_report(arguments.run, arguments.model)[1])
    else:
        print(write_report(arguments.run, arguments.output, arguments.model))


def _view(arguments: argparse.Namespace) -> None:
    check_packages()
    from deploy.report.view import view

    view(arguments.run, arguments.port, arguments.model, install_stop().wait)


def _export(arguments: argparse.Namespace) -> None:
    print(export_run(arguments.run, arguments.directory, arguments.checkpoint))


def _keys_make(arguments: argparse.Namespace) -> None:
    for path in make_keys(arguments.directory):
        print(path)


def _release(arguments: argparse.Namespace) -> cluster.Release:
    return cluster.Release(arguments.name, arguments.namespace)


def _up(arguments: argparse.Namespace) -> None:
    release, more = _release(arguments), (arguments.values, arguments.set)
    print(cluster.up(release, arguments.file, arguments.profile, *more, dry=arguments.dry_run))


def _status(arguments: argparse.Namespace) -> None:
    print(cluster.as_table(cluster.status(cluster.connect(), _release(arguments))))


def _logs(arguments: argparse.Namespace) -> None:
    what = (cluster.connect(), _release(arguments), arguments.component or "", arguments.tail)
    for line in cluster.follow(*what, install_stop()) if arguments.follow else cluster.logs(*what):
        print(line, flush=True)


def _scale(arguments: argparse.Namespace) -> None:
    before = cluster.scale(cluster.connect(), _release(arguments), arguments.actors)
    print(f"actors: {before} -> {arguments.actors}")


def _down(arguments: argparse.Namespace) -> None:
    print(cluster.down(_release(arguments)))


def _env_list(_arguments: argparse.Namespace) -> None:
    for name, summary in sorted(known_environments().items()):
        print(f"{name:16} {summary}")


def _env_show(arguments: argparse.Namespace) -> None:
    async def shown(environment: Environment) -> str:
        return environments.described(environment, arguments.split, arguments.index)

    print(environments.use(arguments.name, arguments.option, shown))


def _env_play(arguments: argparse.Namespace) -> None:
    async def played(environment: Environment) -> float:
        task = environment.task(arguments.split, arguments.index)
        return await play_in_terminal(environment, task, sys.stdin, sys.stdout)

    environments.use(arguments.name, arguments.option, played)


def _env_rollout(arguments: argparse.Namespace) -> None:
    plan = Rollout(arguments.split, arguments.index, arguments.episodes, arguments.concurrency, arguments.max_turns)

    async def rolled_out(environment: Environment) -> list[Record]:
        policy = policy_maker(environment, arguments.policy, arguments.model, arguments.temperature)
        return await roll_out(environment, plan, policy)

    records = environments.use(arguments.name, arguments.option, rolled_out)
    if arguments.output is not None:
        write_records(arguments.output, records)
    print(as_table(records))


def main() -> None:
    """Entry point of the `ergon` command."""
    arguments = build_parser().parse_args()
    run_main(arguments.command, lambda: arguments.act(arguments))
