"""The broker's counters: added to as plain integers by one thread, exact whenever Prometheus reads them."""

from __future__ import annotations

import threading

from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest

from broker.exchange import metrics
from broker.exchange.metrics import Tally
from broker.ledger.events import Count


def value(name: str, **labels: str) -> float:
    found = REGISTRY.get_sample_value(name, labels)
    return 0.0 if found is None else found


def test_what_was_counted_stands_on_the_page_that_is_read_next() -> None:
    read = [
        lambda: value("ergon_broker_results_total", status="late"),
        lambda: value("ergon_broker_outcomes_total", env="tally", outcome="truncated_tokens"),
        lambda: value("ergon_broker_groups_closed_total", env="tally", end="complete"),
        lambda: value("ergon_broker_messages_total", command="TRAJECTORY"),
        lambda: value("ergon_broker_received_bytes_total"),
    ]
    before = [each() for each in read]
    for num in (1, 2):
        metrics.count(Count("late", num))
        metrics.count(Count("outcome_truncated_tokens", num, "tally"))
        metrics.count(Count("group_complete", num, "tally"))
        metrics.count_message("TRAJECTORY")
        metrics.tally.add(metrics.received_bytes, 10 * num)
    page = generate_latest(REGISTRY).decode()
    assert 'ergon_broker_outcomes_total{env="tally",outcome="truncated_tokens"} 3.0' in page
    assert [after() - then for after, then in zip(read, before, strict=True)] == [3, 3, 3, 2, 30]


def test_every_count_of_the_ledger_and_every_command_has_a_counter() -> None:
    for key in (*metrics.tally.totals, *((name, "") for name in metrics.COUNTS), *metrics.COMMANDS, "unknown"):
        assert isinstance(metrics._counter(key), Counter)


def test_readers_beside_the_one_who_counts_lose_nothing_and_count_nothing_twice() -> None:
    counter = Counter("tally_test", "Of this test.", ["key"], registry=CollectorRegistry())
    tally = Tally(lambda key: counter.labels(str(key)))
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            tally.tell()

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(20_000):
        tally.add(number % 7, 2)
    done.set()
    for reader in readers:
        reader.join()
    tally.tell()
    told = [counter.labels(str(key))._value.get() for key in range(7)]
    assert told == [float(tally.totals[key]) for key in range(7)]
    assert sum(told) == 40_000
