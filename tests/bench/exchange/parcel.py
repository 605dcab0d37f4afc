"""The TRAJECTORY messages of a thin client, prebuilt: only tickets and the first token of each trajectory are put in.

Owns the frames of one run's parcels, as the real client makes them: as many trajectories as fit PARCEL_BYTES, or one.
A message made here holds the packed tickets as the broker sent them. No two trajectories are equal, because the store
names large arrays by their content. Never opens a socket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import numpy.typing as npt

from broker.protocol.codec import pack_trajectories
from broker.protocol.commands import MAX_ITEMS, PARCEL_BYTES
from broker.protocol.frames import Frame, encode
from broker.protocol.trajectory import Trajectory
from tests.bench.exchange.load import Job, make_ticket, make_trajectory

COPY_BELOW = 64 << 10  # smaller frames are cheaper copied than referenced
PackedTicket = bytes | msgspec.Raw


class _Template:
    """The parcels of `num` trajectories."""

    def __init__(self, job: Job, num: int) -> None:
        trajectory = make_trajectory(job)
        tickets = [make_ticket(job, index) for index in range(num)]
        frames = encode(pack_trajectories([_answer(trajectory, index, job) for index in range(num)]))
        pieces, rest = [], bytes(frames[1])
        for ticket in tickets:
            piece, _, rest = rest.partition(msgspec.msgpack.encode(ticket))
            pieces.append(piece)
        if len(set(pieces[1:])) > 1:
            raise AssertionError("trajectories that differ in their tickets alone differ in more")
        self._before, self._between, self._after = pieces[0], b"".join(pieces[1:2]), rest
        self._preamble, self._arrays = frames[0], frames[3:]
        self._token_ids_NT = np.frombuffer(frames[2], "<i4").reshape(num, -1)
        self._num = num
        self.copy = len(frames[2]) < COPY_BELOW
        self.free: list[npt.NDArray[np.int32]] = []

    def buffer(self) -> npt.NDArray[np.int32]:
        """Token ids that no message uses any more, int32 [num, tokens of each]."""
        return self.free.pop() if self.free else self._token_ids_NT.copy()

    def frames(self, tickets: Sequence[PackedTicket], token_ids_NT: npt.NDArray[np.int32], token: int) -> list[Frame]:
        """The message about these tickets; its trajectories begin with the tokens `token`, `token` + 1 and so on."""
        token_ids_NT[:, 0] = np.arange(token, token + self._num)
        envelope = b"".join((self._before, self._between.join(tickets), self._after))
        return [self._preamble, envelope, token_ids_NT.data.cast("B", (token_ids_NT.nbytes,)), *self._arrays]


def _answer(trajectory: Trajectory, index: int, job: Job) -> Trajectory:
    head = msgspec.structs.replace(trajectory.head, ticket=make_ticket(job, index))
    return replace(trajectory, head=head)


class Parcels:
    """Makes the messages of all actors of a run."""

    def __init__(self, job: Job) -> None:
        self._job, self._templates = job, dict[int, _Template]()
        one = pack_trajectories([make_trajectory(job)])
        self._most = max(1, min(MAX_ITEMS, PARCEL_BYTES // (one.array_bytes + len(one.body))))
        self._lent: dict[int, list[tuple[_Template, npt.NDArray[np.int32]]]] = {}
        self._token = 0
        for num in {min(self._most, job.window), job.window % self._most} - {0}:
            self._template(num)

    def make(self, actor: int, tickets: Sequence[PackedTicket]) -> Iterator[tuple[list[Frame], bool]]:
        """The messages that hand over a trajectory for each of these tickets, each with whether to copy its frames.

        Frames that are not copied are the message's until `take_back`.
        """
        for start in range(0, len(tickets), self._most):
            some = tickets[start : start + self._most]
            template = self._template(len(some))
            buffer = template.buffer()
            if template.copy:
                template.free.append(buffer)
            else:
                self._lent.setdefault(actor, []).append((template, buffer))
            frames = template.frames(some, buffer, self._token)
            self._token += len(some)
            yield frames, template.copy

    def take_back(self, actor: int) -> None:
        """All that this actor sent is durable: the broker has read it, and its buffers may be used again."""
        for template, buffer in self._lent.pop(actor, ()):
            template.free.append(buffer)

    def _template(self, num: int) -> _Template:
        if num not in self._templates:
            self._templates[num] = _Template(self._job, num)
        return self._templates[num]
