"""A run's folder for tests of what reads it: trajectories by the learner's keeper, records as its reporter has them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from actors.transcript import Reader, answer
from broker.process.config import save_settings
from broker.process.settings import EvalSection, ModelSection, RunSection, Settings
from broker.protocol.trajectory import (
    Mode,
    Outcome,
    PolicyVersion,
    Segment,
    TaskRef,
    Ticket,
    Trajectory,
    TrajectoryHead,
    VersionRun,
)
from deploy.report.transcripts import Transcriber
from deploy.run import CONFIG
from envs.interface import Message
from learner.kept import Keeper
from tests.unit.actors.support import make_renderer, make_tokenizer

RENDERER = make_renderer()
HOSTILE = "</style></textarea><script>document.title='owned'</script><img src=x onerror=alert(1)>\u202e&amp;"


class HereTranscriber(Transcriber):
    """Asks the reader in this process; messages go through msgpack as they would over the pipe."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(Path("none"))
        self._reader = Reader(RENDERER, settings)

    def _ask(self, request: Mapping[str, Any]) -> list[Any]:
        answers: list[Any] = msgpack.unpackb(
            msgpack.packb(answer(self._reader, msgpack.unpackb(msgpack.packb(request))))
        )
        return answers


def make_settings(directory: Path, name: str = "made") -> Settings:
    """Of a run whose model is a tokenizer beside it."""
    model = directory / "model"
    if not model.exists():
        model.mkdir(parents=True)
        make_tokenizer().save(str(model / "tokenizer.json"))
    return Settings(
        run=RunSection(name=name, directory=directory),
        model=ModelSection(path=str(model)),
        eval=EvalSection(tasks=4),
    )


def episode(
    number: int,
    *turns: tuple[str, str],
    reward: float = 1.0,
    env: str = "shop",
    kind: str = "boxes",
    mode: Mode = Mode.TRAIN,
    outcome: Outcome = Outcome.COMPLETED,
    group: int | None = None,
    versions: Sequence[int] = (7,),
) -> Trajectory:
    """An episode of (what the policy was told, what it said) turns. versions: of its sampled tokens, in equal parts."""
    ids: list[int] = []
    mask: list[bool] = []
    for told, said in turns or (("What is the bill?", "<tool>price plate</tool>"), ("72", "It is 72.")):
        context = RENDERER.observe([Message("tool", told)]) if ids else RENDERER.open([Message("user", told)])
        sampled = RENDERER.turn(said)
        ids += context + sampled
        mask += [False] * len(context) + [True] * len(sampled)
    count = sum(mask)
    sizes = [count // len(versions)] * (len(versions) - 1)
    sizes.append(count - sum(sizes))
    logprobs = np.where(mask, -0.25, 0.0).astype(np.float32)
    runs = tuple(VersionRun(1, version, size) for version, size in zip(versions, sizes, strict=True))
    of = number // 2 if group is None else group
    head = TrajectoryHead(
        ticket=Ticket(
            ticket_id=f"made/{mode}/{of}/{number}",
            group_id=f"made/{mode}/{of}",
            group_size=2,
            task=TaskRef(env=env, split="train", index=of),
            mode=mode,
        ),
        kind=kind,
        outcome=outcome,
        reward=reward,
        reward_components={"exact": reward},
        num_turns=max(1, len(turns)),
        num_tool_calls=1,
        timings_s={"total": 1.5, "model": 1.0, "tool": 0.5},
        actor_id="actor-0",
        finished_at=1_700_000_000.0 + number,
    )
    return Trajectory(head, (Segment(np.asarray(ids, np.int32), np.asarray(mask), logprobs, runs),))


def keep(settings: Settings, trajectories: Sequence[Trajectory], step: int = 1, fate: str = "trained") -> None:
    """Have the learner's keeper keep them."""
    keeper = Keeper(settings.run_dir, 16 << 20, lambda: (step, PolicyVersion(1, step)))
    for trajectory in trajectories:
        is_eval = trajectory.ticket.mode is Mode.EVAL
        keeper.keep(trajectory, "evaluated" if is_eval else fate, "after/greedy" if is_eval else "")
    keeper.close()


def record(event: str, step: int, at: float, **fields: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    place = {"event": event, "time": at, "phase": "train", "step": step, "version": step, "lineage": 1}
    return place | fields


def step_record(step: int, at: float, **fields: Any) -> dict[str, Any]:
    """A step's line."""
    return record(
        "step",
        step,
        at,
        **{
            "reward_mean": 0.25 * step,
            "reward_by_kind": {"boxes": 0.5, "change": 0.25},
            "by_env": {"shop": {"episodes": 8, "reward": 0.5, "tokens_sampled": 100}},
            "outcomes": {"shop": {"completed": 7, "timeout": 1}},
            "trajectories": 8,
            "staleness_mean": 1.5,
            "staleness_max": 2,
            "staleness_tokens": {"1": 50, "2": 50},
            "stale_tokens": 3,
            "tokens_sampled": 100,
            "thinking": {"unlimited": {"episodes": 8, "reward": 0.5, "tokens": 0.0, "adherence": 1.0, "forced": 0.0}},
            "seconds": {"waiting": 1.0, "training": 3.0},
            "num_trained_tokens": 80,
            "loss": -0.01 * step,
            "entropy": 0.3,
            "mismatch_kl": 0.001,
            "ess": 0.99,
        }
        | fields,
    )


def evaluation_record(name: str, step: int, at: float, reward: float, **fields: Any) -> dict[str, Any]:
    """An evaluation's line."""
    styles: dict[str, Any] = {}
    for style in ("sampled", "greedy"):
        styles[style] = reward
        styles[f"{style}_ci95"] = [reward / 2, (1 + reward) / 2]
        for by, names in (("kind", ("boxes", "change")), ("env", ("shop",))):
            styles[f"{style}_by_{by}"] = dict.fromkeys(names, reward)
            styles[f"{style}_by_{by}_ci95"] = {name: [reward / 2, (1 + reward) / 2] for name in names}
    outcomes = {"shop": {"completed": 8}}
    return record("evaluation", step, at, evaluation=name, tasks=4, outcomes=outcomes, **(styles | fields))


def make_run(settings: Settings, records: Sequence[Mapping[str, Any]], audit: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write its folder, without a summary; returns it."""
    directory = settings.run_dir
    directory.mkdir(parents=True, exist_ok=True)
    save_settings(settings, directory / CONFIG)
    for name, lines in (("metrics.jsonl", records), ("trained.jsonl", audit)):
        (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory
