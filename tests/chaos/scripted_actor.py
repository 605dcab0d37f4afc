"""`python -m tests.chaos.scripted_actor --config FILE --index N`: a real actor whose engine is a script.

The loop, the adoption of weights and both clients are the real ones; only what an episode does is scripted. Every
adopted snapshot is compared with what its version must be; a wrong byte is a line in violations.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import threading
from pathlib import Path

from actors.actor import Actor
from actors.channels import open_channels
from actors.engine import AdoptionError, EngineLoad
from actors.rollout import InfraFailureError
from actors.weights import WeightAdopter
from broker.client import ActorClient
from broker.process.config import load_settings
from broker.process.lifecycle import install_stop, run_main
from broker.process.settings import Settings
from broker.protocol.partials import Partial
from broker.protocol.trajectory import PolicyVersion, Ticket, Trajectory
from broker.protocol.weights import Buffer
from broker.weights.basefile import BaseFile
from tests.chaos import script
from tests.chaos.orders import reach
from tests.digest import data_digest

VIOLATIONS = "violations.jsonl"


def weights_of(path: Path) -> bytes:
    """The data of a safetensors file."""
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def report_violation(run_dir: Path, text: str) -> None:
    """Something that must never happen was seen: one durable line, which fails the run."""
    with (run_dir / VIOLATIONS).open("a") as file:
        file.write(json.dumps({"violation": text}) + "\n")
        file.flush()
        os.fsync(file.fileno())


class WatchedBase(BaseFile):
    """The real base file; each chunk that is written is a moment to be killed at, and so is the one when the file has
    lost its header and the changes are not yet in it."""

    def __init__(self, path: Path, run_dir: Path, place: str) -> None:
        super().__init__(path)
        self._run_dir, self._place = run_dir, place
        self._finishing = False

    def write(self, index: int, data: Buffer) -> None:
        """See Sink."""
        super().write(index, data)
        reach(self._run_dir, self._place, "fetching")

    def finish(self) -> None:
        """See Sink."""
        self._finishing = self._delta is not None
        super().finish()
        self._finishing = False

    def _pwrite(self, data: Buffer, offset: int) -> None:
        super()._pwrite(data, offset)
        if self._finishing and self.version is None:
            reach(self._run_dir, self._place, "applying")


class ScriptedEngine:
    """Serves a version; `adopt` checks every byte of it, in the phases of a real adoption."""

    def __init__(self, run_dir: Path, place: str) -> None:
        self._run_dir, self._place = run_dir, place
        self.policy_version = PolicyVersion(0, 0)

    async def adopt(self, version: PolicyVersion, weights: Path, digest: str) -> float:
        """Switch to the weights in this safetensors file. Raises AdoptionError where they are not the version's."""
        reach(self._run_dir, self._place, "preparing")
        if weights_of(weights) != script.weights(version).tobytes() or data_digest(weights) != digest:
            report_violation(self._run_dir, f"weights of version {tuple(version)} are not what was published")
            raise AdoptionError("wrong bytes")
        reach(self._run_dir, self._place, "paused")
        self.policy_version = version
        reach(self._run_dir, self._place, "switched")
        return 0.0

    def check(self) -> None:
        """A script does not die."""

    def load(self) -> EngineLoad:
        """It samples nothing."""
        return EngineLoad()


class ScriptedActor(Actor):
    """The real loop; an episode is a sleep and a trajectory drawn from the seed."""

    def __init__(
        self,
        actor_id: str,
        client: ActorClient,
        engine: ScriptedEngine,
        weights: WeightAdopter,
        settings: Settings,
    ) -> None:
        super().__init__(
            actor_id,
            client.tickets,
            client.sender,
            engine,  # type: ignore[arg-type]  # it samples nothing
            weights,
            None,  # type: ignore[arg-type]  # nothing is rendered
            {},
            settings.actor,
        )
        self._seed, self._id, self._adopter = settings.run.seed, actor_id, weights

    async def _episode(self, ticket: Ticket, begun: Partial | None) -> Trajectory:
        assert begun is None, "nobody here says what to go on from"
        version = self._adopter.adopted
        assert version is not None, "the loop waits for the ticket's min_version"
        await _sleep_to_beat(script.duration_s(self._seed, ticket))
        if script.fails(self._seed, ticket):
            raise InfraFailureError("scripted")
        return script.make_trajectory(self._seed, ticket, self._id, version)


async def _sleep_to_beat(seconds: float) -> None:
    """Sleep so long, and on to the next beat: whoever sleeps to the same one wakes in the same turn of the loop."""
    loop = asyncio.get_running_loop()
    beat: asyncio.Future[None] = loop.create_future()
    due = math.ceil((loop.time() + seconds) / script.BEAT_S) * script.BEAT_S

    def wake() -> None:
        if not beat.done():
            beat.set_result(None)

    timer = loop.call_at(due, wake)
    try:
        await beat
    finally:
        timer.cancel()


async def serve(settings: Settings, index: int, stop: threading.Event) -> None:
    """Run the actor until `stop`."""
    actor_id = f"actor-{index}"
    client, subscriber = open_channels(settings, actor_id)
    async with contextlib.AsyncExitStack() as stack:
        engine, staging = ScriptedEngine(settings.run_dir, actor_id), settings.actor.staging / actor_id
        weights = WeightAdopter(engine, subscriber, staging)  # type: ignore[arg-type]
        weights._base = WatchedBase(staging / "weights.safetensors", settings.run_dir, actor_id)
        stack.push_async_callback(weights.close)
        stack.push_async_callback(client.close)
        await client.connect()
        await ScriptedActor(actor_id, client, engine, weights, settings).run(stop)


def main() -> None:
    """Parse the command line and run until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    asyncio.run(serve(load_settings(arguments.config, arguments.set), arguments.index, install_stop()))


if __name__ == "__main__":
    run_main("actor", main)
