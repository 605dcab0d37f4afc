"""The shop's grader: typed parsing of one answer, in the parent, and 0 for everything else."""

from __future__ import annotations

import pytest

from envs.interface import Action
from envs.shop import ShopEnvironment
from envs.shop.environment import parse_answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<answer>1212</answer>", 1212),
        ("<answer>-7</answer>", -7),
        ("<answer>0</answer>", 0),
        ("The bill is <answer>1212</answer> coins.", 1212),
    ],
)
def test_one_integer_is_an_answer(text: str, value: int) -> None:
    assert parse_answer(text) == value


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "1212",
        "<answer></answer>",
        "<answer>1212",
        "1212</answer>",
        "<answer> 1212</answer>",
        "<answer>1212\n</answer>",
        "<answer>1212.0</answer>",
        "<answer>1e3</answer>",
        "<answer>+1212</answer>",
        "<answer>--1</answer>",
        "<answer>1,212</answer>",
        "<answer>1_212</answer>",
        "<answer>١٢</answer>",
        "<answer>17*72-12</answer>",
        "<answer>" + "9" * 13 + "</answer>",
        "<answer>1</answer><answer>2</answer>",
        "<answer>1<answer>2</answer>",
        "<answer>1212</answer></answer>",
        "</answer>1212<answer>",
        "<Answer>1212</Answer>",
        "<answer>__import__('os')</answer>",
    ],
)
def test_anything_else_is_none(text: str | None) -> None:
    assert parse_answer(text) is None


async def test_reward_is_one_for_the_exact_integer_only() -> None:
    shop = ShopEnvironment()
    task = shop.task("train", 2)
    for text, expected in (
        (f"<answer>{task.secret['answer']}</answer>", 1.0),
        (f"<answer>{task.secret['answer'] + 1}</answer>", 0.0),
        (str(task.secret["answer"]), 0.0),
    ):
        episode = shop.episode(task)
        assert (await episode.step(Action(text))).done
        reward = await episode.grade()
        assert (reward.total, reward.components) == (expected, {"correct": expected})
        await episode.close()


async def test_an_episode_cut_short_is_graded_zero() -> None:
    shop = ShopEnvironment()
    episode = shop.episode(shop.task("train", 2))
    assert (await episode.grade()).total == 0.0
    await episode.close()


def test_the_prompt_does_not_hold_the_answer_and_the_repr_no_secret() -> None:
    shop = ShopEnvironment()
    for index in range(200):
        task = shop.task("heldout", index)
        words = {word.strip(".?") for message in task.prompt for word in message.content.split()}
        assert str(task.secret["answer"]) not in words
        assert "secret" not in repr(task)
