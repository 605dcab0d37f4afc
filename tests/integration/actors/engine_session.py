"""A process with a real engine that plays every scene of test_vllm_engine.py and writes down what it saw.

`python -m tests.integration.actors.engine_session MODEL DTYPE WEIGHTS_DIR OUT`, where WEIGHTS_DIR holds 1.safetensors,
2.safetensors, 3.safetensors and bad_*.safetensors. A process of its own, because vLLM changes torch in the process that
imports it. At its end it waits for a line on stdin, still serving.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import REGISTRY

from actors.checkpoint import data_digest
from actors.engine import AdoptionError, EngineDeadError, Sample
from actors.renderer import Renderer
from actors.vllm_engine import VllmEngine
from broker.process.settings import ActorSection
from broker.protocol.trajectory import PolicyVersion, Sampling
from envs.interface import Message

WARM = Sampling(temperature=0.8)
GREEDY = Sampling(temperature=0.0)
LONG = 300


def dump(prompt: list[int], sample: Sample) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "ids": sample.token_ids_N.tolist(),
        "logprobs": sample.logprobs_N.tolist(),
        "runs": [list(run) for run in sample.version_runs],
        "finish": sample.finish,
    }


class Session:
    def __init__(self, engine: VllmEngine, renderer: Renderer, weights: Path) -> None:
        self.engine = engine
        self.weights = weights
        self.stop = renderer.stop_token_ids
        questions = [f"Eva buys {i} plates with a {i * i} coin discount. What is the bill?" for i in range(8)]
        self.prompts = [renderer.open([Message("user", text)]) for text in questions]
        self.count = 0

    async def sample(self, sampling: Sampling, max_tokens: int, stop: tuple[int, ...] = ()) -> list[dict[str, Any]]:
        samples = await asyncio.gather(*self.start(sampling, max_tokens, stop))
        return [dump(prompt, sample) for prompt, sample in zip(self.prompts, samples, strict=True)]

    def start(self, sampling: Sampling, max_tokens: int, stop: tuple[int, ...] = ()) -> list[asyncio.Task[Sample]]:
        tasks = []
        for prompt in self.prompts:
            self.count += 1
            request = self.engine.generate(prompt, sampling, max_tokens, stop, f"r{self.count}")
            tasks.append(asyncio.create_task(request))
        return tasks

    async def probe(self) -> None:
        """Return when requests started before this one have sampled some tokens."""
        await self.engine.generate(self.prompts[0], WARM, 60, (), f"probe{self.count}")

    async def in_flight(self, number: int) -> dict[str, Any]:
        tasks = self.start(WARM, LONG)
        await self.probe()
        pause_s = await self.engine.adopt(PolicyVersion(7, number), self.weights / f"{number}.safetensors")
        samples = await asyncio.gather(*tasks)
        return {"pause_s": pause_s, "samples": [dump(p, s) for p, s in zip(self.prompts, samples, strict=True)]}

    async def refused(self) -> dict[str, str]:
        reasons = {}
        for path in sorted(self.weights.glob("bad_*.safetensors")):
            try:
                await self.engine.adopt(PolicyVersion(9, 9), path)
            except AdoptionError as error:
                reasons[path.stem] = str(error)
        return reasons

    async def aborted(self) -> dict[str, Any]:
        request = asyncio.create_task(self.engine.generate(self.prompts[1], WARM, LONG, (), "long"))
        await self.probe()
        await self.engine.abort("nobody")
        await self.engine.abort("long")
        return dump(self.prompts[1], await request)

    async def cancelled(self) -> int:
        tasks = self.start(WARM, LONG)
        await self.probe()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return int(self.engine._llm.get_num_unfinished_requests())

    async def too_long(self) -> str:
        try:
            await self.engine.generate([5] * 2000, WARM, 5, (), "too-long")
        except EngineDeadError:
            return "dead"
        except Exception as error:  # noqa: BLE001  the test looks at its name
            return type(error).__name__
        return "served"

    async def keep_cache(self) -> dict[str, Any]:
        """Adoption with the cache kept: requests in flight go on with old keys and values, new ones must not."""
        self.engine._recompute = False
        seen = await self.in_flight(3)
        return {"in_flight": seen, "fresh": await self.sample(WARM, 64)}

    async def not_prepared(self) -> dict[str, str]:
        """What fails in the worker before the switch: another hash than the file's, a file that vanished."""
        tasks, reasons = self.start(WARM, LONG), {}
        await self.probe()
        for name, digest in (("2.safetensors", "00" * 16), ("vanished.safetensors", "")):
            try:
                await self.engine._prepare(self.weights / name, digest)
            except AdoptionError as error:
                reasons[name] = str(error)
        await asyncio.gather(*tasks)
        return reasons

    async def both_ways(self) -> list[dict[str, Any]]:
        """The same versions prepared ahead and reloaded in the pause, one request at a time, so that batches agree."""
        seen: list[dict[str, Any]] = []
        for number in (2, 1, 2):
            for prepares in (True, False):
                self.engine._prepares = prepares
                path = self.weights / f"{number}.safetensors"
                await self.engine.adopt(PolicyVersion(8, len(seen)), path)
                samples = [
                    await self.engine.generate(prompt, GREEDY, 32, (), f"w{len(seen)}.{i}")
                    for i, prompt in enumerate(self.prompts[:3])
                ]
                logprobs = [sample.logprobs_N.tolist() for sample in samples]
                seen.append({"number": number, "prepares": prepares, "logprobs": logprobs})
                if prepares:
                    seen[-1]["digests"] = [await self.engine.checksum(), data_digest(path)]
        return seen

    async def killed(self) -> dict[str, Any]:
        tasks = self.start(WARM, LONG)
        await self.probe()
        for child in engine_processes():
            child.send_signal(signal.SIGKILL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        died = [type(result).__name__ for result in results]
        try:
            self.engine.check()
        except EngineDeadError as error:
            return {"requests": died, "check": str(error)}
        return {"requests": died, "check": None}


def engine_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(p.cmdline())]


