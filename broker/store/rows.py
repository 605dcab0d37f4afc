"""The rows of the store: what a key and a value are in each of its tables. Data only; never opens a transaction.

    meta      b"format", b"run_id": text; b"counters": Counters
    sessions  lineage -> learner session
    tickets   seq -> Ticket, written once, deleted when the ticket ends
    states    seq -> State; absent while there is nothing to say
    parcels   parcel number -> digest (16 bytes), length of the head (4), ParcelHead, envelope, arrays unless in a blob
    ended     key of a ticket id -> state (1 byte, of STATES) and source
    past      end number -> key of a ticket id; the newest ends, oldest first

Numbers in keys are 8 bytes, big end first, so that they lie in order. A ticket has a result while it is live and a
parcel names it whose number is above its State's `recalled`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Final

import msgspec

from broker.ledger.events import TakenRow
from broker.protocol.commands import TicketState
from broker.protocol.trajectory import Ticket
from broker.store.blobs import Blob

COUNTERS_KEY: Final = b"counters"
# By their number in a row; a new one goes to the end.
STATES: Final = (TicketState.ACKED, TicketState.DEAD, TicketState.CANCELLED)
MAX_KEY_BYTES: Final = 255  # LMDB takes 511
_HASHED: Final = b"\xff"  # begins no UTF-8

pack_key: Final[Callable[[int], bytes]] = struct.Struct(">Q").pack
encode: Final = msgspec.msgpack.Encoder().encode


def number(key: bytes) -> int:
    """The number in a key."""
    return int.from_bytes(key, "big")


def ticket_key(ticket_id: str) -> bytes:
    """The key of a ticket id: itself, or its hash where it is too long."""
    key = ticket_id.encode()
    return key if len(key) <= MAX_KEY_BYTES else _HASHED + hashlib.blake2b(key, digest_size=32).digest()


class State(msgspec.Struct, frozen=True, array_like=True):
    """What became of a live ticket but for its result. `attempt`: None for the one that it was issued with.
    `recalled`: results in parcels up to this number do not count."""

    attempt: int | None = None
    dead: bool = False
    result_seq: int = 0
    source: str = ""
    error: str = ""
    recalled: int = 0


class Counters(msgspec.Struct, array_like=True):
    """What only ever grows: the next seq, the numbers of the last end and the last parcel, and the ends by state and
    mode, forgotten ones included."""

    next_seq: int = 1
    end: int = 0
    parcel: int = 0
    ends: dict[str, dict[str, int]] = {}


class ParcelHead(msgspec.Struct, frozen=True, array_like=True):
    """What a parcel holds: whose results, from which session, the bytes of its frames (the envelope and each array),
    and the blob that has the arrays, if one has. `partial`: it is no result, but what its ticket goes on with."""

    source: str
    rows: tuple[TakenRow, ...]
    sizes: tuple[int, ...]
    blob: Blob | None
    partial: bool = False


decode_ticket: Final = msgspec.msgpack.Decoder(Ticket).decode
decode_state: Final = msgspec.msgpack.Decoder(State).decode
decode_counters: Final = msgspec.msgpack.Decoder(Counters).decode
decode_head: Final = msgspec.msgpack.Decoder(ParcelHead).decode
