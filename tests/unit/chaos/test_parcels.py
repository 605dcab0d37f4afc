"""The count of trajectories that shared a message: over restarts, and from a real metrics page."""

from __future__ import annotations

from prometheus_client import generate_latest

from broker.exchange import metrics
from tests.chaos.parcels import Counts, ParcelWatch, read_counts


def test_a_page_of_metrics_is_read() -> None:
    before = read_counts(generate_latest().decode())
    metrics.count_message("TRAJECTORY")
    metrics.count_message("LEASE")
    metrics.results.labels("accepted").inc(3)
    metrics.results.labels("repeated").inc()
    after = read_counts(generate_latest().decode())
    assert (after.messages - before.messages, after.results - before.results) == (1, 4)


def test_every_life_of_the_broker_counts() -> None:
    watch = ParcelWatch(port=1)
    for counts in (Counts(2, 2), Counts(4, 9), Counts(1, 1), Counts(3, 5), Counts(0, 0), Counts(2, 3)):
        watch.note(counts)
    assert watch.num_shared == 5 + 2 + 1


def test_messages_that_were_refused_are_no_negative_number() -> None:
    watch = ParcelWatch(port=1)
    watch.note(Counts(9, 2))
    assert watch.num_shared == 0
