"""`python -m tests.chaos.scripted_actor --config FILE --index N`: a real actor whose engine is a script.

The loop, its drain, the adoption of weights and both clients are the real ones; only what an episode does is scripted.
Every adopted snapshot is compared with what its version must be, and every partial with what its ticket's episode can
have become; a wrong byte is a line in violations.jsonl.
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
from actors.handover import EpisodeInterruptedError, HandoverError, is_stale
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
from tests.chaos.episode import Episode, WrongEpisodeError
from tests.chaos.handovers import HANDOVER, WatchedTickets
from tests.chaos.orders import reach, say_working
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
    """The real loop; an episode is a time that passes in turns, and a trajectory drawn from the seed."""

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
            WatchedTickets(client.tickets, settings.run_dir, actor_id),
            client.sender,
            engine,  # type: ignore[arg-type]  # it samples nothing
            weights,
            None,  # type: ignore[arg-type]  # nothing is rendered
            {},
            settings.actor,
            max_staleness=settings.learner.max_staleness,
        )
        self._seed, self._id, self._adopter = settings.run.seed, actor_id, weights
        self._run_dir, self._works = settings.run_dir, False

    async def _episode(self, ticket: Ticket, begun: Partial | None) -> Trajectory:
        loop = asyncio.get_running_loop()
        if begun is not None and is_stale(begun, self._engine.policy_version, self._max_staleness):
            begun = None
        episode, goes_on = self._open(ticket, begun), begun is not None
        duration_s, started = script.duration_s(self._seed, ticket), loop.time() - episode.spent_s
        while not episode.ended:
            version = self._adopter.adopted
            assert version is not None, "the loop waits for the ticket's min_version"
            share = episode.next_end
            due = started + share * duration_s
            if share == 1.0:
                due = math.ceil(due / script.BEAT_S) * script.BEAT_S
            interrupted = await self._wait_until(due)
            episode.spent_s = loop.time() - started
            episode.sample(min(1.0, episode.spent_s / duration_s) if interrupted else share, version)
            if interrupted and not episode.ended:
                if not episode.num_sampled:
                    raise HandoverError("nothing was sampled yet")
                raise EpisodeInterruptedError(episode.partial())
            self._say_working()
            if goes_on:
                reach(self._run_dir, HANDOVER, "continuing")
        if script.fails(self._seed, ticket):
            raise InfraFailureError("scripted")
        return episode.trajectory(self._id)

    def _open(self, ticket: Ticket, begun: Partial | None) -> Episode:
        try:
            return Episode(self._seed, ticket, begun)
        except WrongEpisodeError as error:
            report_violation(self._run_dir, f"{self._id} was to go on with what is not so: {error}")
            raise

    def _say_working(self) -> None:
        if not self._works:
            self._works = True
            say_working(self._run_dir, self._id)

    async def _wait_until(self, due: float) -> bool:
        """Wait for this moment of the loop's clock: whoever waits for the same one wakes in the same turn of the loop.
        Whether the episode is to be left where it is."""
        loop = asyncio.get_running_loop()
        moment: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not moment.done():
                moment.set_result(None)

        timer = loop.call_at(due, wake)
        try:
            await asyncio.wait({moment, self._interrupt}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            moment.cancel()
        return self._interrupt.done()


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
