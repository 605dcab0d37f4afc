"""What becomes of one message that arrived: refused with an ERROR, answered here, or handed to the ledger.

Owns the rules of admittance: who may say HELLO, and who may say what. Never waits, never sends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import zmq

from broker.exchange import metrics
from broker.exchange.admission import Admission
from broker.exchange.dispatch import HANDLERS, Request, about
from broker.exchange.executor import Executor
from broker.exchange.peers import Peer, Peers
from broker.exchange.storewatch import StoreWatch
from broker.ledger.events import ActorJoined, LearnerJoined, Settled
from broker.process.logs import Throttle
from broker.process.settings import Settings
from broker.protocol import commands as wire
from broker.protocol.commands import COMMANDS, Role, error_message, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Frame, Limits, Message, decode
from broker.store.journal import Journal

log = logging.getLogger(__name__)

EXPECTED_CODES = frozenset({ErrorCode.UNKNOWN_PEER, ErrorCode.DISK_FULL})  # every restart or full disk brings them

Report = Callable[[wire.Inspect | wire.Status], Message]


class Reception:
    """The door. `report` answers STATUS and INSPECT."""

    def __init__(
        self,
        settings: Settings,
        limits: Limits,
        journal: Journal,
        peers: Peers,
        executor: Executor,
        watch: StoreWatch,
        report: Report,
    ) -> None:
        self._broker, self._run_id, self._limits = settings.broker, settings.run.name, limits
        self._journal, self._peers, self._executor, self._watch = journal, peers, executor, watch
        self._report = report
        self.admission = Admission(settings.broker.max_inflight_mb << 20)
        self._refusals, self._joins = Throttle(), Throttle()

    def take(
        self, routing: bytes, frames: Sequence[Frame], envelope: zmq.Frame, raw: tuple[bytes | zmq.Frame, ...] = ()
    ) -> None:
        """Handle one message; whatever is wrong with it is answered with ERROR. `envelope` knows the sender's key.
        `raw`: the frames of its arrays as ZeroMQ has them, which it can send on without looking."""
        message: Message | None = None
        try:
            message = decode(frames, self._limits)
            message.raw = raw
            self._handle(routing, message, frames, envelope)
        except ProtocolError as error:
            metrics.refused.labels(error.code.value).inc()
            level = logging.DEBUG if error.code in EXPECTED_CODES else self._refusals.level(logging.WARNING)
            log.log(level, "Message refused. code=%s reason=%s", error.code.value, error.message)
            subject = "" if message is None else about(message)
            self.admission.arrived(routing, subject)  # whatever it was worth, it is not on its way any more
            self._executor.round.outbox.add(routing, error_message(error, subject))
            peer = self._peers.get(routing)
            if error.fatal and peer is not None:
                self._executor.drop(peer, error.code.value)

    def _handle(self, routing: bytes, message: Message, frames: Sequence[Frame], envelope: zmq.Frame) -> None:
        spec = COMMANDS.get(message.command)
        metrics.count_message(message.command if spec else "unknown")
        if spec is None or spec.sender == "broker":
            raise ProtocolError(ErrorCode.UNKNOWN_COMMAND, f"{message.command!r:.40} is no command for the broker")
        if spec.body is wire.Hello:
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
        if spec.body is wire.Status:
            self._executor.round.outbox.add(routing, self._report(parse_body(message, wire.Status)))
        elif spec.body is wire.Inspect:
            self._executor.round.outbox.add(routing, self._report(parse_body(message, wire.Inspect)))
        elif spec.body is wire.Offer:
            offer = parse_body(message, wire.Offer)
            self.admission.offer(routing, offer.ticket_id, offer.num_bytes)
        else:
            self._executor.execute(HANDLERS[message.command](peer, message, self), routing, frames, message)
            if spec.body in (wire.TrajectoryBody, wire.Handover) and self.admission.num_bytes:
                self.admission.arrived(routing, about(message))

    # --- HELLO

    def _hello(self, routing: bytes, hello: wire.Hello) -> None:
        self._refuse(hello)
        former = self._peers.get(routing)
        if former is not None and former.session != hello.session:
            self._executor.drop(former, "it began another session")
        lineage = None
        if hello.role is Role.LEARNER:
            self._executor.barrier()  # the journal writes it itself
            lineage = self._journal.lineage(hello.session)
        now = time.monotonic()
        self._peers.add(Peer(routing, hello.role, hello.peer_id, hello.session, now, now))
        welcome = wire.Welcome(
            run_id=self._run_id,
            lineage=lineage,
            heartbeat_s=self._broker.heartbeat_s,
            liveness=self._broker.liveness,
            lease_s=self._broker.lease_s,
        )
        self._executor.round.outbox.add(routing, welcome.pack())
        if hello.role is Role.ACTOR:
            self._executor.execute(Request(ActorJoined(hello.session, hello.peer_id)))
        elif hello.role is Role.LEARNER:
            self._executor.execute(Request(LearnerJoined(hello.session)))
        level = self._joins.level(logging.INFO)
        log.log(level, "Peer joined. role=%s peer_id=%s session=%s", hello.role, hello.peer_id, hello.session)

    def _refuse(self, hello: wire.Hello) -> None:
        """Raise ProtocolError where the peer cannot be let in now."""
        if hello.run_id != self._run_id:
            raise ProtocolError(
                ErrorCode.WRONG_RUN,
                f"{hello.role} {hello.peer_id} is of run {hello.run_id!r}, this broker serves {self._run_id!r}; "
                "use the same configuration file, or another broker.port",
            )
        if self._watch.full and hello.role is Role.ACTOR:
            raise ProtocolError(ErrorCode.DISK_FULL, f"the store {self._journal.path} is full; make room on its disk")
        if hello.role is Role.LEARNER:
            self._refuse_second_learner(hello)
        known = self._peers.by_session(hello.session)
        if known is not None and (known.role, known.peer_id) != (hello.role, hello.peer_id):
            raise ProtocolError(
                ErrorCode.BAD_STATE, f"session {hello.session:.40} is that of {known.role} {known.peer_id}"
            )

    def _refuse_second_learner(self, hello: wire.Hello) -> None:
        learner = self._peers.learner()
        if learner is None or learner.session == hello.session:
            return
        if not self._peers.send(learner.routing, wire.Heartbeat().pack()):
            self._executor.drop(learner, "its process has ended")
            return
        raise ProtocolError(
            ErrorCode.LEARNER_PRESENT,
            f"run {self._run_id!r} has a learner ({learner.peer_id}) already; end it, or give this run another name",
        )

    # --- what `dispatch.Ended` asks

    def settled(self, ticket_ids: Sequence[str]) -> Mapping[str, Settled]:
        """How those of the tickets ended that are known and not live."""
        return self._executor.settled(ticket_ids)

    def settled_ids(self, ticket_ids: Iterable[str]) -> frozenset[str]:
        """Those of the ids that are not live but known."""
        return self._executor.settled_ids(ticket_ids)
