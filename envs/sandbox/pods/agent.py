"""The session of a sandbox's pod: runs commands and the persistent shell for its actor, over one exec connection.

Sent into the pod as text (manifest.py), so it imports the standard library alone. Requests come on stdin, answers go
out on stdout, both as frames: one letter, a number, a length, and so many bytes. No command has either: each gets pipes
and sockets of its own. Started from a file that nobody may read, its memory and descriptors are closed to what runs
beside it under the same user; it can be killed, which its actor takes as the policy's doing.

    X  run a command; the answer R has its status and outputs     K  kill everything but PID 1 and this
    S  start the persistent shell; E says that it has ended       I  interrupt the shell's command
    D  from and to the shell's own socket                         C  so many bytes of shell output were taken
    O  output of the shell                                        P  is anybody there?
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import time

KEEPER = "\0ergon-keeper"
KEEPER_S = 10.0
HEADER = struct.Struct(">cII")  # letter, number, length of what follows
COMMAND = struct.Struct(">III")  # milliseconds, bytes of each output to keep, length of the script; then stdin
RESULT = struct.Struct(">iBI")  # exit status or -1, flags, length of stdout; then stderr
TRUNCATED, TIMED_OUT, FLOODED = 1, 2, 4
CLOSED, STOPPED = 1, 2
CANNOT_START = 126  # as a shell says it

SILENCE_S = 150.0  # an actor says something every 30 s
FLOOD_BYTES = 64 << 20
READ_BYTES = 64 << 10
DRAIN_BYTES = 128 << 10  # at most, before an answer of the shell: something may go on writing
CREDIT_BYTES = 256 << 10  # of shell output that the actor has not taken yet
ANSWER_BYTES = 64 << 10  # of the shell's own socket, for each thing that it was told
WORK = "/workspace"
SURROUNDINGS = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": WORK, "LANG": "C.UTF-8"}
BASH = ["/bin/bash", "--noprofile", "--norc"]


class Stream:
    """The reading end of an output pipe: keeps the first bytes, counts the rest."""

    def __init__(self) -> None:
        self.fd, self.writing = os.pipe()
        os.set_blocking(self.fd, False)
        self.data = bytearray()
        self.num_bytes = self.keep = 0

    def begin(self, keep: int) -> None:
        """Forget what came so far, keep so many bytes of what comes."""
        self.keep = 0
        self.drain()
        self.data = bytearray()
        self.num_bytes, self.keep = 0, keep

    def read(self) -> int:
        """Bytes read; 0 where there are none."""
        try:
            chunk = os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return 0
        self.data += chunk[: max(0, self.keep - len(self.data))]
        self.num_bytes += len(chunk)
        return len(chunk)

    def drain(self) -> None:
        """Read what is there, up to a bound."""
        left = 1 << 20
        while left > 0 and (num_read := self.read()) > 0:
            left -= num_read


class Agent:
    """The loop and what it holds."""

    def __init__(self, bounds: str) -> None:
        self.bounds = bounds  # a `ulimit` command, for all that is started
        self.poll = select.poll()
        self.pending = bytearray()
        self.heard_at = time.monotonic()
        self.stdout, self.stderr = Stream(), Stream()
        self.command: subprocess.Popen[bytes] | None = None
        self.number = 0
        self.deadline = 0.0
        self.shell: subprocess.Popen[bytes] | None = None
        self.control: socket.socket | None = None
        self.allowance = 0
        self.output, self.shell_writing = os.pipe()
        os.set_blocking(self.output, False)
        self.credit = CREDIT_BYTES
        self.wake, waker = os.pipe()
        for fd in (self.wake, waker):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for fd in (0, self.wake, self.stdout.fd, self.stderr.fd, self.output):
            self.poll.register(fd, select.POLLIN)

    def run(self) -> None:
        """Until the connection ends, or nothing comes over it: its end may never be told."""
        while time.monotonic() - self.heard_at < SILENCE_S:
            for fd, _ in self.poll.poll(self.patience_ms()):
                if fd == 0:
                    chunk = os.read(0, READ_BYTES)
                    if not chunk:
                        return
                    self.heard_at = time.monotonic()
                    self.pending += chunk
                    self.take()
                elif fd == self.wake:
                    os.read(self.wake, 4096)
                elif fd == self.output:
                    self.pass_output(READ_BYTES)
                elif self.control is not None and fd == self.control.fileno():
                    self.pass_control()
                elif fd in (self.stdout.fd, self.stderr.fd):
                    self.collect(self.stdout if fd == self.stdout.fd else self.stderr)
            self.look_after()

    def patience_ms(self) -> int:
        """Until the command's time is over, or it is time to look whether anybody is there."""
        now = time.monotonic()
        until = self.heard_at + SILENCE_S
        return max(0, int(((until if self.command is None else min(until, self.deadline)) - now) * 1000) + 1)

    def take(self) -> None:
        """Do what has arrived whole."""
        while len(self.pending) >= HEADER.size:
            letter, number, length = HEADER.unpack_from(self.pending)
            if len(self.pending) < HEADER.size + length:
                return
            body = bytes(self.pending[HEADER.size : HEADER.size + length])
            del self.pending[: HEADER.size + length]
            self.do(letter, number, body)

    def do(self, letter: bytes, number: int, body: bytes) -> None:
        """One request."""
        if letter == b"X":
            self.start_command(number, body)
            return
        if letter == b"S":
            self.start_shell(number)
            return
        if letter == b"D":
            self.allowance = ANSWER_BYTES
            if self.control is not None:
                self.listen(self.control.fileno(), True)
                self.tell_shell(body)
            return
        if letter == b"C":
            self.credit += number
            self.listen(self.output, self.credit > 0)
            return
        if letter == b"K":
            kill_others()
        elif letter == b"I" and self.shell is not None:
            interrupt(self.shell.pid)
        answer(b"A", number)

    # --- commands

    def start_command(self, number: int, body: bytes) -> None:
        """Start what will be answered with R."""
        milliseconds, keep, length = COMMAND.unpack_from(body)
        script = body[COMMAND.size : COMMAND.size + length]
        given = body[COMMAND.size + length :]
        for stream in (self.stdout, self.stderr):
            stream.begin(keep)
        source = os.memfd_create("stdin") if given else os.open("/dev/null", os.O_RDONLY)
        try:
            if given:
                with open(os.dup(source), "wb") as file:  # noqa: PTH123  a descriptor, not a path
                    file.write(given)
                os.lseek(source, 0, os.SEEK_SET)
            self.command = subprocess.Popen(
                [*BASH, "-c", f'{self.bounds} && exec /bin/sh -c "$0"', script],
                stdin=source,
                stdout=self.stdout.writing,
                stderr=self.stderr.writing,
                cwd=WORK,
                env=SURROUNDINGS,
            )
        except OSError as error:  # no process to be had: others of the policy's have used them up
            answer(b"R", number, RESULT.pack(CANNOT_START, 0, 0) + str(error).encode())
        finally:
            os.close(source)
        self.number, self.deadline = number, time.monotonic() + milliseconds / 1000

    def collect(self, stream: Stream) -> None:
        """Take output; kill what floods it."""
        stream.read()
        if self.command is not None and stream.num_bytes > FLOOD_BYTES:
            self.end_command(FLOODED)

    def look_after(self) -> None:
        """See whether the command or the shell has ended, or the command's time."""
        if self.command is not None:
            if self.command.poll() is not None:
                self.answer_command(self.command.returncode, 0)
            elif time.monotonic() >= self.deadline:
                self.end_command(TIMED_OUT)
        if self.shell is not None and self.shell.poll() is not None:
            self.shell_ended(self.shell.pid)

    def end_command(self, flag: int) -> None:
        """Kill everything, answer with what there was."""
        kill_others()
        if self.command is not None:
            self.command.wait()
        self.answer_command(None, flag)

    def answer_command(self, status: int | None, flags: int) -> None:
        """R."""
        for stream in (self.stdout, self.stderr):
            stream.drain()
            if stream.num_bytes > len(stream.data):
                flags |= TRUNCATED
        code = -1 if status is None else status if status >= 0 else 128 - status
        out, err = bytes(self.stdout.data), bytes(self.stderr.data)
        self.command = None
        answer(b"R", self.number, RESULT.pack(code, flags, len(out)) + out + err)

    # --- the shell

    def start_shell(self, number: int) -> None:
        """An interactive bash without a terminal, on a socket of its own and the output pipe, as descriptor 4."""
        if self.shell is not None:  # it was killed a moment ago
            self.shell.kill()
            self.shell.wait()
        self.release_control()
        ours, theirs = socket.socketpair()
        control, output = theirs.fileno(), self.shell_writing
        move = f"<&{control} 4>&{output} {control}<&- {output}>&- >/dev/null 2>&1"
        with theirs:
            self.shell = subprocess.Popen(
                [*BASH, "-c", f"{self.bounds} && exec env --default-signal=INT,QUIT bash --noprofile --norc -i {move}"],
                pass_fds=(control, output),
                cwd=WORK,
                env=SURROUNDINGS,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        ours.setblocking(False)
        self.control, self.allowance = ours, ANSWER_BYTES
        self.listen(ours.fileno(), True)
        answer(b"S", number, str(self.shell.pid).encode())

    def tell_shell(self, body: bytes) -> None:
        """Write to the shell's socket; it reads between commands, and one is not written before the last has ended."""
        assert self.control is not None
        self.control.setblocking(True)
        self.control.settimeout(5.0)
        try:
            self.control.sendall(body)
        except OSError:
            return  # it has ended or does not read, which its actor will find out
        finally:
            self.control.setblocking(False)

    def pass_control(self) -> None:
        """What the shell says, after all that it has put out before."""
        assert self.control is not None
        try:
            data = self.control.recv(min(4096, self.allowance))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.allowance -= len(data)
        if not data or self.allowance <= 0:
            self.listen(self.control.fileno(), False)
        self.pass_output(DRAIN_BYTES)
        if data:
            answer(b"D", 0, data)

    def pass_output(self, num_bytes: int) -> None:
        """Send what is in the pipe, up to a bound."""
        while num_bytes > 0:
            try:
                chunk = os.read(self.output, READ_BYTES)
            except BlockingIOError:
                break
            num_bytes -= len(chunk)
            self.credit -= len(chunk)
            answer(b"O", 0, chunk)
        self.listen(self.output, self.credit > 0)

    def shell_ended(self, pid: int) -> None:
        """E, after its last words."""
        self.shell = None
        self.pass_output(DRAIN_BYTES)
        self.release_control()
        answer(b"E", pid)

    def release_control(self) -> None:
        """Close the shell's socket."""
        if self.control is not None:
            self.listen(self.control.fileno(), False)
            self.control.close()
            self.control = None

    def listen(self, fd: int, wanted: bool) -> None:
        """Whether a descriptor is looked at."""
        if wanted:
            self.poll.register(fd, select.POLLIN)
            return
        try:
            self.poll.unregister(fd)
        except KeyError:
            return


def another_is_stopped() -> bool:
    """Whether an earlier session is there and was stopped, which only a command can have done."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) not in (1, os.getpid()):
            try:
                with open(f"{entry.path}/cmdline", "rb") as file:  # noqa: PTH123  as below
                    is_session = b"ERGON_AGENT" in file.read()
                with open(f"{entry.path}/stat", "rb") as file:  # noqa: PTH123
                    state = file.read().rpartition(b")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
            if is_session and state in (b"T", b"t"):
                return True
    return False


def kill_others() -> None:
    """Everything but PID 1 and this process."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        return  # there is nothing else


def interrupt(pid: int) -> None:
    """Ctrl-C for a process group."""
    try:
        os.killpg(pid, signal.SIGINT)
    except ProcessLookupError:
        return  # it has ended, which the actor is told


def answer(letter: bytes, number: int, body: bytes = b"") -> None:
    """Write a frame, whole."""
    view = memoryview(HEADER.pack(letter, number, len(body)) + body)
    while view:
        view = view[os.write(1, view) :]


def main() -> None:
    """Say whether this process is closed to others, and whether another session was stopped; then serve."""
    keeper = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + KEEPER_S
    while keeper.connect_ex(KEEPER):  # a container runs before its first process has come so far
        if time.monotonic() > deadline:
            raise SystemExit("the pod's PID 1 does not answer")
        time.sleep(0.01)
    closed = os.stat("/proc/self/fd").st_uid != os.getuid()  # noqa: PTH116  pathlib takes as long as all the rest
    answer(b"H", CLOSED * closed | STOPPED * another_is_stopped())
    Agent(os.environ["ERGON_BOUNDS"]).run()


if __name__ == "__main__":
    main()
