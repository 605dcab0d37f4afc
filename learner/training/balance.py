"""Shares of equal work: a pure function from costs to shares. Knows nothing of ranks, sequences or torch.

The collective calls of a step make every rank wait for the slowest one, so what is shared out is what takes the time:
packed tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def balanced(costs: Sequence[int], num_shares: int) -> list[list[int]]:
    """Split items 0..len(costs)-1 into `num_shares` lists (ascending; empty ones where items are few).

    Longest processing time first: the largest item goes to the share that has least so far, so the largest share is at
    most 4/3 - 1/(3 num_shares) times the best possible one (Graham, 1969). The same costs give the same shares always.
    """
    if num_shares < 1:
        raise ValueError(f"{num_shares} shares; there must be at least one")
    if any(cost < 0 for cost in costs):
        raise ValueError(f"a cost of {min(costs)}; costs must not be negative")
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    heap = [(0, 0, number) for number in range(num_shares)]  # (cost, items, share): few items before many
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        cost, num_items, number = heapq.heappop(heap)
        shares[number].append(item)
        heapq.heappush(heap, (cost + costs[item], num_items + 1, number))
    return [sorted(share) for share in shares]


def imbalance(costs: Sequence[int], shares: Sequence[Sequence[int]]) -> float:
    """The largest share's cost over the mean share's: 1 is perfect, and what every rank's step takes in proportion."""
    totals = [sum(costs[item] for item in share) for share in shares]
    return max(totals) * len(totals) / sum(totals) if sum(totals) else 1.0
