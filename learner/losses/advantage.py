"""Rewards of a group -> advantages: pure functions on numpy. Never divides by the group's standard deviation.

The group's baseline is that of GRPO (arXiv 2402.03300) without its normalisation, as in Dr. GRPO (arXiv 2503.20783):
dividing by the standard deviation over-weights tasks that are nearly solved or nearly hopeless.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Baseline = Literal["mean", "leave_one_out"]

_SAME_REWARD = 1e-9


def has_variance(rewards_G: npt.NDArray[np.float64], counted_G: npt.NDArray[np.bool_]) -> bool:
    """Whether the counted rewards differ, i.e. whether the group has a gradient at all."""
    counted = rewards_G[counted_G]
    return counted.size >= 2 and float(counted.max() - counted.min()) > _SAME_REWARD


def group_advantages(
    rewards_G: npt.NDArray[np.float64], counted_G: npt.NDArray[np.bool_], baseline: Baseline
) -> npt.NDArray[np.float64]:
    """Advantages of one group of G episodes; 0 where `counted_G` is False.

    Episodes that are not counted (infrastructure or environment failures, screened ones) enter no statistic. `mean`:
    A_i = r_i - mean(r). `leave_one_out` (RLOO, arXiv 2402.14740): A_i = r_i - mean of the others' rewards. Fewer than
    two counted episodes compare with nothing: all advantages are 0.
    """
    advantages_G = np.zeros(rewards_G.shape, dtype=np.float64)
    counted = rewards_G[counted_G]
    if counted.size < 2:
        return advantages_G
    centred = counted - counted.mean()
    if baseline == "leave_one_out":
        centred *= counted.size / (counted.size - 1)  # r_i - (sum - r_i)/(n-1), rearranged
    advantages_G[counted_G] = centred
    return advantages_G
