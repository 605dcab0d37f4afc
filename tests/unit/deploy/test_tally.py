"""What processes counted, over their restarts and those of the supervisor."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry, Counter

from broker.process.metrics import Health, start_metrics
from broker.process.settings import ActorSection, MetricsSection, Settings
from deploy.scrape import Samples, Scraper
from deploy.tally import FILE, Tally, read_tally
from tests.ports import free_ports


def samples(**values: float) -> Samples:
    return {(name, frozenset({("kind", "delta")})): value for name, value in values.items()}


def totals(path: Path) -> dict[tuple[str, str], float]:
    return {(process, name): value for (process, name, _), value in read_tally(path)}


def test_a_restarted_process_goes_on(tmp_path: Path) -> None:
    path = tmp_path / FILE
    assert totals(path) == {}
    tally = Tally(path)
    for value in (3.0, 10.0, 2.0, 5.0):  # it died after 10
        tally.add("actor-0", samples(ergon_actor_turns_total=value, ergon_actor_running_episodes=9.0))
    tally.add("actor-1", samples(ergon_actor_turns_total=1.0))
    tally.add("relay", samples(ergon_weights_fetch_seconds_sum=0.5, python_gc_objects_total=7.0))
    tally.write()
    expected = {
        ("actor-0", "ergon_actor_turns_total"): 15.0,
        ("actor-1", "ergon_actor_turns_total"): 1.0,
        ("relay", "ergon_weights_fetch_seconds_sum"): 0.5,
    }
    assert totals(path) == expected
    again = Tally(path)  # the whole run was stopped and goes on
    again.add("actor-1", samples(ergon_actor_turns_total=4.0))
    again.write()
    assert totals(path) == expected | {("actor-1", "ergon_actor_turns_total"): 5.0}
    assert [each.name for each in tmp_path.iterdir()] == [FILE]


def test_what_is_scraped_of_a_real_endpoint_is_counted_by_process(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    Counter("ergon_actor_turns", "Turns.", ["kind"], registry=registry).labels("delta").inc(3)
    server = start_metrics("127.0.0.1", 0, lambda: Health(True, {}), registry)
    silent, relay, learner = free_ports(3)
    metrics = MetricsSection(broker_port=silent, relay_port=relay, learner_port=learner, actor_port=server.port)
    tally = Tally(tmp_path / FILE)
    scraper = Scraper(
        Settings(metrics=metrics, actor=ActorSection(count=1)),
        lambda scraped: [tally.add(name, of_process) for name, of_process in scraped.items()] and None,
    )
    try:
        scraper.scrape_once()
        scraper.scrape_once()
    finally:
        server.close()
    tally.write()
    assert totals(tmp_path / FILE) == {("actor-0", "ergon_actor_turns_total"): 3.0}
