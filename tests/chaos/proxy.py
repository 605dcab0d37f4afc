"""A network that can be broken: TCP proxies between peers and servers, all in one thread.

A link forwards bytes in both directions until told to reset (every connection ends with RST, whatever is on its way is
lost, messages are cut anywhere), to stall (bytes and ends of connections wait, in one direction or both) or to
black-hole (nothing passes, and what was connected or tried to connect is reset afterwards). Knows no message.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time

READ_BYTES = 64 << 10
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Link:
    """One listening port and the server behind it. `up` is towards the server. Methods are thread-safe."""

    def __init__(self, name: str, listen_port: int, target_port: int) -> None:
        self.name, self.listen_port, self._target_port = name, listen_port, target_port
        self._held_until: dict[str, float] = {"up": 0.0, "down": 0.0, "both": 0.0}
        self._hole_until = 0.0
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter | None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def num_connections(self) -> int:
        """Connections through this link at this moment."""
        return len(self._pairs)

    def reset(self) -> None:
        """End every connection with RST."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._abort_all)

    def stall(self, direction: str, seconds: float) -> None:
        """Hold everything back for so long, `up`, `down` or `both`."""
        self._held_until[direction] = max(self._held_until[direction], time.monotonic() + seconds)

    def black_hole(self, seconds: float) -> None:
        """Let nothing pass for so long, then reset what was connected or tried to."""
        self._hole_until = max(self._hole_until, time.monotonic() + seconds)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._end_hole()))

    def heal(self) -> None:
        """Take every fault back."""
        self._hole_until = 0.0
        self._held_until = dict.fromkeys(self._held_until, 0.0)

    # --- in the network's thread

    async def serve(self) -> asyncio.Server:
        """Listen."""
        self._loop = asyncio.get_running_loop()
        return await asyncio.start_server(self._accept, "127.0.0.1", self.listen_port, limit=READ_BYTES)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter | None] = (writer, None)
        self._pairs.add(pair)
        try:
            while self._in_hole():
                await asyncio.sleep(0.02)
            if writer.is_closing():
                return
            try:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port, limit=READ_BYTES)
            except OSError:
                return  # refused, as the server itself would
            self._pairs.discard(pair)
            pair = (writer, far_writer)
            self._pairs.add(pair)
            pumps = [
                asyncio.ensure_future(self._pump("up", reader, far_writer)),
                asyncio.ensure_future(self._pump("down", far_reader, writer)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            self._pairs.discard(pair)
            _abort(pair)

    async def _pump(self, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):  # a broken connection: the other end hears of it by the abort
            while True:
                data = await reader.read(READ_BYTES)
                while self._in_hole() or self._held(direction):
                    await asyncio.sleep(0.01)
                if not data:
                    return
                writer.write(data)
                await writer.drain()

    def _in_hole(self) -> bool:
        return time.monotonic() < self._hole_until

    def _held(self, direction: str) -> bool:
        return time.monotonic() < max(self._held_until[direction], self._held_until["both"])

    async def _end_hole(self) -> None:
        while self._in_hole():
            # What is connected now, or comes before the end, is lost: it goes before the first byte can pass.
            left_s = self._hole_until - time.monotonic()
            if left_s < 0.03:
                self._abort_all()
            await asyncio.sleep(min(0.01, max(0.0, left_s)))

    def _abort_all(self) -> None:
        for pair in tuple(self._pairs):
            _abort(pair)


def _abort(pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter | None]) -> None:
    for writer in pair:
        if writer is not None and not writer.transport.is_closing():
            raw = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()


class Network:
    """All links of a run, served by one thread; a context manager."""

    def __init__(self, links: list[Link]) -> None:
        self.links = {link.name: link for link in links}
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)

    def __enter__(self) -> Network:
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, *_error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            servers = [self._loop.run_until_complete(link.serve()) for link in self.links.values()]
        except OSError as error:
            self._error = error
            self._ready.set()
            return
        self._ready.set()
        self._loop.run_forever()
        for server in servers:
            server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()
