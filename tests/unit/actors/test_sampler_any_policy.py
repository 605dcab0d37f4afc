"""Whatever the policy does, whatever the limits are: budgets, masks, versions and counts hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine import Sample
from actors.renderer import Renderer
from actors.rollout import run_episode
from broker.process.thinking_settings import ThinkingSection
from broker.protocol.codec import pack_trajectories
from broker.protocol.trajectory import Sampling, Trajectory
from envs.interface import Action, Message, Observation
from tests.unit.actors.played import RENDERER, SHORT, TAGGED
from tests.unit.actors.support import ScriptedEngine, WordEnvironment, make_ticket


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
            for token in self._renderer.turn("") if end else self._renderer.tag(str(fragment)):
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
