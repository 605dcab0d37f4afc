"""Keeps the engine on the newest announced policy version: wait, fetch to staging, adopt, report; again.

Owns the staging directory with the one base file that deltas are applied to, and the answer to "is this version being
served yet?". The file is not written while the engine reads it. A version that is superseded while it is fetched is
skipped; whatever fails before the switch leaves the old version serving and is tried again. Never verifies bytes (the
subscriber has, and the engine says what it read) and never touches the engine's internals.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from actors import metrics
from actors.engine import AdoptionError, AdoptionFailedError, Engine
from broker.process.lifecycle import ErgonError
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weights import Manifest
from broker.weights.basefile import BaseFile
from broker.weights.fetch import WeightsSupersededError
from broker.weights.subscriber import WeightsTimeoutError
from broker.weights.vouching import WeightsCorruptError

logger = logging.getLogger(__name__)

POLL_S = 0.5
RETRY_S = 1.0
MAX_RETRY_S = 30.0  # preparing costs seconds of the engine's time, so an engine that keeps failing is asked more rarely
FETCH_TIMEOUT_S = 600.0
MAX_SKIPPED = 2  # versions in a row: where they come faster than they can be fetched, one must be adopted all the same


class Subscriber(Protocol):
    """What adoption needs of broker.weights.WeightSubscriber; its calls block."""

    def wait_coming(self, than: PolicyVersion | None, timeout_s: float) -> PolicyVersion | None:
        """The newest announced version if it is newer, or one that is on its way; else None after `timeout_s`."""
        ...

    def latest(self) -> PolicyVersion | None:
        """The newest announced version."""
        ...

    def fetch_base(self, version: PolicyVersion, base: BaseFile, timeout_s: float) -> Manifest:
        """Make `base` hold the version, whole and verified."""
        ...

    def close(self) -> None:
        """End the connection and any fetch."""
        ...


class WeightAdopter:
    """One per engine. `run` is the adoption loop; `at_least` is the gate that tickets wait at."""

    def __init__(self, engine: Engine, subscriber: Subscriber, staging: Path) -> None:
        """`staging`: a directory of this actor's own, made here and removed by `close`. It has the same name in every
        process of the actor, so that a killed one's leftovers go with the next start. Raises ErgonError where it
        cannot be made.
        """
        self._engine = engine
        self._subscriber = subscriber
        self._adopted: PolicyVersion | None = None
        self._seen: PolicyVersion | None = None  # adopted or refused: only what is newer is worth a fetch
        self._num_failed = 0  # in a row: adoptions that the engine could not make, and fetches that gave wrong bytes
        self._num_skipped = 0  # in a row
        self._changed = asyncio.Condition()
        # Its own thread: environments may fill the loop's default pool, and adoption must not queue behind tools.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._staging = staging
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir(mode=0o700)
        except OSError as error:
            raise ErgonError(
                f"actor.staging = {staging.parent} cannot be used ({error.strerror}); name an existing directory"
            ) from error
        self._base = BaseFile(staging / "weights.safetensors")

    @property
    def adopted(self) -> PolicyVersion | None:
        """The version being served, None before the first adoption."""
        return self._adopted

    @property
    def newest(self) -> PolicyVersion | None:
        """The newest version announced; may be asked from any thread."""
        return self._subscriber.latest()

    def forget(self) -> None:
        """The engine has lost what it had adopted: the newest version is adopted again, and nothing waits for less."""
        self._adopted = self._seen = None

    async def at_least(self, version: PolicyVersion) -> None:
        """Return once the engine serves an announced version that is not older than this one."""
        if self._adopted is not None and self._adopted >= version:
            return
        with metrics.waiting_for_version.track_inprogress():
            async with self._changed:
                await self._changed.wait_for(lambda: self._adopted is not None and self._adopted >= version)

    async def run(self) -> None:
        """Adopt for ever. Raises EngineDeadError, and ProtocolError where the relay refuses this peer for good."""
        loop = asyncio.get_running_loop()
        while True:
            newest = await loop.run_in_executor(self._thread, self._subscriber.wait_coming, self._seen, POLL_S)
            if newest is not None and not await self._adopt(newest):
                await asyncio.sleep(min(MAX_RETRY_S, RETRY_S * 2.0 ** min(self._num_failed, 10)))

    async def close(self) -> None:
        """End the connection and remove what was staged."""
        await asyncio.to_thread(self._subscriber.close)
        await asyncio.to_thread(self._thread.shutdown)
        await asyncio.to_thread(self._base.close)
        await asyncio.to_thread(shutil.rmtree, self._staging, ignore_errors=True)

    async def _adopt(self, version: PolicyVersion) -> bool:
        """Fetch and adopt one version; whether there is nothing to retry."""
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            manifest = await loop.run_in_executor(
                self._thread, self._subscriber.fetch_base, version, self._base, FETCH_TIMEOUT_S
            )
            fetched_s = time.monotonic() - started
            metrics.adopt_phase_seconds.labels("fetch").observe(fetched_s)
            logger.info(
                "fetched version=%s parent=%s seconds=%.3f",
                tuple(version),
                manifest.parent and tuple(manifest.parent),
                fetched_s,
            )
            latest = self._subscriber.latest()
            if latest is not None and latest > version and self._num_skipped < MAX_SKIPPED:
                self._num_skipped += 1
                metrics.adoptions.labels("superseded").inc()
                return True
            pause_s = await self._engine.adopt(version, self._base.path, manifest.total_hash.hex())
        except WeightsSupersededError as error:
            metrics.adoptions.labels("superseded").inc()
            latest = self._subscriber.latest()
            return latest is not None and latest >= error.newest  # else wait for its announcement
        except AdoptionError as error:
            # The same bytes would be refused again: wait for a newer version.
            self._seen = version
            metrics.adoptions.labels("refused").inc()
            logger.error("weights refused version=%s reason=%s serving=%s", tuple(version), error, self._adopted)
            return True
        except AdoptionFailedError as error:
            self._num_failed += 1
            if error.damaged:
                self._base.forget()
            metrics.adoptions.labels("failed").inc()
            logger.warning("weights not adopted version=%s reason=%s serving=%s", tuple(version), error, self._adopted)
            return False
        except (WeightsTimeoutError, WeightsCorruptError, ErgonError) as error:
            self._num_failed += isinstance(error, WeightsCorruptError)  # it may be a whole snapshot each time
            metrics.adoptions.labels("failed").inc()
            logger.warning("weights not fetched version=%s reason=%s serving=%s", tuple(version), error, self._adopted)
            return False
        await self._serve(version, pause_s, time.monotonic() - started)
        return True

    async def _serve(self, version: PolicyVersion, pause_s: float, total_s: float) -> None:
        self._adopted = self._seen = version
        self._num_failed = self._num_skipped = 0
        metrics.policy_lineage.set(version.lineage)
        metrics.policy_version.set(version.version)
        metrics.adoptions.labels("adopted").inc()
        metrics.adopt_seconds.observe(total_s)
        metrics.adopt_pause_seconds.observe(pause_s)
        logger.info("adopted version=%s pause_s=%.3f total_s=%.3f", tuple(version), pause_s, total_s)
        async with self._changed:
            self._changed.notify_all()
