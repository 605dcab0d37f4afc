"""What the store's tests write into a journal, and how they look at what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from broker.ledger.events import EndedRow, JournalEnds, JournalResults, JournalTickets, TakenRow
from broker.protocol.codec import pack_trajectories
from broker.protocol.commands import TicketState
from broker.protocol.frames import Message, encode
from broker.protocol.trajectory import Mode, Segment, Trajectory, VersionRun
from broker.store.blobs import Blob
from broker.store.journal import Journal
from broker.store.parcels import _head
from tests.unit.broker.samples import make_ticket, make_trajectory


def make_message(*ticket_ids: str, num_tokens: int = 1000, salt: int = 0) -> Message:
    """A TRAJECTORY with 9 bytes of arrays a token of each of these tickets."""
    rng = np.random.default_rng(salt)
    trajectories = []
    for ticket_id in ticket_ids:
        mask_T = np.ones(num_tokens, dtype=np.bool_)
        logprobs_T = -rng.random(num_tokens, dtype=np.float32)
        token_ids_T = rng.integers(0, 1000, num_tokens, dtype=np.int32)
        segment = Segment(token_ids_T, mask_T, logprobs_T, (VersionRun(1, 1, num_tokens),))
        trajectories.append(Trajectory(make_trajectory(make_ticket(ticket_id)).head, (segment,)))
    return pack_trajectories(trajectories)


def issue(journal: Journal, *ticket_ids: str, mode: Mode = Mode.TRAIN) -> list[int]:
    """Write new tickets; their seqs."""
    seqs = [journal.next_seq() + i for i in range(len(ticket_ids))]
    journal.apply(
        JournalTickets(tuple((seq, make_ticket(key, mode)) for seq, key in zip(seqs, ticket_ids, strict=True)))
    )
    return seqs


def take(
    journal: Journal, seqs: Sequence[int], ticket_ids: Sequence[str], message: Message, source: str = "s1"
) -> None:
    """Write that a message's trajectories are the results of these tickets, in this order."""
    rows = tuple(
        TakenRow(i, seq, journal.next_seq() + i, key) for i, (seq, key) in enumerate(zip(seqs, ticket_ids, strict=True))
    )
    journal.apply(JournalResults(source, rows), encode(message))


def put(journal: Journal, *ticket_ids: str, message: Message | None = None) -> list[int]:
    """Write new tickets and their results, in one parcel; the tickets' seqs."""
    seqs = issue(journal, *ticket_ids)
    take(journal, seqs, ticket_ids, message or make_message(*ticket_ids))
    return seqs


def end(
    journal: Journal, seqs: Sequence[int], *ticket_ids: str, mode: Mode = Mode.TRAIN, state: TicketState | None = None
) -> None:
    """Write that these tickets have ended, acked where nothing else is said."""
    rows = zip(seqs, ticket_ids, strict=True)
    journal.apply(JournalEnds(tuple(EndedRow(seq, key, mode, state or TicketState.ACKED) for seq, key in rows)))


def load(journal: Journal, ticket_id: str) -> Message | None:
    """The message that a live ticket's result came in."""
    place = journal.place(ticket_id)
    return None if place is None else journal.load(place.parcel)


def same(loaded: Message | None, stored: Message) -> bool:
    """Whether two messages are the same, byte for byte."""
    return (
        loaded is not None
        and loaded.command == stored.command
        and bytes(loaded.body) == bytes(stored.body)
        and len(loaded.arrays) == len(stored.arrays)
        and all(np.array_equal(mine, theirs) for mine, theirs in zip(loaded.arrays, stored.arrays, strict=True))
    )


def stored_blobs(journal: Journal) -> list[Blob]:
    """Those that rows of the store name, by parcel."""
    heads = [_head(memoryview(row)) for _, row in dict(rows(journal))["parcels"]]
    return [head.blob for head in heads if head.blob is not None]


def segment(directory: Path, blob: Blob) -> Path:
    """The file that a blob lies in."""
    return directory / "blobs" / f"{blob.extent.segment:08d}.segment"


def rows(journal: Journal) -> Iterator[tuple[str, list[tuple[bytes, bytes]]]]:
    """Every row of the store, by table."""
    with journal._db.read() as transaction:
        for name, table in journal._db.tables._asdict().items():
            yield name, list(transaction.cursor(db=table))
