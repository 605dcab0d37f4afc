"""The actor's end: a real engine that adopts what comes over the weight channel while requests are in flight.

`python -m tests.bench.exact.play MODEL DTYPE CONFIG OUT`, spoken to on stdin: `fly` starts requests and answers
`flying`; `land LINEAGE VERSION` waits until that version is served and everything has been sampled, and answers
`landed`; `pauses` measures them and answers `paused`; `end` writes OUT. It says `adopting L.V` by itself.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from actors.renderer import Renderer
from actors.vllm_engine import VllmEngine
from actors.weights import WeightAdopter
from broker.process.config import load_settings
from broker.protocol.trajectory import PolicyVersion, Sampling
from broker.protocol.weights import Manifest
from broker.weights.basefile import BaseFile
from broker.weights.subscriber import WeightSubscriber
from envs.interface import Message
from tests.bench.exactness import NUM_SCORED, TEMPERATURE, questions
from tests.digest import data_digest

FLYING_TOKENS = 112
FRESH_TOKENS = 32
NUM_PAUSES = 3


class WatchedSubscriber(WeightSubscriber):
    """The real one; `parents` says how each version came."""

    parents: dict[PolicyVersion, PolicyVersion | None]

    def fetch_base(self, version: PolicyVersion, base: BaseFile, timeout_s: float) -> Manifest:
        manifest = super().fetch_base(version, base, timeout_s)
        self.parents = {version: manifest.parent}
        return manifest


class WatchedEngine:
    """The real engine, and a record of what it was made to adopt."""

    def __init__(self, engine: VllmEngine, subscriber: WatchedSubscriber) -> None:
        self._engine, self._subscriber = engine, subscriber
        self.adoptions: list[dict[str, Any]] = []

    async def adopt(self, version: PolicyVersion, weights: Path, digest: str) -> float:
        say(f"adopting {version.lineage}.{version.version}")
        started = time.monotonic()
        pause_s = await self._engine.adopt(version, weights, digest)
        fits = await self._engine.checksum() == digest == data_digest(weights)
        seconds = time.monotonic() - started
        told = {"pause_s": pause_s, "seconds": seconds, "checksum_fits": fits}
        self.adoptions.append({"version": version, "parent": self._subscriber.parents[version], **told})
        return pause_s


class Play:
    """One engine, one connection to the relay, and everything that was sampled, by scene."""

    def __init__(self, model: Path, dtype: str, config: Path) -> None:
        settings = load_settings(config, [f"actor.dtype={dtype}"])
        self._engine = VllmEngine.start(model, settings.actor, seed=1)
        renderer = Renderer.load(model)
        self._prompts = [renderer.open([Message("user", text)]) for text in questions()]
        self._settings = settings
        self._flying: list[asyncio.Task[dict[str, Any]]] = []
        self._scenes: list[dict[str, Any]] = []
        self._median_pause_s: dict[str, dict[str, float]] = {}
        self._num_requests = 0

    async def run(self, out: Path) -> None:
        links, staging = self._settings.weights, self._settings.actor.staging / "exactness"
        subscriber = WatchedSubscriber(f"tcp://127.0.0.1:{links.relay_port}", self._settings.run.name, "exactness")
        watched = WatchedEngine(self._engine, subscriber)
        adopter = WeightAdopter(watched, subscriber, staging)  # type: ignore[arg-type]
        adopting = asyncio.create_task(adopter.run())
        try:
            while (line := (await asyncio.to_thread(sys.stdin.readline)).split()) != ["end"]:
                if adopting.done():
                    adopting.result()
                await self._obey(line, adopter)
        finally:
            adopting.cancel()
            await asyncio.gather(adopting, return_exceptions=True)
            await adopter.close()
        seen = {"scenes": self._scenes, "adoptions": watched.adoptions, "median_pause_s": self._median_pause_s}
        out.write_text(json.dumps(seen | {"prepares": self._engine._adoption._prepares}))
        self._engine.shutdown()

    async def _obey(self, line: list[str], adopter: WeightAdopter) -> None:
        if line[0] == "fly":
            # The last place is for a short one that says when the others are under way; one more would wait for them.
            self._flying = [self._start(prompt, FLYING_TOKENS) for prompt in self._prompts[1:]]
            await self._start(self._prompts[0], FLYING_TOKENS // 8)
            say("flying")
        elif line[0] == "land":
            version = PolicyVersion(int(line[1]), int(line[2]))
            await asyncio.wait_for(adopter.at_least(version), 120)
            in_flight = await asyncio.gather(*self._flying)
            fresh = await asyncio.gather(*(self._start(p, FRESH_TOKENS) for p in self._prompts[:NUM_SCORED]))
            self._scenes.append({"version": version, "in_flight": in_flight, "fresh": fresh})
            say("landed")
        else:
            base = adopter._base  # nothing is published meanwhile, so the file keeps what is served
            for mode in ("keep", "recompute"):
                self._median_pause_s[mode] = await self._pauses(mode, base.path)
            say("paused")

    async def _pauses(self, mode: str, weights: Path) -> dict[str, float]:
        """Median pause in seconds, the two ways by turns, so that a busy machine is busy for both."""
        adoption, version, digest = self._engine._adoption, self._engine.policy_version, data_digest(weights)
        adoption._mode = mode
        seen: dict[str, list[float]] = {"prepared": [], "reloaded": []}
        flying = [self._start(prompt, 400) for prompt in self._prompts]
        for _ in range(NUM_PAUSES):
            for way, found in seen.items():
                await asyncio.sleep(0.5)
                adoption._prepares = way == "prepared"
                found.append(await self._engine.adopt(version, weights, digest))
        for task in flying:
            task.cancel()
        await asyncio.gather(*flying, return_exceptions=True)
        adoption._prepares = True
        return {way: statistics.median(found) for way, found in seen.items()}

    def _start(self, prompt: list[int], max_tokens: int) -> asyncio.Task[dict[str, Any]]:
        self._num_requests += 1
        return asyncio.create_task(self._sample(f"r{self._num_requests}", prompt, max_tokens))

    async def _sample(self, name: str, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        got = await self._engine.generate(prompt, Sampling(temperature=TEMPERATURE), max_tokens, (), name)
        return {
            "prompt": list(prompt),
            "ids": got.token_ids_N.tolist(),
            "logprobs": got.logprobs_N.tolist(),
            "runs": got.version_runs,
        }


def say(line: str) -> None:
    """Tell the bench, which reads every line and looks for its own."""
    print(line, flush=True)


def main() -> None:
    """Play one number format."""
    model, dtype, config, out = sys.argv[1:5]
    asyncio.run(Play(Path(model), dtype, Path(config)).run(Path(out)))


if __name__ == "__main__":
    main()
