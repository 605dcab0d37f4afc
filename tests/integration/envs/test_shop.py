"""The shop with its real tools in real sandboxes: solvable, not cheatable, the same everywhere, robust."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from envs.interface import Action, EnvironmentFailureError, Message, ReferencePolicy, SandboxError, Split, ToolCall
from envs.play import Played, play
from envs.sandbox import Sandbox, bubblewrap
from envs.shop import ShopEnvironment
from envs.shop.environment import ShopEpisode
from envs.timeouts import OutOfTimeError, within
from tests.integration.envs.policies import DEGENERATE
from tests.integration.envs.support import children, kill_from_outside


@pytest_asyncio.fixture
async def shop() -> AsyncIterator[ShopEnvironment]:
    environment = ShopEnvironment(warm_sandboxes=4)
    yield environment
    await environment.close()


async def started(shop: ShopEnvironment, index: int = 0) -> ShopEpisode:
    episode = shop.episode(shop.task("train", index))
    assert isinstance(episode, ShopEpisode)
    await episode.start()
    return episode


async def ask(episode: ShopEpisode, name: str, **arguments: str) -> str:
    observation = await episode.step(Action("", (ToolCall(name, arguments),)))
    assert not observation.done
    return observation.messages[0].content


@pytest.mark.parametrize("split", ["train", "heldout"])
async def test_the_reference_policy_solves_every_task_through_the_tools(shop: ShopEnvironment, split: Split) -> None:
    await shop.prepare()
    in_flight = asyncio.Semaphore(16)

    async def one(index: int) -> Played:
        async with in_flight:
            task = shop.task(split, index)
            return await play(shop, task, shop.reference(task), max_turns=3)

    played = await asyncio.gather(*(one(index) for index in range(200)))
    assert [each.reward.total for each in played] == [1.0] * 200
    assert Counter(call.name for each in played for call in each.tool_calls) == {"price": 200, "calc": 200}


async def test_an_episode_goes_on_in_another_sandbox_from_its_snapshot(shop: ShopEnvironment) -> None:
    task = shop.task("train", 0)
    policy, first = shop.reference(task), await started(shop)
    action = policy.act(task.prompt)
    price = (await first.step(action)).messages
    assert (await first.step(Action("", (ToolCall("price", {"item": "\n"}),)))).messages[0].content.startswith("error")
    snapshot = await first.snapshot()
    await first.close()
    second = await shop.restore(task, snapshot)
    assert (await second.step(action)).messages == price  # the same hidden price
    messages = [*task.prompt, *price]
    while not (observation := await second.step(policy.act(messages))).done:
        messages += observation.messages
    assert (await second.grade()).total == 1.0
    assert isinstance(second, ShopEpisode)
    assert (second.num_tool_calls, second.num_tool_errors) == (4, 1)
    await second.close()


@pytest.mark.parametrize("policy", DEGENERATE, ids=lambda policy: policy.__name__)
async def test_degenerate_policies_earn_nothing(shop: ShopEnvironment, policy: Callable[[], ReferencePolicy]) -> None:
    in_flight = asyncio.Semaphore(16)
    acting = policy()

    async def one(index: int) -> float:
        async with in_flight:
            return (await play(shop, shop.task("heldout", index), acting, max_turns=4)).reward.total

    rewards = await asyncio.gather(*(one(index) for index in range(100)))
    assert sum(rewards) / len(rewards) <= 0.02


def test_the_same_task_gives_the_same_conversation_in_another_process() -> None:
    program = """
import asyncio
from envs.play import play
from envs.shop import ShopEnvironment
async def main():
    shop = ShopEnvironment(warm_sandboxes=0)
    for split, index in (("train", 3), ("heldout", 42)):
        task = shop.task(split, index)
        print((await play(shop, task, shop.reference(task))).messages)
    await shop.close()
