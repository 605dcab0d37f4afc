"""PID 1 of a sandbox's pod: keeps the pod, takes the orphans' exit statuses, ends when its actor has gone.

Sent into the pod as text (manifest.py), so it imports the standard library alone and runs no command of anybody. As
the first process of its namespace it cannot be killed from inside; started from a file that nobody may read, it cannot
be traced or written into either. Sessions (agent.py) hold a connection to it; when there has been none for the seconds
that its argument says, no actor holds this pod any more, and it ends.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time

ADDRESS = "\0ergon-keeper"
MAX_CONNECTIONS = 64


def take_statuses() -> None:
    """Of all processes that have ended and were left to PID 1."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def main() -> None:
    """Keep the pod until no session has been there for long enough."""
    patience_s = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    wake, waker = os.pipe()
    for fd in (wake, waker):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(ADDRESS)
    listener.listen(16)
    listener.setblocking(False)
    connections: dict[int, socket.socket] = {}
    poll = select.poll()
    for fd in (wake, listener.fileno()):
        poll.register(fd, select.POLLIN)
    alone_since = time.monotonic()
    while connections or time.monotonic() - alone_since < patience_s:
        for fd, _ in poll.poll(1000):
            if fd == wake:
                os.read(wake, 4096)
            elif fd == listener.fileno():
                try:
                    made, _ = listener.accept()
                except OSError:
                    continue  # it has gone again
                if len(connections) >= MAX_CONNECTIONS:
                    made.close()
                    continue
                connections[made.fileno()] = made
                poll.register(made.fileno(), select.POLLRDHUP)
            else:
                poll.unregister(fd)
                connections.pop(fd).close()
                alone_since = time.monotonic()
        take_statuses()


if __name__ == "__main__":
    main()