async def play(session: Session, out: Path, kill: bool) -> None:
    seen: dict[str, Any] = {
        "initial_version": session.engine.policy_version,
        "before": await session.sample(WARM, 64),
        "greedy": [await session.sample(GREEDY, 48, session.stop) for _ in range(2)],
        "in_flight": await session.in_flight(1),
        "in_flight_again": await session.in_flight(2),
        "after": await session.sample(WARM, 64),
        "greedy_after": await session.sample(GREEDY, 32),
        "refused": await session.refused(),
        "greedy_after_refusal": await session.sample(GREEDY, 32),
        "not_prepared": await session.not_prepared(),
        "greedy_after_not_prepared": await session.sample(GREEDY, 32),
        "version_after_refusal": session.engine.policy_version,
        "aborted": await session.aborted(),
        "cancelled": await session.cancelled(),
        "too_long": await session.too_long(),
        "keep_cache": await session.keep_cache(),
        "prepares": session.engine._prepares,
        "both_ways": await session.both_ways(),
        "children": [p.pid for p in engine_processes()],
        "vllm_metrics": sorted({m.name for m in REGISTRY.collect() if m.name.startswith("vllm:")}),
        "ld_preload": os.environ.get("LD_PRELOAD"),
    }
    if kill:
        seen["killed"] = await session.killed()
    out.write_text(json.dumps(seen))
    await asyncio.to_thread(sys.stdin.readline)


def main() -> None:
    model, dtype, weights, out, kill = sys.argv[1:6]
    settings = ActorSection.model_validate(
        {"dtype": dtype, "concurrency": 16, "kv_cache_mb": 64, "max_model_len": 1024}
    )
    engine = VllmEngine.start(Path(model), settings, seed=3)
    session = Session(engine, Renderer.load(Path(model)), Path(weights))
    try:
        asyncio.run(play(session, Path(out), kill == "kill"))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
