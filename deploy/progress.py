"""The live view of a run in the terminal, and its plain-log fallback. Draws what scrape.py reads; decides nothing."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from broker.process.settings import Settings
from deploy.local import Child
from deploy.scrape import JsonLines, Samples, Scraper
from deploy.tally import FILE, Tally

logger = logging.getLogger(__name__)

PLAIN_INTERVAL_S = 15.0
SPARKS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Progress:
    """What is known of a run at this moment. Rates are per second, over the last half minute."""

    num_steps: int
    started_at: float
    phase: str = "starting"
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    sampled_rate: float = 0.0
    trained_rate: float = 0.0
    queue: dict[str, int] = field(default_factory=dict)
    children: dict[str, str] = field(default_factory=dict)

    @property
    def last(self) -> dict[str, Any]:
        """The newest step's record; empty before the first."""
        return self.steps[-1] if self.steps else {}

    def take(self, record: dict[str, Any]) -> None:
        """Fold in one record of metrics.jsonl; a resumed run overwrites the steps it repeats."""
        self.phase = record.get("detail", record["phase"])
        if record["event"] == "step":
            self.steps = [step for step in self.steps if step["step"] < record["step"]] + [record]
        elif record["event"] == "evaluation":
            self.evaluations.append(record)

    def seconds_left(self, now: float) -> float | None:
        """Time left for the remaining steps at the pace of the last ten; None before the second step."""
        recent = self.steps[-10:]
        if len(recent) < 2:
            return None
        first, last = recent[0], recent[-1]
        pace_s = float(last["time"] - first["time"]) / (len(recent) - 1)
        return max(0.0, (self.num_steps - int(last["step"])) * pace_s - (now - float(last["time"])))


class View:
    """Follows a run; `update` is called often and draws as often as is useful."""

    def __init__(self, settings: Settings, started_at: float, plain: bool) -> None:
        self._name = settings.run.name
        self._records = JsonLines(settings.run_dir / "metrics.jsonl")
        self._tally = Tally(settings.run_dir / FILE)
        self._scraper = Scraper(settings, self._count)
        self._live = None if plain else Live(console=Console(stderr=True), refresh_per_second=2, transient=False)
        self._next_line = 0.0
        self.progress = Progress(settings.learner.num_steps, started_at)

    def __enter__(self) -> Self:
        self._scraper.start()
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._read_records()
        if self._live:
            self._live.update(draw(self._name, self.progress, time.time()))
            self._live.stop()
        self._scraper.close()

    def update(self, children: Sequence[Child]) -> None:
        """Read what is new and show it."""
        fresh = self._read_records()
        progress, scraper = self.progress, self._scraper
        progress.children = {child.name: _state(child) for child in children}
        progress.sampled_rate = scraper.rate("ergon_actor_tokens_sampled_total")
        progress.trained_rate = scraper.rate("ergon_learner_trained_tokens_total")
        states = ("issued", "leased", "delivered", "assigned")
        progress.queue = {state: int(scraper.total("ergon_broker_tickets", state=state)) for state in states}
        now = time.time()
        if self._live:
            self._live.update(draw(self._name, progress, now))
        elif fresh or now >= self._next_line:
            self._next_line = now + PLAIN_INTERVAL_S
            logger.info(line(progress, now))

    def _count(self, samples: Mapping[str, Samples]) -> None:
        for process, of_process in samples.items():
            self._tally.add(process, of_process)
        self._tally.write()

    def _read_records(self) -> bool:
        records = self._records.read()
        for record in records:
            self.progress.take(record)
        return bool(records)


def make_view(settings: Settings, started_at: float, plain: bool) -> View:
    """The live view where stderr is a terminal, else the plain log."""
    return View(settings, started_at, plain or not sys.stderr.isatty())


def line(progress: Progress, now: float) -> str:
    """One line for a log."""
    parts = [f"phase={progress.phase}", f"step={progress.last.get('step', 0)}/{progress.num_steps}"]
    if progress.last:
        parts.append(f"reward={progress.last['reward_mean']:.2f}±{progress.last['reward_std']:.2f}")
        parts += _by_env(progress.last, "{env}={reward:.2f}({episodes})")
        parts.append(f"staleness={progress.last['staleness_mean']:.1f}/{progress.last['staleness_max']}")
    parts.append(f"sampled_per_s={progress.sampled_rate:.0f} trained_per_s={progress.trained_rate:.0f}")
    parts.append(" ".join(f"{state}={count}" for state, count in progress.queue.items()))
    left = progress.seconds_left(now)
    if left is not None:
        parts.append(f"left={clock(left)}")
    restarted = {name: state for name, state in progress.children.items() if state != "up"}
    parts += [f"{name}={state.replace(' ', '_')}" for name, state in restarted.items()]
    return " ".join(parts)


