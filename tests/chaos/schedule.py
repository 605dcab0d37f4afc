"""Which faults happen when: drawn from a seed, so that a failing run can be repeated. Pure; touches nothing.

A fault's moment is a point of the work (tickets trained) and a random delay after it, so that all faults fall into the
run however fast the machine is, and some fall on one another.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

PROCESSES = ("broker", "relay", "learner", "actor")
LINKS = ("actor-broker", "learner-broker", "relay-learner", "actor-relay")
KINDS = (
    "kill",
    "kill_update",
    "drain",
    "kill_handover",
    "stop",
    "stop_long",
    "reset",
    "stall",
    "black_hole",
    "disk_full",
    "disk_low",
    "clock",
)
UPDATE_PHASES = (
    # of one update of the weights: who is killed, and when
    ("learner", "publishing"),
    ("learner", "published"),
    ("relay", "fetching"),
    ("relay", "serving"),
    ("actor", "fetching"),
    ("actor", "applying"),
    ("actor", "preparing"),
    ("actor", "paused"),
    ("actor", "switched"),
)
HANDOVER_PHASES = (
    # of one episode that an actor which drains hands over: who is killed, and when
    ("actor", "handing_over"),
    ("actor", "handed_over"),
    ("actor", "continuing"),
    ("broker", "handing_over"),
    ("broker", "handed_over"),
    ("broker", "continuing"),
)
ORDERED = ("kill_update", "kill_handover")  # kinds that the victim's own work brings about
MAX_DELAY_S = 1.5
# How many batches are left, at least, when the last order to kill in an update is given. Four of twice the size may be
# in flight already, and be trained on before any actor sees another version.
UPDATES_LEFT = 12
DRAINS_LEFT = 32  # likewise, when the last actor is told to drain: it must have episodes, perhaps more than once
TICKETS_PER_BATCH = 16
PAIR_GAP_S = 0.3
PAIR_SHARE = 0.5
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` happens to `target` when `at_tickets` are trained and `delay_s` has passed. `pair`: which pair it is of.

    `seconds`: how long a stop, stall, hole or full disk lasts; for a clock, how far it jumps. `variant`: the direction
    of a stall; whether a full disk is filled `once`, or whatever becomes free is taken at once (`greedy`); in which
    phase of the next update, or handover, the target is killed. `actor`: which one is hit, or, for a kill in a
    handover, drains.
    """

    kind: str
    target: str
    at_tickets: int
    delay_s: float
    seconds: float = 0.0
    variant: str = ""
    actor: int = 0
    pair: int | None = field(default=None)

    @property
    def place(self) -> str:
        """The process, link or disk that it hits."""
        return f"actor-{self.actor}" if self.target == "actor" else self.target


Row = tuple[str, str, str]  # kind, target, variant


def combinations(unavailable: Sequence[str] = (), kinds: Sequence[str] = KINDS) -> list[Row]:
    """One round: every kind on every target that it can hit; kills thrice, as they are what most often happens."""
    rows = [("kill", target, "") for target in PROCESSES] * 3
    rows += [("kill_update", target, phase) for target, phase in UPDATE_PHASES]
    rows += [("drain", "actor", "")] * 3
    rows += [("kill_handover", target, phase) for target, phase in HANDOVER_PHASES]
    rows += [(kind, target, "") for kind in ("stop", "stop_long", "clock") for target in PROCESSES]
    rows += [(kind, link, "") for kind in ("reset", "stall", "black_hole") for link in LINKS]
    rows += [("disk_full", "disk", ""), ("disk_full", "disk", ""), ("disk_low", "disk", "")]
    return [row for row in rows if row[0] in kinds and row[0] not in unavailable]


def make_schedule(
    seed: int,
    num_faults: int,
    num_tickets: int,
    num_actors: int,
    unavailable: Sequence[str] = (),
    kinds: Sequence[str] = KINDS,
) -> list[Fault]:
    """`num_faults` faults in order of their moments, half of them in pairs on two different targets."""
    rng = random.Random(f"{seed}/schedule")
    rows: list[Row] = []
    while len(rows) < num_faults:
        one_round = combinations(unavailable, kinds)
        rng.shuffle(one_round)
        rows += one_round[: num_faults - len(rows)]
    last = max(1, num_tickets - max(48, num_tickets // 20))
    faults: list[Fault] = []
    pair = 0
    while rows:
        at_tickets, delay_s = rng.randint(1, last), rng.uniform(0, MAX_DELAY_S)
        row = rows.pop()
        partner = next((i for i in reversed(range(len(rows))) if rows[i][1] != row[1]), None)
        if partner is None or rng.random() >= PAIR_SHARE / (2 - PAIR_SHARE):
            faults.append(_draw(rng, row, at_tickets, delay_s, num_actors, None))
            continue
        pair += 1
        for each, gap_s in ((row, 0.0), (rows.pop(partner), rng.uniform(0, PAIR_GAP_S))):
            faults.append(_draw(rng, each, at_tickets, delay_s + gap_s, num_actors, pair))
    # An update, or a handover, must still come after the order to be killed in it.
    left = {"kill_update": UPDATES_LEFT, "kill_handover": DRAINS_LEFT, "drain": DRAINS_LEFT}
    latest = {kind: max(1, num_tickets - num * TICKETS_PER_BATCH) for kind, num in left.items()}
    faults = [replace(fault, at_tickets=min(fault.at_tickets, latest.get(fault.kind, last))) for fault in faults]
    return sorted(faults, key=lambda fault: (fault.at_tickets, fault.delay_s))


def _draw(rng: random.Random, row: Row, at_tickets: int, delay_s: float, num_actors: int, pair: int | None) -> Fault:
    kind, target, phase = row
    seconds = {
        "stop": rng.uniform(0.2, 1.5),
        "stop_long": rng.uniform(2.5, 4.5),  # beyond the liveness, and mostly beyond the lease
        "stall": rng.uniform(0.3, 3.0),
        "black_hole": rng.uniform(0.3, 3.0),
        "disk_full": rng.uniform(0.5, 3.0),
        "disk_low": rng.uniform(0.5, 3.0),
        "clock": rng.choice((-1, 1)) * rng.choice((2.0, 60.0, 3600.0, 3 * DAY_S)) * rng.uniform(0.5, 1),
    }.get(kind, 0.0)
    variants = {"stall": ("up", "down", "both"), "disk_full": ("once", "greedy")}
    variant = phase or rng.choice(variants.get(kind, ("",)))
    actor = rng.randrange(num_actors)
    return Fault(kind, target, at_tickets, delay_s, seconds, variant, actor, pair)
