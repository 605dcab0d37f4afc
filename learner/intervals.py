"""Confidence intervals of means. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist

import numpy as np

_NORMAL_95 = NormalDist().inv_cdf(0.975)


def interval95(values: Sequence[float]) -> list[float] | None:
    """95 % confidence interval of the mean of what these were drawn from, as [low, high]; None where they are too few.

    Wilson's interval where each is 0 or 1, which has a width also where all are equal (E. B. Wilson, Probable
    inference, the law of succession, and statistical inference, 1927); else the normal one, of two values at least.
    """
    values_N = np.asarray(values, dtype=np.float64)
    n, z = values_N.size, _NORMAL_95
    if n and np.isin(values_N, (0.0, 1.0)).all():
        share = float(values_N.mean())
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return [max(0.0, centre - half), min(1.0, centre + half)]
    if n < 2:
        return None
    mean, half = float(values_N.mean()), z * float(values_N.std(ddof=1)) / sqrt(n)
    return [mean - half, mean + half]
