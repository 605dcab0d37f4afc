"""Alarms: which numbers of a step mean trouble. Owns the thresholds' memory; pure, sends nothing anywhere.

The first two, effective sample size and gradient norm, tell of a collapse before the reward does (arXiv 2602.17616). An
alarm begins after several steps in a row beyond its threshold and ends after as many well within it, so that a number
that hovers around the threshold makes one alarm and not a hundred.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from broker.process.learner_settings import AlarmsSection

KINDS = ("effective_sample_size", "grad_norm", "mismatch_kl", "entropy", "reward", "refused")
_WINDOW = 32  # steps that the gradient norm is compared with
_FIRST_STEPS = 8  # steps whose median entropy is the one of the beginning; fewer norms are compared with nothing
_REWARD_MEMORY = 0.8  # weight of the past in the running mean reward


@dataclass(frozen=True, slots=True)
class Edge:
    """An alarm began or ended. `value` against `threshold`, both as of this step."""

    kind: str
    begins: bool
    value: float
    threshold: float


@dataclass(frozen=True, slots=True)
class Guard:
    """Looks at a batch before its step is taken. Picklable, so that every rank can hold one."""

    min_sample_size: float
    max_masked: float

    def __call__(self, means: Mapping[str, float]) -> str | None:
        """Why this step must not happen, or None. `means`: the batch's statistics, over all its tokens."""
        ratio, squared = means.get("ratio"), means.get("ratio_squared")
        if ratio is not None and squared:
            share = ratio * ratio / squared
            if share < self.min_sample_size:
                return f"the batch's effective sample size is {share:.2g} of its tokens, below {self.min_sample_size:g}"
        masked = means.get("loss_masked_fraction", 0.0)
        if masked >= self.max_masked:
            return f"the loss masks {masked:.3g} of the batch's tokens, which leaves nothing to learn from"
        return None


@dataclass(slots=True)
class _Hysteresis:
    raised: bool = False
    run: int = 0  # steps in a row that speak for the other state

    def move(self, beyond: bool, well_within: bool, steps: int) -> bool:
        """Take one step's verdict; whether the alarm changed."""
        speaks = well_within if self.raised else beyond
        self.run = self.run + 1 if speaks else 0
        if self.run < steps:
            return False
        self.raised, self.run = not self.raised, 0
        return True


class Alarms:
    """Sees every step. `state`: what `to_state` gave, from the checkpoint."""

    def __init__(self, settings: AlarmsSection, state: Mapping[str, Any] | None = None) -> None:
        self._settings = settings
        state = state or {"alarms": {}, "norms": [], "entropies": [], "reward": None, "best_reward": None}
        self._alarms = {kind: _Hysteresis(*state["alarms"].get(kind, ())) for kind in KINDS}
        self._norms: list[float] = list(state["norms"])
        self._entropies: list[float] = list(state["entropies"])
        self._reward: float | None = state["reward"]
        self._best_reward: float | None = state["best_reward"]

    @property
    def raised(self) -> dict[str, bool]:
        """Every kind, and whether it is raised."""
        return {kind: alarm.raised for kind, alarm in self._alarms.items()}

    def observe(self, stats: Mapping[str, float] | None, reward_mean: float) -> list[Edge]:
        """One step (None: its batch was refused, or had no gradient); the alarms that began or ended with it."""
        settings, edges = self._settings, list[Edge]()
        if stats is not None:
            self._below(edges, "effective_sample_size", stats.get("ess"), settings.effective_sample_size)
            norm = stats.get("grad_norm")
            if norm is not None:
                usual = median(self._norms) if len(self._norms) >= _FIRST_STEPS else None
                if usual:
                    self._above(edges, "grad_norm", norm, settings.grad_norm_factor * usual)
                self._norms = [*self._norms, norm][-_WINDOW:]
            self._above(edges, "mismatch_kl", stats.get("mismatch_kl"), settings.mismatch_kl)
            entropy = stats.get("entropy")
            if entropy is not None and len(self._entropies) < _FIRST_STEPS:
                self._entropies.append(entropy)
            elif entropy is not None:
                self._below(edges, "entropy", entropy, settings.entropy_share * median(self._entropies))
        self._observe_reward(edges, reward_mean)
        return edges

    def refused(self, refused: bool) -> list[Edge]:
        """Whether this step's batch was refused: an alarm at once, over with the next step that is taken."""
        if self._alarms["refused"].move(refused, not refused, 1):
            return [Edge("refused", refused, float(refused), 1.0)]
        return []

    def to_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "alarms": {kind: [alarm.raised, alarm.run] for kind, alarm in self._alarms.items()},
            "norms": list(self._norms),
            "entropies": list(self._entropies),
            "reward": self._reward,
            "best_reward": self._best_reward,
        }

    def _observe_reward(self, edges: list[Edge], reward: float) -> None:
        before = reward if self._reward is None else self._reward
        self._reward = _REWARD_MEMORY * before + (1 - _REWARD_MEMORY) * reward
        self._best_reward = max(self._reward, self._reward if self._best_reward is None else self._best_reward)
        if self._best_reward > 0:  # a share of a negative reward says nothing
            self._below(edges, "reward", self._reward, self._settings.reward_share * self._best_reward)

    def _below(self, edges: list[Edge], kind: str, value: float | None, threshold: float) -> None:
        if value is not None and threshold > 0:
            within = value >= threshold * (1 + self._settings.margin)
            self._move(edges, kind, value, threshold, value < threshold, within)

    def _above(self, edges: list[Edge], kind: str, value: float | None, threshold: float) -> None:
        if value is not None:
            within = value <= threshold * (1 - self._settings.margin)
            self._move(edges, kind, value, threshold, value > threshold, within)

    def _move(
        self, edges: list[Edge], kind: str, value: float, threshold: float, beyond: bool, well_within: bool
    ) -> None:
        if self._alarms[kind].move(beyond, well_within, self._settings.steps):
            edges.append(Edge(kind, self._alarms[kind].raised, value, threshold))
