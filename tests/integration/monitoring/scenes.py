"""For every alert a run in which it fires and one in which it does not, as promtool's input series.

A value is promtool's notation: `0+30x60` grows by 30 a minute. Times are minutes, as is the interval between samples;
only fleets, for the number of actors, are scraped as often as the chart says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

Series = dict[str, str]

RUN: Final = 'namespace="rl",run="a"'


@dataclass(frozen=True, slots=True)
class Scene:
    """`fires` and `quiet` by the alert's name; looked at after `minutes`."""

    fires: Series
    quiet: Series
    minutes: int = 60


def broker(name: str, labels: str = "") -> str:
    """A series of the broker."""
    return _series(name, "ergon-broker", "broker-0", labels)


def learner(name: str, labels: str = "") -> str:
    """A series of the learner."""
    return _series(name, "ergon-learner", "learner-0", labels)


def actor(name: str, labels: str = "", instance: str = "actor-0") -> str:
    """A series of an actor."""
    return _series(name, "ergon-actor", instance, labels)


def relay(name: str, labels: str = "") -> str:
    """A series of a relay."""
    return _series(name, "ergon-relay", "relay-0", labels)


def _series(name: str, job: str, instance: str, labels: str) -> str:
    return f'{name}{{{RUN},job="{job}",instance="{instance}"{"," if labels else ""}{labels}}}'


def alarm(kind: str) -> Scene:
    """One of the learner's own alarms, raised; in the quiet run another one is."""
    others = 'kind="entropy"' if kind != "entropy" else 'kind="reward"'
    here = learner("ergon_learner_alarm", f'kind="{kind}"')
    return Scene({here: "1x60"}, {here: "0x60", learner("ergon_learner_alarm", others): "1x60"})


def _staleness(versions: int) -> Series:
    """Every token `versions` behind, of at most 8."""
    bucket = "ergon_learner_staleness_versions_bucket"
    bounds = (0, 1, 2, 3, 4, 6, 8, 12)
    counts = {str(bound): "0+100x60" if bound >= versions else "0x60" for bound in bounds} | {"+Inf": "0+100x60"}
    series = {learner(bucket, f'le="{bound}"'): values for bound, values in counts.items()}
    return series | {learner("ergon_learner_max_staleness_versions"): "8x60"}


_TICKETS: Final = broker("ergon_broker_tickets", 'state="assigned",mode="train"')
_STARTED: Final = "process_start_time_seconds"
_FREE: Final = broker("ergon_broker_store_free_bytes")
_WAITING: Final = learner("ergon_learner_waiting_seconds_total")
_FORGED: Final = relay("ergon_weights_forged_total", 'reason="signature"')
_INFRA: Final = actor("ergon_actor_infra_failures_total", 'env="shop",cause="sandbox"')
_EPISODES: Final = actor("ergon_actor_episodes_total", 'env="shop",mode="train",outcome="completed"')
_RESTARTS: Final = actor("ergon_actor_engine_restarts_total", 'result="restarted"')

