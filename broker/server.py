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

import zmq

from broker import experience_metrics as metrics
from broker.dispatch import HANDLERS, Request, about
from broker.journal import SYNC_INTERVAL_S, Journal, StoreFullError
from broker.ledger import Ledger
from broker.ledger_types import (
    ActorJoined,
    AnnounceDead,
    Count,
    Deliver,
    Grant,
    Hold,
    LearnerJoined,
    PeerGone,
    Reply,
    Settled,
    Tick,
)
from broker.peers import Peer, Peers
from broker.process.lifecycle import install_stop
from broker.process.metrics import Health, start_metrics
from broker.process.settings import Settings
from broker.protocol import commands as wire
from broker.protocol.commands import COMMANDS, Role, error_message, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Frame, Message, decode

log = logging.getLogger(__name__)

ROUND_MESSAGES = 512
ROUND_BYTES = 64 << 20
POLL_MAX_S = 0.25
CHECK_S = 1.0  # between looks at the disk
EXPECTED_CODES = frozenset({ErrorCode.UNKNOWN_PEER, ErrorCode.DISK_FULL})  # every restart or full disk brings them
GRACE_HEARTBEATS = 2  # after a restart, for actors to name the leases they still hold


class Server:
    """One broker: a store, a ledger, a socket. Single-threaded but for `health`."""

    def __init__(self, settings: Settings, max_store_pages: int | None = None) -> None:
        self._settings, self._broker, self._run_id = settings, settings.broker, settings.run.name
        self._journal = Journal(settings.run_dir / "broker", self._run_id, self._broker.fsync, max_store_pages)
        try:
            broker = self._broker
            self._peers = Peers(broker.host, broker.port, broker.heartbeat_s, broker.liveness)
        except BaseException:
            self._journal.close()
            raise
        self._outbox: list[tuple[bytes, Message | Deliver]] = []
        self._totals: Counter[str] = Counter()
        self._full = self._on_hold = False
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
            poller.poll(int(pause_s * 1000) + 1)
            self.round()

    def round(self) -> None:
        """Take what has arrived, make it durable, answer."""
        self._check_store(time.monotonic())  # first: a refused probe must not undo what a round has written
        try:
            self._receive()
            self._keep_time(time.monotonic())
            started = time.perf_counter()
            if self._journal.commit():
                metrics.commit_seconds.observe(time.perf_counter() - started)
        except StoreFullError as error:
            self._suspend(error)
            return
        outbox, self._outbox = self._outbox, []
        for routing, item in outbox:
            self._send(routing, item)

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
            try:
                parts = self._peers.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            routing, frames = parts[0].bytes, [part.buffer for part in parts[1:]]
            size = sum(len(frame) for frame in frames)
            metrics.received_bytes.inc(size)
            self._take(routing, frames)
            num_bytes += size
            if num_bytes >= ROUND_BYTES:
                return

    def _take(self, routing: bytes, frames: Sequence[Frame]) -> None:
        """Handle one message; whatever is wrong with it is answered with ERROR."""
        message: Message | None = None
        try:
            message = decode(frames)
            self._handle(routing, message, frames)
        except ProtocolError as error:
            metrics.refused.labels(error.code.value).inc()
            level = logging.DEBUG if error.code in EXPECTED_CODES else logging.WARNING
            log.log(level, "Message refused. code=%s reason=%s", error.code.value, error.message)
            self._outbox.append((routing, error_message(error, "" if message is None else about(message))))
            peer = self._peers.get(routing)
            if error.fatal and peer is not None:
                self._drop(peer, error.code.value)

    def _handle(self, routing: bytes, message: Message, frames: Sequence[Frame]) -> None:
        spec = COMMANDS.get(message.command)
        metrics.messages.labels(message.command if spec else "unknown").inc()
        if spec is None or spec.sender == "broker":
            raise ProtocolError(ErrorCode.UNKNOWN_COMMAND, f"{message.command!r:.40} is no command for the broker")
        if message.command == wire.Hello.COMMAND:
            self._hello(routing, parse_body(message, wire.Hello))
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
        else:
            request = HANDLERS[message.command](peer, message, self)
            self._execute(request, routing, frames)

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

    def _execute(self, request: Request, routing: bytes = b"", frames: Sequence[Frame] = ()) -> None:
        for action in self._ledger.handle(request.event, time.monotonic()):
            match action:
                case Reply():
                    if request.reply is not None:
                        self._outbox.append((routing, request.reply(action)))
                case Count(name, num):
                    self._totals[name] += num
                    metrics.COUNTS[name].inc(num)
                case Grant() | Deliver() | AnnounceDead():
                    self._post(action)
                case _:
                    self._journal.apply(action, frames)

    def _post(self, action: Grant | Deliver | AnnounceDead) -> None:
        peer = self._peers.by_session(action.session)
        if peer is None:
            raise AssertionError(f"the ledger serves session {action.session}, which is not connected")
        match action:
            case Grant(_, ticket):
                self._outbox.append((peer.routing, wire.TicketBody(ticket=ticket).pack()))
            case Deliver():
                self._outbox.append((peer.routing, action))
            case AnnounceDead(_, ticket_id, group_id, mode, error):
                letter = wire.Dead(ticket_id=ticket_id, group_id=group_id, mode=mode, error=error)
                self._outbox.append((peer.routing, letter.pack()))

    # --- out

    def _send(self, routing: bytes, item: Message | Deliver) -> None:
        if isinstance(item, Deliver):
            stored = self._journal.load(item.ticket_id)
            if stored is None:  # acked in the very round that assigned it
                return
            item = Message(wire.Deliver.COMMAND, stored.body, stored.arrays)
        peer = self._peers.get(routing)
        if not self._peers.send(routing, item) and peer is not None:
            self._drop(peer, "it cannot be reached, or takes nothing")

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

    def _suspend(self, error: StoreFullError) -> None:
        """The store took nothing of this round: forget it, and everybody who waits for an answer."""
        log.error("The store refuses writes; actors are refused until there is room. error=%s", error)
        self._full = True
        self._outbox.clear()
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
        metrics.observe(status, on_hold, self._journal.path.stat().st_size)
        detail = {"run": self._run_id, "leases_on_hold": on_hold, "store": str(self._journal.path)}
        self._health = Health(not self._full, {**detail, **status.model_dump(exclude={"request_id"})})

    def _status(self, request_id: str) -> wire.StatusReply:
        tickets: dict[str, dict[str, int]] = {}
        for (state, mode), num in self._ledger.counts.items():
            tickets.setdefault(state.value, {})[mode.value] = num
        peers = {role.value: num for role, num in self._peers.count_by_role().items()}
        return wire.StatusReply(
            request_id=request_id or "none", tickets=tickets, totals=dict(self._totals), peers=peers, full=self._full
        )


def serve(settings: Settings) -> None:
    """Run the experience broker until SIGTERM. Raises ErgonError where a port or the store is taken."""
    stop = install_stop()
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
