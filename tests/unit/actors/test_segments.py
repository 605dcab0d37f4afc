"""Episodes whose history is edited, and those that fill what they may: segment by segment, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.engine import Sample
from actors.record import Record
from actors.rollout import run_episode
from broker.protocol.codec import pack_trajectories
from broker.protocol.trajectory import MAX_SEGMENTS, Mode, Outcome, Ticket, Trajectory, VersionRun
from envs.interface import Action, Message, Observation, ReferencePolicy, Task, ToolCall
from envs.play import play
from tests.unit.actors.conversations import NAMES, make_renderer
from tests.unit.actors.support import ScriptedEngine, WordEnvironment, make_ticket

TOLD = Message("user", "Say word 3.")
SUMMARY = (TOLD, Message("assistant", "I looked."), Message("user", "Go on."))


class Edited:
    """An episode of a format in which some turns are answered with an edited history."""

    def __init__(
        self,
        script: list[Any],
        edits: dict[int, Observation],
        ticket: Ticket | None = None,
        max_model_len: int = 4000,
        name: str = "tagged",
    ) -> None:
        self.renderer = make_renderer(name)
        self.environment = WordEnvironment()
        self.engine = ScriptedEngine(self.renderer, script)
        self.ticket, self.max_model_len = ticket or make_ticket(sampling={"max_turns": 9}), max_model_len
        self.edits = edits
        self.num_steps = 0
        self.environment.on_step = self.step

    async def step(self, _action: Action) -> Observation | None:
        self.num_steps += 1
        self.engine.version = self.engine.version._replace(version=4 + self.num_steps)
        return self.edits.get(self.num_steps)

    async def __call__(self) -> Trajectory:
        trajectory = await run_episode(
            self.ticket,
            self.environment,
            self.engine,
            self.renderer,
            actor_id="a",
            max_model_len=self.max_model_len,
        )
        pack_trajectories((trajectory,))  # raises unless the wire carries it
        return trajectory

    def look(self) -> str:
        return self.renderer.write(Action("", (ToolCall("look", {"word": "3"}),)), self.environment.tools)


def look(name: str = "tagged") -> str:
    return make_renderer(name).write(Action("", (ToolCall("look", {"word": "3"}),)), WordEnvironment().tools)


@pytest.mark.parametrize("name", NAMES)
async def test_an_edited_history_begins_a_segment_of_its_own(name: str) -> None:
    edit = Observation((Message("tool", "w3"),), history=SUMMARY)
    run = Edited([look(name), look(name), look(name), "w3"], {2: edit}, name=name)
    trajectory = await run()
    renderer, tools = run.renderer, run.environment.tools
    assert trajectory.head.outcome is Outcome.COMPLETED
    assert (trajectory.head.num_turns, trajectory.head.num_tool_calls) == (4, 3)
    first, second = trajectory.segments
    turn, answer = renderer.turn(look(name)), renderer.turn("w3")
    observed = renderer.observe([Message("tool", "w3")])
    assert first.token_ids_T.tolist() == [*renderer.open([TOLD], tools), *turn, *observed, *turn]
    opening = renderer.open([*SUMMARY, Message("tool", "w3")], tools)
    assert second.token_ids_T.tolist() == [*opening, *turn, *observed, *answer]
    for segment, wanted in ((first, [turn, turn]), (second, [turn, answer])):
        assert segment.token_ids_T[segment.loss_mask_T].tolist() == [i for ids in wanted for i in ids]
        assert not segment.logprobs_T[~segment.loss_mask_T].any()
        assert (segment.logprobs_T[segment.loss_mask_T] <= -1).all()
    # Each has the versions of its own tokens, and what was said of before is no one's sample.
    assert first.version_runs == (VersionRun(1, 4, len(turn)), VersionRun(1, 5, len(turn)))
    assert second.version_runs == (VersionRun(1, 6, len(turn)), VersionRun(1, 7, len(answer)))
    assert not second.loss_mask_T[: len(opening)].any()
    # The prompts are the segments as far as they had grown.
    prompts = run.engine.prompts
    assert prompts[1] == first.token_ids_T.tolist()[: len(prompts[1])]
    assert prompts[2] == opening
    assert prompts[3] == second.token_ids_T.tolist()[: -len(answer)]


async def test_the_history_may_be_edited_after_every_turn() -> None:
    edits = {number: Observation(history=(TOLD,)) for number in (1, 2, 3)}
    trajectory = await Edited([look(), look(), look(), "w3"], edits)()
    assert [s.num_sampled for s in trajectory.segments] == [len(make_renderer("tagged").turn(look()))] * 3 + [
        len(make_renderer("tagged").turn("w3"))
    ]
    assert len({s.token_ids_T.tobytes() for s in trajectory.segments[:3]}) == 1


async def test_the_token_limit_of_an_episode_counts_over_all_segments() -> None:
    turn = len(make_renderer("tagged").turn(look()))
    ticket = make_ticket(sampling={"max_turns": 9, "max_episode_tokens": 2 * turn + 1})
    edits = {1: Observation(history=(TOLD,)), 2: Observation(history=(TOLD,))}
    run = Edited([look()] * 3, edits, ticket)
    trajectory = await run()
    assert run.engine.max_tokens == [2 * turn + 1, turn + 1, 1]
    assert trajectory.head.outcome is Outcome.TRUNCATED_TOKENS
    assert [s.num_sampled for s in trajectory.segments] == [turn, turn, 1]


async def test_the_context_limit_is_of_the_segment_at_hand() -> None:
    """Clearing the history makes room: three turns that would not fit into one context."""
    renderer = make_renderer("tagged")
    one = len(renderer.open([TOLD])) + len(renderer.turn(look())) + 2
    edits = {number: Observation(history=(TOLD,)) for number in (1, 2, 3)}
    trajectory = await Edited([look(), look(), look(), "w3"], edits, max_model_len=one)()
    assert trajectory.head.outcome is Outcome.COMPLETED
    assert max(s.token_ids_T.size for s in trajectory.segments) <= one
    assert sum(s.token_ids_T.size for s in trajectory.segments) > 3 * one - 20


async def test_an_edited_history_that_does_not_fit_leaves_the_segments_so_far() -> None:
    too_long = Observation(history=(Message("user", "x" * 5000),))
    trajectory = await Edited([look(), look()], {1: Observation(history=SUMMARY), 2: too_long})()
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.TRUNCATED_TOKENS, 0.0)
    assert [s.num_sampled for s in trajectory.segments] == [len(make_renderer("tagged").turn(look()))] * 2


async def test_an_episode_has_no_more_segments_than_the_wire_carries() -> None:
    edits = {number: Observation(history=(TOLD,)) for number in range(1, MAX_SEGMENTS + 10)}
    sampling = {"max_turns": MAX_SEGMENTS + 10, "max_episode_tokens": 1_000_000}
    trajectory = await Edited([look()] * MAX_SEGMENTS, edits, make_ticket(sampling=sampling))()
    assert trajectory.head.outcome is Outcome.TRUNCATED_TOKENS
    assert len(trajectory.segments) == trajectory.head.num_turns == MAX_SEGMENTS


@pytest.mark.parametrize("name", NAMES)
async def test_an_observation_that_does_not_fit_ends_the_episode_with_the_tokens_so_far(name: str) -> None:
    run = Edited([look(name)], {1: Observation((Message("tool", "x" * 5000),))}, name=name)
    trajectory = await run()
    assert trajectory.head.outcome is Outcome.TRUNCATED_TOKENS
    (segment,) = trajectory.segments
    opening, turn = run.renderer.open([TOLD], run.environment.tools), run.renderer.turn(look(name))
    assert segment.token_ids_T.tolist() == opening + turn
    assert segment.loss_mask_T.tolist() == [False] * len(opening) + [True] * len(turn)


@pytest.mark.parametrize("room", [0, 1])
async def test_an_observation_fits_if_a_token_fits_after_it(room: int) -> None:
    renderer = make_renderer("tagged")
    sampled = len(renderer.open([TOLD])) + len(renderer.turn(look()))
    answered = sampled + len(renderer.observe([Message("tool", "w3")]))
    run = Edited([look(), "w3"], {}, max_model_len=answered + room)
    trajectory = await run()
    assert trajectory.head.outcome is Outcome.TRUNCATED_TOKENS
    assert len(run.engine.prompts) == 1 + room
    assert trajectory.segments[0].token_ids_T.size == (answered + 1 if room else sampled)
    assert trajectory.segments[0].loss_mask_T[-1]


def test_a_segment_in_which_nothing_was_sampled_is_kept_only_where_it_is_the_only_one() -> None:
    sample = Sample(np.array([7], np.int32), np.array([-1.0], np.float32), (VersionRun(1, 4, 1),), "stop")
    record = Record()
    record.begin([1, 2], [TOLD])
    record.begin([3], [TOLD])
    assert [s.token_ids_T.tolist() for s in record.segments()] == [[3]]
    record.add_sample(sample)
    record.begin([4, 5], SUMMARY)
    assert [s.token_ids_T.tolist() for s in record.segments()] == [[3, 7]]
    assert record.messages == list(SUMMARY)
    record.add_sample(sample)
    assert [s.token_ids_T.tolist() for s in record.segments()] == [[3, 7], [4, 5, 7]]
    assert record.num_sampled == 2


@pytest.mark.parametrize("name", NAMES)
async def test_a_malformed_turn_is_answered_in_every_format_and_counted(name: str) -> None:
    bad = {
        "tagged": "<tool>look 3",
        "llama3": '{"name": "look", "parameters": {"wrd": "3"}}',
    }.get(name, '<tool_call>\n{"name": "look", "arguments": {"wrd": "3"}}\n</tool_call>')
    run = Edited([bad, "w3"], {}, name=name)
    trajectory = await run()
    reason = run.renderer.parse(bad, run.environment.tools).malformed
    assert trajectory.head.outcome is Outcome.COMPLETED
    assert (trajectory.head.num_malformed, trajectory.head.num_tool_calls, run.num_steps) == (1, 0, 1)
    ids = trajectory.segments[0].token_ids_T.tolist()
    told = run.renderer.observe([Message("tool", f"error: {reason}")])
    answer = run.renderer.turn("w3")
    assert ids[-len(told) - len(answer) :] == told + answer


@pytest.mark.parametrize("name", NAMES)
async def test_a_turn_cut_by_its_length_is_kept_and_ends_the_episode(name: str) -> None:
    run = Edited([look(name), "w3 and so on..."], {}, name=name)
    trajectory = await run()
    assert trajectory.head.outcome is Outcome.TRUNCATED_TOKENS
    ids = trajectory.segments[0].token_ids_T.tolist()
    cut = run.renderer.turn("w3 and so on")[:-1]
    assert ids[-len(cut) :] == cut
    assert trajectory.segments[0].loss_mask_T[-len(cut) :].all()


@pytest.mark.parametrize("name", NAMES)
async def test_reference_episodes_have_the_tokens_of_sampled_ones_in_every_format(name: str) -> None:
    sampled = await Edited([look(name), "w3"], {}, name=name)()
    run = Edited([], {}, make_ticket(mode=Mode.REFERENCE, sampling={"max_turn_tokens": 200}), name=name)
    written = await run()
    np.testing.assert_array_equal(written.segments[0].token_ids_T, sampled.segments[0].token_ids_T)
    np.testing.assert_array_equal(written.segments[0].loss_mask_T, sampled.segments[0].loss_mask_T)
    assert written.head.reward == 1.1


async def test_a_reference_policy_sees_the_history_as_it_was_edited() -> None:
    seen: list[tuple[Message, ...]] = []

    class Watching(ReferencePolicy):
        def act(self, messages: Any) -> Action:
            seen.append(tuple(messages))
            return Action("", (ToolCall("look", {"word": "3"}),)) if len(seen) < 3 else Action("w3")

    edit = Observation((Message("tool", "w3"),), history=SUMMARY)
    run = Edited([], {1: edit}, make_ticket(mode=Mode.REFERENCE))
    run.environment.reference = lambda task: Watching()  # type: ignore[method-assign]
    trajectory = await run()
    assert len(trajectory.segments) == 2
    looked, answered = Message("assistant", look()), Message("tool", "w3")
    assert seen == [(TOLD,), (*SUMMARY, answered), (*SUMMARY, answered, looked, answered)]

    environment = WordEnvironment()
    again = Edited([], {1: edit})
    environment.on_step = again.step
    seen.clear()
    task: Task = environment.task("train", 3)
    played = await play(environment, task, Watching())
    assert played.messages == (*SUMMARY, answered, Message("assistant", ""), answered, Message("assistant", "w3"))
    assert seen[1] == (*SUMMARY, answered)
