"""The experience channel's server: `serve()` is the only poll loop. It carries out the ledger's actions.

One round: take the messages that are there (bounded in number and bytes), feed each to the ledger, write the journal
actions, commit once, and only then send everything that the round produced. So nothing is acknowledged that is not
durable, and one commit serves many messages. Never decides about a ticket; never holds a trajectory beyond a round, but
for `fresh.py`'s bounded shortcut.

Where the store refuses a write, the round is rolled back and nothing of it is sent; all peers are forgotten (they say
HELLO again and repeat what was not answered), the ledger is rebuilt from the journal, and actors are refused with
DISK_FULL until a probe write succeeds.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from dataclasses import replace

import msgspec
import zmq

from broker.exchange import metrics
from broker.exchange.delivery import Delivery
from broker.exchange.dispatch import Request
from broker.exchange.executor import Executor
from broker.exchange.inspection import inspect, stored_bytes
from broker.exchange.intake import Intake
from broker.exchange.peers import Peers
from broker.exchange.reception import Reception
from broker.exchange.storewatch import StoreWatch
from broker.ledger.events import Tick
from broker.process.keys import Identity
from broker.process.lifecycle import install_stop, raise_file_limit
from broker.process.memory import keep_freed_memory
from broker.process.metrics import Health, start_metrics
from broker.process.security import load_security
from broker.process.settings import Settings
from broker.protocol import commands as wire
from broker.protocol.frames import DEFAULT_LIMITS, Message
from broker.store.journal import SYNC_INTERVAL_S, Journal, StoreFullError

log = logging.getLogger(__name__)

ROUND_MESSAGES = 8  # few: a commit begins soon after a pause, and what comes meanwhile is gathered for the next one
ROUND_BYTES = 1 << 20
VIEWED_BYTES = 16_384  # frames of this size are not copied on their way in
INTAKE_SHARE = 2  # of `max_inflight_mb`: as much may have arrived and wait to be looked at
POLL_MAX_S = 0.25
SIZE_S = 10.0  # between looks at all files of the store
SWITCH_S = 0.0002  # until the thread of the commits gets its turn to say that one has ended
GC_ALLOCATIONS = 50_000  # the messages of a round are no garbage yet, and in no cycle
BLOCKED_PAUSE_S = 0.005  # while a result waits for the network


class Server:
    """One broker: a store, a ledger, a socket. Single-threaded but for `health`."""

    def __init__(self, settings: Settings, max_store_bytes: int | None = None) -> None:
        self._settings, self._broker = settings, settings.broker
        broker = self._broker
        self._journal = Journal(
            settings.run_dir / "broker",
            settings.run.name,
            broker.fsync,
            max_store_bytes,
            broker.blob_bytes,
            broker.keep_ended,
        )
        try:
            security = load_security(settings, Identity.BROKER)
            self._peers = Peers(broker.host, broker.port, broker.heartbeat_s, broker.liveness, security)
        except BaseException:
            self._journal.close()
            raise
        self._peers.max_queued_bytes = broker.max_inflight_mb << 20
        limits = replace(DEFAULT_LIMITS, max_message_bytes=broker.max_message_mb << 20)
        self._executor = Executor(broker, self._journal, self._peers)
        self._watch = StoreWatch(self._journal, self._executor, broker.min_free_mb)
        self._reception = Reception(
            settings, limits, self._journal, self._peers, self._executor, self._watch, self._report
        )
        self._intake = Intake(self._peers.receive, self._peers.leads, (broker.max_inflight_mb << 20) // INTAKE_SHARE)
        self._delivery = Delivery(self._journal, self._peers, self._executor, broker.max_inflight_mb << 20)
        self._synced_at = self._sized_at = float("-inf")
        self._stored_bytes = 0
        self._health = Health(True, {})

    @property
    def endpoint(self) -> str:
        """Where peers connect."""
        return f"tcp://{self._broker.host}:{self._broker.port}"

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set."""
        poller = zmq.Poller()
        poller.register(self._peers.socket, zmq.POLLIN)
        poller.register(self._executor.committer.descriptor, zmq.POLLIN)
        pause_s = min(POLL_MAX_S, self._broker.heartbeat_s / 2, self._broker.lease_s / 2)
        while not stop.is_set():
            wait_s = BLOCKED_PAUSE_S if self._delivery.blocked() else pause_s
            poller.poll(0 if self._intake else int(wait_s * 1000) + 1)
            self.round()

    def round(self) -> None:
        """Take what has arrived, make it durable, answer."""
        try:
            now = time.monotonic()
            if self._watch.due(now):
                self._executor.barrier()  # a refused probe must not undo what a round has written
                self._watch.check(now)
                self._publish()
            self._receive()
            self._keep_time(time.monotonic())
            for routing, ticket_id in self._reception.admission.clear(self._knows):
                self._executor.round.outbox.add(routing, wire.Clear(ticket_id=ticket_id).pack())
            self._executor.commit()
            for routing, message in self._executor.take():
                self._send(routing, message)
            self._delivery.deliver(self._send)
            self._executor.commit()  # tickets that were recalled on the way out
        except StoreFullError as error:
            self._watch.suspend(error)

    def _knows(self, routing: bytes) -> bool:
        return self._peers.get(routing) is not None

    def _receive(self) -> None:
        num_bytes = 0
        self._intake.fill()
        for parts in self._intake.take(ROUND_MESSAGES, ROUND_BYTES):
            # A copy of a small frame costs less than a view of it.
            raw = [part.bytes if len(part) < VIEWED_BYTES else part for part in parts[1:]]
            frames = [part if isinstance(part, bytes) else part.buffer for part in raw]
            self._reception.take(parts[0].bytes, frames, parts[0], tuple(raw[2:]))
            num_bytes += sum(map(len, frames))
        metrics.tally.add(metrics.received_bytes, num_bytes)

    def _send(self, routing: bytes, message: Message) -> bool:
        peer = self._peers.get(routing)
        sent = self._peers.send(routing, message)
        if not sent and peer is not None:
            self._executor.drop(peer, "it cannot be reached, or takes nothing")
        return sent

    def _keep_time(self, now: float) -> None:
        self._executor.execute(Request(Tick()))
        for peer in self._peers.beat(now, self._intake.read_until):
            self._executor.drop(peer, "it is silent, or cannot be reached")
        if now - self._synced_at >= SYNC_INTERVAL_S:
            self._synced_at = now
            self._executor.barrier()
            self._journal.sync()
            self._executor.fresh.retain(self._parcel_of)

    def _parcel_of(self, ticket_id: str) -> int | None:
        place = self._journal.place(ticket_id)
        return None if place is None else place.parcel

    def close(self) -> None:
        """Close socket and store."""
        self._executor.close()
        self._peers.close()
        self._journal.close()

    # --- what it says of itself

    def health(self) -> Health:
        """What the loop last knew; from any thread."""
        return self._health

    def _publish(self) -> None:
        """The gauges, and the answer of `/healthz`."""
        status = self._status("none")
        metrics.observe_drift(self._executor.drift.drift(), self._broker.drift_alarm)
        if (now := time.monotonic()) - self._sized_at >= SIZE_S:
            self._sized_at, self._stored_bytes = now, stored_bytes(self._journal.path.parent)
        held = self._executor.ledger.partial_bytes
        metrics.observe(status, self._watch.on_hold, self._stored_bytes, self._watch.free_bytes, held)
        detail = {"run": self._settings.run.name, "store": str(self._journal.path)}
        facts = {key: value for key, value in msgspec.to_builtins(status).items() if key != "request_id"}
        self._health = Health(not self._watch.full, {**detail, **facts})

    def _report(self, body: wire.Inspect | wire.Status) -> Message:
        status = self._status(body.request_id)
        if isinstance(body, wire.Status):
            return status.pack()
        return inspect(
            status,
            self._settings.run.name,
            self._executor.ledger.entries,
            self._executor.ledger.actors,
            self._peers,
            now=time.monotonic(),
            max_dead=body.max_dead,
            store_bytes=stored_bytes(self._journal.path.parent),
        ).pack()

    def _status(self, request_id: str) -> wire.StatusReply:
        tickets: dict[str, dict[str, int]] = {}
        for (state, mode), num in self._executor.ledger.counts.items():
            tickets.setdefault(state.value, {})[mode.value] = num
        return wire.StatusReply(
            request_id=request_id,
            tickets=tickets,
            totals=dict(self._executor.totals),
            peers={role.value: num for role, num in self._peers.count_by_role().items()},
            full=self._watch.full,
            leases_on_hold=self._watch.on_hold,
        )


def serve(settings: Settings) -> None:
    """Run the experience broker until SIGTERM. Raises ErgonError where a port or the store is taken."""
    stop = install_stop()
    raise_file_limit()
    keep_freed_memory()
    sys.setswitchinterval(SWITCH_S)
    gc.set_threshold(GC_ALLOCATIONS, 10, 10)
    server = Server(settings)
    try:
        http = start_metrics(settings.metrics.host, settings.metrics.broker_port, server.health)
        try:
            log.info(
                "Broker serves. run=%s host=%s port=%d", settings.run.name, settings.broker.host, settings.broker.port
            )
            server.run(stop)
        finally:
            http.close()
    finally:
        server.close()
