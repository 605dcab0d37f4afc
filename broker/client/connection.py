"""One DEALER socket in one thread: HELLO, heartbeats both ways, liveness, reconnection.

Owns the connection of a peer to a server of either channel; knows no ticket, trajectory or weight, and never decides
what to send again: its owner does.

The pattern is the Paranoid Pirate of the ZeroMQ guide with a session handshake: a socket is used from the HELLO to the
first sign of loss (a TCP disconnect, `liveness` silent heartbeats, UNKNOWN_PEER), then thrown away with all that was
queued on it, and a new one says HELLO after a jittered backoff.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable

import zmq

from broker.client.handshake import EVENTS, Handshakes
from broker.process.keys import Identity
from broker.process.lifecycle import ErgonError
from broker.process.security import OPEN, OVERHEAD_BYTES, Security
from broker.process.wakeup import Wakeup
from broker.protocol.commands import ErrorBody, Heartbeat, Period, Welcome, parse_body
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.frames import DEFAULT_LIMITS, Limits, Message, decode, encode
from broker.protocol.trajectory import Facts, Positive

log = logging.getLogger(__name__)

BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 3.0
FLUSH_S = 2.0  # at close, for what is still queued
_LAST, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
RETRIED_CODES = frozenset({ErrorCode.DISK_FULL})  # refusals of a HELLO that pass by themselves


class ConnectionClosedError(Exception):
    """`send` after `close`, or after the connection failed for good."""


class _LostError(Exception):
    """This socket is no good any more; the text says why."""


class _Timers(Facts, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """What a connection reads of a WELCOME, of either channel; the rest is its owner's."""

    heartbeat_s: Period
    liveness: Positive


