"""The experience channel's server: `serve()` is the only poll loop. It carries out the ledger's actions.

One round: take the messages that are there (bounded in number and bytes), feed each to the ledger, write the journal
actions, commit once, and only then send everything that the round produced. So nothing is acknowledged that is not
durable, and one fsync serves many messages. Never decides about a ticket; never holds a trajectory beyond a round.

Where the store refuses a write, the round is rolled back and nothing of it is sent; all peers are forgotten (they say
HELLO again and repeat what was not answered), the ledger is rebuilt from the journal, and actors are refused with
DISK_FULL until a probe write succeeds.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import zmq

from broker.exchange import metrics
from broker.exchange.admission import Admission
from broker.exchange.dispatch import HANDLERS, Request, about
from broker.exchange.drift import DriftMonitor
from broker.exchange.inspection import inspect, stored_bytes
from broker.exchange.peers import Peer, Peers
from broker.ledger.events import (
    ActorJoined,
    AnnounceDead,
    Count,
    Damaged,
    Deliver,
    Finished,
    Grant,
    Hold,
    JournalAttempt,
    JournalResult,
    JournalTicket,
    LearnerJoined,
    PeerGone,
    Reply,
    Settle,
    Settled,
    Tick,
    Withdraw,
)
from broker.ledger.ledger import Ledger
from broker.process.keys import Identity
from broker.process.lifecycle import install_stop, raise_file_limit
from broker.process.metrics import Health, start_metrics
from broker.process.security import load_security
from broker.process.settings import Settings
from broker.protocol import commands as wire
from broker.protocol.commands import COMMANDS, Role, error_message, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import DEFAULT_LIMITS, Frame, Message, decode
from broker.store.blobs import DamagedError
from broker.store.fresh import FreshResults
from broker.store.journal import SYNC_INTERVAL_S, Journal, StoreFullError

log = logging.getLogger(__name__)

ROUND_MESSAGES = 512
ROUND_BYTES = 64 << 20
VIEWED_BYTES = 4096  # frames of this size are not copied on their way in
WARN_S = 1.0  # between warnings of refused messages: a flood is counted, not logged
POLL_MAX_S = 0.25
BLOCKED_PAUSE_S = 0.005  # while a result waits for the network
CHECK_S = 1.0  # between looks at the disk
EXPECTED_CODES = frozenset({ErrorCode.UNKNOWN_PEER, ErrorCode.DISK_FULL})  # every restart or full disk brings them
GRACE_HEARTBEATS = 2  # after a restart, for actors to name the leases they still hold


class Server:
    """One broker: a store, a ledger, a socket. Single-threaded but for `health`."""

    def __init__(self, settings: Settings, max_store_pages: int | None = None) -> None:
        self._settings, self._broker, self._run_id = settings, settings.broker, settings.run.name
        broker = self._broker
        self._journal = Journal(
            settings.run_dir / "broker",
            self._run_id,
            broker.fsync,
            max_store_pages,
            broker.blob_bytes,
            broker.keep_ended,
        )
        self._limits = replace(DEFAULT_LIMITS, max_message_bytes=broker.max_message_mb << 20)
        self._max_queued_bytes = broker.max_inflight_mb << 20
        self._admission = Admission(self._max_queued_bytes)
        try:
            security = load_security(settings, Identity.BROKER)
            self._peers = Peers(broker.host, broker.port, broker.heartbeat_s, broker.liveness, security)
        except BaseException:
            self._journal.close()
            raise
        self._outbox: list[tuple[bytes, Message]] = []
        self._fresh = FreshResults()
        self._warned_at = float("-inf")
        self._totals: Counter[str] = Counter()
        self._drift = DriftMonitor()
        self._full, self._on_hold = not self._journal.reserved, False
        self._ledger = self._restore()
        self._checked_at = self._synced_at = float("-inf")
        self._health = Health(True, {})

    def _restore(self) -> Ledger:
        live = list(self._journal.live())
        grace_s = GRACE_HEARTBEATS * self._broker.heartbeat_s if live else 0.0
        log.info("Ledger restored. live_tickets=%d store=%s", len(live), self._journal.path)
        return Ledger(
            self._broker.lease_s,
            self._broker.max_attempts,
            live,
            self._journal.ended(),
            self._journal.next_seq(),
            time.monotonic() + grace_s,
        )

    @property
    def endpoint(self) -> str:
        """Where peers connect."""
        return f"tcp://{self._broker.host}:{self._broker.port}"

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set."""
        poller = zmq.Poller()
        poller.register(self._peers.socket, zmq.POLLIN)
        pause_s = min(POLL_MAX_S, self._broker.heartbeat_s / 2, self._broker.lease_s / 2)
        while not stop.is_set():
            poller.poll(int((BLOCKED_PAUSE_S if self._blocked() else pause_s) * 1000) + 1)
            self.round()

    def _blocked(self) -> bool:
        """Whether a result waits for the network, which does not wake the loop when it is ready."""
        learner = self._peers.learner()
        return learner is not None and learner.outflow.blocked(self._max_queued_bytes)

    def round(self) -> None:
        """Take what has arrived, make it durable, answer."""
        self._check_store(time.monotonic())  # first: a refused probe must not undo what a round has written
        try:
            self._receive()
            self._keep_time(time.monotonic())
            self._commit()
            for routing, ticket_id in self._admission.clear(self._knows):
                self._outbox.append((routing, wire.Clear(ticket_id=ticket_id).pack()))
            outbox, self._outbox = self._outbox, []
            for routing, message in outbox:
                self._send(routing, message)
            self._deliver()
            self._commit()  # tickets that were recalled on the way out
        except StoreFullError as error:
            self._suspend(error)

    def _knows(self, routing: bytes) -> bool:
        return self._peers.get(routing) is not None

    def _commit(self) -> None:
        started = time.perf_counter()
        if self._journal.commit():
            metrics.commit_seconds.observe(time.perf_counter() - started)

    def close(self) -> None:
        """Close socket and store."""
        self._peers.close()
        self._journal.close()

    def health(self) -> Health:
        """What the loop last knew; from any thread."""
        return self._health

    # --- in

    def _receive(self) -> None:
        num_bytes = 0
        for _ in range(ROUND_MESSAGES):
            if not (parts := self._peers.receive()):
                return
            # A copy of a small frame costs less than a view of it.
            frames = [part.bytes if len(part) < VIEWED_BYTES else part.buffer for part in parts[1:]]
            size = sum(map(len, frames))
            metrics.received_bytes.inc(size)
            self._take(parts[0].bytes, frames, parts[0])
            num_bytes += size
            if num_bytes >= ROUND_BYTES:
                return

    def _take(self, routing: bytes, frames: Sequence[Frame], envelope: zmq.Frame) -> None:
        """Handle one message; whatever is wrong with it is answered with ERROR. `envelope` knows the sender's key."""
        message: Message | None = None
        try:
            message = decode(frames, self._limits)
            self._handle(routing, message, frames, envelope)
        except ProtocolError as error:
            metrics.refused.labels(error.code.value).inc()
            self._warn(error)
            self._outbox.append((routing, error_message(error, "" if message is None else about(message))))
            peer = self._peers.get(routing)
            if error.fatal and peer is not None:
                self._drop(peer, error.code.value)

    def _warn(self, error: ProtocolError) -> None:
        level = logging.DEBUG
        if error.code not in EXPECTED_CODES and (now := time.monotonic()) - self._warned_at >= WARN_S:
            level, self._warned_at = logging.WARNING, now
        log.log(level, "Message refused. code=%s reason=%s", error.code.value, error.message)

    def _handle(self, routing: bytes, message: Message, frames: Sequence[Frame], envelope: zmq.Frame) -> None:
        spec = COMMANDS.get(message.command)
        metrics.messages.labels(message.command if spec else "unknown").inc()
        if spec is None or spec.sender == "broker":
            raise ProtocolError(ErrorCode.UNKNOWN_COMMAND, f"{message.command!r:.40} is no command for the broker")
        if message.command == wire.Hello.COMMAND:
            hello = parse_body(message, wire.Hello)
            self._peers.check_key(hello, envelope)
            self._hello(routing, hello)
            return
        peer = self._peers.get(routing)
        if peer is None:
            raise ProtocolError(ErrorCode.UNKNOWN_PEER, f"{message.command} from a peer that is not known; say HELLO")
        peer.heard_at = time.monotonic()
        if peer.role not in spec.roles:
            roles = ", ".join(sorted(spec.roles))
            raise ProtocolError(ErrorCode.WRONG_ROLE, f"{message.command} from {peer.role}; it is for {roles}")
        if message.command == wire.Status.COMMAND:
            self._outbox.append((routing, self._status(parse_body(message, wire.Status).request_id).pack()))
        elif message.command == wire.Offer.COMMAND:
            offer = parse_body(message, wire.Offer)
            self._admission.offer(routing, offer.ticket_id, offer.num_bytes)
        elif message.command == wire.Inspect.COMMAND:
            self._outbox.append((routing, self._inspect(parse_body(message, wire.Inspect)).pack()))
        else:
            if message.command == wire.TrajectoryBody.COMMAND:
                self._admission.arrived(routing, about(message))
            request = HANDLERS[message.command](peer, message, self)
            self._execute(request, routing, frames, message)

    def _hello(self, routing: bytes, hello: wire.Hello) -> None:
        if hello.run_id != self._run_id:
            raise ProtocolError(
                ErrorCode.WRONG_RUN,
                f"{hello.role} {hello.peer_id} is of run {hello.run_id!r}, this broker serves {self._run_id!r}; "
                "use the same configuration file, or another broker.port",
            )
        if self._full and hello.role is Role.ACTOR:
            raise ProtocolError(ErrorCode.DISK_FULL, f"the store {self._journal.path} is full; make room on its disk")
        if hello.role is Role.LEARNER:
            self._refuse_second_learner(hello)
        known = self._peers.by_session(hello.session)
        if known is not None and (known.role, known.peer_id) != (hello.role, hello.peer_id):
            raise ProtocolError(
                ErrorCode.BAD_STATE, f"session {hello.session:.40} is that of {known.role} {known.peer_id}"
            )
        former = self._peers.get(routing)
        if former is not None and former.session != hello.session:
            self._drop(former, "it began another session")
        lineage = self._journal.lineage(hello.session) if hello.role is Role.LEARNER else None
        now = time.monotonic()
        self._peers.add(Peer(routing, hello.role, hello.peer_id, hello.session, now, now))
        welcome = wire.Welcome(
            run_id=self._run_id,
            lineage=lineage,
            heartbeat_s=self._broker.heartbeat_s,
            liveness=self._broker.liveness,
            lease_s=self._broker.lease_s,
        )
        self._outbox.append((routing, welcome.pack()))
        if hello.role is Role.ACTOR:
            self._execute(Request(ActorJoined(hello.session, hello.peer_id)))
        elif hello.role is Role.LEARNER:
            self._execute(Request(LearnerJoined(hello.session)))
        log.info("Peer joined. role=%s peer_id=%s session=%s", hello.role, hello.peer_id, hello.session)

    def _refuse_second_learner(self, hello: wire.Hello) -> None:
        learner = self._peers.learner()
        if learner is None or learner.session == hello.session:
            return
        if not self._peers.send(learner.routing, wire.Heartbeat().pack()):
            self._drop(learner, "its process has ended")
            return
        raise ProtocolError(
            ErrorCode.LEARNER_PRESENT,
            f"run {self._run_id!r} has a learner ({learner.peer_id}) already; end it, or give this run another name",
        )

    # --- what `dispatch.Ended` asks

    def settled(self, ticket_id: str) -> Settled | None:
        """How a ticket that is not live ended."""
        return None if ticket_id in self._ledger else self._journal.settled(ticket_id)

    def settled_ids(self, ticket_ids: Iterable[str]) -> frozenset[str]:
        """Those of the ids that are not live but known."""
        return self._journal.settled_ids(key for key in ticket_ids if key not in self._ledger)

    # --- the ledger's actions

    def _execute(
        self, request: Request, routing: bytes = b"", frames: Sequence[Frame] = (), message: Message | None = None
    ) -> None:
        for action in self._ledger.handle(request.event, time.monotonic()):
            match action:
                case Reply():
                    if request.reply is not None:
                        self._outbox.append((routing, request.reply(action)))
                case Count(name, num):
                    self._totals[name] += num
                    metrics.count(action)
                case Grant() | Withdraw() | Deliver() | AnnounceDead():
                    self._post(action)
                case Finished() | Settle():
                    self._drift.observe(action)
                case _:
                    self._journal.apply(action, frames)
                    if isinstance(action, JournalResult) and message is not None:
                        self._fresh.add(action.ticket_id, message)
                    elif not isinstance(action, JournalTicket | JournalAttempt):
                        self._fresh.discard(action.ticket_id)

    def _post(self, action: Grant | Withdraw | Deliver | AnnounceDead) -> None:
        peer = self._peers.by_session(action.session)
        if peer is None:
            raise AssertionError(f"the ledger serves session {action.session}, which is not connected")
        match action:
            case Grant(_, ticket):
                self._outbox.append((peer.routing, wire.TicketBody(ticket=ticket).pack()))
            case Withdraw(_, ticket_ids):
                self._outbox.append((peer.routing, wire.Withdrawn(ticket_ids=ticket_ids).pack()))
            case Deliver(_, ticket_id):
                peer.outflow.add(ticket_id)
            case AnnounceDead(_, ticket_id, group_id, mode, error):
                letter = wire.Dead(ticket_id=ticket_id, group_id=group_id, mode=mode, error=error)
                peer.outflow.add(letter.pack())

    # --- out

    def _send(self, routing: bytes, message: Message) -> bool:
        peer = self._peers.get(routing)
        sent = self._peers.send(routing, message)
        if not sent and peer is not None:
            self._drop(peer, "it cannot be reached, or takes nothing")
        return sent

    def _deliver(self) -> None:
        """Send the learner what waits for it, as far as its credit and the network allow."""
        learner = self._peers.learner()
        while learner is not None and (item := learner.outflow.next(self._max_queued_bytes)) is not None:
            message = self._load(learner, item) if isinstance(item, str) else item
            if message is None:
                continue
            if not self._send(learner.routing, message):
                return
            learner.outflow.sent(message)

    def _load(self, learner: Peer, ticket_id: str) -> Message | None:
        """The DELIVER of a ticket; None where it was acked meanwhile, or is damaged, and so issued again."""
        if (fresh := self._fresh.take(ticket_id)) is not None:
            return fresh
        try:
            stored = self._journal.load(ticket_id)
        except DamagedError as error:
            log.error(
                "A stored trajectory is damaged; its ticket is issued again. ticket=%s error=%s", ticket_id, error
            )
            self._execute(Request(Damaged(learner.session, ticket_id)))
            return None
        return None if stored is None else Message(wire.Deliver.COMMAND, stored.body, stored.arrays)

    def _drop(self, peer: Peer, reason: str) -> None:
        if self._peers.drop(peer):
            log.info("Peer left. role=%s peer_id=%s reason=%s", peer.role, peer.peer_id, reason)
            self._execute(Request(PeerGone(peer.session)))

    # --- time, disk, status

    def _keep_time(self, now: float) -> None:
        self._execute(Request(Tick()))
        for peer in self._peers.beat(now):
            self._drop(peer, "it is silent, or cannot be reached")
        if now - self._synced_at >= SYNC_INTERVAL_S:
            self._synced_at = now
            self._journal.sync()
            if not self._full:
                self._journal.compact()

    def _suspend(self, error: StoreFullError) -> None:
        """The store took nothing of this round: forget it, and everybody who waits for an answer."""
        log.error("The store refuses writes; actors are refused until there is room. error=%s", error)
        self._full = True
        self._outbox.clear()
        self._fresh.clear()
        self._peers.clear()
        self._ledger = self._restore()

    def _check_store(self, now: float) -> None:
        """Stop leasing before the disk is full; go on when there is room again."""
        if now - self._checked_at < CHECK_S:
            return
        self._checked_at = now
        if self._full:
            try:
                self._journal.probe()
                self._full = False
                log.warning("The store takes writes again. store=%s", self._journal.path)
            except StoreFullError as error:
                log.debug("The store is still full. error=%s", error)
        free_mb = shutil.disk_usage(self._journal.path.parent).free >> 20
        on_hold = free_mb < self._broker.min_free_mb
        if on_hold != self._on_hold:
            log.warning("Leases %s. free_mb=%d", "stop: the disk is nearly full" if on_hold else "go on", free_mb)
        self._on_hold = on_hold
        self._execute(Request(Hold(on_hold)))
        status = self._status("")
        metrics.observe_drift(self._drift.drift(), self._broker.drift_alarm)
        metrics.observe(status, on_hold, self._journal.path.stat().st_size)
        detail = {"run": self._run_id, "store": str(self._journal.path)}
        self._health = Health(not self._full, {**detail, **status.model_dump(exclude={"request_id"})})

    def _status(self, request_id: str) -> wire.StatusReply:
        tickets: dict[str, dict[str, int]] = {}
        for (state, mode), num in self._ledger.counts.items():
            tickets.setdefault(state.value, {})[mode.value] = num
        peers = {role.value: num for role, num in self._peers.count_by_role().items()}
        return wire.StatusReply(
            request_id=request_id or "none",
            tickets=tickets,
            totals=dict(self._totals),
            peers=peers,
            full=self._full,
            leases_on_hold=self._on_hold,
        )

    def _inspect(self, body: wire.Inspect) -> wire.InspectReply:
        return inspect(
            self._status(body.request_id),
            self._run_id,
            self._ledger.entries,
            self._ledger.actors,
            self._peers,
            now=time.monotonic(),
            max_dead=body.max_dead,
            store_bytes=stored_bytes(self._journal.path.parent),
        )


def serve(settings: Settings) -> None:
    """Run the experience broker until SIGTERM. Raises ErgonError where a port or the store is taken."""
    stop = install_stop()
    raise_file_limit()
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
