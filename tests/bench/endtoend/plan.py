"""What both sides are told: the main job's settings, where things lie, and what a side hands over. Pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from broker.process.config import load_settings
from broker.process.settings import Settings
from broker.protocol.trajectory import Mode, Sampling, TaskRef, Ticket

ROOT = Path(__file__).parents[3]
RUN = ROOT / "deploy" / "runs" / "quickstart.toml"


class Snapshot(NamedTuple):
    """The weights after so many steps, and the seconds since the side's command was given.

    training_s: of these, since its first step began, so without starting processes and loading models.
    """

    step: int
    wall_s: float
    training_s: float
    file: str


class Course(NamedTuple):
    """How one side went: its snapshots in order, and its CPU seconds in all."""

    snapshots: list[Snapshot]
    cpu_s: float


def job(seed: int, overrides: list[str] | None = None) -> Settings:
    """The main job's settings."""
    return load_settings(RUN, [f"run.seed={seed}", *(overrides or [])], environ={})


def ticket(settings: Settings, mode: Mode, index: int, number: int, deadline_s: float) -> Ticket:
    """A request for one episode of the job's only environment, sampled as in training. `number` makes its id."""
    (environment,) = settings.environments
    section = settings.sampling
    return Ticket(
        ticket_id=f"{mode.value}/{number}",
        group_id=f"{mode.value}/group/{index}",
        group_size=settings.learner.group_size if mode is Mode.TRAIN else 1,
        task=TaskRef(env=environment.name, split="train" if mode is Mode.TRAIN else "heldout", index=index),
        mode=mode,
        sampling=Sampling(
            temperature=section.temperature,
            top_p=section.top_p,
            max_turn_tokens=section.max_turn_tokens,
            max_episode_tokens=section.max_episode_tokens,
            max_turns=section.max_turns,
        ),
        deadline_s=deadline_s,
    )


def write_course(course: Course, path: Path) -> None:
    """For the other process to read."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({"snapshots": course.snapshots, "cpu_s": course.cpu_s}))
    draft.replace(path)


def read_course(path: Path) -> Course:
    """What `write_course` wrote."""
    raw: dict[str, Any] = json.loads(path.read_text())
    return Course([Snapshot(*item) for item in raw["snapshots"]], raw["cpu_s"])
