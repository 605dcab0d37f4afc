"""The benchmark of admission open against closed: what tools take, ratios, intervals, the report."""

from __future__ import annotations

import asyncio
import statistics
from unittest.mock import patch

import pytest

from envs.interface import Task
from envs.registry import create_environment
from envs.shop.environment import ShopEpisode
from tests.bench.asynchrony.environment import NAME, SlowShop, delay_s, slow_job
from tests.bench.asynchrony.report import Flow, Pair, Ratio, Run, flow, gain_ci95, markdown, ratio, summary
from tests.bench.endtoend.plan import Course, Snapshot, job
from tests.bench.endtoend.report import Side
from tests.bench.rollouts.environment import Latency

FLOW = Flow(30.0, 8.0, 0.0, 0, 6.0, 1.0)


def run(rewards: list[float], step_s: float, final: list[float], start_s: float = 40.0) -> Run:
    steps = range(2, 2 * len(rewards) + 1, 2)
    snapshots = [Snapshot(step, start_s + step * step_s, step * step_s, f"w{step}") for step in steps]
    return Run(Side(Course(snapshots, 1.0), rewards), dict(enumerate(final)), FLOW)


CLOSED = run([0.4, 0.6, 0.75], 40.0, [1.0, 0.0, 1.0, 1.0])
OPEN = run([0.5, 0.72, 0.8], 10.0, [1.0, 1.0, 1.0, 0.0])
PAIR = Pair(3, 0.3, CLOSED, OPEN)


def test_the_ratio_is_of_the_seconds_to_the_same_reward() -> None:
    assert ratio(PAIR, 0.7) == Ratio(280 / 80, censored=False)
    assert ratio(PAIR, 0.7, started=False) == Ratio(240 / 40, censored=False)


def test_a_closed_side_that_never_gets_there_took_at_least_its_whole_time() -> None:
    assert ratio(PAIR, 0.78) == Ratio(280 / 100, censored=True)
    assert ratio(PAIR, 0.9) is None
    told = summary([PAIR], 0.9)
    assert (told["async_vs_sync_wall"], told["not_reached"]) == (None, 1)


def test_the_interval_is_of_open_less_closed_by_task() -> None:
    better = Pair(0, 0.3, run([0.5], 1.0, [0.0] * 20), run([0.5], 1.0, [1.0] * 20))
    assert gain_ci95([better]) == [1.0, 1.0]
    assert summary([better], 0.4)["no_loss"] is True
    worse = better._replace(closed=better.opened, opened=better.closed)
    assert gain_ci95([worse]) == [-1.0, -1.0]
    assert summary([worse], 0.4)["no_loss"] is False


def test_seeds_of_a_task_are_drawn_together() -> None:
    cancelled = [Pair(0, 0.3, CLOSED, OPEN), Pair(1, 0.3, OPEN, CLOSED)]
    assert gain_ci95(cancelled) == [0.0, 0.0]


def test_the_summary_has_what_is_asked_for() -> None:
    told = summary([PAIR], 0.7)
    assert told["async_vs_sync_wall"] == 3.5
    assert told["async_vs_sync_step"] == 4.0
    assert (told["reward_async"], told["reward_sync"]) == (0.75, 0.75)
    low, high = told["ci95"]
    assert low < 0 < high


def test_the_report_has_both_curves() -> None:
    text = markdown([PAIR], 0.7, "two cores")
    assert "- seed 3, closed: 40% at 120 s (step 2), 60% at 200 s (step 4), 75% at 280 s (step 6)" in text
    assert "- seed 3, open: 50% at 60 s (step 2), 72% at 80 s (step 4), 80% at 100 s (step 6)" in text
    assert "seed 3: 3.50×" in text
    assert "at least 2.80×" in markdown([PAIR], 0.78, "two cores")


def test_the_flow_is_the_mean_of_the_steps() -> None:
    def step(waiting: float, staleness: float, most: int) -> dict[str, object]:
        seconds = {"waiting": waiting, "training": 5.0}
        found = {"staleness_mean": staleness, "staleness_max": most, "groups": 6, "zero_variance_groups": 1}
        return {"event": "step", "seconds": seconds, **found}

    records = [{"event": "phase"}, step(10.0, 1.0, 2), step(20.0, 2.0, 3)]
    assert flow(records) == Flow(15.0, 5.0, 1.5, 3, 6, 1)
    with pytest.raises(ValueError, match="without steps"):
        flow(records[:1])


def test_latencies_have_the_mean_and_the_tail_that_were_asked_for() -> None:
    latency = Latency(2.0, 15.0)
    drawn = sorted(delay_s(latency, "train 0 1", call) for call in range(20_000))
    assert statistics.fmean(drawn) == pytest.approx(2.0, rel=0.1)
    assert drawn[-200] == pytest.approx(15.0, rel=0.15)
    assert delay_s(latency, "train 0 1", 1) == delay_s(latency, "train 0 1", 1)
    assert delay_s(latency, "train 0 1", 1) != delay_s(latency, "train 0 2", 1)


def test_the_job_is_the_main_job_with_another_shop() -> None:
    slow, plain = slow_job(4, Latency(2.0, 15.0)), job(4)
    (section,) = slow.environments
    assert slow.model_copy(update={"environments": plain.environments}) == plain
    assert section.options == {**plain.environments[0].options, "mean_s": 2.0, "p99_s": 15.0}
    shop = create_environment(section.name, section.options)
    assert isinstance(shop, SlowShop)
    assert section.name == NAME


async def test_a_call_waits_and_then_runs() -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    async def ran(self: ShopEpisode, command: str) -> str:
        return f"ran {command} after {len(waited)}"

    shop = SlowShop(2.0, 15.0)
    task: Task = shop.task("train", 5)
    first, second = shop.episode(task), shop.episode(task)
    assert isinstance(first, ShopEpisode)
    assert isinstance(second, ShopEpisode)
    with patch.object(asyncio, "sleep", sleep), patch.object(ShopEpisode, "run", ran):
        assert await first.run("price") == "ran price after 1"
        await first.run("calc")
        await second.run("price")
    keys = [("train 5 1", 1), ("train 5 1", 2), ("train 5 2", 1)]
    assert waited == [delay_s(Latency(2.0, 15.0), key, call) for key, call in keys]


def test_a_mean_beyond_the_tail_is_refused() -> None:
    with pytest.raises(ValueError, match="nor the mean be the larger"):
        SlowShop(3.0, 2.0)
