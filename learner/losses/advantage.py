"""Rewards of a group -> advantages: pure functions on numpy.

The group's baseline is that of GRPO (arXiv 2402.03300), by default without its normalisation, as in Dr. GRPO (arXiv
2503.20783): dividing by the standard deviation over-weights tasks that are nearly solved or nearly hopeless.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Baseline = Literal["mean", "leave_one_out"]

_SAME_REWARD = 1e-9
_STD_FLOOR = 1e-6  # what GRPO's implementations add to the standard deviation


def has_variance(rewards_G: npt.NDArray[np.float64], counted_G: npt.NDArray[np.bool_]) -> bool:
    """Whether the counted rewards differ, i.e. whether the group has a gradient at all."""
    counted = rewards_G[counted_G]
    return counted.size >= 2 and float(counted.max() - counted.min()) > _SAME_REWARD


def group_advantages(
    rewards_G: npt.NDArray[np.float64],
    counted_G: npt.NDArray[np.bool_],
    baseline: Baseline,
    *,
    divide_by_std: bool = False,
) -> npt.NDArray[np.float64]:
    """Advantages of one group of G episodes; 0 where `counted_G` is False.

    Episodes that are not counted (infrastructure or environment failures, screened ones) enter no statistic. `mean`:
    A_i = r_i - mean(r). `leave_one_out` (RLOO, arXiv 2402.14740): A_i = r_i - mean of the others' rewards. With
    `divide_by_std` (GRPO, arXiv 2402.03300) it is divided by the standard deviation of the counted rewards (with n - 1)
    plus 1e-6. Fewer than two counted episodes compare with nothing: all advantages are 0.
    """
    advantages_G = np.zeros(rewards_G.shape, dtype=np.float64)
    counted = rewards_G[counted_G]
    if counted.size < 2:
        return advantages_G
    centred = counted - counted.mean()
    if baseline == "leave_one_out":
        centred *= counted.size / (counted.size - 1)  # r_i - (sum - r_i)/(n-1), rearranged
    if divide_by_std:
        centred /= counted.std(ddof=1) + _STD_FLOOR
    advantages_G[counted_G] = centred
    return advantages_G


def soft_overlong_punishment(num_tokens: int, max_tokens: int, buffer: int) -> float:
    """What is added to the reward of an episode of so many sampled tokens (DAPO, arXiv 2503.14476, equation 13): 0 up
    to max_tokens - buffer, then linearly down to -1 at max_tokens, and -1 beyond."""
    return -min(max(num_tokens - (max_tokens - buffer), 0) / buffer, 1.0)
