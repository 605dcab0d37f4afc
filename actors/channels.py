"""An actor's ends of the two channels, as its run's settings have them. Owns nothing; connects nothing yet."""

from __future__ import annotations

from typing import NamedTuple

from broker.client import ActorClient
from broker.process.keys import Identity
from broker.process.security import load_security
from broker.process.settings import Settings
from broker.weights.subscriber import WeightSubscriber


class Channels(NamedTuple):
    """Of one actor: tickets and trajectories, and weights. Whoever has them closes both."""

    client: ActorClient
    subscriber: WeightSubscriber


def open_channels(settings: Settings, actor_id: str) -> Channels:
    """The client, whose `connect` is due, and the subscriber, which connects by itself. Raises ErgonError for keys that
    cannot be used."""
    run_id, broker, links = settings.run.name, settings.broker, settings.weights
    security = load_security(settings, Identity.ACTOR)
    client = ActorClient(
        f"tcp://{broker.host}:{broker.port}",
        run_id,
        actor_id,
        heartbeat_s=broker.heartbeat_s,
        liveness=broker.liveness,
        security=security,
    )
    subscriber = WeightSubscriber(
        f"tcp://{links.relay_host}:{links.relay_port}",
        run_id,
        actor_id,
        credit=links.credit,
        push_bytes=links.push_mb << 20,
        heartbeat_s=links.heartbeat_s,
        liveness=links.liveness,
        security=security,
    )
    return Channels(client, subscriber)
