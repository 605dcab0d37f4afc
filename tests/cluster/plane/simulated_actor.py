"""`python -m tests.cluster.plane.simulated_actor --config FILE`: an actor's process without an engine, for played
nodes.

Loop, lease, drain, adoption of weights, keys, metrics and health are the real ones; an episode is that of
`tests/chaos/script.py`, a time that passes and a trajectory drawn from the seed, so that the learner can tell a wrong
one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import threading
from pathlib import Path

from actors import metrics
from actors.channels import open_channels
from actors.weights import WeightAdopter
from broker.process.config import load_settings
from broker.process.lifecycle import install_stop, run_main
from broker.process.metrics import Health, start_metrics
from broker.process.settings import Settings
from broker.protocol.partials import Partial
from broker.protocol.trajectory import Ticket, Trajectory
from tests.chaos.scripted_actor import ScriptedActor, ScriptedEngine


class SimulatedActor(ScriptedActor):
    """Counts its episodes where a real one does."""

    async def _episode(self, ticket: Ticket, begun: Partial | None) -> Trajectory:
        with metrics.running_episodes.track_inprogress():
            trajectory = await super()._episode(ticket, begun)
        metrics.observe_episode(trajectory)
        return trajectory


async def serve(settings: Settings, adopters: list[WeightAdopter], stop: threading.Event) -> None:
    """Run the actor until `stop`."""
    actor_id = socket.gethostname()
    client, subscriber = open_channels(settings, actor_id)
    async with contextlib.AsyncExitStack() as stack:
        engine = ScriptedEngine(settings.run_dir, actor_id)
        weights = WeightAdopter(engine, subscriber, settings.actor.staging / actor_id)  # type: ignore[arg-type]
        adopters.append(weights)
        stack.push_async_callback(weights.close)
        stack.push_async_callback(client.close)
        connecting = asyncio.create_task(client.connect())
        while not connecting.done():
            if stop.is_set():
                connecting.cancel()
                return
            await asyncio.wait({connecting}, timeout=0.2)
        await connecting
        await SimulatedActor(actor_id, client, engine, weights, settings).run(stop)


def run_actor(settings: Settings) -> None:
    """Run until SIGTERM; ready once a version is served."""
    stop = install_stop()
    adopters: list[WeightAdopter] = []

    def health() -> Health:
        adopted = adopters[0].adopted if adopters else None
        return Health(adopted is not None, {"policy_version": adopted})

    settings.run_dir.mkdir(parents=True, exist_ok=True)
    server = start_metrics(settings.metrics.host, settings.metrics.actor_port, health)
    try:
        asyncio.run(serve(settings, adopters, stop))
    finally:
        server.close()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    run_actor(load_settings(parser.parse_args().config))


if __name__ == "__main__":
    run_main("actor", main)
