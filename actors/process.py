"""The actor's operating-system process: builds the parts that actor.py's loop runs with, and takes them down again.

Owns the order of start (metrics port, renderer, environments, engine, connections) and the health endpoint's answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

from actors.actor import POLL_S, Actor
from actors.checkpoint import checkpoint_shapes
from actors.renderer import Renderer
from actors.vllm_engine import VllmEngine
from actors.weights import WeightAdopter
from broker.client import ActorClient
from broker.process.keys import Identity
from broker.process.lifecycle import ErgonError, install_stop
from broker.process.metrics import Health, start_metrics
from broker.process.security import load_security
from broker.process.settings import Settings
from broker.protocol.errors import ProtocolError
from broker.weights.subscriber import WeightSubscriber
from envs.interface import Environment, ErgonEnvError
from envs.registry import create_environment

logger = logging.getLogger(__name__)


class _Status:
    """What the health endpoint may read from its own thread."""

    def __init__(self) -> None:
        self.engine: VllmEngine | None = None
        self.weights: WeightAdopter | None = None

    def health(self) -> Health:
        """Ready only when the engine serves a version that came over the weight channel."""
        engine, weights = self.engine, self.weights
        adopted = weights.adopted if weights is not None else None
        alive = engine is not None and engine.dead is None
        return Health(alive and adopted is not None, {"engine_alive": alive, "policy_version": adopted})


def run_actor(settings: Settings, index: int) -> None:
    """Run actor number `index` until SIGTERM. Raises ErgonError for what the user can mend, EngineDeadError."""
    stop = install_stop()
    status = _Status()
    server = start_metrics(settings.metrics.host, settings.metrics.actor_port + index, status.health)
    try:
        model = Path(settings.model.path).expanduser()
        checkpoint_shapes(model)  # a bad path is told before anything slow starts
        renderer = Renderer.load(model, settings.model.tool_format)
        environments = make_environments(settings)
        status.engine = VllmEngine.start(model, settings.actor, seed=(settings.run.seed * 1009 + index) % 2**31)
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


def make_environments(settings: Settings) -> dict[str, Environment]:
    """The run's environments by name. Raises ErgonError with the registry's sentence."""
    try:
        return {section.name: create_environment(section.name, section.options) for section in settings.environments}
    except ErgonEnvError as error:
        raise ErgonError(str(error)) from error


async def _serve(
    settings: Settings,
    index: int,
    stop: threading.Event,
    status: _Status,
    engine: VllmEngine,
    renderer: Renderer,
    environments: Mapping[str, Environment],
) -> None:
    actor_id = f"{socket.gethostname()}-{index}"
    run_id, links = settings.run.name, settings.weights
    security = load_security(settings, Identity.ACTOR)
    client = ActorClient(
        f"tcp://{settings.broker.host}:{settings.broker.port}",
        run_id,
        actor_id,
        heartbeat_s=settings.broker.heartbeat_s,
        liveness=settings.broker.liveness,
        security=security,
    )
    subscriber = WeightSubscriber(
        f"tcp://{links.relay_host}:{links.relay_port}",
        run_id,
        actor_id,
        credit=links.credit,
        push_bytes=links.push_mb << 20,
        heartbeat_s=links.heartbeat_s,
        liveness=links.liveness,
        security=security,
    )
    async with contextlib.AsyncExitStack() as stack:
        for environment in environments.values():
            stack.push_async_callback(environment.close)
        stack.push_async_callback(engine.close)
        weights = WeightAdopter(engine, subscriber, settings.actor.staging / f"ergon-{run_id}-actor-{index}")
        stack.push_async_callback(weights.close)
        stack.push_async_callback(client.close)
        status.weights = weights
        for environment in environments.values():
            await _prepared(environment)
        if not await _connected(client, stop):
            return
        actor = Actor(actor_id, client.tickets, client.sender, engine, weights, renderer, environments, settings.actor)
        await actor.run(stop)


async def _prepared(environment: Environment) -> None:
    """Make the environment ready; what the machine lacks for it is told at once, and not as failing episodes."""
    try:
        await environment.prepare()
    except ErgonEnvError as error:
        raise ErgonError(f"environment {environment.name!r}: {error}") from error


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
