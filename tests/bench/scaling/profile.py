"""What a simulated actor's engine and tools do, in time: a script that follows measured distributions. Pure.

Two of them. `measured`: SmolLM2-135M on one thread of a CPU, as `make bench-rollout` runs it, with its turns and its
slow tools. `gpu`: by arithmetic from what 1,000 GPUs are said to produce, 50 trajectories and 7 MB of tokens a second,
which makes 15,500 tokens a trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.bench.rollouts.engines import TURN_TOKENS
from tests.bench.rollouts.environment import HEAVY_TAILED, NUM_TURNS, Latency

TOKEN_BYTES: Final = 9  # a token id, a mask byte, a log-prob
POOL: Final = 4096  # episodes that are drawn; what runs is drawn from them


class Profile(NamedTuple):
    """One kind of actor. tokens_per_s: that its engine samples with a full batch. sampled: tokens of an episode, mean
    and 99th percentile, log-normal; None: NUM_TURNS turns of TURN_TOKENS, each length as likely. context: tokens of an
    episode that were not sampled, for each that was. most_tool_s: a call's time limit, which those that hang take."""

    name: str
    tokens_per_s: float
    batch: int
    turns: int
    sampled: tuple[float, float] | None
    context: float
    latency: Latency
    most_tool_s: float
    most_sampled: int


MEASURED: Final = Profile("measured", 280.0, 32, NUM_TURNS, None, 1.0, HEAVY_TAILED, 35.0, 128)
GPU: Final = Profile("gpu", 0.05 * 7750, 32, 40, (7750, 65_500), 1.0, HEAVY_TAILED, 35.0, 65_500)
PROFILES: Final = {profile.name: profile for profile in (MEASURED, GPU)}


class Episode(NamedTuple):
    """How long it runs, and the tokens of its trajectory."""

    seconds: float
    sampled: int
    context: int


class Script:
    """Episodes of a profile, drawn from a seed."""

    def __init__(self, profile: Profile, seed: int) -> None:
        self.profile = profile
        self._rng = np.random.default_rng(seed)
        self._sampled_N = _sampled(profile, self._rng)
        self._model_s_N = self._sampled_N * (profile.batch / profile.tokens_per_s)
        self._seconds_N = self._model_s_N + _tools_s(profile, self._rng)

    @property
    def mean_s(self) -> float:
        """Seconds of an episode."""
        return float(self._seconds_N.mean())

    @property
    def episodes(self) -> int:
        """That an actor has at once: as many as keep its engine's batch full while the tools of the others run."""
        return max(1, round(self.profile.batch * self.mean_s / float(self._model_s_N.mean())))

    @property
    def per_s(self) -> float:
        """Trajectories that an actor finishes in a second, if nothing but its engine and tools holds it up."""
        return self.episodes / self.mean_s

    @property
    def mean_bytes(self) -> float:
        """Of a trajectory's arrays."""
        return float(self._sampled_N.mean()) * (1 + self.profile.context) * TOKEN_BYTES

    def fresh(self) -> Iterator[Episode]:
        """Episodes from their beginning, without end."""
        while True:
            for index in self._rng.integers(0, POOL, POOL):
                yield self._episode(index, float(self._seconds_N[index]))

    def running(self) -> Iterator[Episode]:
        """What is left of episodes that were met at any moment of their time: the longer ones more often."""
        shares = self._seconds_N / self._seconds_N.sum()
        while True:
            indices, left = self._rng.choice(POOL, POOL, p=shares), self._rng.random(POOL)
            for index, share in zip(indices, left, strict=True):
                yield self._episode(index, float(share * self._seconds_N[index]))

    def _episode(self, index: int, seconds: float) -> Episode:
        sampled = int(self._sampled_N[index])
        return Episode(seconds, sampled, round(sampled * self.profile.context))


def _sampled(profile: Profile, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    if profile.sampled is None:
        low, high = TURN_TOKENS
        return rng.integers(low, high + 1, (POOL, profile.turns)).sum(1)
    drawn = _log_normal(Latency(*profile.sampled), rng, (POOL,))
    return np.clip(np.rint(drawn), 1, profile.most_sampled).astype(np.int64)


def _tools_s(profile: Profile, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """All calls of an episode, one a turn."""
    calls = _log_normal(profile.latency, rng, (POOL, profile.turns))
    calls[rng.random(calls.shape) < profile.latency.hanging] = math.inf
    return np.minimum(calls, profile.most_tool_s).sum(1)


def _log_normal(shape: Latency, rng: np.random.Generator, size: tuple[int, ...]) -> npt.NDArray[np.float64]:
    mu, sigma = shape.shape
    return rng.lognormal(mu, sigma, size)