asyncio.run(main())
"""
    outputs = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1
    assert outputs.pop().count("<answer>") == 2


async def test_price_tells_every_price_and_only_those(shop: ShopEnvironment) -> None:
    episode = await started(shop)
    for item, coins in episode.task.secret["prices"].items():
        assert await ask(episode, "price", item=item) == str(coins)
    assert episode.num_tool_errors == 0
    for item in ("plates ", "unicorn", "", ".*", "plate\tx", "../etc/passwd", "'; cat /opt/shop/calc.py; '", "x" * 65):
        assert (await ask(episode, "price", item=item)).startswith("error: "), item
    assert episode.num_tool_errors == 8
    await episode.close()


@pytest.mark.parametrize("expression", ["17*72-12", "2000-(3+4)*5", "-3*-3"])
async def test_calc_is_a_real_process_with_the_right_result(shop: ShopEnvironment, expression: str) -> None:
    episode = await started(shop)
    assert await ask(episode, "calc", expression=expression) == str(eval(expression, {"__builtins__": {}}))
    await episode.close()


async def test_calc_refuses_hostile_input(shop: ShopEnvironment) -> None:
    episode = await started(shop)
    hostile = {
        "9**9**9": "error: only integers, + - * and parentheses",
        "__import__('os').system('id')": "error: only integers, + - * and parentheses",
        "open('/workspace/prices.tsv').read()": "error: only integers, + - * and parentheses",
        "1'; id; '": "error: only integers, + - * and parentheses",
        "$(id)": "error: only integers, + - * and parentheses",
        "1+`id`": "error: only integers, + - * and parentheses",
        "-h": "error: only integers, + - * and parentheses",
        "--": "error: not an expression",
        "": "error: not an expression",
        "(1)(2)": "error: only integers, + - * and parentheses",
        "999999999*999999999": "error: result too large",
        "1+" * 40 + "1": "error: bad argument",
        "1\n+1": "error: bad argument",
    }
    for expression, expected in hostile.items():
        assert await ask(episode, "calc", expression=expression) == expected, expression
    assert episode.num_tool_errors == len(hostile)
    assert await ask(episode, "calc", expression="1+1") == "2"
    await episode.close()


async def test_several_calls_in_one_action_run_in_order(shop: ShopEnvironment) -> None:
    episode = await started(shop)
    calls = (ToolCall("calc", {"expression": "1+1"}), ToolCall("fly", {}), ToolCall("calc", {"expression": "2*3"}))
    observation = await episode.step(Action("", calls))
    assert observation.messages == (
        Message("tool", "2"),
        Message("tool", "error: unknown tool fly; the tools are: price, calc"),
        Message("tool", "6"),
    )
    await episode.close()


async def test_the_answer_is_nowhere_in_the_sandbox(shop: ShopEnvironment) -> None:
    episode = await started(shop, 3)
    sandbox = episode._sandbox
    assert sandbox is not None
    files = await sandbox.exec("cat /workspace/* /opt/shop/* /tmp/* /proc/*/environ /proc/*/cmdline 2>/dev/null")
    assert str(episode.task.secret["prices"]["plate"]).encode() in files.stdout
    assert str(episode.task.secret["answer"]).encode() not in files.stdout
    await episode.close()


async def test_a_tool_that_takes_too_long_is_an_error_and_the_next_call_works() -> None:
    shop = ShopEnvironment(warm_sandboxes=1, tool_timeout_s=0.0001)
    episode = await started(shop)
    assert await ask(episode, "calc", expression="1+1") == "error: timed out"
    assert episode.num_tool_errors == 1
    episode._tool_timeout_s = 20
    item = episode.task.secret["item"]
    assert await ask(episode, "price", item=item) == str(episode.task.secret["prices"][item])
    await episode.close()
    await shop.close()


async def test_a_call_that_is_given_up_costs_its_sandbox_and_the_episode_goes_on(shop: ShopEnvironment) -> None:
    episode = await started(shop)
    with pytest.raises(OutOfTimeError):
        await within(episode.run("exec sleep 1000"), 0.2)
    assert await ask(episode, "calc", expression="1+1") == "2"
    await episode.close()


async def test_a_sandbox_that_dies_is_infrastructure_not_a_zero(shop: ShopEnvironment) -> None:
    episode = await started(shop)
    assert isinstance(episode._sandbox, Sandbox)
    kill_from_outside(episode._sandbox)
    with pytest.raises(SandboxError, match="dead"):
        await ask(episode, "calc", expression="1+1")
    await episode.close()


async def test_a_tool_that_is_broken_is_the_environments_failure(shop: ShopEnvironment) -> None:
    episode = await started(shop)
    assert isinstance(episode._sandbox, Sandbox)
    await episode._sandbox.exec("rm prices.tsv")
    with pytest.raises(EnvironmentFailureError, match="exited with 2"):
        await ask(episode, "price", item="plate")
    await episode.close()


async def test_missing_programs_are_one_sentence_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "SEARCH_PATH", "/nowhere")
    shop = ShopEnvironment(warm_sandboxes=1)
    with pytest.raises(SandboxError, match=r"python3.*not found.*type `apt-get install python3-minimal mawk`"):
        await shop.prepare()
    await shop.close()


async def test_closing_is_idempotent_final_and_leaves_no_process() -> None:
    before = children()
    shop = ShopEnvironment(warm_sandboxes=2)
    await shop.prepare()
    episode = await started(shop)
    await episode.close()
    await episode.close()
    with pytest.raises(SandboxError):
        await ask(episode, "calc", expression="1+1")
    never_started = shop.episode(shop.task("train", 0))
    await never_started.close()
    await shop.close()
    await shop.close()
    assert children() == before
