"""The ranks of one trainer: the process group they join, and the line on which rank 0 tells the others what to do.

The line is a gloo group of its own, so it carries objects of host memory whatever moves the gradients. Rank 0 speaks,
the others listen; while there is nothing to do it says so every few seconds, so that a listener can tell a long wait
from a rank 0 that is gone. Knows nothing of models. With one rank there is nobody to talk to, and no line.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from broker.process.lifecycle import ErgonError

logger = logging.getLogger(__name__)

IDLE = "idle"
_BEATS_PER_TIMEOUT = 4
_MAX_BEAT_S = 10.0


class Ranks:
    """This process's place among the ranks. One per process; `close` gives it up.

    timeout_s: how long a rank waits for the others in any collective call.
    """

    def __init__(self, master_port: int, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._made = _join(master_port, self._timeout)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._line: Any = None
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._beats: threading.Thread | None = None
        if self.world_size == 1:
            return
        self._line = dist.new_group(backend="gloo", timeout=self._timeout)
        if self.rank == 0:
            interval_s = min(_MAX_BEAT_S, timeout_s / _BEATS_PER_TIMEOUT)
            self._beats = threading.Thread(target=self._beat, args=(interval_s,), name="rank-beat", daemon=True)
            self._beats.start()

    # --- rank 0

    @contextmanager
    def told(self, *command: Any) -> Iterator[None]:
        """Tell the other ranks a command and keep the line until its work is done."""
        with self._lock:
            self._broadcast(command)
            yield

    def scatter(self, items: Sequence[Any]) -> Any:
        """Rank 0, within a command: send each rank its own item; returns rank 0's."""
        for rank in range(1, self.world_size):
            for tensor in _frames(items[rank]):
                dist.send(tensor, rank, group=self._line)
        return items[0]

    # --- the others

    def listen(self) -> tuple[Any, ...]:
        """The next command of rank 0. Raises RuntimeError where rank 0 is gone, or silent for too long."""
        while True:
            command: tuple[Any, ...] = _receive(lambda tensor: dist.broadcast(tensor, 0, group=self._line))
            if command[0] != IDLE:
                return command

    def receive(self) -> Any:
        """What `scatter` sent to this rank."""
        return self._received_from(0)

    # --- all

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on rank 0; nothing on the others. For large arrays."""
        if self.rank:
            for tensor in _frames(value):
                dist.send(tensor, 0, group=self._line)
            return []
        return [value, *(self._received_from(rank) for rank in range(1, self.world_size))]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on every rank. For small objects."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._line)
        return values

    def close(self, destroy: Callable[[], None] = dist.destroy_process_group) -> None:
        """Leave the process group by `destroy`, and take the variables back that were made for it. Idempotent."""
        self._closed.set()
        if self._beats is not None:  # one that is still in a call when the interpreter ends would abort the process
            self._beats.join()
            self._beats = None
        with self._lock:
            if dist.is_initialized():
                destroy()
            for name in self._made:  # a process that is started from here is no rank of that group
                os.environ.pop(name, None)
            self._made = ()

    def _received_from(self, rank: int) -> Any:
        return _receive(lambda tensor: dist.recv(tensor, rank, group=self._line))

    def _broadcast(self, command: tuple[Any, ...]) -> None:
        if self._line is not None:
            for tensor in _frames(command):
                dist.broadcast(tensor, 0, group=self._line)

    def _beat(self, interval_s: float) -> None:
        while not self._closed.wait(interval_s):
            with self._lock:
                if self._closed.is_set():
                    return
                try:
                    self._broadcast((IDLE,))
                except RuntimeError as error:
                    # A trainer without all its ranks can do nothing, not even save: whoever started it must start anew.
                    logger.critical("a rank is gone, so this process ends error=%s", str(error).splitlines()[0])
                    logging.shutdown()
                    os._exit(1)


def _frames(value: Any) -> list[torch.Tensor]:
    """An object as three tensors: the length of the next, the lengths of its parts, its parts (arrays as they are)."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    lengths = torch.tensor([part.nbytes for part in parts], dtype=torch.int64)
    body = torch.empty(int(lengths.sum()), dtype=torch.uint8)
    view, start = body.numpy(), 0
    for part in parts:
        if part.nbytes:
            view[start : start + part.nbytes] = np.frombuffer(part, np.uint8)
        start += part.nbytes
    return [torch.tensor([len(parts)], dtype=torch.int64), lengths, body]


def _receive(fill: Any) -> Any:
    """The object whose three tensors `fill` writes."""
    count = torch.zeros(1, dtype=torch.int64)
    fill(count)
    lengths = torch.zeros(int(count), dtype=torch.int64)
    fill(lengths)
    body = torch.empty(int(lengths.sum()), dtype=torch.uint8)
    fill(body)
    view, start = memoryview(body.numpy().data), 0
    parts: list[memoryview] = []
    for length in lengths.tolist():
        parts.append(view[start : start + length])
        start += length
    return pickle.loads(parts[0], buffers=parts[1:])


def _join(master_port: int, timeout: timedelta) -> tuple[str, ...]:
    """Join the process group that a launcher prepared, or be the only rank of a new one; the variables that needed."""
    made: tuple[str, ...] = ()
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        check_port(master_port)
        os.environ.update(alone, MASTER_PORT=str(master_port))
        made = (*alone, "MASTER_PORT")
    if torch.cuda.is_available():  # before anything is put on a device
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
    return made


def check_port(port: int) -> None:
    """Say in one sentence what torch.distributed would say in fifty lines."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ErgonError(
                f"learner.master_port {port} cannot be bound ({error.strerror}); set another one or stop its holder"
            ) from error
