"""The learner's side of the experience channel: issues tickets, receives trajectories, acks them.

Blocking and thread-safe. Owns what this process holds (received and not acked) and the requests that are not answered;
after a reconnection it says what it holds and repeats what is unanswered, so that a restarted broker goes unnoticed.
Never decides what to train on. All I/O and heartbeats are in the connection's thread, so the learner may compute as
long as it likes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from broker.client.connection import Connection, ConnectionClosedError
from broker.process.lifecycle import ErgonError
from broker.process.security import OPEN, Security
from broker.protocol.codec import array_bytes, unpack_trajectories
from broker.protocol.commands import (
    MAX_IDS,
    Ack,
    Acked,
    Body,
    Cancel,
    Cancelled,
    Credit,
    Dead,
    Deliver,
    ErrorBody,
    Hello,
    Issue,
    Issued,
    Resume,
    Resumed,
    Role,
    Status,
    StatusReply,
    Welcome,
    check,
    parse_body,
)
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message
from broker.protocol.trajectory import Mode, Ticket, Trajectory

log = logging.getLogger(__name__)

CHUNK = 500  # tickets or ids in one request: with the longest of names they stay below the bound of an envelope
ACKS_REPEATED = 4096
REPLIES: dict[str, type[Body]] = {body.COMMAND: body for body in (Resumed, Issued, Acked, Cancelled, StatusReply)}
BrokerStatus = StatusReply
ReplyT = TypeVar("ReplyT", bound=Body)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A ticket that will have no trajectory: its attempts are used up. Ack it like a trajectory."""

    ticket_id: str
    group_id: str
    mode: Mode
    error: str


@dataclass(slots=True)
class _Request:
    message: Message
    reply: Body | None = None
    error: Exception | None = None


