"""A TCP proxy before a server on loopback, whose passing of bytes a test decides."""

from __future__ import annotations

import socket
import threading
from abc import abstractmethod


class Proxy(threading.Thread):
    """Takes connections at `endpoint` and has `_pass` serve each one and its own connection to the server's port.

    While nobody serves that port, connections are taken and closed at once. Start it when all is set up.
    """

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"

    def run(self) -> None:
        while True:
            try:
                inside, _ = self._server.accept()
            except OSError:
                return
            try:
                outside = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                inside.close()
                continue
            threading.Thread(target=self._pass, args=(inside, outside), daemon=True).start()

    def close(self) -> None:
        """Take no further connection."""
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    @abstractmethod
    def _pass(self, inside: socket.socket, outside: socket.socket) -> None:
        """Pass bytes on both ways until one side closes, and close both."""
