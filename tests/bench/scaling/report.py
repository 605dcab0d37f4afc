"""What the simulation tells: rates, shares of cores, what is full first and with how many actors. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

KEPT_UP = 0.97  # share of what is offered, from which on the system counts as keeping up
PARTS = ("broker", "relay", "learner")
"""What there is one of, however many actors. (The simulated actors are on machines of their own in a real run.)"""
PAPER: Final = {"7B": 0.05e9, "70B": 0.47e9, "1T": 6.7e9}
"""Bytes of a delta at a learning rate of 1e-6, by the rates that `make bench-weights` found."""
PAPER_STEP_S: Final = 60.0
LINK_BYTES_PER_S: Final = 10e9 / 8
_WORDS = {
    "broker": "the broker's busiest thread",
    "relay": "the relay's busiest thread",
    "learner": "the learner's client",
}


class Cell(NamedTuple):
    """So many actors of one profile. Rates are trajectories a second; shares are of one core."""

    profile: str
    actors: int
    in_flight: int  # episodes, of all actors
    offered: float
    finished: float
    durable: float
    delivered: float
    p50_ms: float  # from an actor's send until it knows it durable
    p99_ms: float
    busiest: Mapping[str, float]  # by part: its busiest thread; of the learner, the process
    cores: Mapping[str, float]  # by part, and of the simulated actors: all of it
    late_s: float  # by which the simulated actors were behind their script, at worst
    idle: float  # share of the episodes that waited for a ticket
    delta_bytes: float  # of a version
    versions: int  # that were published while all ran
    lag_p50_s: float  # from the call that publishes a version until an actor has verified it
    lag_p99_s: float
    missed: int  # of versions times actors, those that did not arrive within the time
    pulled: int  # of them, those that were not pushed
    lost: int  # times that a server had not heard of an actor for so long that it knew it no more
    not_taken: int  # results that came too late, because a lease had run out
    staleness: float  # versions, from an episode's beginning to its delivery
    load: str

    @property
    def kept_up(self) -> bool:
        """Whether as much was delivered as was offered, and nobody was lost."""
        return self.delivered >= KEPT_UP * self.offered and not self.lost


class Bottleneck(NamedTuple):
    """What is full first, and with how many actors that is so. measured: it was seen, else it is a projection."""

    part: str
    actors: float
    measured: bool


def bottleneck(cells: Sequence[Cell]) -> Bottleneck:
    """Of one profile: by the largest number of actors that was kept up with (or else the smallest), whose shares of a
    core are taken to grow with the number of actors."""
    kept_up = [cell for cell in cells if cell.kept_up]
    cell = max(kept_up, key=_actors) if kept_up else min(cells, key=_actors)
    part = max(PARTS, key=lambda name: cell.busiest[name])
    full_at = cell.actors / max(1e-9, cell.busiest[part])
    return Bottleneck(part, full_at, measured=full_at <= max(map(_actors, cells)))


def _actors(cell: Cell) -> int:
    return cell.actors


def machine_full(cells: Sequence[Cell], num_cores: int) -> int | None:
    """The smallest number of actors with which everything together, the simulated actors included, took nine tenths of
    the machine; None where it never did."""
    return next((cell.actors for cell in cells if sum(cell.cores.values()) >= 0.9 * num_cores), None)


def link_bytes_per_s(actors: int, delta_bytes: float, step_s: float) -> float:
    """What a relay sends, on average, with so many actors behind it and a version each step."""
    return actors * delta_bytes / step_s


def relays_needed(actors: int, delta_bytes: float, step_s: float) -> int:
    """Relays side by side, each of which sends for half of the time at most, on a link of LINK_BYTES_PER_S."""
    return math.ceil(2 * link_bytes_per_s(actors, delta_bytes, step_s) / LINK_BYTES_PER_S)


def by_profile(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells of each profile, by number of actors."""
    found: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=_actors):
        found.setdefault(cell.profile, []).append(cell)
    return found


