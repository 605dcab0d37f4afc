"""The life of one sandbox's pod: its making, its session, its death. Runs no command and moves no file."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any, Final

from envs.interface import SandboxError
from envs.sandbox.pods.cluster import Cluster
from envs.sandbox.pods.manifest import PodSettings, session_command
from envs.sandbox.pods.refusals import RefusedError
from envs.sandbox.pods.session import LostError, Session, ShellEnds

logger = logging.getLogger(__name__)

MOST_WORN: Final = 0.5  # of its life, at which a pod is not handed out any more


class PodLife:
    """A pod as something that answers, lives and dies. Belongs to one event loop.

    name: the pod's. ends: the shell's local ends, which outlive a session.
    """

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.name = name
        self.ends = ShellEnds()
        self._cluster = cluster
        self._born = time.monotonic()
        self._session: Session | None = None
        self._connecting = asyncio.Lock()
        self._may_be_there = True
        self._dead_because: str | None = None
        self._closing: asyncio.Task[None] | None = None
        self._reconnecting: asyncio.Task[None] | None = None

    @classmethod
    async def begin(cls, settings: PodSettings, manifest: Mapping[str, Any]) -> PodLife:
        """Make the pod and its session. Raises ErgonEnvError where there is no cluster, SandboxError where it makes no
        pod."""
        cluster = await Cluster.acquire(settings)
        made = cls(cluster, str(manifest["metadata"]["name"]))
        try:
            await made._create(manifest)
            await cluster.ready(made.name, settings.start_timeout_s)
            await made.connected()
        except BaseException:
            await made.close()
            raise
        return made

    async def _create(self, manifest: Mapping[str, Any]) -> None:
        try:
            await self._cluster.create(manifest)
        except RefusedError:
            self._may_be_there = False
            raise

    @property
    def alive(self) -> bool:
        """False once it was closed or killed, its pod has ended, or its connection broke."""
        if self._dead_because is None and (fate := self._cluster.fate(self.name)):
            self._dead_because = fate
        lost = self._session.lost if self._session is not None else None
        return self._dead_because is None and (lost is None or lost.by_policy)

    @property
    def worn(self) -> bool:
        """Whether too much of its life is over for it to be handed out."""
        return time.monotonic() - self._born > self._cluster.settings.life_s * MOST_WORN

    def check(self) -> None:
        """Raises SandboxError for a sandbox that is known to be dead."""
        if self._dead_because is not None:
            raise SandboxError(f"the sandbox is dead: {self._dead_because}")

    async def connected(self) -> Session:
        """The session; a new one where something in the pod has ended the last. Raises SandboxError."""
        self.check()
        async with self._connecting:
            self.check()
            session = self._session
            if session is not None and session.lost is None:
                return session
            if session is not None and session.lost is not None and not session.lost.by_policy:
                raise self.died(str(session.lost))
            if session is not None:
                await session.close()
            try:
                stream = await self._cluster.connect(self.name, session_command())
                self._session = await Session.open(stream, self.ends)
                self._session.on_lost = self._lost
            except SandboxError as error:
                raise self.died(str(error)) from error
            silent = session is not None and session.lost is not None and session.lost.silent
            if silent and not self._session.found_stopped:
                raise self.died("its session did not answer, and nothing in the pod had stopped it")
            return self._session

    def _lost(self, lost: LostError) -> None:
        """Have a session again soon, so that the pod does not take itself for an orphan."""
        if lost.by_policy and self._dead_because is None:
            self._reconnecting = asyncio.create_task(self._again(), name=f"{self.name}-session")

    async def _again(self) -> None:
        try:
            await self.connected()
        except SandboxError as error:
            logger.info("sandbox has no session pod=%s error=%s", self.name, error)

    def died(self, reason: str) -> SandboxError:
        """It is dead, for this reason or the one that the cluster gives; the error that says so."""
        fate = self._cluster.fate(self.name)
        self.kill(f"{reason}{': ' if fate else ''}{fate}")
        return SandboxError(f"the sandbox is dead: {self._dead_because}")

    def kill(self, reason: str) -> None:
        """It is dead from here on; its pod is deleted in the background, which `close` waits for."""
        if self._dead_because is None:
            self._dead_because = reason
        if self._closing is None:
            self._closing = asyncio.create_task(self._remove(), name=f"{self.name}-removal")

    async def close(self) -> None:
        """Delete the pod, and with it all that runs. Idempotent. Does not wait until the node has ended it."""
        self.kill("it was closed")
        assert self._closing is not None
        await asyncio.shield(self._closing)

    async def _remove(self) -> None:
        try:
            if self._may_be_there:
                await self._cluster.delete(self.name)
        except SandboxError as error:
            # It ends by itself: nothing but its room is lost, and for a while.
            logger.warning("sandbox's pod not deleted pod=%s error=%s", self.name, error)
        async with self._connecting:
            if self._session is not None:
                await self._session.close()
            self.ends.close()
        await self._cluster.release()
