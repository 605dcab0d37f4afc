"""Scenes of adoption, failing ones most of all: what a real engine serves after each, to whom, under which version.

Part of `engine_session.py`, whose process plays them. Versions are (number of the scene, number of the file).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import actors.vllm_engine
from actors.engine import AdoptionFailedError, EngineDeadError
from actors.vllm_engine import VllmEngine
from broker.process.settings import ActorSection
from broker.protocol.trajectory import PolicyVersion
from tests.digest import data_digest
from tests.integration.actors.engine_session import BATCH, WARM, Session, dump
from tests.integration.actors.faulty_worker import EXTENSION

SETTINGS = {"max_num_seqs": BATCH, "kv_cache_mb": 64, "max_model_len": 1024}
TURN_TOKENS = 150
FRESH_TOKENS = 24


def start_engine(model: Path, settings: dict[str, Any]) -> VllmEngine:
    """An engine whose workers can be told to fail."""
    actors.vllm_engine.WORKER_EXTENSION = EXTENSION
    return VllmEngine.start(model, ActorSection.model_validate(SETTINGS | settings), seed=3)


class AdoptionSession(Session):
    """Every scene leaves an engine that serves file 1 or 2, as (lineage of the scene, file)."""

    lineage = 20

    async def arm(self, *points: str, rank: int | None = None) -> None:
        await self.engine._llm.collective_rpc("arm", args=(list(points), rank))

    async def start_serving(self) -> PolicyVersion:
        """The other of the files 1 and 2 than the next scene will try."""
        self.lineage += 1
        await self.adopt(self.lineage, 1)
        return self.engine.policy_version

    async def try_adopting(self, number: int = 2) -> dict[str, Any]:
        """Adopt while requests are in flight, whatever comes of it."""
        tasks = self.start(WARM, TURN_TOKENS)
        await self.probe(TURN_TOKENS // 4)
        outcome: dict[str, Any] = {"error": None, "pause_s": None, "damaged": None}
        try:
            outcome["pause_s"] = await self.adopt(self.lineage, number)
        except (AdoptionFailedError, EngineDeadError) as error:
            outcome |= {"error": type(error).__name__, "reason": str(error)}
            outcome["damaged"] = getattr(error, "damaged", None)
        outcome["version"] = self.engine.policy_version
        if outcome["error"] == "EngineDeadError":
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return outcome
        samples = await asyncio.gather(*tasks)
        outcome["in_flight"] = [dump(p, s) for p, s in zip(self.prompts, samples, strict=True)]
        outcome["fresh"] = await self.sample(WARM, FRESH_TOKENS)
        outcome["checksum_fits"] = await self._serves_what_it_says()
        return outcome

    async def worker_fault(self, *points: str, rank: int | None = None) -> dict[str, Any]:
        """Fail at these points of the worker; then adopt the next version as if nothing had been."""
        before = await self.start_serving()
        await self.arm(*points, rank=rank)
        seen = await self.try_adopting()
        await self.arm()
        return seen | {"before": before, "next": await self._next()}

    async def call_fault(self, method: str, *, late: bool = False) -> dict[str, Any]:
        """Fail in a call of the engine, before or after it was carried out."""
        before = await self.start_serving()
        llm: Any = self.engine._llm
        call: Callable[..., Awaitable[Any]] = getattr(llm, method)

        async def failing(*arguments: Any, **keywords: Any) -> None:
            delattr(llm, method)
            if late:
                await call(*arguments, **keywords)
            raise RuntimeError(f"injected into {method}")

        setattr(llm, method, failing)
        seen = await self.try_adopting()
        return seen | {"before": before, "next": await self._next() if seen["error"] != "EngineDeadError" else None}

    async def _next(self) -> dict[str, Any]:
        self.lineage += 1
        return await self.try_adopting(3)

    async def _serves_what_it_says(self) -> bool:
        number = self.engine.policy_version.version
        return await self.engine.checksum() == data_digest(self.weights / f"{number}.safetensors")

    # --- scenes: before the switch ----------------------------------------------------------------------------------

    async def fault_begin(self) -> dict[str, Any]:
        return await self.worker_fault("begin")

    async def fault_prepare(self) -> dict[str, Any]:
        return await self.worker_fault("prepare")

    async def fault_read(self) -> dict[str, Any]:
        return await self.worker_fault("read")

    async def fault_vanished(self) -> dict[str, Any]:
        before = await self.start_serving()
        path, hidden = self.weights / "2.safetensors", self.weights / "hidden"
        prepare = self.engine._adoption._prepare

        async def vanish(*arguments: Any) -> None:
            path.rename(hidden)  # after it was looked at and before the worker opens it
            try:
                await prepare(*arguments)
            finally:
                hidden.rename(path)

        self.engine._adoption._prepare = vanish  # type: ignore[method-assign]
        seen = await self.try_adopting()
        del self.engine._adoption._prepare
        return seen | {"before": before, "next": await self._next()}

    async def fault_pause(self) -> dict[str, Any]:
        return await self.call_fault("pause_generation")

    async def fault_paused(self) -> dict[str, Any]:
        return await self.call_fault("pause_generation", late=True)

    # --- scenes: from the switch on ---------------------------------------------------------------------------------

    async def fault_switch(self) -> dict[str, Any]:
        return await self.worker_fault("switch")

    async def fault_half_way(self) -> dict[str, Any]:
        return await self.worker_fault("half-way")

    async def fault_switched(self) -> dict[str, Any]:
        return await self.worker_fault("switched")

    async def fault_checksum(self) -> dict[str, Any]:
        return await self.worker_fault("checksum")

    async def fault_release(self) -> dict[str, Any]:
        return await self.worker_fault("release")

    async def fault_one_worker(self) -> dict[str, Any]:
        return await self.worker_fault("half-way", rank=1)

    async def fatal_reload(self) -> dict[str, Any]:
        return await self._fatal(self.worker_fault("half-way", "reload"))

    async def fatal_label(self) -> dict[str, Any]:
        return await self._fatal(self.call_fault("update_weight_version"))

    async def fatal_resume(self) -> dict[str, Any]:
        return await self._fatal(self.call_fault("resume_generation"))

    async def _fatal(self, scene: Awaitable[dict[str, Any]]) -> dict[str, Any]:
        """What a dead engine answers; then another one in its place, which vLLM's healthy process makes cheap."""
        dead = self.engine
        self._next = self._nothing  # type: ignore[method-assign]
        seen = await scene
        del self._next
        seen["dead"] = dead.dead
        try:
            await dead.generate(self.prompts[0], WARM, 5, (), "nobody")
        except EngineDeadError:
            seen["refuses"] = True
        settings = ActorSection.model_validate(SETTINGS)
        self.engine = VllmEngine(dead._llm, dead._meter, dead._adoption._shapes, settings)
        await self.engine._llm.resume_generation()
        return seen

    async def _nothing(self) -> dict[str, Any]:
        return {}

    # --- scenes: drain ----------------------------------------------------------------------------------------------

    async def drain(self) -> dict[str, Any]:
        """Requests in flight end under the old version; those that come meanwhile begin under the new one."""
        before = await self.start_serving()
        self.engine._adoption._mode = "drain"
        early = self.start(WARM, TURN_TOKENS)
        await self.probe(TURN_TOKENS // 4)
        adopting = asyncio.create_task(self.adopt(self.lineage, 2))
        while self.engine._turns._admitting.is_set():
            await asyncio.sleep(0.001)
        still_in_flight = sum(not task.done() for task in early)
        late = self.start(WARM, FRESH_TOKENS)
        pause_s = await adopting
        self.engine._adoption._mode = "recompute"
        return {
            "before": before,
            "still_in_flight": still_in_flight,
            "pause_s": pause_s,
            "early": [dump(p, s) for p, s in zip(self.prompts, await asyncio.gather(*early), strict=True)],
            "late": [dump(p, s) for p, s in zip(self.prompts, await asyncio.gather(*late), strict=True)],
        }

    async def drain_too_long(self) -> dict[str, Any]:
        before = await self.start_serving()
        self.engine._adoption._mode, self.engine._adoption._drain_s = "drain", 0.01
        seen = await self.try_adopting()
        self.engine._adoption._drain_s = 60.0
        seen |= {"before": before, "next": await self._next()}
        self.engine._adoption._mode = "recompute"
        return seen
