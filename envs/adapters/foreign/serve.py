"""The program of a process for other people's environments: loads them once, and plays each episode in a fork.

Run by the Python that has the package: `python serve.py SOCKET MODULE OPTIONS`. MODULE lies beside this file and has
`load(options)`, which is called once and returns what to tell the parent, and `play(ask, options)`, which plays one
episode: `ask(answer)` sends an answer and returns the next request. Ends with its standard input. What an episode does
to its process ends with it.
"""

import gc
import importlib
import json
import os
import pathlib
import select
import signal
import socket
import sys
from typing import Any


def serve(connection: socket.socket, module: Any, options: "dict[str, Any]") -> None:
    """One episode, in the fork: requests and answers are JSON, one a line."""
    requests = connection.makefile("r", encoding="utf-8")

    def ask(answer: "dict[str, Any]") -> Any:
        connection.sendall(json.dumps(answer).encode() + b"\n")
        line = requests.readline()
        if not line:
            os._exit(0)  # the parent has hung up: the episode is over
        return json.loads(line)

    try:
        module.play(ask, options)
    except BaseException as error:  # noqa: BLE001  it is told to the parent, and the fork ends
        connection.sendall(json.dumps({"failed": f"{type(error).__name__}: {error}"[:2000]}).encode() + b"\n")


def main() -> None:
    """Load, say so, and fork for every connection. What packages print goes to standard error."""
    path, name, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(128)
    try:
        module: Any = importlib.import_module(name)
        about = module.load(options)
    except BaseException as error:  # noqa: BLE001  it is told to the parent
        about = {"failed": f"{type(error).__name__}: {error}"[:2000]}
    gc.collect()
    gc.freeze()  # a collection in a fork would write to, and so copy, every page of what was loaded
    told.write(json.dumps(about) + "\n")
    told.flush()
    if "failed" in about:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the forks
    while True:
        ready = select.select([listener, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            serve(connection, module, options)
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).parent)
    main()
