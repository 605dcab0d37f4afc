"""Partials in the store: one a ticket, durable with the commit, gone with what ends it, damage found by its hash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from broker.ledger.events import EndedRow, JournalAttempt, JournalEnds, JournalPartial
from broker.protocol.commands import PartialHead, TicketState
from broker.protocol.frames import Message, encode
from broker.protocol.partials import Partial, pack_handover
from broker.protocol.trajectory import Mode, Segment, VersionRun
from broker.store.blobs import DamagedError
from broker.store.journal import Journal
from tests.unit.broker.stored import issue, make_message, same, segment, stored_blobs, take

BLOB_BYTES = 4096
LARGE = 1000  # tokens, of 9 bytes each


def make(ticket_id: str, num_tokens: int = 10, snapshot: bytes = b"state") -> Message:
    mask_T, logprobs_T = np.ones(num_tokens, np.bool_), np.full(num_tokens, -0.5, np.float32)
    traced = Segment(np.arange(num_tokens, dtype=np.int32), mask_T, logprobs_T, (VersionRun(1, 1, num_tokens),))
    return pack_handover(ticket_id, Partial(PartialHead(num_turns=1), (traced,), snapshot))


def opened(directory: Path) -> Journal:
    return Journal(directory, "run", blob_bytes=BLOB_BYTES)


def hand_over(journal: Journal, seq: int, ticket_id: str, message: Message) -> None:
    journal.apply(JournalPartial(seq, ticket_id), encode(message))


def stored(journal: Journal, ticket_id: str) -> Message | None:
    parcel = journal.partial(ticket_id)
    return None if parcel is None else journal.load(parcel)


@pytest.mark.parametrize("num_tokens", [10, LARGE])
def test_a_partial_is_durable_with_the_commit_and_the_newest_counts(tmp_path: Path, num_tokens: int) -> None:
    journal = opened(tmp_path)
    a, b = issue(journal, "a", "b")
    journal.commit()
    first, second = make("a", num_tokens), make("a", num_tokens + 7, b"later")
    hand_over(journal, a, "a", first)
    journal.commit()
    hand_over(journal, a, "a", second)
    hand_over(journal, b, "b", make("b"))
    journal.close()  # killed before the commit
    journal = opened(tmp_path)
    assert same(stored(journal, "a"), first)
    assert stored(journal, "b") is None
    hand_over(journal, a, "a", second)
    journal.commit()
    journal.close()
    journal = opened(tmp_path)
    assert same(stored(journal, "a"), second)
    assert len(stored_blobs(journal)) == (num_tokens == LARGE)
    assert [(row.ticket.ticket_id, row.state, row.partial_bytes) for row in journal.live()] == [
        ("a", TicketState.ISSUED, second.array_bytes),
        ("b", TicketState.ISSUED, 0),
    ]
    journal.close()


ENDS: dict[str, Callable[[Journal, int], None]] = {
    "result": lambda journal, seq: take(journal, [seq], ["a"], make_message("a")),
    "attempt": lambda journal, seq: journal.apply(JournalAttempt(seq, "a", 1, "lost")),
    "end": lambda journal, seq: journal.apply(JournalEnds((EndedRow(seq, "a", Mode.TRAIN, TicketState.CANCELLED),))),
    "lost": lambda journal, seq: journal.apply(JournalPartial(seq, "a", lost=True)),
}


@pytest.mark.parametrize("what", ENDS)
def test_what_ends_a_partial_frees_its_place(tmp_path: Path, what: str) -> None:
    journal = opened(tmp_path)
    (a,) = issue(journal, "a")
    hand_over(journal, a, "a", make("a", LARGE))
    journal.commit()
    (blob,) = stored_blobs(journal)
    ENDS[what](journal, a)
    journal.commit()
    assert stored(journal, "a") is None
    assert blob not in stored_blobs(journal)
    journal.close()
    journal = opened(tmp_path)
    assert stored(journal, "a") is None
    assert not any(row.partial_bytes for row in journal.live())
    assert (journal.place("a") is not None) is (what == "result")
    (c,) = issue(journal, "c")
    hand_over(journal, c, "c", make("c", LARGE))
    journal.commit()
    assert stored_blobs(journal)[-1].extent.segment == blob.extent.segment or what == "result"
    journal.close()


def test_a_damaged_partial_is_found_by_its_hash(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    (a,) = issue(journal, "a")
    hand_over(journal, a, "a", make("a", LARGE))
    journal.commit()
    (blob,) = stored_blobs(journal)
    with segment(tmp_path, blob).open("r+b") as file:
        file.seek(blob.extent.offset + 50)
        file.write(b"\xff")
    with pytest.raises(DamagedError):
        stored(journal, "a")
    journal.close()
