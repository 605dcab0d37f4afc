"""The benchmark's figures as a Markdown report and as one line of JSON. Computes ratios; measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests.bench.exchange.standing import Done, Idle

ERGON, REDIS, EVERYSEC, BARE = "ergon", "redis always", "redis everysec", "pyzmq"
FLOOR = "pyzmq+fsync"
SYSTEMS = (ERGON, REDIS, EVERYSEC, BARE, FLOOR)
CURVE = "ergon curve"
WITH_LEASES = "ergon, leasing too"
BUSY = 0.9  # a load thread above this share of a core was the bottleneck
MIN_VS_REDIS = {"2KiB": 1.0, "16KiB": 1.0, "256KiB": 2.0, "16MiB": 2.0}
MIN_VS_PYZMQ = {"256KiB": 0.5, "16MiB": 0.5}
TARGET_ACTORS = (16, 256)
MAX_IDLE_MIB = 512


class Cell(NamedTuple):
    """What was compared."""

    size: str
    actors: int
    system: str

    @property
    def key(self) -> str:
        """SIZE/ACTORS."""
        return f"{self.size}/{self.actors}"


class Figures(NamedTuple):
    """One run. `_core` is the share of a core that the thread which drives a side used; MB are 10^6 bytes."""

    per_s: float
    mb_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_s_per_gb: float
    peak_mib: float
    server_cores: float
    actors_core: float
    learner_core: float
    issue_per_s: float
    lease_per_s: float


def median(runs: Sequence[Figures]) -> Figures:
    """The median of each figure."""
    return Figures(*(statistics.median(column) for column in zip(*runs, strict=True)))


def ratios(cells: Mapping[Cell, Figures], other: str, system: str = ERGON) -> dict[str, float]:
    """Ergon's trajectories/s, or another system's, over those of `other`, by SIZE/ACTORS."""
    return {
        cell.key: round(figures.per_s / cells[cell._replace(system=other)].per_s, 3)
        for cell, figures in cells.items()
        if cell.system == system
    }


def summary(cells: Mapping[Cell, Figures], idle: Idle | None) -> dict[str, object]:
    """The last line; null for what was not measured."""
    ergon = {cell.key: figures for cell, figures in cells.items() if cell.system == ERGON}
    return {
        "vs_redis_always": ratios(cells, REDIS),
        "vs_redis_everysec": ratios(cells, EVERYSEC),
        "vs_pyzmq": ratios(cells, BARE),
        "durable_floor_vs_pyzmq": ratios(cells, BARE, FLOOR),
        "p99_ms": {key: round(figures.p99_ms, 2) for key, figures in ergon.items()},
        "cpu_s_per_gb": {key: round(figures.cpu_s_per_gb, 2) for key, figures in ergon.items()},
        "peak_mb": {key: round(figures.peak_mib, 1) for key, figures in ergon.items()},
        "mb_per_1000_peers": None if idle is None else round(idle.mib_per_1000, 1),
    }


def markdown(cells: Mapping[Cell, Figures], idle: Idle | None, done: Sequence[Done] | None, conditions: str) -> str:
    """The report. `idle` and `done` are None where they were not measured."""
    parts = [
        f"## Broker benchmark\n\n{conditions}",
        _ratio_table(cells),
        _targets(cells, idle),
        _figures_table(cells),
        _ticket_table(cells),
        _curve_table(cells),
        _standing(idle, done) if idle and done else "",
    ]
    return "\n\n".join(filter(None, parts))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio_table(cells: Mapping[Cell, Figures]) -> str:
    head = ["trajectory", "actors", "Ergon, trajectories/s", "MB/s", "vs Redis always", "vs everysec", "vs bare pyzmq"]
    head.append("pyzmq + fsync vs bare pyzmq")
    against = [*(ratios(cells, other) for other in (REDIS, EVERYSEC, BARE)), ratios(cells, BARE, FLOOR)]
    rows = [
        [cell.size, str(cell.actors), f"{figures.per_s:,.0f}", f"{figures.mb_per_s:,.0f}"]
        + [f"{table[cell.key]:.2f}×" for table in against]
        for cell, figures in cells.items()
        if cell.system == ERGON
    ]
    return _table(head, rows)


def _targets(cells: Mapping[Cell, Figures], idle: Idle | None) -> str:
    """What was asked for, and by how much it was missed."""
    lines = []
    for name, other, minimum in (("Redis always", REDIS, MIN_VS_REDIS), ("bare pyzmq", BARE, MIN_VS_PYZMQ)):
        for key, ratio in ratios(cells, other).items():
            size, actors = key.split("/")
            if int(actors) in TARGET_ACTORS and size in minimum:
                verdict = "met" if ratio >= minimum[size] else f"MISSED, {ratio / minimum[size]:.0%} of it"
                lines.append(f"- {key} vs {name}: {ratio:.2f}×, at least {minimum[size]:g}× is asked for: {verdict}")
    if idle is not None:
        verdict = "met" if idle.after_mib < MAX_IDLE_MIB else "MISSED"
        lines.append(
            f"- {idle.num} connected actors: {idle.after_mib:.0f} MiB, below {MAX_IDLE_MIB} is asked for: {verdict}"
        )
    return "\n".join(lines)


def _figures_table(cells: Mapping[Cell, Figures]) -> str:
    head = ("trajectory", "actors", "system", "trajectories/s", "MB/s", "send-to-durable p50 ms", "p99 ms")
    head += ("server CPU s/GB", "server peak MiB", "cores: server", "actors' thread", "learner's thread")
    rows = []
    for cell, got in cells.items():
        served = cell.system != BARE
        load = [f"{core:.2f}{' (bottleneck)' if core > BUSY else ''}" for core in (got.actors_core, got.learner_core)]
        rows.append(
            [cell.size, str(cell.actors), cell.system, f"{got.per_s:,.0f}", f"{got.mb_per_s:,.0f}"]
            + ([f"{got.p50_ms:.1f}", f"{got.p99_ms:.1f}"] if served else ["", ""])
            + ([f"{got.cpu_s_per_gb:.1f}", f"{got.peak_mib:.0f}", f"{got.server_cores:.2f}"] if served else [""] * 3)
            + load
        )
    return _table(head, rows)


def _ticket_table(cells: Mapping[Cell, Figures]) -> str:
    head = ("trajectory", "actors", "tickets issued/s", "leased/s", "trajectories/s", "the same, leasing too")
    rows = []
    for cell, got in cells.items():
        if cell.system == WITH_LEASES:
            plain = cells[cell._replace(system=ERGON)]
            rates = (plain.issue_per_s, plain.lease_per_s, plain.per_s, got.per_s)
            rows.append([cell.size, str(cell.actors), *(f"{rate:,.0f}" for rate in rates)])
    return "What Ergon's tickets cost beside the results:\n\n" + _table(head, rows) if rows else ""


def _curve_table(cells: Mapping[Cell, Figures]) -> str:
    head = ("trajectory", "actors", "trajectories/s", "encrypted", "ratio", "server CPU s/GB", "encrypted")
    rows = []
    for cell, got in cells.items():
        if cell.system == CURVE:
            plain = cells[cell._replace(system=ERGON)]
            rates = [f"{plain.per_s:,.0f}", f"{got.per_s:,.0f}", f"{got.per_s / plain.per_s:.2f}×"]
            costs = [f"{plain.cpu_s_per_gb:.1f}", f"{got.cpu_s_per_gb:.1f}"]
            rows.append([cell.size, str(cell.actors), *rates, *costs])
    text = "What CURVE costs, with the encryption of all actors in one I/O thread of the load:\n\n"
    return text + _table(head, rows) if rows else ""


def _standing(idle: Idle, done: Sequence[Done]) -> str:
    few, many = done
    head = ("tickets done", "start s", "memory MiB", "trajectories/s", "broker CPU ms each")
    rows = [
        [f"{d.num:,}", f"{d.start_s:.2f}", f"{d.memory_mib:.0f}", f"{d.per_s:,.0f}", f"{d.cpu_ms:.3f}"] for d in done
    ]
    return (
        f"{idle.num:,} idle actors with heartbeats: {idle.before_mib:.0f} → {idle.after_mib:.0f} MiB "
        f"({idle.mib_per_1000:.1f} MiB per 1,000), {idle.cores:.2f} cores.\n\n{_table(head, rows)}\n\n"
        f"CPU per trajectory at {many.num:,} over {few.num:,} tickets done: {many.cpu_ms / few.cpu_ms:.2f}×."
    )
