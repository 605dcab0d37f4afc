"""The operator's side of the experience channel: looks at a broker, and decides about its dead letters.

Blocking, for a person at a terminal: a call is answered within `timeout_s` or ends with one sentence. Repeats nothing:
whether a requeue or purge that was not answered took effect is for the next `inspect` to say.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import queue
import socket
import time
import uuid
from collections.abc import Sequence
from typing import TypeVar

from broker.client.connection import Connection, ConnectionClosedError
from broker.process.lifecycle import ErgonError
from broker.process.security import OPEN, Security
from broker.protocol.commands import (
    MAX_IDS,
    Body,
    ErrorBody,
    Hello,
    Inspect,
    InspectReply,
    Purge,
    Purged,
    Requeue,
    Requeued,
    Role,
    parse_body,
)
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import Message

Answer = InspectReply | Requeued | Purged
AnswerT = TypeVar("AnswerT", InspectReply, Requeued, Purged)
ANSWERS: dict[str, type[Answer]] = {body.COMMAND: body for body in (InspectReply, Requeued, Purged)}


class OperatorClient:
    """A context manager: connected inside. Everything raises ErgonError where the broker refuses or does not answer."""

    def __init__(
        self, endpoint: str, run_id: str, *, timeout_s: float = 10.0, security: Security = OPEN, operator_id: str = ""
    ) -> None:
        self._endpoint, self._run_id, self._timeout_s = endpoint, run_id, timeout_s
        self._operator_id = operator_id or f"{_user()}@{socket.gethostname()}-{os.getpid()}"
        self._session = uuid.uuid4().hex
        self._connection = Connection(
            endpoint,
            hello=self._hello,
            on_welcome=self._on_welcome,
            on_message=self._on_message,
            on_failure=self._on_failure,
            name="operator",
            security=security,
        )
        self._answers: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

    def __enter__(self) -> OperatorClient:
        self._connection.start()
        try:
            self._connection.wait_welcome(self._timeout_s)
        except ProtocolError as error:
            self._connection.close()
            raise ErgonError(f"the broker at {self._endpoint} refuses this operator: {error.message}") from error
        except ErgonError:
            self._connection.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._connection.close(flush_s=0.2)

    def inspect(self, max_dead: int = 100) -> InspectReply:
        """What the broker knows at this moment, with at most `max_dead` dead letters."""
        request_id = uuid.uuid4().hex
        return self._ask(Inspect(request_id=request_id, max_dead=max_dead), request_id, InspectReply)

    def requeue(self, ticket_ids: Sequence[str]) -> Requeued:
        """Issue these dead tickets again, with no attempt used: all of them or, where `refused` says why not, none."""
        ids = _checked(ticket_ids)
        request_id = uuid.uuid4().hex
        return self._ask(Requeue(request_id=request_id, ticket_ids=ids), request_id, Requeued)

    def requeue_all(self) -> Requeued:
        """Issue every dead ticket again that can be; `refused` names the others."""
        request_id = uuid.uuid4().hex
        return self._ask(Requeue(request_id=request_id, all_dead=True), request_id, Requeued)

    def purge(self, ticket_ids: Sequence[str]) -> Purged:
        """Give these dead letters up: all of them or, where `refused` says why not, none."""
        ids = _checked(ticket_ids)
        request_id = uuid.uuid4().hex
        return self._ask(Purge(request_id=request_id, ticket_ids=ids), request_id, Purged)

    def purge_all(self) -> Purged:
        """Give every dead letter up."""
        request_id = uuid.uuid4().hex
        return self._ask(Purge(request_id=request_id, all_dead=True), request_id, Purged)

    def _ask(self, body: Body, request_id: str, expected: type[AnswerT]) -> AnswerT:
        self._answers = queue.SimpleQueue()  # without what came too late for an earlier question
        if self._connection.failure is not None:
            raise self._unanswered(body, self._connection.failure)
        with contextlib.suppress(ConnectionClosedError):  # _on_failure says why
            self._connection.send(body.pack())
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                answer = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise ErgonError(
                    f"the broker at {self._endpoint} has not answered {body.COMMAND} within {self._timeout_s:g} s; "
                    "look at its log, and with `ergon broker inspect` whether the command took effect"
                ) from None
            if isinstance(answer, Exception):
                raise self._unanswered(body, answer)
            if answer.request_id == request_id:
                if not isinstance(answer, expected):
                    raise self._unanswered(body, ErgonError(f"it said {answer.COMMAND} instead; update the broker"))
                return answer

    def _unanswered(self, body: Body, error: Exception) -> ErgonError:
        problem = ErgonError(f"the broker at {self._endpoint} has not answered {body.COMMAND}: {error}")
        problem.__cause__ = error
        return problem

    # --- in the connection's thread

    def _hello(self) -> Message:
        return Hello(role=Role.OPERATOR, peer_id=self._operator_id, run_id=self._run_id, session=self._session).pack()

    def _on_welcome(self, _welcome: Message, first: bool) -> None:
        if not first:
            self._on_failure(ErgonError("the connection was lost meanwhile; see with `ergon broker inspect`"))

    def _on_message(self, message: Message) -> None:
        if message.command == ErrorBody.COMMAND:
            body = parse_body(message, ErrorBody)
            self._answers.put(ProtocolError(body.known_code, body.message))
        elif message.command in ANSWERS:
            self._answers.put(parse_body(message, ANSWERS[message.command]))
        else:
            raise ProtocolError(ErrorCode.UNKNOWN_COMMAND, f"the broker sent {message.command!r:.40} to an operator")

    def _on_failure(self, error: Exception) -> None:
        self._answers.put(error)


def _checked(ticket_ids: Sequence[str]) -> tuple[str, ...]:
    """Ids as the wire takes them."""
    if not 1 <= len(ticket_ids) <= MAX_IDS:
        raise ErgonError(f"{len(ticket_ids)} ticket ids; allowed are 1 to {MAX_IDS} in one command")
    for ticket_id in ticket_ids:
        if not 1 <= len(ticket_id) <= 256:
            raise ErgonError(f"{ticket_id!r:.40} is no ticket id: these have 1 to 256 characters")
    return tuple(ticket_ids)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"uid-{os.getuid()}"