class LearnerClient:
    """The learner's connection to the broker; one per learner process.

    `window`: trajectories that may lie here untaken; `window_bytes`: bytes of their arrays, overstepped by one message
    at most. Every method raises ErgonError once the connection has ended for good; where the broker is only away, they
    wait for it. No more than MAX_IDS may be held, that is received and not acked: nothing more comes until some are
    acked (`full`).
    """

    def __init__(
        self,
        endpoint: str,
        run_id: str,
        *,
        learner_id: str = "learner",
        window: int = 64,
        window_bytes: int = 512 << 20,
        heartbeat_s: float = 1.0,
        liveness: int = 15,
        security: Security = OPEN,
    ) -> None:
        self.session = uuid.uuid4().hex
        self._endpoint, self._run_id, self._learner_id, self._window = endpoint, run_id, learner_id, window
        self._window_bytes = window_bytes
        self._connection = Connection(
            endpoint,
            hello=self._hello,
            on_welcome=self._on_welcome,
            on_message=self._on_message,
            on_failure=self._on_failure,
            heartbeat_s=heartbeat_s,
            liveness=liveness,
            name="learner",
            security=security,
        )
        # One lock with the connection: what is computed and what is sent must not be separated by a reconnection.
        self._changed = threading.Condition(self._connection.lock)
        self._lineage: int | None = None
        self._failure: Exception | None = None
        self._inbox: deque[tuple[Trajectory | DeadLetter, int]] = deque()  # with the bytes of its arrays
        self._inbox_bytes = 0
        self._held: set[str] = set()  # received, and not known to be acked
        # Repeated in RESUME: with fsync "interval", a crash of the broker's machine may forget the last acks.
        self._acked: deque[str] = deque(maxlen=ACKS_REPEATED)
        self._requests: dict[str, _Request] = {}  # unanswered, in order
        self._resumed = False  # resume() has been answered once
        self._received = self._credit = 0  # since HELLO
        self._received_bytes = self._credit_bytes = 0  # since HELLO
        self._resuming: str | None = None  # the id of the RESUME that a reconnection sent

    @property
    def lineage(self) -> int:
        """The lineage of this process: a number that no other learner process of this run had or will have."""
        if self._lineage is None:
            raise ErgonError("the lineage is known after connect()")
        return self._lineage

    @property
    def full(self) -> bool:
        """Whether as many are held as a RESUME can name: nothing more is delivered before an ack."""
        with self._changed:
            return len(self._held) >= MAX_IDS

    def connect(self, timeout_s: float = 60.0) -> None:
        """Say HELLO and wait for the WELCOME. Raises ErgonError where the broker refuses or does not answer in time."""
        self._connection.start()
        try:
            self._connection.wait_welcome(timeout_s)
        except ProtocolError as error:
            self._connection.close()
            raise ErgonError(f"the broker at {self._endpoint} refuses this learner: {error.message}") from error
        except ErgonError:
            self._connection.close()
            raise

    def resume(self, acked_ids: Sequence[str] = ()) -> int:
        """Once, after connect: ack these ids; all else that was assigned to an earlier learner will be delivered again.

        Returns how many trajectories that is. Nothing is delivered before.
        """
        rest = list(acked_ids)
        while len(rest) > MAX_IDS:
            self.ack(rest[:MAX_IDS])
            rest = rest[MAX_IDS:]
        request_id = uuid.uuid4().hex
        return self._ask(Resume(request_id=request_id, acked=tuple(rest)), request_id, Resumed).returned

    def issue(self, tickets: Sequence[Ticket]) -> int:
        """Make these tickets durable; ids that the broker knows are ignored. Returns how many were new."""
        num_new = 0
        for start in range(0, len(tickets), CHUNK):
            request_id = uuid.uuid4().hex
            body = Issue(request_id=request_id, tickets=tuple(tickets[start : start + CHUNK]))
            num_new += self._ask(body, request_id, Issued).accepted
        return num_new

    def receive(self, timeout_s: float) -> Trajectory | DeadLetter | None:
        """The next trajectory or dead letter, or None after `timeout_s`.

        Small trajectories come many in a message, and their arrays are views of it: one that is kept for long keeps
        its neighbours' arrays in memory too, up to PARCEL_BYTES (1 MiB) in all.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self._inbox:
                self._check()
                if (left_s := deadline - time.monotonic()) <= 0:
                    return None
                self._changed.wait(left_s)
            item, num_bytes = self._inbox.popleft()
            self._inbox_bytes -= num_bytes
            self._top_up()
            return item

    def ack(self, ticket_ids: Sequence[str], dropped: Collection[str] = ()) -> int:
        """These will never be delivered again; durable when it returns. Idempotent. Returns how many were new.

        `dropped`: those of them that were thrown away unused (too stale, too late), for the broker's drift monitor.
        """
        unused = frozenset(dropped)
        num_new = 0
        for ids in _chunks(ticket_ids):
            body = Ack(request_id=uuid.uuid4().hex, ticket_ids=ids, dropped=tuple(unused.intersection(ids)))
            num_new += self._ask(body, body.request_id, Acked).count
            with self._changed:
                self._held.difference_update(ids)
                self._acked.extend(ids)
                self._top_up()
        return num_new

    def cancel(self, ticket_ids: Sequence[str] | None = None, group_ids: Sequence[str] | None = None) -> int:
        """Withdraw tickets that have no result yet: these, and those of these groups. Returns how many.

        Each comes back as a dead letter, which closes its group. Without arguments: every ticket, at the end of
        training, and nothing comes back.
        """
        if ticket_ids is None and group_ids is None:
            return self._cancel(Cancel(request_id=uuid.uuid4().hex))
        num = 0
        for ids in _chunks(ticket_ids or ()):
            num += self._cancel(Cancel(request_id=uuid.uuid4().hex, ticket_ids=ids))
        for ids in _chunks(group_ids or ()):
            num += self._cancel(Cancel(request_id=uuid.uuid4().hex, group_ids=ids))
        return num

    def _cancel(self, body: Cancel) -> int:
        return self._ask(body, body.request_id, Cancelled).count

    def status(self) -> BrokerStatus:
        """The broker's counts."""
        request_id = uuid.uuid4().hex
        return self._ask(Status(request_id=request_id), request_id, StatusReply)

    def close(self) -> None:
        """End the connection; what is held stays assigned until the next learner resumes. Idempotent."""
        self._connection.close()
        with self._changed:
            self._failure = self._failure or ErgonError("this learner's connection to the broker was closed")
            self._changed.notify_all()

    # --- requests

    def _send(self, message: Message) -> None:
        with contextlib.suppress(ConnectionClosedError):  # _on_failure and close() tell everybody who waits
            self._connection.send(message)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _ask(self, body: Body, request_id: str, expected: type[ReplyT]) -> ReplyT:
        """Send a request and wait for its reply, over reconnections."""
        request = _Request(check(body).pack())
        with self._changed:
            self._check()
            self._requests[request_id] = request
            self._send(request.message)
            try:
                while request.reply is None and request.error is None:
                    self._check()
                    self._changed.wait()
            finally:
                del self._requests[request_id]
        if request.error is not None:
            raise request.error
        if not isinstance(request.reply, expected):
            raise ErgonError(
                f"the broker answered {body.COMMAND} with {type(request.reply).__name__}; update the broker"
            )
        return request.reply

    def _top_up(self) -> None:
        """Renew the credit, counted since HELLO, in steps of a quarter window."""
        if not self._resumed or self._resuming is not None:
            return
        # A RESUME names all that is held, and the broker takes each for the whole truth, so it cannot be cut in pieces:
        # what is held and what may still come must fit into one.
        room = min(self._window - len(self._inbox), MAX_IDS - len(self._held))
        credit = max(self._credit, self._received + room)
        # The inbox may overstep its bytes by one message, and outlive a connection: no credit ever falls.
        credit_bytes = max(self._credit_bytes, self._received_bytes + self._window_bytes - self._inbox_bytes)
        step = max(1, self._window // 4) if self._inbox else 1
        if credit - self._credit >= step or credit_bytes - self._credit_bytes >= self._window_bytes // 4:
            self._credit, self._credit_bytes = credit, credit_bytes
            self._send(Credit(credit=credit, credit_bytes=credit_bytes).pack())

    # --- in the connection's thread

    def _hello(self) -> Message:
        return Hello(role=Role.LEARNER, peer_id=self._learner_id, run_id=self._run_id, session=self.session).pack()

    def _on_welcome(self, welcome: Message, _first: bool) -> None:
        body = parse_body(welcome, Welcome)
        if body.lineage is None:
            raise ProtocolError(ErrorCode.BAD_MESSAGE, "WELCOME without a lineage, for a learner")
        self._lineage = body.lineage
        self._received = self._credit = self._received_bytes = self._credit_bytes = 0
        self._resuming = None
        if self._resumed:
            self._resuming = uuid.uuid4().hex
            self._send(Resume(request_id=self._resuming, acked=tuple(self._acked), held=tuple(self._held)).pack())
        for request in self._requests.values():
            self._send(request.message)

    def _on_message(self, message: Message) -> None:
        if message.command == Deliver.COMMAND:
            self._take((t.ticket.ticket_id, t, array_bytes(t)) for t in unpack_trajectories(message, Deliver))
        elif message.command == Dead.COMMAND:
            letter = parse_body(message, Dead)
            item = DeadLetter(letter.ticket_id, letter.group_id, letter.mode, letter.error)
            self._take([(letter.ticket_id, item, 0)])
        elif message.command in REPLIES:
            self._settle(parse_body(message, REPLIES[message.command]))
        elif message.command == ErrorBody.COMMAND:
            body = parse_body(message, ErrorBody)
            log.error("The broker refused a message. about=%s code=%s reason=%s", body.about, body.code, body.message)
            with self._changed:
                if body.about in self._requests:
                    self._requests[body.about].error = ProtocolError(body.known_code, body.message)
                    self._changed.notify_all()
        else:
            raise ProtocolError(ErrorCode.UNKNOWN_COMMAND, f"the broker sent {message.command!r:.40} to a learner")

    def _take(self, items: Iterable[tuple[str, Trajectory | DeadLetter, int]]) -> None:
        """(ticket id, what came, bytes of its arrays): all of one message."""
        with self._changed:
            for ticket_id, item, num_bytes in items:
                self._received += 1
                self._received_bytes += num_bytes
                if ticket_id in self._held:
                    log.warning("Delivery dropped. ticket_id=%s reason=it is held already", ticket_id)
                    self._top_up()
                    continue
                self._held.add(ticket_id)
                self._inbox.append((item, num_bytes))
                self._inbox_bytes += num_bytes
                if len(self._held) == MAX_IDS:
                    log.warning("Nothing more is delivered until some are acked. held=%d allowed=%d", MAX_IDS, MAX_IDS)
            self._changed.notify_all()

    def _settle(self, reply: Body) -> None:
        request_id = getattr(reply, "request_id", "")
        with self._changed:
            if isinstance(reply, Resumed):  # here and not in resume(): a reconnection may come in between
                self._resumed, self._resuming = True, None
                self._top_up()
            if request_id in self._requests:
                self._requests[request_id].reply = reply
                self._changed.notify_all()

    def _on_failure(self, error: Exception) -> None:
        with self._changed:
            self._failure = ErgonError(f"the connection to the broker at {self._endpoint} has failed: {error}")
            self._failure.__cause__ = error
            self._changed.notify_all()


def _chunks(ids: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for start in range(0, len(ids), CHUNK):
        yield tuple(ids[start : start + CHUNK])
