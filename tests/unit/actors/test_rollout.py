from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from actors import metrics
from actors.engine import EngineDeadError
from actors.rollout import InfraFailureError, run_episode
from broker.protocol.codec import pack_trajectories
from broker.protocol.trajectory import Mode, Outcome, TaskRef, Ticket, Trajectory, VersionRun
from envs import timeouts
from envs.interface import Action, EnvironmentFailureError, Message, Observation, Reward, SandboxError
from tests.unit.actors.support import ScriptedEngine, WordEnvironment, make_renderer, make_ticket

RENDERER = make_renderer()
SOLUTION = ["<tool>look 3</tool>", "w3"]


class Run:
    """An episode with its fakes still at hand."""

    def __init__(
        self,
        script: list[Any],
        ticket: Ticket | None = None,
        max_model_len: int = 1000,
        turn_timeout_s: float | None = None,
    ) -> None:
        self.environment = WordEnvironment()
        self.engine = ScriptedEngine(RENDERER, script)
        self.ticket = ticket or make_ticket()
        self.max_model_len = max_model_len
        self.turn_timeout_s = turn_timeout_s
        self.before = self._timeouts()

    async def __call__(self) -> Trajectory:
        trajectory = await run_episode(
            self.ticket,
            self.environment,
            self.engine,
            RENDERER,
            actor_id="a",
            max_model_len=self.max_model_len,
            turn_timeout_s=self.turn_timeout_s,
        )
        assert self.environment.closed == self.environment.opened
        pack_trajectories((trajectory,))  # raises unless the wire carries it
        return trajectory

    @property
    def timeouts(self) -> dict[str, float]:
        """What was counted since, by what ran out of time."""
        return {what: num - self.before[what] for what, num in self._timeouts().items() if num > self.before[what]}

    @staticmethod
    def _timeouts() -> dict[str, float]:
        return {
            what: metrics.timeouts.labels("words", "train", what)._value.get() for what in ("tool", "turn", "episode")
        }


def text(trajectory: Trajectory) -> str:
    return RENDERER.decode(trajectory.segments[0].token_ids_T.tolist())


async def test_a_completed_episode_is_recorded_token_for_token() -> None:
    run = Run(SOLUTION)
    trajectory = await run()
    head, segment = trajectory.head, trajectory.segments[0]
    assert (head.outcome, head.reward, head.kind) == (Outcome.COMPLETED, 1.1, "plain")
    assert head.reward_components == {"right": 1.0, "looked": 1.0}
    assert (head.num_turns, head.num_tool_calls, head.num_malformed) == (2, 1, 0)
    assert head.timings_s.keys() == {"total", "model", "tool"}
    assert text(trajectory) == (
        "<|im_start|>user\nSay word 3.<|im_end|>\n<|im_start|>assistant\n<tool>look 3</tool><|im_end|>\n"
        "<|im_start|>tool\nw3<|im_end|>\n<|im_start|>assistant\nw3<|im_end|>"
    )
    sampled = segment.token_ids_T[segment.loss_mask_T].tolist()
    assert sampled == RENDERER.turn(SOLUTION[0]) + RENDERER.turn(SOLUTION[1])
    assert segment.version_runs == (VersionRun(1, 4, len(sampled)),)
    assert (segment.logprobs_T[segment.loss_mask_T] <= -1).all()
    assert not segment.logprobs_T[~segment.loss_mask_T].any()
    # Each prompt is the previous one, what was sampled, and the observation: nothing is tokenised twice.
    first, second = run.engine.prompts
    assert second[: len(first)] == first
    assert second[len(first) :][: len(RENDERER.turn(SOLUTION[0]))] == RENDERER.turn(SOLUTION[0])
    assert run.environment.closed == 1


async def test_a_reward_in_numpys_numbers_is_carried_by_the_wire() -> None:
    run = Run(SOLUTION)

    async def grade() -> Reward:
        return Reward(np.float32(0.5), {"exact": np.float64(0.25), "rounds": 2})  # type: ignore[arg-type]

    run.environment.on_grade = grade
    head = (await run()).head
    assert (head.reward, head.reward_components) == (0.5, {"exact": 0.25, "rounds": 2.0})


async def test_versions_are_kept_per_token_across_a_switch() -> None:
    run = Run(SOLUTION)

    async def switch(_action: Action) -> None:
        run.engine.version = run.engine.version._replace(version=5)

    run.environment.on_step = switch
    runs = (await run()).segments[0].version_runs
    assert [(r.lineage, r.version) for r in runs] == [(1, 4), (1, 5)]
    assert [r.num_tokens for r in runs] == [len(RENDERER.turn(t)) for t in SOLUTION]


async def test_a_malformed_call_is_answered_and_counted_and_runs_nothing() -> None:
    run = Run(["<tool>look 3", "<tool>find 3</tool>", "w3"])
    trajectory = await run()
    assert trajectory.head.outcome is Outcome.COMPLETED
    assert (trajectory.head.num_malformed, trajectory.head.num_tool_calls, trajectory.head.num_turns) == (2, 0, 3)
    assert trajectory.head.reward_components == {"right": 1.0, "looked": 0.0}
    assert "tool\nerror: a <tool> without </tool><|im_end|>" in text(trajectory)
    assert "tool\nerror: unknown tool find; the tools are: look, add<|im_end|>" in text(trajectory)


