"""The relay process: a subscriber of its upstream, a server to its downstream. Stateless; it can be killed at any time.

The upstream is the learner's publisher, or another relay: it is only an address. The relay pulls the newest version, as
a delta to what it holds where the upstream has one, verifies the whole, then serves and announces it. A delta that was
pushed to it goes on at once to who waits for that one, as soon as its chunks are verified: those verify the whole, too.
It decides nothing about which version anybody should use.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from dataclasses import replace
from functools import partial

from broker.process.keys import Identity
from broker.process.lifecycle import ErgonError, install_stop, raise_file_limit
from broker.process.metrics import Health, start_metrics
from broker.process.security import load_security
from broker.process.settings import Settings
from broker.process.signing import Signers
from broker.protocol.errors import ProtocolError
from broker.protocol.proofs import Of
from broker.protocol.trajectory import PolicyVersion
from broker.protocol.weight_messages import Part
from broker.weights import metrics
from broker.weights.chain import Payload
from broker.weights.fetch import WeightsSupersededError
from broker.weights.pushing import Ahead
from broker.weights.server import WeightServer
from broker.weights.store import OutOfBudgetError, WeightStore
from broker.weights.subscriber import WeightsTimeoutError, WeightSubscriber
from broker.weights.vouching import WeightsCorruptError, WeightsForgedError, check_digest, check_signed

logger = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 600.0  # a fetch that makes no headway for so long is begun anew, with the newest version
RETRY_AFTER_S = 2.0
WAIT_S = 0.5  # how soon a stop is noticed while nothing is announced


def push_on(server: WeightServer, signers: Signers | None, delta: Payload) -> None:
    """Let `server` push this delta, which has just arrived, if its chunks are right and it is what was signed."""
    manifest = delta.manifest
    if not all(manifest.chunk_fits(index, delta.chunk(index)) for index in range(manifest.num_chunks)):
        return
    try:
        check_signed(manifest, signers)
        check_digest(manifest, Of.PAYLOAD, delta.data)
    except WeightsForgedError as error:
        logger.error("push not passed on reason=%s", error)
        return
    server.push_ahead(delta)


def pass_on(server: WeightServer, part: Part) -> None:
    """Let `server` pass on these bytes of a delta that is still being made, whatever they are: where they are not
    right, the push that says what they had to be is never passed on."""
    server.push_part(Ahead(part, part.start + part.data.size))


class Relay:
    """Fetches what `upstream` announces into `store` and lets `server` announce it; `step` by `step`."""

    def __init__(
        self, upstream: WeightSubscriber, store: WeightStore, server: WeightServer, signers: Signers | None = None
    ) -> None:
        self._upstream, self._store, self._server, self._signers = upstream, store, server, signers
        self._problem = ""

    @property
    def newest(self) -> PolicyVersion | None:
        """The version being served."""
        newest = self._store.newest
        return newest.version if newest else None

    def health(self) -> Health:
        """Fit once it is connected upstream or holds a version, unless it cannot take new ones."""
        newest = self.newest
        connected = self._upstream.connected
        return Health(
            ok=(connected or newest is not None) and not self._problem,
            detail={
                "newest": list(newest) if newest else None,
                "announced": list(announced) if (announced := self._upstream.latest()) else None,
                "upstream": self._upstream.endpoint,
                "upstream_connected": connected,
                "problem": self._problem or None,
                "peers": self._server.num_peers,
                "held_bytes": self._store.live_bytes,
            },
        )

    def step(self, stop: threading.Event) -> None:
        """Wait a moment for a newer version; fetch and serve it. Raises ProtocolError where the upstream refuses us."""
        metrics.relay_connected.set(self._upstream.connected)
        if self._server.failure is not None:
            raise self._server.failure
        version = self._upstream.wait_newer(self.newest, WAIT_S)
        if version is None:
            return
        try:
            manifest = self._upstream.fetch_into(version, self._store, FETCH_TIMEOUT_S)
        except WeightsSupersededError as error:
            logger.info("fetch superseded version=%s newest=%s", tuple(version), tuple(error.newest))
            return
        except (WeightsTimeoutError, WeightsCorruptError, OutOfBudgetError) as error:
            if stop.is_set():
                return
            metrics.relay_failures.labels(type(error).__name__).inc()
            self._problem = str(error)
            logger.warning("fetch failed version=%s reason=%s", tuple(version), error)
            stop.wait(RETRY_AFTER_S)
            return
        self._problem = ""
        self._server.announce()
        self.seal()
        metrics.relay_versions.inc()
        kind = metrics.kind(manifest.parent)
        logger.info("serving version=%s kind=%s bytes=%d", tuple(version), kind, manifest.payload_bytes)

    def seal(self) -> None:
        """Take the proof of the newest snapshot, where it has come and there is none yet. From any thread."""
        newest, seal = self._store.newest, self._upstream.seal
        if newest is None or newest.proof is not None or seal is None or seal[0] != newest.version:
            return
        try:
            check_signed(replace(newest, proof=seal[1]), self._signers)
        except WeightsForgedError as error:
            logger.error("seal refused reason=%s", error)
            return
        self._store.seal(*seal)
        self._server.announce()


def serve_relay(settings: Settings) -> None:
    """Run a relay until SIGTERM. Upstream [weights] host:port, downstream relay_host:relay_port.

    Raises ErgonError where a port cannot be bound or the upstream refuses (another protocol version, another run).
    """
    stop = install_stop()
    raise_file_limit()
    weights, run_id = settings.weights, settings.run.name
    security = load_security(settings, Identity.RELAY)
    signers = security.signers
    store = WeightStore(weights.max_mb << 20, weights.delta_mb << 20, sealed=signers is not None)
    server = WeightServer(
        f"tcp://{weights.relay_host}:{weights.relay_port}",
        run_id,
        store,
        heartbeat_s=weights.heartbeat_s,
        liveness=weights.liveness,
        security=security,
    )
    upstream = WeightSubscriber(
        f"tcp://{weights.host}:{weights.port}",
        run_id,
        f"relay-{socket.gethostname()}-{os.getpid()}",
        role="relay",
        credit=weights.credit,
        push_bytes=weights.push_mb << 20,
        heartbeat_s=weights.heartbeat_s,
        liveness=weights.liveness,
        on_push=partial(push_on, server, signers),
        on_part=partial(pass_on, server),
        on_failure=lambda _error: stop.set(),
        security=security,
        server=Identity(settings.security.upstream),
    )
    try:
        relay = Relay(upstream, store, server, signers)
        upstream.on_seal(relay.seal)
        http = start_metrics(settings.metrics.host, settings.metrics.relay_port, relay.health)
        closer = threading.Thread(target=_close_at, args=(stop, upstream), name="relay-stop", daemon=True)
        closer.start()
        logger.info("relay serves endpoint=%s upstream=%s", server.endpoint, upstream.endpoint)
        try:
            while not stop.is_set():
                relay.step(stop)
        finally:
            http.close()
        if upstream.failure is not None:
            raise upstream.failure
    except ProtocolError as error:
        raise ErgonError(f"the relay cannot pull from {upstream.endpoint}: {error.message}") from error
    finally:
        stop.set()
        upstream.close()
        server.close()


def _close_at(stop: threading.Event, upstream: WeightSubscriber) -> None:
    """End a fetch in progress when the process is told to stop."""
    stop.wait()
    upstream.close()
