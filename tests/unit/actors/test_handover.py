"""An episode that is interrupted anywhere, and gone on with elsewhere, is token for token the one in one piece."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import metrics
from actors.engine import Sample
from actors.handover import EpisodeInterruptedError, HandoverError, is_stale
from actors.renderer import Renderer
from actors.rollout import run_episode
from broker.process.thinking_settings import ThinkingSection
from broker.protocol.codec import pack_trajectories
from broker.protocol.commands import MAX_SNAPSHOT_BYTES, PartialHead
from broker.protocol.frames import decode, encode
from broker.protocol.partials import Partial, pack_continue, pack_handover, unpack_continue
from broker.protocol.trajectory import Mode, Outcome, PolicyVersion, Sampling, Segment, Trajectory, VersionRun
from envs.interface import Action, Environment, Episode, Message, Observation, Reward, SnapshotError, Task
from tests.unit.actors.played import RENDERER, SHORT, TAGGED
from tests.unit.actors.support import ScriptedEngine, WordEnvironment, make_ticket

NEVER = 1 << 30
SAME = (
    *("outcome", "reward", "num_turns", "num_tool_calls", "num_malformed"),
    *("num_thinking_tokens", "num_overrun_tokens", "num_forced_stops"),
)


class Habit(ScriptedEngine):
    """A policy whose next token follows from all tokens so far, tags among them; so does its log-prob. After `cut`
    tokens it says that the episode is to be interrupted, and waits for the abort."""

    FRAGMENTS = ("<think>", "</think>", "<thi", "nk>", "plates", " 17", "€", "w3")

    def __init__(self, renderer: Renderer, seed: int, version: int, cut: int = NEVER) -> None:
        super().__init__(renderer, [])
        self.version = PolicyVersion(1, version)
        self.interrupt: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.num_sampled = 0
        self._cut_at, self._seed, self._aborted = cut, seed, asyncio.Event()
        self._fragments = [renderer.tag(each) for each in self.FRAGMENTS]
        self._end = renderer.turn("")

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_token_ids: Sequence[int],
        request_id: str,
        priority: int = 0,
    ) -> Sample:
        assert max_tokens > 0
        ids, logprobs = list(prompt_ids), list[float]()
        while len(logprobs) < max_tokens:
            if self.num_sampled == self._cut_at:
                if not self.interrupt.done():
                    self.interrupt.set_result(None)
                await self._aborted.wait()
                return self._answer(ids[len(prompt_ids) :], logprobs, "abort")
            self.num_sampled += 1
            token, logprob = self._next(ids)
            ids.append(token)
            logprobs.append(logprob)
            if token in stop_token_ids:
                return self._answer(ids[len(prompt_ids) :], logprobs, "stop")
        return self._answer(ids[len(prompt_ids) :], logprobs, "length")

    def _next(self, ids: list[int]) -> tuple[int, float]:
        digest = hashlib.blake2b(np.asarray([self._seed, *ids], np.int64).tobytes(), digest_size=4).digest()
        chance, which = digest[0] / 256, digest[1]
        for fragment in self._fragments:  # what was begun is mostly ended
            for length in range(len(fragment) - 1, 0, -1):
                if ids[-length:] == fragment[:length] and chance < 0.85:
                    return fragment[length], -chance
        return (self._end if chance < 0.1 else self._fragments[which % len(self._fragments)])[0], -chance

    def _answer(self, ids: list[int], logprobs: list[float], finish: Any) -> Sample:
        runs = (VersionRun(*self.version, len(ids)),) if ids else ()
        return Sample(np.array(ids, np.int32), np.array(logprobs, np.float32), runs, finish)

    async def abort(self, request_id: str) -> None:
        self._aborted.set()


class Counting(WordEnvironment):
    """Answers every turn with its number, edits the history at every third, and never ends by itself."""

    snapshots = True

    def episode(self, task: Task) -> CountingEpisode:
        return CountingEpisode(self, task, 0)

    async def restore(self, task: Task, snapshot: bytes) -> Episode:
        self.opened += 1
        if not snapshot.isdigit():
            raise SnapshotError("no number")
        return CountingEpisode(self, task, int(snapshot))


class CountingEpisode(Episode):
    def __init__(self, environment: Counting, task: Task, count: int) -> None:
        self._env, self._task, self._count = environment, task, count

    async def start(self) -> Sequence[Message]:
        self._env.opened += 1
        return self._task.prompt

    async def step(self, action: Action) -> Observation:
        self._count += 1
        history = self._task.prompt if self._count % 3 == 0 else None
        return Observation((Message("tool", f"<think> {self._count}"),), history=history)

    async def grade(self) -> Reward:
        return Reward(float(self._count))

    async def close(self) -> None:
        self._env.closed += 1

    async def snapshot(self) -> bytes:
        return b"%d" % self._count


def over_the_wire(partial: Partial, ticket: Any) -> Partial:
    def sent(message: Any) -> Any:
        return decode([bytes(frame) for frame in encode(message)])

    return unpack_continue(sent(pack_continue(ticket, sent(pack_handover(ticket.ticket_id, partial)))))[1]


def versions_of(trajectory: Trajectory) -> list[int]:
    """Of every sampled token."""
    runs = [run for segment in trajectory.segments for run in segment.version_runs]
    return [run.version for run in runs for _ in range(run.num_tokens)]


@given(
    seed=st.integers(0, 1 << 30),
    budget=st.one_of(st.none(), st.integers(0, 12)),
    per=st.sampled_from(["turn", "episode"]),
    opens=st.sampled_from(["policy", "context"]),
    soft=st.booleans(),
    tagged=st.booleans(),
    limits=st.fixed_dictionaries({"max_turn_tokens": st.integers(1, 50), "max_episode_tokens": st.integers(1, 150)}),
    max_model_len=st.integers(60, 400),
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=3),
)
@settings(deadline=None, max_examples=120)
async def test_wherever_it_is_interrupted_the_episode_is_the_same(
    seed: int,
    budget: int | None,
    per: str,
    opens: str,
    soft: bool,
    tagged: bool,
    limits: dict[str, int],
    max_model_len: int,
    cuts: list[int],
) -> None:
    renderer, environment = TAGGED if tagged else RENDERER, Counting()
    section = ThinkingSection.model_validate(
        SHORT | {"per": per, "opens": opens, "soft": {"overrun_rate": 0.1 if soft else None}}
    )
    ticket = make_ticket(thinking_budget=budget, sampling=limits | {"max_turns": 9})

    async def play(engine: Habit, begun: Partial | None = None) -> Trajectory:
        return await run_episode(
            ticket,
            environment,
            engine,
            renderer,
            actor_id="a",
            max_model_len=max_model_len,
            thinking=section,
            begun=begun,
            interrupt=engine.interrupt,
        )

    whole = await play(Habit(renderer, seed, 1))
    begun, versions, cut = None, list[int](), list(cuts)
    while True:
        engine = Habit(renderer, seed, len(cuts) - len(cut) + 1, cut.pop(0) if cut else NEVER)
        try:
            again = await play(engine, begun)
            break
        except EpisodeInterruptedError as interrupted:
            begun = over_the_wire(interrupted.partial, ticket)
            versions = [run.version for s in begun.segments for run in s.version_runs for _ in range(run.num_tokens)]
        except HandoverError:  # nothing was sampled yet: it begins anew
            assert engine.num_sampled == 0
    pack_trajectories((again,))
    for name in SAME:
        assert getattr(again.head, name) == getattr(whole.head, name), name
    assert len(again.segments) == len(whole.segments)
    for mine, theirs in zip(again.segments, whole.segments, strict=True):
        assert mine.token_ids_T.tolist() == theirs.token_ids_T.tolist()
        assert mine.loss_mask_T.tolist() == theirs.loss_mask_T.tolist()
        assert mine.logprobs_T.tolist() == theirs.logprobs_T.tolist()
        assert len({run[:2] for run in mine.version_runs}) == len(mine.version_runs), "runs of one version are one"
    # What was there keeps its versions; what came after has that of who sampled it.
    assert versions_of(again)[: len(versions)] == versions
    assert set(versions_of(again)[len(versions) :]) <= {engine.version.version}
    assert environment.opened == environment.closed


# --- by cases


async def interrupted(environment: Environment, cut: int = 3, **ticket: Any) -> Partial:
    engine = Habit(RENDERER, 1, 4, cut)
    with pytest.raises(EpisodeInterruptedError) as caught:
        await run(environment, engine, interrupt=engine.interrupt, **ticket)
    return caught.value.partial


async def run(
    environment: Environment, engine: Habit, begun: Partial | None = None, interrupt: Any = None, **ticket: Any
) -> Trajectory:
    ends = {"begun": begun, "interrupt": interrupt}
    return await run_episode(
        make_ticket(**ticket), environment, engine, RENDERER, actor_id="b", max_model_len=1000, **ends
    )


def counted(result: str) -> float:
    return metrics.handovers.labels(result)._value.get()  # type: ignore[no-any-return]


async def test_what_was_used_up_of_the_deadline_stays_used_up() -> None:
    partial = await interrupted(Counting())
    assert 0 < partial.head.total_s < 60
    used = Partial(PartialHead(num_turns=0, turn=partial.head.turn, total_s=60.0), partial.segments, b"7")
    trajectory = await run(Counting(), Habit(RENDERER, 1, 5), begun=used, deadline_s=60.0)
    assert (trajectory.head.outcome, trajectory.head.reward) == (Outcome.TIMEOUT, 7.0)  # graded from the restored state
    assert trajectory.head.timings_s["total"] >= 60.0


async def test_a_snapshot_that_cannot_be_read_begins_the_episode_anew() -> None:
    partial, before = await interrupted(Counting()), counted("unreadable")
    environment = Counting()
    trajectory = await run(environment, Habit(RENDERER, 1, 5), begun=Partial(partial.head, partial.segments, b"x"))
    assert set(versions_of(trajectory)) == {5}
    assert trajectory.segments[0].token_ids_T.tolist()[:3] == partial.segments[0].token_ids_T.tolist()[:3]
    assert trajectory.head.timings_s["total"] < 60
    assert counted("unreadable") == before + 1


async def test_without_snapshots_and_for_reference_policies_nothing_is_interrupted() -> None:
    for environment, changes in ((WordEnvironment(), {}), (Counting(), {"mode": Mode.REFERENCE})):
        engine = Habit(RENDERER, 1, 4)
        engine.interrupt.set_result(None)
        trajectory = await run(environment, engine, interrupt=engine.interrupt, **changes)
        assert trajectory.num_sampled


async def test_what_cannot_be_said_is_a_handover_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_self: Any) -> bytes:
        raise KeyError("a bug")

    async def huge(_self: Any) -> bytes:
        return bytes(MAX_SNAPSHOT_BYTES + 1)

    for snapshot, text in ((broken, "no snapshot: 'a bug'"), (huge, f"at most {MAX_SNAPSHOT_BYTES} travel")):
        monkeypatch.setattr(CountingEpisode, "snapshot", snapshot)
        environment, engine = Counting(), Habit(RENDERER, 1, 4, 3)
        with pytest.raises(HandoverError, match=text):
            await run(environment, engine, interrupt=engine.interrupt)
        assert environment.opened == environment.closed == 1


def test_how_old_a_partial_may_be() -> None:
    def partial(*runs: VersionRun) -> Partial:
        num = 1 + sum(run.num_tokens for run in runs)
        traced = Segment(np.zeros(num, np.int32), np.arange(num) > 0, np.zeros(num, np.float32), runs)
        return Partial(PartialHead(), (traced,), b"")

    of_two = partial(VersionRun(2, 5, 3), VersionRun(2, 9, 1))
    assert not is_stale(of_two, PolicyVersion(2, 9), 4)
    assert is_stale(of_two, PolicyVersion(2, 10), 4)  # of its oldest token
    assert is_stale(of_two, PolicyVersion(3, 0), 4)  # another history
    assert not is_stale(of_two, PolicyVersion(3, 0), None)
    assert not is_stale(partial(), PolicyVersion(9, 9), 0)