async def test_a_turn_cut_by_its_length_ends_the_episode_which_is_graded() -> None:
    run = Run([SOLUTION[0], "w3 and so on..."])
    trajectory = await run()
    assert trajectory.head.outcome is Outcome.TRUNCATED_TOKENS
    assert trajectory.head.reward == 0.1  # it did look
    assert trajectory.head.num_turns == 1
    assert text(trajectory).endswith("w3 and so on")


async def test_the_token_budget_of_the_episode_is_kept() -> None:
    turn = len(RENDERER.turn(SOLUTION[0]))
    run = Run([SOLUTION[0]] * 3, make_ticket(sampling={"max_episode_tokens": 2 * turn + 1}))
    trajectory = await run()
    assert trajectory.head.outcome is Outcome.TRUNCATED_TOKENS
    assert run.engine.max_tokens == [2 * turn + 1, turn + 1, 1]
    assert trajectory.num_sampled == 2 * turn + 1


async def test_a_full_context_is_truncated_tokens() -> None:
    prompt = len(RENDERER.open(WordEnvironment().task("train", 3).prompt))
    turn = len(RENDERER.turn(SOLUTION[0]))
    run = Run([SOLUTION[0]], max_model_len=prompt + turn + 2)
    trajectory = await run()
    assert trajectory.head.outcome is Outcome.TRUNCATED_TOKENS
    assert len(run.engine.prompts) == 1
    assert trajectory.num_sampled == turn


async def test_too_many_turns_are_graded_without_a_dangling_observation() -> None:
    run = Run([SOLUTION[0]] * 2, make_ticket(sampling={"max_turns": 2}))
    trajectory = await run()
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.TRUNCATED_TURNS, 0.1)
    assert text(trajectory).endswith("</tool><|im_end|>")


@pytest.mark.parametrize(("declared", "allowed", "played"), [(1, 3, 1), (3, 1, 1), (2, 2, 2)])
async def test_an_episode_has_the_fewer_of_its_environments_turns_and_the_tickets(
    declared: int, allowed: int, played: int
) -> None:
    run = Run([SOLUTION[0]] * played, make_ticket(sampling={"max_turns": allowed}))
    run.environment.max_turns = declared
    trajectory = await run()
    assert (trajectory.head.outcome, trajectory.head.num_turns) == (Outcome.TRUNCATED_TURNS, played)
    assert trajectory.head.reward == 0.1
    assert trajectory.ticket.sampling.max_turns == allowed  # as it was leased


async def test_a_timeout_while_sampling_keeps_the_partial_and_is_graded() -> None:
    run = Run([SOLUTION[0], "<hang>"], make_ticket(deadline_s=0.2))
    trajectory = await run()
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.TIMEOUT, 0.1)
    assert trajectory.num_sampled == len(RENDERER.turn(SOLUTION[0])) + 1
    assert trajectory.segments[0].loss_mask_T[-1]
    assert run.timeouts == {"episode": 1}


async def test_a_timeout_in_a_tool_is_graded_on_the_partial_state() -> None:
    run = Run([SOLUTION[0]], make_ticket(deadline_s=0.2))

    async def hang(_action: Action) -> None:
        await asyncio.Event().wait()

    run.environment.on_step = hang
    trajectory = await run()
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.TIMEOUT, 0.0)
    assert trajectory.num_sampled == len(RENDERER.turn(SOLUTION[0]))
    assert trajectory.head.timings_s["tool"] > 0.1


async def test_a_turn_that_takes_too_long_ends_the_episode_long_before_its_deadline() -> None:
    run = Run([SOLUTION[0], "<hang>"], make_ticket(deadline_s=600), turn_timeout_s=0.1)
    trajectory = await run()
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.TIMEOUT, 0.1)
    assert trajectory.num_sampled == len(RENDERER.turn(SOLUTION[0])) + 1
    assert run.timeouts == {"turn": 1}

    run = Run([SOLUTION[0]], make_ticket(deadline_s=600), turn_timeout_s=0.1)

    async def hang(_action: Action) -> None:
        await asyncio.Event().wait()

    run.environment.on_step = hang
    assert (await run()).head.outcome is Outcome.TIMEOUT
    assert run.timeouts == {"turn": 1}


async def test_a_tool_call_that_ran_out_of_time_is_counted_and_the_episode_goes_on() -> None:
    run = Run(list(SOLUTION))

    async def late(action: Action) -> Observation | None:
        return Observation((Message("tool", "error: look timed out"),), num_timeouts=1) if action.tool_calls else None

    run.environment.on_step = late
    trajectory = await run()
    assert trajectory.head.outcome is Outcome.COMPLETED
    assert "tool\nerror: look timed out<|im_end|>" in text(trajectory)
    assert run.timeouts == {"tool": 1}


