"""A delta that is applied while it is still being made: the records that have come, and how to take them back.

What comes ahead of a manifest is not verified, so nothing here is believed: a record is checked before it is written,
all that was written can be undone to the bit, and whoever holds the snapshot verifies the whole in either case.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from broker.protocol.delta_records import whole_bytes
from broker.protocol.deltas import apply_delta, undo_delta
from broker.protocol.hashes import Leaves
from broker.protocol.weights import Bytes, TensorSpec, flat
from broker.weights.threads import coding_run


class Begun:
    """What of one payload has been applied to `target`, the writable snapshot of exactly these tensors."""

    def __init__(self, tensors: Sequence[TensorSpec], target: Bytes) -> None:
        self.leaves = Leaves(flat(target))
        """Of the target: those of the blocks that were changed are hashed."""
        self.num_bytes = 0
        """Of the payload's first bytes, which are applied."""
        self._tensors, self._target = tensors, target
        self._applied: list[Bytes] = []  # pieces of the payload
        self._rest: Bytes = np.empty(0, np.uint8)  # behind them: the beginning of a record

    def add(self, data: Bytes) -> None:
        """The next bytes of the payload. Raises ProtocolError where their records are malformed; none of these has been
        applied then."""
        rest = np.concatenate((self._rest, data))
        end = whole_bytes(rest)
        piece, self._rest = rest[:end], rest[end:]
        apply_delta(piece, self._tensors, self._target, coding_run(), self.leaves)
        self._applied.append(piece)
        self.num_bytes += piece.size

    def begins(self, payload: Bytes) -> bool:
        """Whether what was applied is the beginning of this payload."""
        start = 0
        for piece in self._applied:
            if not np.array_equal(piece, payload[start : start + piece.size]):
                return False
            start += piece.size
        return True

    def undo(self) -> None:
        """Make the target what it was."""
        while self._applied:
            undo_delta(self._applied.pop(), self._tensors, self._target)
