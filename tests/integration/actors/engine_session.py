"""A process with a real engine that plays scenes of the tests beside it and writes down what it saw.

`python -m tests.integration.actors.engine_session MODEL WEIGHTS_DIR OUT PLAN`, where WEIGHTS_DIR holds 1.safetensors,
2.safetensors, 3.safetensors and bad_*.safetensors, and PLAN is JSON: `settings` of [actor] and `scenes`, methods of
EpisodeSession in their order. A process of its own, because vLLM changes torch in the process that imports it. At its
end it waits for a line on stdin, still serving.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import REGISTRY
from tokenizers import Tokenizer

from actors.engine import AdoptionError, EngineDeadError, Sample
from actors.renderer import Renderer
from actors.rollout import run_episode
from actors.vllm_engine import VllmEngine
from broker.process.thinking_settings import ThinkingSection
from broker.protocol.trajectory import Mode, PolicyVersion, Sampling, TaskRef, Ticket
from envs.interface import Message
from tests.digest import data_digest
from tests.unit.actors.support import WordEnvironment

WARM = Sampling(temperature=0.8)
GREEDY = Sampling(temperature=0.0)
LONG = 300
BATCH = 16  # of the engine


def dump(prompt: list[int], sample: Sample) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "ids": sample.token_ids_N.tolist(),
        "logprobs": sample.logprobs_N.tolist(),
        "runs": [list(run) for run in sample.version_runs],
        "finish": sample.finish,
    }


class Session:
    def __init__(self, engine: VllmEngine, model: Path, weights: Path) -> None:
        renderer = Renderer.load(model)
        self.engine = engine
        self.model, self.weights, self.renderer = model, weights, renderer
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

    async def probe(self, num_tokens: int = 60) -> None:
        """Return when requests started before this one have sampled some tokens."""
        await self.engine.generate(self.prompts[0], WARM, num_tokens, (), f"probe{self.count}")

    async def adopt(self, lineage: int, number: int) -> float:
        """The version (lineage, number) has the weights of the file `number`."""
        path = self.weights / f"{number}.safetensors"
        return await self.engine.adopt(PolicyVersion(lineage, number), path, data_digest(path))

    async def initial_version(self) -> PolicyVersion:
        return self.engine.policy_version

    async def before(self) -> list[dict[str, Any]]:
        return await self.sample(WARM, 64)

    async def greedy(self) -> list[list[dict[str, Any]]]:
        return [await self.sample(GREEDY, 48, self.stop) for _ in range(2)]

    async def in_flight(self) -> dict[str, Any]:
        return await self.across(1)

    async def in_flight_again(self) -> dict[str, Any]:
        return await self.across(2)

    async def after(self) -> list[dict[str, Any]]:
        return await self.sample(WARM, 64)

    async def greedy_after(self) -> list[dict[str, Any]]:
        return await self.sample(GREEDY, 32)

    greedy_after_refusal = greedy_after

    async def version_after_refusal(self) -> PolicyVersion:
        return self.engine.policy_version

    async def across(self, number: int) -> dict[str, Any]:
        tasks = self.start(WARM, LONG)
        await self.probe()
        pause_s = await self.adopt(7, number)
        samples = await asyncio.gather(*tasks)
        return {"pause_s": pause_s, "samples": [dump(p, s) for p, s in zip(self.prompts, samples, strict=True)]}

    async def refused(self) -> dict[str, str]:
        reasons = {}
        for path in sorted(self.weights.glob("bad_*.safetensors")):
            try:
                await self.engine.adopt(PolicyVersion(9, 9), path, "")
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

    async def load(self) -> dict[str, Any]:
        """What one round of requests adds to it."""
        before = dataclasses.asdict(self.engine.load())
        await self.sample(WARM, 40)
        await self.sample(WARM, 1)
        after = dataclasses.asdict(self.engine.load())
        return {name: after[name] - before[name] for name in after}

    async def queued(self) -> list[str]:
        """The order in which requests end of which the first leave one place of the batch."""
        ended: list[str] = []

        async def ask(name: str, num_tokens: int, priority: int) -> None:
            await self.engine.generate(self.prompts[0], WARM, num_tokens, (), f"q.{name}", priority)
            ended.append(name)

        before = self.engine.load().num_full_steps
        fillers = [asyncio.create_task(ask(f"filler{i}", 80 if i == 0 else LONG, 5)) for i in range(BATCH)]
        while self.engine.load().num_full_steps == before:
            await asyncio.sleep(0.001)
        late = [asyncio.create_task(ask(name, 5, place)) for name, place in (("last", 9), ("second", 4), ("first", 3))]
        await asyncio.gather(*fillers, *late)
        return [name for name in ended if name[:6] != "filler"]

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
        self.engine._adoption._mode = "keep"
        seen = await self.across(3)
        self.engine._adoption._mode = "recompute"
        return {"in_flight": seen, "fresh": await self.sample(WARM, 64)}

    async def gateway(self) -> dict[str, Any]:
        """Agent programs behind the gateway, across an update of the weights."""
        from tests.integration.gateway.scene import converse

        await self.adopt(40, 1)
        return await converse(
            self.engine, self.renderer, lambda: self.adopt(40, 2), self.engine._llm.get_num_unfinished_requests
        )

    async def handover(self) -> dict[str, Any]:
        """An episode that one actor begins and another ends, across an update of the weights."""
        from tests.integration.actors.handover_session import hand_over

        await self.adopt(41, 1)
        tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        return await hand_over(self.engine, tokenizer, lambda: self.adopt(41, 2))

    async def prepares(self) -> bool | None:
        return self.engine._adoption._prepares

    async def children(self) -> list[int]:
        return [process.pid for process in engine_processes()]

    async def vllm_metrics(self) -> list[str]:
        return sorted({m.name for m in REGISTRY.collect() if m.name.startswith("vllm:")})

    async def ld_preload(self) -> str | None:
        return os.environ.get("LD_PRELOAD")

    async def both_ways(self) -> list[dict[str, Any]]:
        """The same versions prepared ahead and reloaded in the pause, one request at a time, so that batches agree."""
        seen: list[dict[str, Any]] = []
        for number in (2, 1, 2):
            for prepares in (True, False):
                self.engine._adoption._prepares = prepares
                path = self.weights / f"{number}.safetensors"
                await self.engine.adopt(PolicyVersion(8, len(seen)), path, data_digest(path))
                samples = [
                    await self.engine.generate(prompt, GREEDY, 32, (), f"w{len(seen)}.{i}")
                    for i, prompt in enumerate(self.prompts[:3])
                ]
                logprobs = [sample.logprobs_N.tolist() for sample in samples]
                seen.append({"number": number, "prepares": prepares, "logprobs": logprobs})
                seen[-1]["digests"] = [await self.engine.checksum(), data_digest(path)]
        self.engine._adoption._prepares = True
        return seen

    async def thinking(self) -> list[dict[str, Any]]:
        """Episodes with budgets, whose phases are sampled under two versions; thinking is opened by the context.

        A model of random weights closes a tag of one letter by itself at times, and never one of eight.
        """
        await self.adopt(10, 1)
        tasks = []
        for number in range(8):
            tags = ("<think>", "</think>") if number % 2 else ("#", "e")
            settings = ThinkingSection(tags=tags, opens="context", stop_phrase=" Stop.")
            ticket = Ticket(
                ticket_id=f"think{number}",
                group_id="g",
                group_size=1,
                task=TaskRef(env="words", split="train", index=number),
                mode=Mode.TRAIN,
                sampling=Sampling(temperature=WARM.temperature, max_turn_tokens=160, max_turns=2),
                thinking_budget=(0, 30, 60, None)[number // 2],
                deadline_s=200.0,
            )
            ends = (WordEnvironment(), self.engine, self.renderer)
            episode = run_episode(ticket, *ends, actor_id="a", max_model_len=512, thinking=settings)
            tasks.append(asyncio.create_task(episode))
        await self.probe(20)
        await self.adopt(10, 2)
        seen = []
        for trajectory in await asyncio.gather(*tasks):
            segment, head = trajectory.segments[0], trajectory.head
            seen.append(
                {
                    "ids": segment.token_ids_T.tolist(),
                    "mask": segment.loss_mask_T.tolist(),
                    "logprobs": segment.logprobs_T.tolist(),
                    "runs": [list(run) for run in segment.version_runs],
                    "budget": head.ticket.thinking_budget,
                    "thinking": [head.num_thinking_tokens, head.num_overrun_tokens, head.num_forced_stops],
                    "text": self.renderer.decode(segment.token_ids_T.tolist()),
                }
            )
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


async def play(session: Session, scenes: list[str], out: Path) -> None:
    seen = {}
    for name in scenes:
        print(f"scene {name}", flush=True)
        seen[name] = await getattr(session, name)()
    out.write_text(json.dumps(seen))
    await asyncio.to_thread(sys.stdin.readline)


def main() -> None:
    from tests.integration.actors.adoption_session import start_engine
    from tests.integration.actors.episode_session import EpisodeSession

    model, weights, out, plan = sys.argv[1:5]
    settings, scenes = json.loads(plan)["settings"], json.loads(plan)["scenes"]
    engine = start_engine(Path(model), settings)
    session = EpisodeSession(engine, Path(model), Path(weights))
    try:
        asyncio.run(play(session, scenes, Path(out)))
    finally:
        session.engine.shutdown()


if __name__ == "__main__":
    main()
