"""Every metric of the experience channel's broker, in one place. `ergon_broker_*`; see each help text.

What is counted at every message is counted in plain integers by the server's thread, and told to Prometheus' counters,
which cost a lock each time, when they are read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Final

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Metric

from broker.ledger.events import Count
from broker.protocol.commands import COMMANDS, Role, StatusReply


class Tally:
    """Totals that one thread adds to and any thread may read. `counter`: that of a key."""

    def __init__(self, counter: Callable[[Hashable], Counter]) -> None:
        self.totals: dict[Hashable, int] = {}
        self._counter = counter
        self._told: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def add(self, key: Hashable, num: int) -> None:
        """Count; from the one thread."""
        totals = self.totals
        totals[key] = totals.get(key, 0) + num

    def tell(self) -> None:
        """Bring the counters up to date; from any thread."""
        with self._lock:
            for key, num in list(self.totals.items()):
                if num != (told := self._told.get(key, 0)):
                    self._counter(key).inc(num - told)
                    self._told[key] = num


class _BeforeReading:
    """Registered before all metrics, hence asked before them: has none of its own, and brings theirs up to date."""

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> list[Metric]:
        tally.tell()
        return []


REGISTRY.register(_BeforeReading())

tickets = Gauge(
    "ergon_broker_tickets",
    "Tickets by state and mode; acked, dead and cancelled count since the store was made.",
    ["state", "mode"],
)
peers = Gauge("ergon_broker_peers", "Connected peers by role.", ["role"])
store_full = Gauge("ergon_broker_store_full", "1 while the store refuses writes, and no actor is served.")
leases_on_hold = Gauge("ergon_broker_leases_on_hold", "1 while no ticket is leased: the disk is nearly full.")
results = Counter(
    "ergon_broker_results_total",
    "Trajectories received: accepted, late (taken after the lease had run out), repeated (sent again by the actor that "
    "had sent it), duplicate (another result of the ticket; dropped), unwanted (ticket cancelled, dead or unknown).",
    ["status"],
)
leases = Counter(
    "ergon_broker_leases_total",
    "Leases by what happened: granted, reclaimed by a heartbeat, expired, given back for drain or infra_failure.",
    ["event"],
)
outcomes = Counter(
    "ergon_broker_outcomes_total",
    "Results taken, by environment and outcome. An infra_failure is no result: see ergon_broker_leases_total.",
    ["env", "outcome"],
)
groups = Counter(
    "ergon_broker_groups_closed_total",
    "Groups of which no ticket is open any more: complete, or short (with dead letters in the place of results).",
    ["env", "end"],
)
drift = Gauge(
    "ergon_broker_drift",
    "Kolmogorov-Smirnov distance, 0 to 1, of what was trained on from what was run: duration of an episode, difficulty "
    "(1 - the mean reward of its group). Above 0 the learner drops results, and not at random.",
    ["env", "quantity"],
)
drift_alarm = Gauge("ergon_broker_drift_alarm", "1 while any ergon_broker_drift is at least broker.drift_alarm.")
handovers = Counter(
    "ergon_broker_handovers_total",
    "Unfinished episodes: kept (handed over by an actor that drains), refused (no room within broker.partials_mb; the "
    "episode begins anew), continued (sent to the next actor), damaged (could not be read; the episode begins anew).",
    ["event"],
)
partial_bytes = Gauge("ergon_broker_partial_bytes", "Bytes of the unfinished episodes that wait to be continued.")
issued = Counter("ergon_broker_issued_total", "Tickets issued.")
acked = Counter("ergon_broker_acked_total", "Trajectories and dead letters acked by the learner.")
cancelled = Counter("ergon_broker_cancelled_total", "Tickets cancelled.")
dead = Counter("ergon_broker_dead_total", "Tickets that used up their attempts.")
requeued = Counter("ergon_broker_requeued_total", "Dead tickets that an operator issued again.")
purged = Counter("ergon_broker_purged_total", "Dead letters that an operator gave up.")
messages = Counter("ergon_broker_messages_total", "Messages received, by command.", ["command"])
refused = Counter("ergon_broker_refused_total", "Messages answered with ERROR, by code.", ["code"])
refused_handshakes = Counter(
    "ergon_broker_handshakes_refused_total",
    "Connections not let in: unknown_key, wrong_role (no business on this channel), not_encrypted (or sealed for "
    "another server), broken_off.",
    ["reason"],
)
damaged = Counter(
    "ergon_broker_damaged_total",
    "Stored trajectories found damaged when they were to be delivered; their tickets were issued again.",
)
received_bytes = Counter("ergon_broker_received_bytes_total", "Bytes of all frames received.")
sent_bytes = Counter("ergon_broker_sent_bytes_total", "Bytes of all frames handed to the network.")
store_free_bytes = Gauge(
    "ergon_broker_store_free_bytes",
    "Room that is left: on the store's disk, and within its files. Below broker.min_free_mb no ticket is leased.",
)
store_bytes = Gauge("ergon_broker_store_bytes", "Size of all files of the store, blobs included.")
commit_seconds = Histogram(
    "ergon_broker_commit_seconds",
    "Seconds one group commit took.",
    buckets=(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)

COUNTS: Final = {
    "accepted": results.labels("accepted"),
    "late": results.labels("late"),
    "repeated": results.labels("repeated"),
    "duplicate": results.labels("duplicate"),
    "unwanted": results.labels("unwanted"),
    "granted": leases.labels("granted"),
    "reclaimed": leases.labels("reclaimed"),
    "expired": leases.labels("expired"),
    "released_drain": leases.labels("drain"),
    "released_infra_failure": leases.labels("infra_failure"),
    "handover_kept": handovers.labels("kept"),
    "handover_refused": handovers.labels("refused"),
    "continued": handovers.labels("continued"),
    "partial_damaged": handovers.labels("damaged"),
    "issued": issued,
    "acked": acked,
    "cancelled": cancelled,
    "dead": dead,
    "damaged": damaged,
    "requeued": requeued,
    "purged": purged,
}
"""The counter of each total that the ledger reports in a `Count`."""


_MESSAGES: Final = {command: messages.labels(command) for command in (*COMMANDS, "unknown")}


def _counter(key: Hashable) -> Counter:
    """Of a key of the tally: a command, a counter itself, or name and environment of a `Count`."""
    if isinstance(key, Counter):
        return key
    if isinstance(key, str):
        return _MESSAGES[key]
    assert isinstance(key, tuple), "there are no other keys"
    name, env = key
    family, _, end = name.partition("_")
    if family == "outcome":
        return outcomes.labels(env, end)
    return groups.labels(env, end) if family == "group" else COUNTS[name]


tally: Final = Tally(_counter)


def count(action: Count) -> None:
    """Add to the counter of a `Count`."""
    tally.add((action.name, action.env), action.num)


def count_message(command: str) -> None:
    """Count a message that arrived; `command` is one of the protocol's, or "unknown"."""
    tally.add(command, 1)


def observe_drift(drifts: Mapping[tuple[str, str], float], threshold: float) -> None:
    """Set the gauges of the monitor."""
    for (env, quantity), value in drifts.items():
        drift.labels(env, quantity).set(value)
    drift_alarm.set(any(value >= threshold for value in drifts.values()))


def observe(status: StatusReply, on_hold: bool, num_bytes: int, free_bytes: int, num_partial_bytes: int) -> None:
    """Set the gauges. `num_bytes` of the store, `free_bytes` that are left to it."""
    for state, by_mode in status.tickets.items():
        for mode, num in by_mode.items():
            tickets.labels(state, mode).set(num)
    for role in Role:
        peers.labels(role.value).set(status.peers.get(role.value, 0))
    store_full.set(status.full)
    leases_on_hold.set(on_hold)
    store_bytes.set(num_bytes)
    partial_bytes.set(num_partial_bytes)
    store_free_bytes.set(free_bytes)
