"""Thinking budgets in the actor: what is asked of the engine, what is cut, what the actor writes, what is trained."""

from __future__ import annotations

from typing import Any

import pytest

from actors.renderer import Renderer
from broker.protocol.trajectory import Outcome
from learner.batching import train_sequence
from tests.unit.actors.played import CLOSED, RENDERER, STOP, TAGGED, Played


def both_tokenizers() -> Any:
    return pytest.mark.parametrize("renderer", [RENDERER, TAGGED], ids=["several tokens", "one token"])


@both_tokenizers()
async def test_an_unlimited_budget_is_one_generation_and_is_counted(renderer: Renderer) -> None:
    played = await Played(renderer).run(["<think>3, so look</think>\n\n<tool>look 3</tool>", "w3"], None)
    assert played.head.outcome is Outcome.COMPLETED
    assert len(played.engine.prompts) == 2
    assert played.account == (played.tokens("3, so look", "</think>"), 0, 0)
    assert [action.tool_calls[0].arguments for action in played.actions[:1]] == [{"word": "3"}]
    assert "Think for" not in played.parts()[0][1]


@both_tokenizers()
async def test_thinking_within_the_budget_is_left_alone(renderer: Renderer) -> None:
    text = "<think>3</think>\n\nw3"
    played = await Played(renderer).run([text], 40)
    assert [mask for mask, _ in played.parts()] == [False, True]
    assert played.parts()[0][1].endswith(
        "user\nSay word 3.\nThink for at most 40 tokens in each turn.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert played.engine.max_tokens == [played.tokens("<think>") + 40]
    assert played.account == (played.tokens("3", "</think>"), 0, 0)
    assert played.head.reward_components["right"] == 1.0  # the answer alone is graded


@both_tokenizers()
async def test_thinking_that_goes_on_is_closed_and_answered(renderer: Renderer) -> None:
    played = await Played(renderer).run(["<think>plates plates plates plates plates plates", "w3"], 5)
    start, sampled, forced, answer = played.parts()
    assert [mask for mask, _ in (start, sampled, forced, answer)] == [False, True, False, True]
    assert forced[1] == STOP
    assert answer[1] == "w3<|im_end|>"
    assert played.account == (5, 0, 1)
    assert played.head.outcome is Outcome.COMPLETED
    assert played.head.reward_components["right"] == 1.0
    opening = played.tokens("<think>")  # which is no thinking
    assert played.engine.max_tokens == [opening + 5, 60 - opening - 5]
    first, second = played.engine.prompts
    whole = played.trajectory.segments[0].token_ids_T.tolist()
    assert (first, second) == (whole[: len(first)], whole[: -len(renderer.turn("w3"))])


async def test_what_the_actor_wrote_is_never_trained_on_and_has_no_version() -> None:
    played = await Played().run(["<think>plates plates plates plates", "<tool>look 3</tool>", "w3"], 3)
    segment = played.trajectory.segments[0]
    forced = [token for text in (" Stop.", "</think>", "\n\n") for token in RENDERER.inside(text)]
    ids = segment.token_ids_T.tolist()
    (at,) = (i for i in range(len(ids)) if ids[i : i + len(forced)] == forced)
    span = slice(at, at + len(forced))
    assert not segment.loss_mask_T[span].any()
    assert not segment.logprobs_T[span].any()
    assert (segment.logprobs_T[segment.loss_mask_T] < 0).all()
    assert sum(run.num_tokens for run in segment.version_runs) == segment.loss_mask_T.sum()
    assert len({run.version for run in segment.version_runs}) == 2
    assert not train_sequence(segment, 1.0, 0, 1 << 30).loss_mask_T[span].any()


@both_tokenizers()
async def test_a_budget_of_0_answers_at_once(renderer: Renderer) -> None:
    played = await Played(renderer).run(["<tool>look 3</tool>", "w3"], 0)
    parts = played.parts()
    assert [mask for mask, _ in parts] == [False, True, False, True]
    assert parts[0][1].endswith(f"Answer without thinking.<|im_end|>\n<|im_start|>assistant\n{CLOSED}")
    assert parts[2][1].endswith(f"<|im_start|>assistant\n{CLOSED}")  # in every turn
    assert len(played.engine.prompts) == 2
    assert played.account == (0, 0, 0)


@both_tokenizers()
async def test_a_budget_of_0_is_kept_by_a_policy_that_thinks_all_the_same(renderer: Renderer) -> None:
    played = await Played(renderer).run(["w4, or <think>let me see</think>w5", "w3"], 0)
    assert [text for mask, text in played.parts() if mask] == ["w4, or <think>", "w3<|im_end|>"]
    assert played.parts()[2][1] == STOP
    assert played.account == (0, 0, 1)
    assert played.environment.closed == 1  # type: ignore[attr-defined]


@both_tokenizers()
async def test_thinking_again_after_an_answer_costs_the_same_budget(renderer: Renderer) -> None:
    budget = len(renderer.tag("3") + renderer.tag("</think>")) + 2
    played = await Played(renderer).run(["<think>3</think>\n\nso <think>plates plates plates plates", "w3"], budget)
    assert played.account == (budget, 0, 1)
    assert played.parts()[-2:] == [(False, STOP), (True, "w3<|im_end|>")]
    assert played.head.outcome is Outcome.COMPLETED


async def test_a_budget_of_a_turn_begins_anew() -> None:
    used = len(RENDERER.inside("3 3</think>"))
    played = await Played().run(["<think>3 3</think>\n\n<tool>look 3</tool>", "<think>3 3</think>\n\nw3"], used)
    assert played.account == (2 * used, 0, 0)
    assert CLOSED not in "".join(text for _, text in played.parts())


async def test_an_episode_whose_budget_is_spent_does_not_think_again() -> None:
    played = await Played(thinking={"per": "episode"}).run(
        ["<think>plates plates plates plates", "<tool>look 3</tool>", "w3"], 4
    )
    assert played.account == (4, 0, 1)
    contexts = [text for mask, text in played.parts() if not mask]
    assert "in all." in contexts[0]
    assert contexts[-1].endswith(f"<|im_start|>assistant\n{CLOSED}")
    assert played.head.outcome is Outcome.COMPLETED


async def test_an_episode_spends_what_its_turns_left() -> None:
    first = "<think>3</think>\n\n<tool>look 3</tool>"
    budget = len(RENDERER.inside("3</think>")) + 2
    played = await Played(thinking={"per": "episode"}).run([first, "<think>plates plates plates", "w3"], budget)
    assert played.account == (budget, 0, 1)


async def test_a_context_may_open_thinking() -> None:
    played = await Played(thinking={"opens": "context"}).run(["so 3</think>\n\nw3"], 20)
    assert played.parts()[0][1].endswith("assistant\n<think>\n")
    assert played.account == (len(RENDERER.inside("so 3</think>")), 0, 0)
    assert played.head.reward_components["right"] == 1.0
    forced = await Played(thinking={"opens": "context"}).run(["so 3 and so on", "w3"], 2)
    assert forced.account == (2, 0, 1)
    assert forced.engine.max_tokens == [2, 58]
    closed = await Played(thinking={"opens": "context"}).run(["w3"], 0)
    assert closed.parts()[0][1].endswith(f"assistant\n{CLOSED}")


async def test_a_soft_budget_is_overrun_up_to_its_limit_and_says_by_how_much() -> None:
    soft = {"soft": {"overrun_rate": 0.1, "limit": 2.0}, "opens": "context"}
    text = "a b c d e f"
    assert len(RENDERER.inside(text)) > 8
    played = await Played(thinking=soft).run([text, "w3"], 4)
    assert played.account == (8, 4, 1)
    used = len(RENDERER.inside("a</think>"))
    ended = await Played(thinking=soft).run(["a</think>\n\nw3"], used - 1)
    assert ended.account == (used, 1, 0)
    episode = await Played(thinking=soft | {"per": "episode"}).run(
        ["a</think>\n\n<tool>look 3</tool>", "a b c", "w3"], 4
    )
    assert episode.account[1] == episode.account[0] - 4


async def test_the_limits_of_tokens_hold_while_thinking() -> None:
    played = await Played().run(["<think>plates plates plates plates", " plates"], 30, sampling={"max_turn_tokens": 9})
    assert (played.head.outcome, played.trajectory.num_sampled) == (Outcome.TRUNCATED_TOKENS, 9)
    assert played.head.num_forced_stops == 0
    prompt = len(played.engine.prompts[0])
    full = Played(thinking={"opens": "context"})
    full.max_model_len = prompt + len(RENDERER.inside("<think>") + RENDERER.inside("\n")) + 5
    played = await full.run(["plates plates plates plates"], 5)
    # The stop phrase does not fit, so nothing could be answered: cut as it stands.
    assert (played.head.outcome, played.account) == (Outcome.TRUNCATED_TOKENS, (5, 0, 0))
    assert len(played.trajectory.segments[0].token_ids_T) <= full.max_model_len


async def test_a_turn_that_ends_while_thinking_is_malformed_and_the_episode_goes_on() -> None:
    played = await Played().run(["<think>that is all", "w3"], 40)
    assert played.head.outcome is Outcome.COMPLETED
    assert played.head.num_malformed == 1
    assert [action.text for action in played.actions] == ["w3"]


async def test_a_call_within_thinking_is_not_made() -> None:
    played = await Played().run(["<think><tool>look 9</tool></think>\n\n<tool>look 3</tool>", "w3"], 59)
    assert [call.arguments["word"] for action in played.actions for call in action.tool_calls] == ["3"]
    assert played.head.num_tool_calls == 1


async def test_a_deadline_between_the_phases_keeps_what_there_is() -> None:
    played = await Played(thinking={"opens": "context"}).run(["plates plates plates", "<hang>"], 4, deadline_s=0.2)
    assert played.head.outcome is Outcome.TIMEOUT
    assert played.account == (4, 0, 1)
    assert played.trajectory.num_sampled == 5