class Connection:
    """A connection that outlives its sockets.

    All callbacks run in the connection's thread and must not block. `on_welcome(welcome, first)` gets the WELCOME after
    every handshake, with `lock` held, and must send what is outstanding: whatever was queued before is discarded.
    `first` is True for the first WELCOME of this Connection. `on_message` gets every message but WELCOME and HEARTBEAT,
    ordinary ERRORs included. `on_failure(exc)` is called once, when the connection has ended for good (a fatal ERROR, a
    refused handshake, bytes that break the protocol, an exception in a callback); `failure` holds that exception from
    then on.

    Hold `lock` (re-entrant) where a computed message and its `send` must not be separated by a reconnection.
    `heartbeat_s` and `liveness` hold until the WELCOME names the server's own. `heartbeat` makes the message that is
    sent every `heartbeat_s`; `hello` makes the HELLO. `server` is the identity that the other side must prove,
    where `security` has keys.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        hello: Callable[[], Message],
        on_welcome: Callable[[Message, bool], None],
        on_message: Callable[[Message], None],
        on_failure: Callable[[Exception], None],
        heartbeat: Callable[[], Message] = lambda: Message(Heartbeat.COMMAND),
        heartbeat_s: float = 1.0,
        liveness: int = 15,
        name: str = "connection",
        limits: Limits = DEFAULT_LIMITS,
        max_queued: int | None = None,
        security: Security = OPEN,
        server: Identity = Identity.BROKER,
    ) -> None:
        self.endpoint = endpoint
        self._security, self._server = security, server
        self._handshakes = Handshakes(endpoint, security, server)
        self.lock = threading.RLock()
        self._hello, self._heartbeat = hello, heartbeat
        self._on_welcome, self._on_message, self._on_failure = on_welcome, on_message, on_failure
        self._heartbeat_s, self._liveness = heartbeat_s, liveness
        self._name, self._limits, self._max_queued = name, limits, max_queued
        self._queue: deque[Message] = deque()
        self._failure: Exception | None = None
        self._welcomed = False  # on the present socket
        self._num_welcomes = 0
        self._stop = False
        self._flush_until = 0.0
        self._settled = threading.Event()  # first WELCOME, failure or close
        self._learner_present_until: float | None = None
        self._wakeup = Wakeup()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def failure(self) -> Exception | None:
        """Why the connection ended for good, or None."""
        return self._failure

    @property
    def connected(self) -> bool:
        """Whether the present socket has had its WELCOME."""
        return self._welcomed

    def start(self) -> None:
        """Start the thread, which says HELLO."""
        self._thread.start()

    def wait_welcome(self, timeout_s: float) -> None:
        """Block until the first WELCOME. Raises the failure, or ErgonError when nobody answered in time."""
        self._settled.wait(timeout_s)
        if self._failure is not None:
            raise self._failure
        if self._num_welcomes == 0:
            raise ErgonError(
                f"no answer from {self.endpoint} within {timeout_s:g} s; "
                + (
                    self._handshakes.trouble
                    or "start the process that serves it, or correct its host and port in the configuration"
                )
            )

    def send(self, message: Message) -> bool:
        """Queue a message; from any thread. False where there is no welcomed socket: on_welcome will have to send it.

        Raises ConnectionClosedError after the end, BufferError when `max_queued` messages wait already.
        """
        with self.lock:
            if self._stop or self._failure is not None:
                raise ConnectionClosedError(f"the connection to {self.endpoint} is closed")
            if not self._welcomed:
                return False
            if self._max_queued is not None and len(self._queue) >= self._max_queued:
                raise BufferError(f"{self._max_queued} messages to {self.endpoint} are waiting already")
            idle = not self._queue  # else the thread is awake, or waits for the socket to take more
            self._queue.append(message)
        if idle and threading.current_thread() is not self._thread:
            self._wakeup.wake()
        return True

    def close(self, flush_s: float = FLUSH_S) -> None:
        """Send what is queued (for at most `flush_s`), close the socket, end the thread. Idempotent."""
        with self.lock:
            self._flush_until = time.monotonic() + flush_s
            self._stop = True
        self._settled.set()
        self._wakeup.wake()
        if threading.current_thread() is not self._thread:
            if self._thread.ident is not None:
                self._thread.join()
            self._wakeup.close()

    # Everything below runs in the thread.

    def _run(self) -> None:
        backoff_s = BACKOFF_MIN_S
        try:
            while not self._stop:
                welcomes = self._num_welcomes
                try:
                    self._serve()
                except _LostError as reason:
                    level = logging.WARNING if self._welcomed else logging.DEBUG  # the rest is news of the same outage
                    log.log(level, "Connection lost. name=%s endpoint=%s reason=%s", self._name, self.endpoint, reason)
                with self.lock:
                    self._welcomed = False
                    self._queue.clear()
                backoff_s = BACKOFF_MIN_S if self._num_welcomes > welcomes else min(2 * backoff_s, BACKOFF_MAX_S)
                self._pause(backoff_s * random.uniform(0.5, 1.0))
        except Exception as error:  # noqa: BLE001  handed to the owner, which would otherwise wait for ever
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        with self.lock:
            self._welcomed = False
            self._queue.clear()
            self._failure = error
        if isinstance(error, ProtocolError | ErgonError):
            log.error("Connection refused. name=%s endpoint=%s error=%s", self._name, self.endpoint, error)
        else:
            log.error("Connection failed. name=%s endpoint=%s", self._name, self.endpoint, exc_info=error)
        self._settled.set()
        self._on_failure(error)

    def _pause(self, seconds: float) -> None:
        """Wait, unless the connection is closed meanwhile."""
        deadline = time.monotonic() + seconds
        poller = zmq.Poller()
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        while not self._stop and (left_s := deadline - time.monotonic()) > 0:
            if poller.poll(int(left_s * 1000) + 1):
                self._wakeup.drain()

    def _serve(self) -> None:
        """Use one socket from HELLO to its end. Raises _LostError, or what ends the connection for good."""
        dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RECONNECT_IVL, 100)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        dealer.setsockopt(zmq.MAXMSGSIZE, self._limits.max_array_bytes + OVERHEAD_BYTES)
        monitor = dealer.get_monitor_socket(EVENTS)
        try:
            self._security.protect_client(dealer, self._server)
            dealer.connect(self.endpoint)
            self._say_hello(dealer, monitor)
            self._poll(dealer, monitor)
        finally:
            dealer.disable_monitor()
            monitor.close(linger=0)
            dealer.close()

    def _say_hello(self, dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        try:
            dealer.send_multipart(encode(self._hello()), zmq.NOBLOCK)
        except zmq.Again:
            # The handshake was refused already: ZeroMQ has given the connection up, and would wait here for ever.
            raise _LostError(self._handshakes.read(monitor)) from None

    def _poll(self, dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(self._wakeup.fileno(), zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        last_heard = last_beat = time.monotonic()
        while True:
            poller.register(dealer, zmq.POLLIN | (zmq.POLLOUT if self._queue else 0))
            window_s = self._heartbeat_s * self._liveness
            due = last_heard + window_s
            if self._welcomed:
                due = min(due, last_beat + self._heartbeat_s)
            events = dict(poller.poll(int(max(0.0, due - time.monotonic()) * 1000) + 1))
            if self._wakeup.fileno() in events:
                self._wakeup.drain()
            if self._receive(dealer):
                last_heard = time.monotonic()
            if monitor in events:
                raise _LostError(self._handshakes.read(monitor))
            now = time.monotonic()
            if self._welcomed and now - last_beat >= self._heartbeat_s and not self._stop:
                last_beat = now
                self.send(self._heartbeat())
            sent_all = self._flush(dealer)
            if self._stop:
                if sent_all or not self._welcomed or now >= self._flush_until:
                    dealer.setsockopt(
                        zmq.LINGER, int(1000 * max(0.0, self._flush_until - now)) if self._welcomed else 0
                    )
                    return
            elif now - last_heard >= window_s:
                raise _LostError(f"silent for {now - last_heard:.1f} s")

    def _receive(self, dealer: zmq.Socket[bytes]) -> bool:
        """Handle what has arrived, at most 64 messages; whether there was anything."""
        for num in range(64):
            try:
                frames = [dealer.recv(zmq.NOBLOCK, copy=False)]
            except zmq.Again:
                return num > 0
            while frames[-1].more:  # recv_multipart asks the socket instead, which takes longer than the rest of it
                frames.append(dealer.recv(zmq.NOBLOCK, copy=False))
            self._handle(decode([frame.buffer for frame in frames], self._limits))
        return True

    def _handle(self, message: Message) -> None:
        if message.command == Heartbeat.COMMAND:
            return
        if message.command == Welcome.COMMAND:
            self._handle_welcome(message)
        elif message.command == ErrorBody.COMMAND:
            self._handle_error(message)
        elif self._welcomed:
            self._on_message(message)
        else:
            raise ProtocolError(ErrorCode.BAD_STATE, f"{self.endpoint} sent {message.command!r:.40} before WELCOME")

    def _handle_welcome(self, message: Message) -> None:
        if self._welcomed:
            return
        timers = parse_body(message, _Timers)
        self._heartbeat_s, self._liveness = timers.heartbeat_s, timers.liveness
        with self.lock:
            self._welcomed = True
            self._num_welcomes += 1
            self._learner_present_until = None
            self._handshakes.succeeded()
            self._on_welcome(message, self._num_welcomes == 1)
        self._settled.set()
        log.info("Connected. name=%s endpoint=%s welcomes=%d", self._name, self.endpoint, self._num_welcomes)

    def _handle_error(self, message: Message) -> None:
        body = parse_body(message, ErrorBody)
        if body.code == ErrorCode.UNKNOWN_PEER or (not self._welcomed and body.code in RETRIED_CODES):
            raise _LostError(body.message)
        if body.code == ErrorCode.LEARNER_PRESENT and not self._welcomed:
            # A killed predecessor holds its place until its liveness runs out: wait for that, once.
            now = time.monotonic()
            if self._learner_present_until is None:
                self._learner_present_until = now + 1.25 * self._heartbeat_s * self._liveness
            if now < self._learner_present_until:
                raise _LostError(body.message)
        if body.fatal or not self._welcomed:
            raise ProtocolError(body.known_code, body.message)
        self._on_message(message)

    def _flush(self, dealer: zmq.Socket[bytes]) -> bool:
        """Send what is queued as far as the socket takes it; whether all of it went."""
        while self._queue:
            frames = encode(self._queue[0])
            try:
                # send_multipart combines its flags anew for every frame, which takes as long as the sending.
                for frame in frames[:-1]:
                    dealer.send(frame, _MORE, copy=False)
                dealer.send(frames[-1], _LAST, copy=False)
            except zmq.Again:
                return False
            with self.lock:
                if self._queue:
                    self._queue.popleft()
        return True
