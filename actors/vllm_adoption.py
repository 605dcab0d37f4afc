"""How vLLM's engine gets other weights while requests are in flight: prepare, drain, pause, switch, resume, free.

Owns the order of one adoption and what a failure at each point of it means: before the switch nothing has changed;
after it the whole file is loaded again before sampling goes on, and where that fails, too, the engine is dead and its
process is to be restarted. What happens in the workers is in `vllm_weights.py`. Never samples and never fetches.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from actors import metrics
from actors.checkpoint import Shapes, check_fit
from actors.engine import AdoptionFailedError, EngineDeadError
from actors.turns import Turns
from broker.process.settings import ActorSection
from broker.protocol.trajectory import PolicyVersion

logger = logging.getLogger(__name__)

BASE_VERSION = PolicyVersion(0, 0)
UNIT_S = 0.05  # for how long, about, sampling waits for each of the units of preparing and freeing weights


class VllmAdoption:
    """The weights of one engine. `version` is the one being served; (0, 0) until one was adopted."""

    def __init__(
        self, llm: Any, shapes: Shapes, settings: ActorSection, turns: Turns, die: Callable[[str], EngineDeadError]
    ) -> None:
        """die: notes why the engine serves no more, and makes the error to raise."""
        self.version = BASE_VERSION
        self._llm = llm
        self._shapes = shapes
        self._mode = settings.adopt_mode
        self._drain_s = settings.adopt_drain_s
        self._turns = turns
        self._die = die
        self._prepares: bool | None = None  # decided before the first adoption

    async def adopt(self, version: PolicyVersion, weights: Path, digest: str) -> float:
        """See Engine. The pause lasts from the stop of sampling until it may go on.

        On a CPU everything but a change of pointers and an embedding's table is done before, between the steps of the
        engine. Where that cannot be (on a GPU, where neither way was run, and for some models) the worker reloads the
        file in the pause.
        """
        await asyncio.to_thread(check_fit, self._shapes, weights)
        prepares = await self._can_prepare()
        if prepares:
            await self._prepare(version, weights, digest)
        try:
            await self._drain(version)
            pause_s = await self._switch(version, weights, digest, prepares)
        except EngineDeadError:
            raise
        except BaseException:
            await asyncio.shield(self._ask("give_up_preparing"))
            raise
        finally:
            self._turns.admit()
        if prepares:
            await self._release()
        return pause_s

    async def _drain(self, version: PolicyVersion) -> None:
        """In mode `drain`, let the turns in flight end and none start; `adopt` lets them start again."""
        if self._mode == "drain":
            with metrics.adopt_phase_seconds.labels("drain").time():
                drained = await self._turns.drain(self._drain_s)
            if not drained:
                raise AdoptionFailedError(
                    f"turns in flight had not ended after actor.adopt_drain_s = {self._drain_s:g} s when "
                    f"{label(version)} was ready; set it higher than the longest turn takes"
                )

    async def _switch(self, version: PolicyVersion, weights: Path, digest: str, prepares: bool) -> float:
        """Pause, switch, resume; the seconds of it. Raises AdoptionFailedError where nothing has changed."""
        started = time.perf_counter()
        try:
            await self._pause(version)
            served = await self._serve_prepared(digest) if prepares else None
            if served is None:
                served = await self._ask("reload_whole", str(weights))
            if any(worker_digest != digest for worker_digest in served):
                raise RuntimeError(f"the file has the hash {digest}, but the engine read {served}")
            await self._llm.update_weight_version(label(version))
            self.version = version
            await self._llm.resume_generation()
        except (EngineDeadError, AdoptionFailedError):
            raise
        # From the switch on there is no way back: the model may hold a mixture of two versions.
        except asyncio.CancelledError:
            self._die(f"adopting {label(version)} was cancelled half-way")
            raise
        except Exception as error:
            raise self._die(f"adopting {label(version)} failed: {type(error).__name__}: {error}") from error
        return time.perf_counter() - started

    async def _pause(self, version: PolicyVersion) -> None:
        try:
            await self._llm.pause_generation(mode="keep", clear_cache=self._mode != "keep")
        except Exception as error:
            await self._llm.resume_generation()
            raise AdoptionFailedError(f"sampling could not be paused for {label(version)}: {error}") from error

    async def _serve_prepared(self, digest: str) -> list[str] | None:
        """The hashes of what the workers serve now; None where they failed to switch, and the file must be reloaded."""
        try:
            served = await self._ask("switch_to_prepared")
        except EngineDeadError:
            raise
        except Exception as error:  # noqa: BLE001  whatever the worker could not do, loading all again may mend it
            logger.error("switch failed next=reload reason=%s: %s", type(error).__name__, error)
            metrics.adopt_reloads.inc()
            return None
        if all(worker_digest == digest for worker_digest in served):
            return served
        logger.error("switch failed next=reload reason=the engine serves %s instead of %s", served, digest)
        metrics.adopt_reloads.inc()
        return None

    async def checksum(self) -> str | None:
        """The hash, in hexadecimal, of the bytes from which the workers made the weights they serve.

        None before the first adoption.
        """
        return cast("str | None", (await self._ask("checksum_served"))[0])

    async def _can_prepare(self) -> bool:
        if self._prepares is None:
            shapes = {name: list(shape) for name, shape in self._shapes.items()}
            reasons = [reason for reason in await self._ask("obstacle_to_preparing", shapes) if reason is not None]
            self._prepares = not reasons
            if reasons:
                logger.warning("every adoption reloads the whole model while sampling pauses, because %s", reasons[0])
        return self._prepares

    async def _prepare(self, version: PolicyVersion, weights: Path, digest: str) -> None:
        """Make the workers ready to switch. Raises AdoptionFailedError, and then nothing has changed, or
        EngineDeadError."""
        started = time.perf_counter()
        try:
            taken = await self._ask("begin_preparing", str(weights), UNIT_S)
            while None in taken:
                taken = await self._ask("go_on_preparing", UNIT_S)
            if any(worker_digest != digest for worker_digest in taken):
                raise AdoptionFailedError(
                    f"{weights.name} has the hash {digest}, but the engine read {taken}; it is fetched again",
                    damaged=True,
                )
        except BaseException as error:
            if isinstance(error, EngineDeadError):
                raise
            await asyncio.shield(self._ask("give_up_preparing"))
            if isinstance(error, AdoptionFailedError) or not isinstance(error, Exception):
                raise
            raise AdoptionFailedError(f"the engine could not prepare {weights.name}: {error}") from error
        seconds = time.perf_counter() - started
        metrics.adopt_phase_seconds.labels("prepare").observe(seconds)
        logger.info("prepared version=%s seconds=%.3f", tuple(version), seconds)

    async def _release(self) -> None:
        """Let the workers free what was served before, a little between any two steps."""
        try:
            with metrics.adopt_phase_seconds.labels("release").time():
                while not all(await self._ask("release_replaced", UNIT_S)):
                    pass
        except EngineDeadError:
            raise
        except Exception as error:  # noqa: BLE001  the new version serves, and the next preparation frees the memory
            logger.error("replaced weights not freed reason=%s: %s", type(error).__name__, error)

    async def _ask(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of vllm_weights.WorkerExtension in every worker, between two steps; their answers."""
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

        try:
            return cast("list[Any]", await self._llm.collective_rpc(method, args=arguments))
        except VllmDeadError as error:
            raise self._die(f"its process ended before it had answered {method}") from error


def label(version: PolicyVersion) -> str:
    """A version as vLLM keeps it, and reports it with the tokens that it sampled."""
    return f"{version.lineage}.{version.version}"


def version_of(label: str) -> PolicyVersion:
    """The version of such a label; of the one that vLLM starts with, BASE_VERSION."""
    if label == "default":
        return BASE_VERSION
    lineage, _, version = label.partition(".")
    return PolicyVersion(int(lineage), int(version))