async def test_an_environment_that_ignores_its_cancellation_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "CANCEL_GRACE_S", 0.01)
    run, released, before = Run([SOLUTION[0]], make_ticket(deadline_s=0.2)), asyncio.Event(), timeouts.num_abandoned()

    async def resist(_action: Action) -> None:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue

    run.environment.on_step = resist
    assert (await run()).head.outcome is Outcome.TIMEOUT
    assert timeouts.num_abandoned() == before + 1
    released.set()
    while timeouts.num_abandoned() > before:
        await asyncio.sleep(0)


async def test_an_environment_that_wants_to_end_the_process_ends_its_episode_only() -> None:
    run = Run(list(SOLUTION))

    async def leave(_action: Action) -> None:
        raise SystemExit(1)

    run.environment.on_step = leave
    assert (await run()).head.outcome is Outcome.ENV_FAILURE


async def test_a_timeout_before_the_first_turn_still_makes_a_trajectory() -> None:
    run = Run([], make_ticket(deadline_s=0.1))

    async def hang() -> None:
        await asyncio.Event().wait()

    run.environment.on_start = hang
    trajectory = await run()
    assert (trajectory.head.outcome, trajectory.num_sampled) == (Outcome.TIMEOUT, 0)


@pytest.mark.parametrize("error", [EnvironmentFailureError("gone"), KeyError("bug"), TimeoutError("its own")])
@pytest.mark.parametrize("where", ["task", "start", "step", "grade"])
async def test_a_broken_environment_is_env_failure(where: str, error: Exception) -> None:
    run = Run(list(SOLUTION))

    async def fail(*_: object) -> None:
        raise error

    def fail_now() -> None:
        raise error

    setattr(run.environment, f"on_{where}", fail_now if where == "task" else fail)
    trajectory = await run()
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.ENV_FAILURE, 0.0)


async def test_a_reward_that_is_no_number_is_env_failure() -> None:
    run = Run(list(SOLUTION))

    async def grade() -> Reward:
        return Reward(float("nan"))

    run.environment.on_grade = grade
    assert (await run()).head.outcome is Outcome.ENV_FAILURE


@pytest.mark.parametrize("where", ["start", "step", "grade"])
async def test_a_dead_sandbox_is_no_reward_but_an_infra_failure(where: str) -> None:
    run = Run(list(SOLUTION))

    async def fail(*_: object) -> None:
        raise SandboxError("bwrap died")

    setattr(run.environment, f"on_{where}", fail)
    with pytest.raises(InfraFailureError, match="bwrap died"):
        await run()
    assert run.environment.closed == 1


async def test_engine_failures_are_no_reward_either() -> None:
    run = Run([RuntimeError("odd")])
    with pytest.raises(InfraFailureError, match="odd"):
        await run()
    dead = Run([EngineDeadError("gone")])
    with pytest.raises(EngineDeadError):
        await dead()
    assert (run.environment.closed, dead.environment.closed) == (1, 1)


async def test_an_abort_that_nobody_asked_for_is_an_infra_failure() -> None:
    run = Run(["<hang>"])
    task = asyncio.create_task(run())
    await run.engine.hanging.wait()
    await run.engine.abort("t1.0.0")
    with pytest.raises(InfraFailureError, match="aborted"):
        await task


async def test_cancelling_ends_the_request_and_closes_the_episode() -> None:
    run = Run(["<hang>"])
    task = asyncio.create_task(run())
    await run.engine.hanging.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert (run.engine.cancelled, run.environment.closed) == (1, 1)


async def test_reference_episodes_use_no_engine_and_have_the_boundaries_of_sampled_ones() -> None:
    sampled = (await Run(SOLUTION)()).segments[0]
    run = Run([], make_ticket(mode=Mode.REFERENCE))
    trajectory = await run()
    segment = trajectory.segments[0]
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.COMPLETED, 1.1)
    assert run.engine.prompts == []
    np.testing.assert_array_equal(segment.token_ids_T, sampled.token_ids_T)
    np.testing.assert_array_equal(segment.loss_mask_T, sampled.loss_mask_T)
    assert not segment.logprobs_T.any()
    assert segment.version_runs == (VersionRun(0, 0, int(segment.loss_mask_T.sum())),)


async def test_a_reference_turn_that_does_not_fit_is_truncated() -> None:
    trajectory = await Run([], make_ticket(mode=Mode.REFERENCE, sampling={"max_turn_tokens": 3}))()
    assert (trajectory.head.outcome, trajectory.num_sampled) == (Outcome.TRUNCATED_TOKENS, 3)


async def test_an_answer_need_not_end_the_episode() -> None:
    run = Run(["hm", *SOLUTION])

    async def ask_again(action: Action) -> Observation | None:
        return Observation() if action.text == "hm" else None

    run.environment.on_step = ask_again
    trajectory = await run()
    assert trajectory.head.outcome is Outcome.COMPLETED
    assert "hm<|im_end|>\n<|im_start|>assistant\n" in text(trajectory)


async def test_a_ticket_names_its_task() -> None:
    run = Run(["w7"], make_ticket(task=TaskRef(env="words", split="heldout", index=7)))
    assert (await run()).head.reward == 1.0
