"""The rollout benchmark: the latencies it draws, the rounds of its synchronous side, and what it computes."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

import pytest

from actors.engine import Sample
from broker.protocol.trajectory import Sampling
from tests.bench.rollouts.engines import TURN_TOKENS, GivenLengths, InRounds
from tests.bench.rollouts.environment import CONSTANT, HANGS, HEAVY_TAILED, NO_TOOLS
from tests.bench.rollouts.report import Results, joined, markdown, summary
from tests.bench.rollouts.sides import Measured
from tests.unit.actors.support import ScriptedEngine, make_renderer

RENDERER = make_renderer()


def measured(tokens: int, hung_s: tuple[float, ...] = ()) -> Measured:
    return Measured(10.0, tokens, 50, 70.0, 0.9, 0.3, 0.75, 0, 0.2, (11.0, 40.0), hung_s, 0.1, 0.01, 500.0)


def test_the_latencies_have_the_mean_and_the_percentile_that_they_say() -> None:
    mu, sigma = HEAVY_TAILED.shape
    assert math.exp(mu + sigma * sigma / 2) == pytest.approx(3.0)
    assert math.exp(mu + 2.3263 * sigma) == pytest.approx(30.0, rel=1e-3)
    calls = [HEAVY_TAILED.draw(f"{number}") for number in range(20_000)]
    assert [HEAVY_TAILED.draw(f"{number}") for number in range(100)] == calls[:100]
    hanging = Counter(call.name for call in calls if call.name in HANGS)
    assert sum(hanging.values()) / len(calls) == pytest.approx(0.02, abs=0.005)
    assert set(hanging) == set(HANGS)
    seconds = sorted(call.arguments["seconds"] for call in calls if call.name == "look")
    assert sum(seconds) / len(seconds) == pytest.approx(3.0, rel=0.1)
    assert seconds[len(seconds) * 99 // 100] == pytest.approx(30.0, rel=0.2)
    assert NO_TOOLS.draw("x").arguments == {"seconds": 0.0}
    assert CONSTANT.draw("x").arguments == {"seconds": 1.0}


async def test_turns_have_given_lengths_and_count_as_ended() -> None:
    engine = ScriptedEngine(RENDERER, ["w " * 100] * 3)
    turns = GivenLengths(engine, 7)
    samples = [await turns.generate([1], Sampling(), 32, (), f"r{i}") for i in range(3)]
    assert all(sample.token_ids_N[-1] == 7 and sample.token_ids_N[-2] != 7 for sample in samples)
    lengths = [len(sample.token_ids_N) for sample in samples]
    assert all(TURN_TOKENS[0] <= length <= TURN_TOKENS[1] for length in lengths)
    assert lengths == engine.max_tokens


async def test_the_synchronous_side_generates_for_all_and_answers_nobody_before_that() -> None:
    engine, starts, answered = ScriptedEngine(RENDERER, ["<hang>", "w3", "w3"]), [], []
    rounds = InRounds(engine, 7, 3, lambda: starts.append(len(engine.prompts)))

    async def ask(name: str) -> Sample:
        sample = await rounds.generate([1], Sampling(), 32, (), name)
        answered.append(name)
        return sample

    tasks = [asyncio.create_task(ask(name)) for name in ("a", "b")]
    await asyncio.sleep(0.01)
    assert (engine.prompts, starts) == ([], [])
    tasks.append(asyncio.create_task(ask("c")))
    await engine.hanging.wait()
    while len(engine.prompts) < 3:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert (len(starts), answered) == (1, [])
    for name in ("a", "b", "c"):
        await engine.abort(name)
    await asyncio.gather(*tasks)
    assert sorted(answered) == ["a", "b", "c"]


def test_the_last_line_has_every_key_and_the_table_a_row_for_each_run() -> None:
    results = Results(measured(2000), measured(1900), measured(1850, (0.3, 0.1)), measured(500))
    told = summary(results)
    assert {key: told[key] for key in ("tool_efficiency", "vs_sync_loop", "prefix_hit_rate", "worst_hang_s")} == {
        "tool_efficiency": 0.925,
        "vs_sync_loop": 3.7,
        "prefix_hit_rate": 0.75,
        "worst_hang_s": 0.3,
    }
    assert markdown(results, "two cores").count("\n| ") == 2 + 4
    assert summary(Results(*(measured(10) for _ in range(4))))["worst_hang_s"] is None


def test_two_windows_are_one() -> None:
    both = joined(measured(1000, (0.1,)), measured(3000)._replace(seconds=30.0, group_s=None, episodes=90.0))
    assert (both.rate, both.turns, both.episodes, both.hung_s) == (100.0, 100, 80.0, (0.1,))
    assert both.group_s == (11.0, 40.0)
