"""The actor's operating-system process: builds the parts that actor.py's loop runs with, and takes them down again.

Owns the order of start (metrics port, renderer, environments, engine, connections) and the health endpoint's answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

from actors.actor import POLL_S, Actor
from actors.channels import open_channels
from actors.checkpoint import checkpoint_shapes
from actors.engine import Engine
from actors.gateway.server import Gateway
from actors.renderer import Renderer
from actors.restarting import RestartingEngine
from actors.vllm_engine import VllmEngine
from actors.weights import WeightAdopter
from broker.client import ActorClient
from broker.process.lifecycle import ErgonError, install_stop
from broker.process.metrics import Health, start_metrics
from broker.process.settings import Settings
from broker.protocol.errors import ProtocolError
from broker.protocol.trajectory import PolicyVersion
from envs.interface import Environment, ErgonEnvError
from envs.registry import create_environment
from envs.sandbox import PodSettings, configure_pods
from envs.timeouts import within
from envs.tools import ToolRunner

logger = logging.getLogger(__name__)

CLOSE_LIMIT_S = 5.0


class Status:
    """What the health endpoint may read from its own thread."""

    def __init__(self, max_staleness: int) -> None:
        self._max_staleness = max_staleness
        self.engine: RestartingEngine | None = None
        self.weights: WeightAdopter | None = None

    def health(self) -> Health:
        """Ready only while the engine serves a version that came over the weight channel and is not too old: what it
        samples now, the learner would use."""
        engine, weights = self.engine, self.weights
        adopted, newest = (weights.adopted, weights.newest) if weights is not None else (None, None)
        alive = engine is not None and engine.dead is None
        ok = alive and adopted is not None and self._is_current(adopted, newest)
        return Health(ok, {"engine_alive": alive, "policy_version": adopted, "newest_version": newest})

    def _is_current(self, adopted: PolicyVersion, newest: PolicyVersion | None) -> bool:
        if newest is None:
            return True
        return adopted.lineage == newest.lineage and newest.version - adopted.version <= self._max_staleness


def run_actor(settings: Settings, index: int) -> None:
    """Run actor number `index` until SIGTERM. Raises ErgonError for what the user can mend, EngineDeadError."""
    stop = install_stop()
    status = Status(settings.learner.max_staleness)
    server = start_metrics(settings.metrics.host, settings.metrics.actor_port + index, status.health)
    try:
        model = Path(settings.model.path).expanduser()
        checkpoint_shapes(model)  # a bad path is told before anything slow starts
        renderer = Renderer.load(model, settings.model.tool_format)
        configure_pods(pods_of(settings, index))
        environments = make_environments(settings)
        _tell_bounds(environments, settings.sampling.max_turns)
        seed = (settings.run.seed * 1009 + index) % 2**31
        status.engine = RestartingEngine(
            lambda: VllmEngine.start(model, settings.actor, seed),
            settings.actor.engine_restarts,
            settings.actor.engine_reset_s,
        )
        try:
            asyncio.run(_serve(settings, index, stop, status, status.engine, renderer, environments))
        finally:
            status.engine.shutdown()
    except ProtocolError as error:
        if error.fatal:
            raise ErgonError(error.message) from error
        raise
    finally:
        server.close()


def pods_of(settings: Settings, index: int) -> PodSettings:
    """What sandboxes that are pods are like for this actor, which is the owner where its own pod is beside them."""
    name, uid, namespace = (os.environ.get(f"ERGON_POD_{what}", "") for what in ("NAME", "UID", "NAMESPACE"))
    owner = (name, uid) if name and uid and namespace == settings.sandboxes.namespace else None
    actor = f"{socket.gethostname()}-{index}"
    return PodSettings(**settings.sandboxes.model_dump(), run=settings.run.name, actor=actor, owner=owner)


def make_environments(settings: Settings) -> dict[str, Environment]:
    """The run's environments by name. Raises ErgonError with the registry's sentence."""
    try:
        return {section.name: create_environment(section.name, section.options) for section in settings.environments}
    except ErgonEnvError as error:
        raise ErgonError(str(error)) from error


def _tell_bounds(environments: Mapping[str, Environment], max_turns: int) -> None:
    """Whose own bound is lower than the run's."""
    for environment in environments.values():
        if environment.max_turns < max_turns:
            logger.info(
                "the environment has fewer turns than the run allows environment=%s max_turns=%d sampling.max_turns=%d",
                *(environment.name, environment.max_turns, max_turns),
            )


async def _serve(
    settings: Settings,
    index: int,
    stop: threading.Event,
    status: Status,
    engine: RestartingEngine,
    renderer: Renderer,
    environments: Mapping[str, Environment],
) -> None:
    actor_id = f"{socket.gethostname()}-{index}"
    client, subscriber = open_channels(settings, actor_id)
    async with contextlib.AsyncExitStack() as stack:
        limits = settings.actor
        await stack.enter_async_context(
            ToolRunner(limits.tool_timeout_s, limits.tool_processes, num_threads=limits.max_episodes)
        )
        for environment in environments.values():
            stack.push_async_callback(_closed, environment)
        stack.push_async_callback(engine.close)
        weights = WeightAdopter(engine, subscriber, settings.actor.staging / f"ergon-{settings.run.name}-actor-{index}")
        engine.on_death = weights.forget
        stack.push_async_callback(weights.close)
        stack.push_async_callback(client.close)
        status.weights = weights
        for environment in environments.values():
            await _prepared(environment)
        gateway = await _gateway(settings, index, engine, renderer, environments, stack)
        if not await _connected(client, stop):
            return
        ends = (client.tickets, client.sender, engine, weights)
        staleness = settings.learner.max_staleness
        actor = Actor(actor_id, *ends, renderer, environments, settings.actor, settings.thinking, gateway, staleness)
        await actor.run(stop)


async def _gateway(
    settings: Settings,
    index: int,
    engine: Engine,
    renderer: Renderer,
    environments: Mapping[str, Environment],
    stack: contextlib.AsyncExitStack,
) -> Gateway | None:
    """The endpoint for programs, listening, where an environment of the run has any."""
    if not any(environment.self_driven for environment in environments.values()):
        return None
    port = settings.gateway.port + index
    limits = {"port": port, "max_model_len": settings.actor.max_model_len}
    gateway = Gateway(engine, renderer, settings.gateway, settings.thinking, **limits)
    stack.push_async_callback(gateway.close)
    await gateway.start()
    return gateway


async def _prepared(environment: Environment) -> None:
    """Make the environment ready; what the machine lacks for it is told at once, and not as failing episodes."""
    try:
        await environment.prepare()
    except ErgonEnvError as error:
        raise ErgonError(f"environment {environment.name!r}: {error}") from error


async def _closed(environment: Environment) -> None:
    """Close the environment, but do not let it hold the end of the process."""
    try:
        await within(environment.close(), CLOSE_LIMIT_S)
    except Exception:
        logger.exception("environment could not be closed environment=%s", environment.name)


async def _connected(client: ActorClient, stop: threading.Event) -> bool:
    """Wait for the broker's welcome; False if the process is told to stop meanwhile."""
    connecting = asyncio.create_task(client.connect())
    while not connecting.done() and not stop.is_set():
        await asyncio.wait({connecting}, timeout=POLL_S)
    if not connecting.done():
        connecting.cancel()
        return False
    await connecting
    return True
