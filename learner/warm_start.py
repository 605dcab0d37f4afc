"""The supervised warm start: reference and recorded episodes -> batches. Only reads; the trainer runs the steps.

Few passes on purpose: imitation only teaches the tool format, so that reinforcement learning has something to improve.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from broker.process.learner_settings import WarmStartSection
from broker.process.lifecycle import ErgonError
from broker.protocol.trajectory import Outcome, Trajectory
from learner.batching import train_sequence
from learner.engine import TrainSequence
from learner.recording import find_recordings, read_trajectories

_NEVER_STALE = 2**31 - 1


def demonstrations(references: Sequence[Trajectory], settings: WarmStartSection) -> list[Trajectory]:
    """What is imitated: of the reference episodes and those in `settings.files`, the ones that are worth it.

    Raises ErgonError where none is, or a file cannot be read.
    """
    recorded = [trajectory for path in find_recordings(settings.files) for trajectory in read_trajectories(path)]
    episodes = [trajectory for trajectory in (*references, *recorded) if worth_imitating(trajectory, settings)]
    if not episodes:
        raise ErgonError(
            f"none of the {len(references) + len(recorded)} demonstrations was completed with the reward that "
            f"learner.warm_start.min_reward = {settings.min_reward} asks for, so there is nothing to imitate; check "
            "the environments' demonstrators and learner.warm_start.files, or set learner.warm_start.episodes = 0"
        )
    return episodes


def worth_imitating(trajectory: Trajectory, settings: WarmStartSection) -> bool:
    """A demonstration that ended as it should, and well enough where the settings ask for that."""
    head = trajectory.head
    return head.outcome is Outcome.COMPLETED and (settings.min_reward is None or head.reward >= settings.min_reward)


def supervised_batches(
    trajectories: Sequence[Trajectory], settings: WarmStartSection, seed: int
) -> Iterator[list[TrainSequence]]:
    """Batches of all passes: consecutive tasks stay together, so that a batch is as evenly mixed as the environment's
    order is; the order of batches differs from pass to pass and depends on the seed alone."""
    episodes = sorted(
        trajectories, key=lambda t: (t.ticket.task.env, t.ticket.task.index, t.ticket.ticket_id)
    )  # ids too: recorded episodes may be of one task
    batches = [episodes[first : first + settings.batch] for first in range(0, len(episodes), settings.batch)]
    rng = random.Random(f"warm start {seed}")
    for _ in range(settings.passes):
        for chosen in rng.sample(batches, len(batches)):
            yield [train_sequence(s, 1.0, 0, _NEVER_STALE) for episode in chosen for s in episode.segments]


def num_batches(num_episodes: int, settings: WarmStartSection) -> int:
    """Supervised steps of all passes."""
    return settings.passes * -(-num_episodes // settings.batch)


def warmed_up(learning_rate: float, step: int, num_warmup_steps: int) -> float:
    """The learning rate of the step number `step` (from 0), rising linearly over the first ones."""
    return learning_rate * min(1.0, (step + 1) / (num_warmup_steps + 1)) if num_warmup_steps else learning_rate


def scheduled(settings: WarmStartSection, step: int, num_steps: int) -> float:
    """The learning rate of supervised step `step` (from 0) of `num_steps`: linear rise, level, linear fall."""
    rate = warmed_up(settings.learning_rate, step, settings.learning_rate_warmup_steps)
    falling = settings.decay * num_steps
    return rate * min(1.0, (num_steps - step) / falling) if falling else rate
