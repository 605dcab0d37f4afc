"""Thinking budgets in the actor: what is asked of the engine, what is cut, what the actor writes, what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine import Sample
from actors.renderer import Renderer
from actors.rollout import run_episode
from broker.process.thinking_settings import ThinkingSection
from broker.protocol.codec import pack_trajectories
from broker.protocol.trajectory import Mode, Outcome, Sampling, Trajectory, VersionRun
from envs.interface import Action, Environment, Message, Observation, ReferencePolicy, Reward, Split, Task
from envs.tools import ToolEpisode, ToolSet
from learner.batching import train_sequence
from tests.unit.actors.support import ScriptedEngine, WordEnvironment, make_renderer, make_ticket

RENDERER = make_renderer()
TAGGED = make_renderer("<think>", "</think>")
SHORT = {"stop_phrase": " Stop."}
STOP = " Stop.</think>\n\n"
CLOSED = "<think>\n\n</think>\n\n"


class Played:
    """An episode of the word environment, and what it left."""

    def __init__(self, renderer: Renderer = RENDERER, thinking: dict[str, Any] | None = None) -> None:
        self.renderer = renderer
        self.thinking = ThinkingSection.model_validate(SHORT | (thinking or {}))
        self.environment: Environment = WordEnvironment()
        self.actions: list[Action] = []
        self.max_model_len = 1000

    async def run(self, script: Sequence[str], budget: int | None, **ticket: Any) -> Played:
        self.engine = ScriptedEngine(self.renderer, list(script))
        if isinstance(self.environment, WordEnvironment):
            self.environment.on_step = self.seen
        self.trajectory = await run_episode(
            make_ticket(thinking_budget=budget, **ticket),
            self.environment,
            self.engine,
            self.renderer,
            actor_id="a",
            max_model_len=self.max_model_len,
            thinking=self.thinking,
        )
        pack_trajectories((self.trajectory,))  # raises unless the wire carries it
        return self

    async def seen(self, action: Action) -> None:
        self.actions.append(action)
        self.engine.version = self.engine.version._replace(version=self.engine.version.version + 1)

    @property
    def head(self) -> Any:
        return self.trajectory.head

    @property
    def account(self) -> tuple[int, int, int]:
        """Thinking, overrun, forced stops."""
        return self.head.num_thinking_tokens, self.head.num_overrun_tokens, self.head.num_forced_stops

    def parts(self) -> list[tuple[bool, str]]:
        """The trace in runs of equal mask, as text."""
        segment = self.trajectory.segments[0]
        cuts = np.flatnonzero(np.diff(segment.loss_mask_T.astype(int))) + 1
        ids, masks = np.split(segment.token_ids_T, cuts), np.split(segment.loss_mask_T, cuts)
        return [(bool(mask[0]), self.renderer.decode(part.tolist())) for part, mask in zip(ids, masks, strict=True)]

    def tokens(self, *texts: str) -> int:
        return sum(len(self.renderer.inside(text)) for text in texts)


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
    budget = len(renderer.inside("3") + renderer.inside("</think>")) + 2
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


async def test_a_turn_that_ends_while_thinking_has_no_answer() -> None:
    played = await Played().run(["<think>that is all"], 40)
    assert played.head.outcome is Outcome.COMPLETED
    assert [action.text for action in played.actions] == [""]


async def test_a_call_within_thinking_is_not_made() -> None:
    played = await Played().run(["<think><tool>look 9</tool></think>\n\n<tool>look 3</tool>", "w3"], 59)
    assert [call.arguments["word"] for action in played.actions for call in action.tool_calls] == ["3"]
    assert played.head.num_tool_calls == 1


async def test_a_deadline_between_the_phases_keeps_what_there_is() -> None:
    played = await Played(thinking={"opens": "context"}).run(["plates plates plates", "<hang>"], 4, deadline_s=0.2)
    assert played.head.outcome is Outcome.TIMEOUT
    assert played.account == (4, 0, 1)
    assert played.trajectory.num_sampled == 5


# --- demonstrations keep to the budgets too


class Thinker(ReferencePolicy):
    """Thinks, then answers."""

    def __init__(self, text: str) -> None:
        self._text = text

    def act(self, messages: Sequence[Message]) -> Action:
        assert messages[0].content == "Say it."  # what the policy is told of budgets is not the reference's business
        return Action(self._text)


class ThinkerEpisode(ToolEpisode):
    async def grade(self) -> Reward:
        return Reward(float(self.final_text == "w3"))


class ThinkerEnvironment(Environment):
    name = "thinker"
    tools = ()

    def __init__(self, text: str) -> None:
        self._text = text

    def task(self, split: Split, index: int) -> Task:
        return Task("thinker", split, index, "plain", (Message("user", "Say it."),))

    def episode(self, task: Task) -> ThinkerEpisode:
        return ThinkerEpisode(task, ToolSet())

    def reference(self, task: Task) -> ReferencePolicy:
        return Thinker(self._text)


DEMONSTRATION = "<think>plates plates plates</think>\n\nw3"


@pytest.mark.parametrize("opens", ["policy", "context"])
@pytest.mark.parametrize("budget", [None, 0, 2, 100])
@pytest.mark.parametrize("text", [DEMONSTRATION, "w3"])
async def test_a_demonstration_is_written_as_a_policy_with_that_budget_would_have(
    text: str, budget: int | None, opens: str
) -> None:
    played = Played(thinking={"opens": opens})
    played.environment = ThinkerEnvironment(text)
    await played.run([], budget, mode=Mode.REFERENCE, sampling={"max_turn_tokens": 150})
    whole = "".join(part for _, part in played.parts())
    turn = whole.partition("<|im_start|>assistant\n")[2]
    forced = budget == 2 and (text == DEMONSTRATION or opens == "context")  # the closing tag is longer than that
    assert played.head.reward == 1.0
    assert played.head.num_forced_stops == forced
    assert played.trajectory.segments[0].version_runs == (VersionRun(0, 0, played.trajectory.num_sampled),)
    if budget == 0:
        assert turn == f"{CLOSED}w3<|im_end|>"
        assert played.parts()[-1] == (True, "w3<|im_end|>")
    elif forced:
        assert played.head.num_thinking_tokens == 2
        assert played.parts()[-2:] == [(False, STOP), (True, "w3<|im_end|>")]
    elif opens == "context" and text == "w3":
        assert turn == "<think>\n\n\n</think>\n\nw3<|im_end|>"
    else:
        assert turn.replace("<think>\n", "<think>") == f"{text}<|im_end|>"


# --- any policy, any limits


class RandomEngine(ScriptedEngine):
    """Samples random fragments, tags among them; the same tokens after the same context, whatever is asked for."""

    FRAGMENTS = ("<think>", "</think>", "<thi", "nk>", "plates", " 17", "€", "<", "w3")

    def __init__(self, renderer: Renderer, seed: int) -> None:
        super().__init__(renderer, [])
        self._rng = np.random.default_rng(seed)
        self.sent: list[list[int]] = []

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
    ) -> Sample:
        assert max_tokens > 0
        self.prompts.append(list(prompt_ids))
        ids: list[int] = []
        while len(ids) < max_tokens:
            end = self._rng.random() < 0.08
            fragment = self._rng.choice(self.FRAGMENTS)
            for token in self._renderer.turn("") if end else self._renderer.inside(str(fragment)):
                ids.append(token)
                if token in stop_token_ids or len(ids) == max_tokens:
                    break
            if ids[-1] in stop_token_ids:
                break
        self.version = self.version._replace(version=self.version.version + int(self._rng.integers(2)))
        self.sent.append(ids)
        return self._sample(ids, "stop" if ids[-1] in stop_token_ids else "length")


@given(
    seed=st.integers(0, 1 << 30),
    budget=st.one_of(st.none(), st.integers(0, 12)),
    per=st.sampled_from(["turn", "episode"]),
    opens=st.sampled_from(["policy", "context"]),
    soft=st.booleans(),
    tagged=st.booleans(),
    limits=st.fixed_dictionaries({"max_turn_tokens": st.integers(1, 50), "max_episode_tokens": st.integers(1, 120)}),
    max_model_len=st.integers(60, 400),
)
@settings(deadline=None, max_examples=150)
async def test_whatever_the_policy_does_the_budget_and_the_limits_hold(
    seed: int,
    budget: int | None,
    per: str,
    opens: str,
    soft: bool,
    tagged: bool,
    limits: dict[str, int],
    max_model_len: int,
) -> None:
    renderer = TAGGED if tagged else RENDERER
    engine, environment = RandomEngine(renderer, seed), WordEnvironment()

    async def never_done(_action: Action) -> Observation:
        return Observation((Message("tool", "<think> go on"),))

    environment.on_step = never_done
    section = ThinkingSection.model_validate(
        SHORT | {"per": per, "opens": opens, "soft": {"overrun_rate": 0.1 if soft else None}}
    )
    trajectory = await run_episode(
        make_ticket(thinking_budget=budget, sampling=limits),
        environment,
        engine,
        renderer,
        actor_id="a",
        max_model_len=max_model_len,
        thinking=section,
    )
    pack_trajectories((trajectory,))
    head, segment = trajectory.head, trajectory.segments[0]
    assert trajectory.num_sampled <= limits["max_episode_tokens"]
    assert np.flatnonzero(segment.loss_mask_T).max(initial=-1) < max_model_len
    assert head.num_overrun_tokens <= head.num_thinking_tokens <= trajectory.num_sampled
    if budget is not None:
        allowed = section.limit(budget) or 0
        num_turns = head.num_turns + 1 if per == "turn" else 1
        assert head.num_thinking_tokens <= allowed * num_turns
        assert soft or head.num_overrun_tokens == 0
    else:
        assert head.num_forced_stops == 0
    # What is called sampled is what the engine sent, cut at most; and each request went on from all that was there.
    ids, mask_T = segment.token_ids_T.tolist(), segment.loss_mask_T
    starts, num_kept = [len(prompt) for prompt in engine.prompts], 0
    for prompt, sent, end in zip(engine.prompts, engine.sent, [*starts, len(ids)][1:], strict=True):
        start = len(prompt)
        kept = int(mask_T[start:end].argmin()) if not mask_T[start:end].all() else end - start
        assert 0 < kept <= len(sent)
        assert ids[: start + kept] == prompt + sent[:kept]
        num_kept += kept
    assert num_kept == trajectory.num_sampled
    assert_counted_token_by_token(trajectory, renderer)


def assert_counted_token_by_token(trajectory: Trajectory, renderer: Renderer) -> None:
    """Thinking counted again, the slow way: over the text of every turn, after every token."""
    segment, expected = trajectory.segments[0], 0
    ids, mask = segment.token_ids_T.tolist(), segment.loss_mask_T.tolist()
    header = renderer.inside("assistant\n")
    starts = [i + len(header) for i in range(len(ids)) if ids[i : i + len(header)] == header]
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        for i in range(start, end):
            text, is_open = renderer.decode(ids[start:i]), False
            while (found := text.find("</think>" if is_open else "<think>")) >= 0:
                text, is_open = text[found + 7 + is_open :], not is_open
            expected += is_open and mask[i]
    assert trajectory.head.num_thinking_tokens == expected
