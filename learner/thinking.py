"""What episodes say of thinking: tokens, adherence, forced stops and reward by budget. Pure; writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from broker.process.thinking_settings import BUDGET_BUCKETS, Account, adherence, budget_bucket
from broker.protocol.trajectory import Trajectory

_NORMAL_95 = 1.959964


class Graded(Account, Protocol):
    """An episode's account of its thinking, and its reward."""

    @property
    def reward(self) -> float:
        """What the environment gave."""
        ...

    @property
    def num_thinking_tokens(self) -> int:
        """Tokens sampled while thinking."""
        ...


class Result(NamedTuple):
    """What an evaluation keeps of an episode."""

    kind: str
    reward: float
    num_thinking_tokens: int = 0
    num_overrun_tokens: int = 0
    num_forced_stops: int = 0
    env: str = ""
    outcome: str = ""

    @classmethod
    def of(cls, trajectory: Trajectory) -> Result:
        """Of a finished episode."""
        head = trajectory.head
        kind, account = head.kind or head.ticket.task.env, (head.num_thinking_tokens, head.num_overrun_tokens)
        return cls(kind, head.reward, *account, head.num_forced_stops, head.ticket.task.env, head.outcome.value)


@dataclass(frozen=True, slots=True)
class Thinking:
    """Of several episodes with one budget, or with budgets of one bucket.

    reward: their mean, reward_ci95: the half-width of its normal 95 % interval. tokens: mean thinking tokens.
    adherence: share of the episodes that kept their budget by themselves, over: of those beyond a soft one, forced: of
    those that the actor stopped at least once.
    """

    episodes: int
    reward: float
    reward_ci95: float
    tokens: float
    adherence: float
    over: float
    forced: float

    def to_json(self) -> dict[str, Any]:
        """For metrics.jsonl, budgets.json and the summary."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def describe(episodes: Sequence[Graded]) -> Thinking | None:
    """What these episodes did on average; None where there are none."""
    if not episodes:
        return None
    rewards_N = np.asarray([episode.reward for episode in episodes], dtype=np.float64)
    kept = [adherence(episode) for episode in episodes]
    return Thinking(
        episodes=len(episodes),
        reward=float(rewards_N.mean()),
        reward_ci95=_half_width(rewards_N),
        tokens=sum(episode.num_thinking_tokens for episode in episodes) / len(episodes),
        adherence=kept.count("kept") / len(episodes),
        over=kept.count("over") / len(episodes),
        forced=sum(episode.num_forced_stops > 0 for episode in episodes) / len(episodes),
    )


def by_bucket(trajectories: Iterable[Trajectory]) -> Mapping[str, Thinking]:
    """Episodes by the bucket of their budget, in the order of the buckets."""
    members: dict[str, list[Graded]] = {bucket: [] for bucket in BUDGET_BUCKETS}
    for trajectory in trajectories:
        members[budget_bucket(trajectory.ticket.thinking_budget)].append(trajectory.head)
    described = {bucket: describe(episodes) for bucket, episodes in members.items()}
    return {bucket: thinking for bucket, thinking in described.items() if thinking is not None}


def _half_width(rewards_N: npt.NDArray[np.float64]) -> float:
    if rewards_N.size < 2:
        return 0.0
    return float(_NORMAL_95 * rewards_N.std(ddof=1) / np.sqrt(rewards_N.size))
