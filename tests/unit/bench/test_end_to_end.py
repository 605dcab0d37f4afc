"""The end-to-end benchmark: when a side reached a reward, ratios of the two, and episodes in lock-step."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from broker.protocol.trajectory import Mode, Sampling
from tests.bench.endtoend.lockstep import LockStepEngine, cut
from tests.bench.endtoend.plan import Course, Snapshot, job, read_course, ticket, write_course
from tests.bench.endtoend.report import Pair, Ratio, Side, markdown, ratio, summary


def side(rewards: list[float], step_s: float, start_s: float = 10.0, *, num_steps: int = 8, every: int = 2) -> Side:
    snapshots = [
        Snapshot(step, start_s + step * step_s, step * step_s, f"w{step}" if step % every == 0 else "")
        for step in range(1, num_steps + 1)
    ]
    return Side(Course(snapshots, 100.0), rewards)


OURS = side([0.3, 0.7, 0.85, 0.8], 10.0)
THEIRS = side([0.3, 0.5, 0.6, 0.81], 40.0)
CAPPED = side([0.3, 0.5, 0.6, 0.79], 40.0)


def test_the_first_snapshot_that_reaches_the_level_counts() -> None:
    reached = OURS.reached(0.8)
    assert reached is not None
    assert (reached.step, reached.wall_s) == (6, 70.0)
    assert CAPPED.reached(0.8) is None


def test_the_ratio_is_of_the_seconds_since_the_command() -> None:
    assert ratio(Pair(0, OURS, THEIRS), 0.8) == Ratio(330 / 70, censored=False)
    assert ratio(Pair(0, OURS, THEIRS), 0.8, started=False) == Ratio(320 / 60, censored=False)


def test_who_was_stopped_took_at_least_that_long() -> None:
    assert ratio(Pair(0, OURS, CAPPED), 0.8) == Ratio(330 / 70, censored=True)


def test_without_our_own_success_there_is_no_ratio() -> None:
    assert ratio(Pair(0, CAPPED, OURS), 0.8) is None
    told = summary([Pair(0, CAPPED, OURS)], 0.8)
    assert told["vs_trl_wall"] is None
    assert told["not_reached"] == 1


def test_the_summary_is_the_median_of_the_seeds() -> None:
    pairs = [Pair(0, OURS, THEIRS), Pair(1, OURS, CAPPED), Pair(2, OURS, OURS)]
    told = summary(pairs, 0.8)
    assert told["vs_trl_wall"] == round(330 / 70, 3)
    assert told["vs_trl_step"] == 4.0
    assert told["censored"] == 1
    assert told["seeds"] == [0, 1, 2]


def test_the_report_says_at_least() -> None:
    text = markdown([Pair(3, OURS, CAPPED)], 0.8, "two cores")
    assert "| 3 | 70 s (60), step 6 | not by 330 s (320), step 8 | at least 4.71 | 10.0 s | 40.0 s |" in text
    assert "2: 30% at 30 s, 4: 70% at 50 s" in text


def test_a_course_survives_the_way_between_processes(tmp_path: Path) -> None:
    write_course(OURS.course, tmp_path / "course.json")
    assert read_course(tmp_path / "course.json") == OURS.course


def test_tickets_are_the_main_jobs() -> None:
    settings = job(5, ["eval.tasks=7"])
    assert (settings.run.seed, settings.eval.tasks) == (5, 7)
    train, heldout = (ticket(settings, mode, 3, 11, 60.0) for mode in (Mode.TRAIN, Mode.EVAL))
    assert (train.task.env, train.task.split, train.task.index) == ("shop", "train", 3)
    assert (heldout.task.split, heldout.group_size) == ("heldout", 1)
    assert train.group_size == settings.learner.group_size
    assert train.sampling == heldout.sampling
    assert train.sampling.max_turn_tokens == settings.sampling.max_turn_tokens


def test_a_completion_is_cut_to_the_room_that_an_episode_has() -> None:
    stop = frozenset({9})
    assert cut([1, 2, 9], 3, stop).finish == "stop"
    assert cut([1, 2, 9], 2, stop).finish == "length"
    assert cut([1, 2, 9], 2, stop).token_ids_N.tolist() == [1, 2]
    assert [tuple(run) for run in cut([1, 9], 8, stop).version_runs] == [(0, 0, 2)]


async def test_turns_are_generated_together_when_everybody_has_asked() -> None:
    calls: list[list[list[int]]] = []

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        calls.append(prompts)
        return [[*prompt, 9] for prompt in prompts]

    engine = LockStepEngine(generate, 3)

    async def episode(number: int, num_turns: int) -> int:
        for _ in range(num_turns):
            await engine.generate([number], Sampling(), 8, (9,), f"request-{number}")
        engine.leave()
        return number

    async with asyncio.timeout(5):
        assert await asyncio.gather(episode(0, 1), episode(1, 3), episode(2, 2)) == [0, 1, 2]
    assert [sorted(prompt[0] for prompt in call) for call in calls] == [[0, 1, 2], [1, 2], [1]]


async def test_an_episode_that_never_asks_keeps_nobody_waiting() -> None:
    engine = LockStepEngine(lambda prompts: [[9] for _ in prompts], 2)
    waiting = asyncio.create_task(engine.generate([1], Sampling(), 8, (9,), "request"))
    await asyncio.sleep(0)
    assert not waiting.done()
    engine.leave()
    assert (await asyncio.wait_for(waiting, 5)).finish == "stop"


def test_a_generator_that_returns_too_few_is_told() -> None:
    async def ask() -> None:
        await LockStepEngine(lambda prompts: [], 1).generate([1], Sampling(), 8, (9,), "request")

    with pytest.raises(ValueError):
        asyncio.run(ask())