def summary(cells: Sequence[Cell], num_cores: int) -> dict[str, Any]:
    """The last line's JSON."""
    told: dict[str, Any] = {}
    for profile, some in by_profile(cells).items():
        found = bottleneck(some)
        told[profile] = {
            "first_bottleneck": found.part,
            "full_at_actors": round(found.actors),
            "seen": found.measured,
            "machine_full_at": machine_full(some, num_cores),
            "cells": {
                cell.actors: {
                    "offered": round(cell.offered, 2),
                    "delivered": round(cell.delivered, 2),
                    "p99_ms": round(cell.p99_ms, 1),
                    "broker_thread": round(cell.busiest["broker"], 3),
                    "relay_thread": round(cell.busiest["relay"], 3),
                    "learner": round(cell.busiest["learner"], 3),
                    "lag_p99_s": round(cell.lag_p99_s, 3),
                    "relay_mb_per_version": round(cell.actors * cell.delta_bytes / 1e6, 1),
                }
                for cell in some
            },
        }
    return told


def markdown(cells: Sequence[Cell], conditions: str, num_cores: int) -> str:
    """The report for people."""
    lines = ["## Scale", "", conditions, ""]
    for profile, some in by_profile(cells).items():
        lines += [
            f"### {profile}",
            "",
            "| actors | in flight | offered/s | delivered/s | p50 / p99 send-to-durable, ms | broker, busiest thread "
            "(all) | relay, busiest thread (all) | learner | simulated actors | version lag p50 / p99, s | asked for / "
            "missed | peers lost / results not taken | staleness | load |",
            "|" + " --- |" * 14,
            *(_row(cell) for cell in some),
            "",
            _verdict(some, num_cores),
            "",
        ]
    return "\n".join([*lines, *_on_paper(1000)])


def _on_paper(actors: int) -> list[str]:
    """The weight channel of larger models, by arithmetic alone."""
    lines = [
        f"By arithmetic, {actors:,} actors behind one relay, a version every {PAPER_STEP_S:g} s; relays side by side "
        "on links of 10 Gbit/s, each busy for half of the time at most:",
        "",
        "| model | delta, GB | one relay would send, GB/s | relays |",
        "| --- | --- | --- | --- |",
    ]
    for model, delta_bytes in PAPER.items():
        sent = link_bytes_per_s(actors, delta_bytes, PAPER_STEP_S) / 1e9
        num = relays_needed(actors, delta_bytes, PAPER_STEP_S)
        lines.append(f"| {model} | {delta_bytes / 1e9:g} | {sent:.2f} | {num} |")
    return [*lines, ""]


def _row(cell: Cell) -> str:
    cells = [f"{cell.actors:,}", f"{cell.in_flight:,}", f"{cell.offered:,.1f}", f"{cell.delivered:,.1f}"]
    cells += [f"{cell.p50_ms:.0f} / {cell.p99_ms:.0f}"]
    cells += [f"{cell.busiest[part]:.2f} ({cell.cores[part]:.2f})" for part in ("broker", "relay")]
    cells += [f"{cell.cores['learner']:.2f}", f"{cell.cores['actors']:.2f}, {cell.late_s:.1f} s late"]
    cells += [f"{cell.lag_p50_s:.2f} / {cell.lag_p99_s:.2f}", f"{cell.pulled} / {cell.missed}"]
    cells += [f"{cell.lost} / {cell.not_taken}"]
    return "| " + " | ".join([*cells, f"{cell.staleness:.1f}", cell.load]) + " |"


def _verdict(cells: Sequence[Cell], num_cores: int) -> str:
    found, full = bottleneck(cells), machine_full(cells, num_cores)
    kept_up = [cell.actors for cell in cells if cell.kept_up]
    size = statistics.fmean(cell.delta_bytes for cell in cells)
    return (
        f"Kept up with: {', '.join(f'{n:,}' for n in kept_up) or 'none'}. Full first: {_WORDS[found.part]}, with "
        f"about {found.actors:,.0f} actors ({'seen' if found.measured else 'projected'}). The machine, with all "
        f"simulated actors on it, was full with {f'{full:,}' if full else 'none of these numbers'}. A version is a "
        f"delta of {size / 1e6:.2f} MB."
    )
