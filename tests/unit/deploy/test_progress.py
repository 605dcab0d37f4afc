"""What the terminal shows: folding of records, time left, following a growing file, scraping a real endpoint."""

import io
import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from rich.console import Console

from broker.process.metrics import Health, start_metrics
from broker.process.settings import ActorSection, MetricsSection, Settings
from deploy.progress import Progress, clock, draw, evaluation_line, line, spark
from deploy.scrape import JsonLines, Scraper, scrape
from tests.ports import free_ports


def step(number: int, time: float, reward: float = 0.5) -> dict[str, object]:
    return {
        "event": "step",
        "phase": "train",
        "step": number,
        "time": time,
        "reward_mean": reward,
        "reward_std": 0.25,
        "reward_by_kind": {"boxes": reward},
        "staleness_mean": 1.25,
        "staleness_max": 3,
    }


def test_time_left_follows_the_pace_of_the_steps() -> None:
    progress = Progress(num_steps=10, started_at=0.0)
    progress.take(step(1, 100.0))
    assert progress.seconds_left(100.0) is None
    progress.take(step(2, 110.0))
    progress.take(step(3, 120.0))
    assert progress.seconds_left(120.0) == pytest.approx(70.0)
    assert progress.seconds_left(125.0) == pytest.approx(65.0)


def test_a_resumed_run_repeats_steps_and_they_count_once() -> None:
    progress = Progress(num_steps=10, started_at=0.0)
    for record in (step(1, 1.0), step(2, 2.0), step(3, 3.0), step(2, 9.0, reward=0.75)):
        progress.take(record)
    assert [record["step"] for record in progress.steps] == [1, 2]
    assert progress.last["reward_mean"] == 0.75


def test_what_is_shown() -> None:
    progress = Progress(num_steps=4, started_at=0.0, sampled_rate=200.4, trained_rate=150.0, queue={"leased": 3})
    progress.children = {"broker": "up", "learner": "restarting (1 restarts)"}
    progress.take(step(1, 10.0))
    progress.take(step(2, 20.0, reward=0.875))
    evaluation = {"event": "evaluation", "phase": "train", "step": 2, "evaluation": "before", "time": 20.0}
    progress.take({**evaluation, "sampled": 0.5, "greedy": None, "sampled_by_kind": {"boxes": 0.5}})
    text = line(progress, 20.0)
    assert "step=2/4 reward=0.88±0.25 staleness=1.2/3 sampled_per_s=200 trained_per_s=150 leased=3 left=0:20" in text
    assert "learner=restarting_(1_restarts)" in text
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(draw("quickstart", progress, 20.0))
    shown = console.export_text()
    for part in ("quickstart", "2/4", "0.88 ± 0.25", "before: 0.500 sampled, nan greedy", "actor 200", "boxes 0.88"):
        assert part in shown


def test_an_evaluation_along_budgets_shows_them() -> None:
    record = {"evaluation": "after", "sampled": 0.5, "greedy": 0.6, "sampled_by_kind": {"boxes": 0.5}}
    curve = [{"budget": 0, "reward": 0.1}, {"budget": "unlimited", "reward": 0.9}]
    assert evaluation_line(record) == "after: 0.500 sampled, 0.600 greedy  (boxes 0.50)"
    assert evaluation_line({**record, "sampled_curve": curve}).endswith("  by budget: 0 0.10  unlimited 0.90")


def test_a_mixture_is_told_by_environment() -> None:
    progress = Progress(num_steps=4, started_at=0.0)
    by_env = {
        "reason": {"episodes": 8, "reward": 0.25, "tokens_sampled": 90},
        "shop": {"episodes": 16, "reward": 0.75, "tokens_sampled": 500},
    }
    progress.take({**step(1, 10.0), "by_env": by_env})
    assert " reason=0.25(8) shop=0.75(16) staleness=" in line(progress, 20.0)
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(draw("mixture", progress, 20.0))
    assert "reason 0.25 of 8 episodes  shop 0.75 of 16 episodes" in console.export_text()
    progress.take({**step(2, 10.0), "by_env": {"shop": by_env["shop"]}})
    assert "shop=" not in line(progress, 20.0)
    record = {"evaluation": "after", "sampled": 0.5, "greedy": 0.6, "sampled_by_kind": {"boxes": 0.5}}
    told = evaluation_line({**record, "sampled_by_env": {"reason": 0.25, "shop": 0.75}})
    assert told == "after: 0.500 sampled, 0.600 greedy  (reason 0.25  shop 0.75; boxes 0.50)"


def test_sparks_and_clock() -> None:
    assert spark([0.0, 0.5, 1.0, 2.0, -1.0]) == "▁▅██▁"
    assert spark([0.0] * 50 + [1.0], width=2) == "▁█"
    assert clock(125.9) == "2:05"


def test_only_whole_lines_are_read_and_only_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follow = JsonLines(path)
    assert follow.read() == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert follow.read() == [{"a": 1}, {"a": 2}]
    with path.open("a") as file:
        file.write(": 3}\n")
    assert follow.read() == [{"a": 3}]
    path.write_text(json.dumps({"a": 4}) + "\n")
    assert follow.read() == [{"a": 4}], "a file that became shorter is read anew"


def test_a_real_endpoint_is_summed_over_labels_and_processes() -> None:
    registry = CollectorRegistry()
    tickets = Gauge("ergon_broker_tickets", "Tickets.", ["state", "mode"], registry=registry)
    tickets.labels("issued", "train").set(3)
    tickets.labels("issued", "eval").set(4)
    tickets.labels("leased", "eval").set(9)
    tokens = Counter("ergon_actor_tokens_sampled", "Tokens.", registry=registry)
    server = start_metrics("127.0.0.1", 0, lambda: Health(True, {}), registry)
    silent, other = free_ports(2)
    metrics = MetricsSection(broker_port=server.port, relay_port=silent, learner_port=other, actor_port=server.port)
    scraper = Scraper(Settings(metrics=metrics, actor=ActorSection(count=1)))
    try:
        scraper.scrape_once()
        assert scraper.total("ergon_broker_tickets", state="issued") == 2 * 7, "two processes share the endpoint here"
        assert scraper.total("ergon_none") == 0
        assert scraper.rate("ergon_actor_tokens_sampled_total") == 0
        tokens.inc(50)
        scraper.scrape_once()
        assert scraper.rate("ergon_actor_tokens_sampled_total") > 0
        assert scrape(f"http://127.0.0.1:{silent}/metrics") is None
    finally:
        server.close()
