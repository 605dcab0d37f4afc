"""How many episodes an actor has at once: additive increase, multiplicative decrease, on what its engine reports.

Episodes whose tools are running need nothing of the engine, so there are to be more of them than the engine's batch
holds: just as many as keep the batch full. Each look at the engine says one of three things:

- steps of the engine had places left in the batch, and memory for them: `step` more episodes;
- requests were preempted for want of memory, or waited in the queue for too long: a quarter fewer;
- the batch was full, or memory almost: as many as before.

Pure: who looks, when, and what becomes of the number is the owner's. (Chiu and Jain, "Analysis of the increase and
decrease algorithms for congestion avoidance", 1989, for why these two moves and no others share a resource stably.)
"""

from __future__ import annotations

from typing import Final

from actors.engine import EngineLoad

DECREASE: Final = 0.75
FULL: Final = 0.9  # share of the engine's steps with a full batch, above which more episodes would only wait
CACHE_FULL: Final = 0.9  # of the KV cache, above which the batch is not to grow
CACHE_SHORT: Final = 0.75  # below this a preemption was not for want of memory: an adoption preempts everything
COOLDOWN_S: Final = 5.0  # a decrease shows its effect as episodes end, not at once


class Window:
    """The number of episodes that may be running: `size`, always between `lowest` and `highest`."""

    def __init__(self, lowest: int, highest: int, first: int, step: int, max_queue_s: float) -> None:
        """first: the size to begin with. step: what an increase adds. max_queue_s: mean wait of a turn in the engine's
        queue that is too long."""
        if not 0 < lowest <= highest or step < 1 or max_queue_s <= 0:
            raise ValueError(f"a window of {lowest} to {highest} in steps of {step}, {max_queue_s} s, makes no sense")
        self._lowest, self._highest, self._step, self._max_queue_s = lowest, highest, step, max_queue_s
        self.size = min(max(first, lowest), highest)
        self._before: EngineLoad | None = None
        self._decrease_at = float("-inf")  # not before

    def observe(self, load: EngineLoad, num_sampling: int, now: float) -> int:
        """One look at the engine; the new size.

        num_sampling: running episodes that the policy samples. now: seconds of a clock that does not go back.
        """
        before, self._before = self._before, load
        if before is None or load.num_steps < before.num_steps:  # another engine, which counts from zero
            return self.size
        num_steps = load.num_steps - before.num_steps
        if self._congested(before, load, num_steps):
            if now >= self._decrease_at:
                self._decrease_at = now + COOLDOWN_S
                # What was allowed and not used is given up first.
                self.size = max(self._lowest, int(min(self.size, num_sampling) * DECREASE))
        elif num_sampling >= self.size and self._has_room(before, load, num_steps):
            self.size = min(self._highest, self.size + self._step)
        return self.size

    def _congested(self, before: EngineLoad, load: EngineLoad, num_steps: int) -> bool:
        num_turns = load.num_turns - before.num_turns
        if num_turns and (load.queue_s - before.queue_s) / num_turns > self._max_queue_s:
            return True
        preempted = load.num_preemptions > before.num_preemptions
        return preempted and _cache_use(before, load, num_steps) >= CACHE_SHORT

    @staticmethod
    def _has_room(before: EngineLoad, load: EngineLoad, num_steps: int) -> bool:
        if not num_steps:
            return not load.num_unfinished  # idle; what is paused for an adoption has its requests still
        full = (load.num_full_steps - before.num_full_steps) / num_steps
        return full < FULL and _cache_use(before, load, num_steps) < CACHE_FULL


def _cache_use(before: EngineLoad, load: EngineLoad, num_steps: int) -> float:
    """Mean share of the KV cache in use, 0 to 1."""
    return (load.cache_use_steps - before.cache_use_steps) / num_steps if num_steps else 0.0