def _by_env(step: Mapping[str, Any], text: str) -> list[str]:
    """What a step says of each environment, where there is more than one."""
    environments: Mapping[str, Mapping[str, Any]] = step.get("by_env", {})
    return [text.format(env=env, **of_env) for env, of_env in environments.items()] if len(environments) > 1 else []


def draw(name: str, progress: Progress, now: float) -> Group:
    """The whole live view."""
    done = progress.last.get("step", 0)
    head = Text.assemble(
        ("ergon ", "bold"), (name, "bold cyan"), f"  {progress.phase}  {clock(now - progress.started_at)}"
    )
    left = progress.seconds_left(now)
    if left is not None and done < progress.num_steps:
        head.append(f"  about {clock(left)} of training left")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    bar = Table.grid(padding=(0, 1))
    bar.add_row(ProgressBar(total=progress.num_steps, completed=done, width=40), f"{done}/{progress.num_steps}")
    table.add_row("steps", bar)
    if progress.last:
        last = progress.last
        rewards = [step["reward_mean"] for step in progress.steps]
        table.add_row("reward", f"{last['reward_mean']:.2f} ± {last['reward_std']:.2f}  {spark(rewards)}")
        kinds = "  ".join(f"{kind} {value:.2f}" for kind, value in sorted(last.get("reward_by_kind", {}).items()))
        table.add_row("  by kind", kinds)
        if environments := _by_env(last, "{env} {reward:.2f} of {episodes} episodes"):
            table.add_row("  by environment", "  ".join(environments))
        table.add_row("staleness", f"mean {last['staleness_mean']:.1f}  max {last['staleness_max']}")
    for record in progress.evaluations:
        table.add_row("held out", evaluation_line(record))
    if progress.children:
        table.add_row("tokens/s", f"actor {progress.sampled_rate:.0f}  learner {progress.trained_rate:.0f}")
        table.add_row("tickets", "  ".join(f"{state} {count}" for state, count in progress.queue.items()))
        table.add_row("processes", "  ".join(f"{child}: {state}" for child, state in progress.children.items()))
    return Group(head, table)


def evaluation_line(record: dict[str, Any]) -> str:
    """Held-out rewards of one evaluation, at the training temperature and greedy, by kind and thinking budget."""
    sampled, greedy = (record[style] if record[style] is not None else float("nan") for style in ("sampled", "greedy"))
    kinds = "  ".join(f"{kind} {value:.2f}" for kind, value in record["sampled_by_kind"].items())
    environments = record.get("sampled_by_env", {})
    if len(environments) > 1:
        kinds = "  ".join(f"{env} {value:.2f}" for env, value in environments.items()) + f"; {kinds}"
    curve = "  ".join(f"{point['budget']} {point['reward']:.2f}" for point in record.get("sampled_curve", ()))
    budgets = f"  by budget: {curve}" if curve else ""
    return f"{record['evaluation']}: {sampled:.3f} sampled, {greedy:.3f} greedy  ({kinds}){budgets}"


def spark(values: Sequence[float], width: int = 40) -> str:
    """Values between 0 and 1 as a line of blocks, the newest `width` of them."""
    top = len(SPARKS) - 1
    return "".join(SPARKS[round(min(max(value, 0.0), 1.0) * top)] for value in values[-width:])


def clock(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _state(child: Child) -> str:
    state = "up" if child.running() else "restarting"
    return f"{state} ({child.num_restarts} restarts)" if child.num_restarts else state


def picture(run_dir: Path, settings: Settings, target: Path) -> None:
    """Draw a finished run as SVG, from its metrics.jsonl, as the live view showed it at its end."""
    records = JsonLines(run_dir / "metrics.jsonl").read()
    progress = Progress(settings.learner.num_steps, records[0]["time"])
    for record in records:
        progress.take(record)
    console = Console(record=True, width=124, file=sys.stderr)
    console.print(draw(settings.run.name, progress, records[-1]["time"]))
    # Without the fonts that the SVG would fetch from elsewhere.
    svg = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=f"ergon run {settings.run.name}"), flags=re.DOTALL)
    target.write_text(svg, encoding="utf-8")