SCENES: Final[dict[str, Scene]] = {
    "ErgonLearnerStarving": Scene({_WAITING: "0+45x60"}, {_WAITING: "0+20x60"}),
    "ErgonActorsIdle": Scene(
        {actor("ergon_actor_running_episodes"): "3x60", actor("ergon_actor_admitted_episodes"): "32x60"},
        {actor("ergon_actor_running_episodes"): "30x60", actor("ergon_actor_admitted_episodes"): "32x60"},
    ),
    "ErgonStalenessNearBound": Scene(_staleness(8), _staleness(3)),
    "ErgonTrajectoriesStuck": Scene(
        {_TICKETS: "40x60", broker("ergon_broker_acked_total"): "100x60", broker(_STARTED): "0x60"},
        {_TICKETS: "40x60", broker("ergon_broker_acked_total"): "0+4x60", broker(_STARTED): "0x60"},
    ),
    "ErgonLeasesExpire": Scene(
        {
            broker("ergon_broker_leases_total", 'event="granted"'): "0+20x60",
            broker("ergon_broker_leases_total", 'event="expired"'): "0+4x60",
        },
        {
            broker("ergon_broker_leases_total", 'event="granted"'): "0+20x60",
            broker("ergon_broker_leases_total", 'event="expired"'): "0+1x60",
        },
    ),
    "ErgonDeadLetters": Scene(
        {broker("ergon_broker_dead_total"): "0x55 1x5"},
        {broker("ergon_broker_dead_total"): "1x60"},
    ),
    "ErgonDiskFilling": Scene({_FREE: "20000000000-250000000x60"}, {_FREE: "20000000000-10000000x60"}),
    "ErgonLeasesOnHold": Scene(
        {broker("ergon_broker_leases_on_hold"): "1x60"}, {broker("ergon_broker_leases_on_hold"): "0x60"}
    ),
    "ErgonStoreFull": Scene({broker("ergon_broker_store_full"): "1x60"}, {broker("ergon_broker_store_full"): "0x60"}),
    "ErgonStoreDamaged": Scene(
        {broker("ergon_broker_damaged_total"): "0x55 2x5"}, {broker("ergon_broker_damaged_total"): "2x60"}
    ),
    "ErgonWeightLag": Scene(
        {
            learner("ergon_learner_policy_version"): "10+1x60",
            learner("ergon_learner_max_staleness_versions"): "8x60",
            actor("ergon_actor_policy_version"): "10x60",
            actor("ergon_actor_policy_version", instance="actor-1"): "10+1x60",
        },
        {
            learner("ergon_learner_policy_version"): "10+1x60",
            learner("ergon_learner_max_staleness_versions"): "8x60",
            actor("ergon_actor_policy_version"): "8+1x60",
        },
    ),
    "ErgonWeightLineage": Scene(
        {
            learner("ergon_learner_lineage"): "2x60",
            actor("ergon_actor_policy_lineage"): "1x60",
            actor("ergon_actor_policy_lineage", instance="actor-1"): "2x60",
        },
        {learner("ergon_learner_lineage"): "2x60", actor("ergon_actor_policy_lineage"): "1x45 2x15"},
    ),
    "ErgonWeightsForged": Scene({_FORGED: "0x55 1x5"}, {_FORGED: "1x60"}),
    "ErgonRelayCutOff": Scene(
        {relay("ergon_relay_upstream_connected"): "1x50 0x10"},
        # An actor has the metric too, and no upstream.
        {relay("ergon_relay_upstream_connected"): "0x50 1x10", actor("ergon_relay_upstream_connected"): "0x60"},
    ),
    "ErgonMismatchKL": alarm("mismatch_kl"),
    "ErgonEffectiveSampleSize": alarm("effective_sample_size"),
    "ErgonGradientNorm": alarm("grad_norm"),
    "ErgonEntropyCollapse": alarm("entropy"),
    "ErgonRewardCollapse": alarm("reward"),
    "ErgonBatchRefused": alarm("refused"),
    "ErgonSandboxFailures": Scene({_INFRA: "0+2x60", _EPISODES: "0+20x60"}, {_INFRA: "0+2x60", _EPISODES: "0+60x60"}),
    "ErgonEngineRestarts": Scene({_RESTARTS: "0x30 1x9 2x9 3x9"}, {_RESTARTS: "0x30 1x30"}),
    "ErgonDrift": Scene(
        {broker("ergon_broker_drift_alarm"): "0x20 1x40"}, {broker("ergon_broker_drift_alarm"): "1x20 0x40"}
    ),
    "ErgonRestartLoop": Scene({actor(_STARTED): "0x48 2900x4 3200x4 3400x4"}, {actor(_STARTED): "0x48 2900x12"}),
    "ErgonProcessDown": Scene(
        {learner("up"): "1x50 0x10"},
        {
            learner("up"): "1x57 0x3",
            actor("up"): "0x60",
            broker("up"): "1x60",
            _series("up", "ergon-broker", "another-pod", ""): "0x60",
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A fleet's state, and how many actors it should have. busy, waiting: shares of the time."""

    actors: int
    busy: float
    waiting: float
    staleness: int
    wanted: float | None


SCALING: Final = (
    Wanted(actors=4, busy=1.0, waiting=0.75, staleness=1, wanted=8),  # starving: twice as many at most
    Wanted(actors=4, busy=1.0, waiting=0.25, staleness=1, wanted=4 / 0.75),
    Wanted(actors=4, busy=0.5, waiting=0.0, staleness=1, wanted=2),
    Wanted(actors=4, busy=0.1, waiting=0.0, staleness=1, wanted=2),  # half as many at most
    Wanted(actors=4, busy=1.0, waiting=0.75, staleness=8, wanted=4),  # what more of them sampled would be too old
    Wanted(actors=0, busy=1.0, waiting=0.75, staleness=1, wanted=None),  # nothing known: nothing wanted
)


def fleet(state: Wanted, interval_s: int) -> Series:
    """The series of such a fleet over five minutes."""
    return _fleet(state, f"0+{state.waiting * interval_s:g}x{300 // interval_s}", f"{state.busy * 40:g}x60")


def starved(actors: int, busy: float, interval_s: int, missed: int | None = None) -> Series:
    """A fleet that was busy for this share until, after four minutes, the learner wanted more than it could have: from
    then on it waits, and they are busy. missed: the scrape of the learner after that which failed."""
    before, after = 240 // interval_s, 120 // interval_s
    waited = [str(interval_s * (number + 1)) for number in range(after)]
    if missed is not None:
        waited[missed] = "_"
    state = Wanted(actors, busy, waiting=0.0, staleness=1, wanted=None)
    return _fleet(state, f"0x{before} {' '.join(waited)}", f"{busy * 40:g}x{before} 40x{after}")


def joined(actors: int, interval_s: int) -> Series:
    """A fleet that was too small until, after four minutes, as many again came and were enough."""
    before, after = 240 // interval_s, 120 // interval_s
    state = Wanted(actors, busy=1.0, waiting=0.9, staleness=1, wanted=None)
    waited = 0.9 * interval_s
    series = _fleet(state, f"0+{waited:g}x{before} {waited * before:g}x{after}", f"40x{before} 36x{after}")
    for index in range(actors):
        name = f"newcomer-{index}"
        series[actor("ergon_actor_running_episodes", instance=name)] = f"0x{before} 36x{after}"
        series[actor("ergon_actor_admitted_episodes", instance=name)] = f"0x{before} 40x{after}"
    return series


def _fleet(state: Wanted, waiting: str, running: str) -> Series:
    series = {_WAITING: waiting} | _staleness(state.staleness)
    for index in range(state.actors):
        name = f"actor-{index}"
        series[actor("ergon_actor_running_episodes", instance=name)] = running
        series[actor("ergon_actor_admitted_episodes", instance=name)] = "40x120"
    return series
