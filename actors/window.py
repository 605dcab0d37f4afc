"""How many episodes an actor has at once: additive increase, multiplicative decrease, on what its engine reports.

Episodes whose tools are running need nothing of the engine, so there are to be more of them than the engine's batch
holds: as many as keep the batch full, and some in the queue for when many tools take long at once. So at every look at
the engine,

- where its steps had places left in the batch, and memory for them: `step` more episodes;

and over every PERIOD_S,

- where requests were preempted for want of memory, or the queue is longer than `max_queue` batches: a tenth fewer.

Pure: who looks, when, and what becomes of the number is the owner's. (Chiu and Jain, "Analysis of the increase and
decrease algorithms for congestion avoidance", 1989, for why these two moves and no others share a resource stably.)
"""

from __future__ import annotations

from typing import Final

from actors.engine import EngineLoad

DECREASE: Final = 0.9
FULL: Final = 0.9  # share of the engine's steps with a full batch, above which more episodes would only wait
CACHE_FULL: Final = 0.9  # of the KV cache, above which the batch is not to grow
CACHE_SHORT: Final = 0.75  # below this a preemption was not for want of memory: an adoption preempts everything
PERIOD_S: Final = 5.0  # a decrease shows its effect as episodes end, not at once; and the youngest turns wait longest


class Window:
    """The number of episodes that may be running: `size`, always between `lowest` and `highest`."""

    def __init__(self, lowest: int, highest: int, first: int, step: int, max_queue: float) -> None:
        """first: the size to begin with. step: what an increase adds. max_queue: seconds that turns wait in the
        engine's queue as a share of those they are then sampled for, which is the queue's length in batches."""
        if not 0 < lowest <= highest or step < 1 or max_queue <= 0:
            raise ValueError(f"a window of {lowest} to {highest} in steps of {step}, {max_queue}, makes no sense")
        self._lowest, self._highest, self._step, self._max_queue = lowest, highest, step, max_queue
        self.size = min(max(first, lowest), highest)
        self._before: EngineLoad | None = None  # at the last look
        self._began: tuple[float, EngineLoad] | None = None  # the period: since when, and from what on

    def observe(self, load: EngineLoad, num_sampling: int, now: float) -> int:
        """One look at the engine; the new size.

        num_sampling: running episodes that the policy samples. now: seconds of a clock that does not go back.
        """
        before, self._before = self._before, load
        if before is None or self._began is None or load.num_steps < before.num_steps:  # or another, that began at zero
            self._began = now, load
            return self.size
        began_at, at_first = self._began
        if now - began_at >= PERIOD_S:
            self._began = now, load
            if self._congested(at_first, load):
                # What was allowed and not used is given up first.
                self.size = max(self._lowest, int(min(self.size, num_sampling) * DECREASE))
                return self.size
        if num_sampling >= self.size and self._has_room(before, load):
            self.size = min(self._highest, self.size + self._step)
        return self.size

    def _congested(self, before: EngineLoad, load: EngineLoad) -> bool:
        if load.queue_s - before.queue_s > self._max_queue * (load.sampling_s - before.sampling_s):
            return True
        return load.num_preemptions > before.num_preemptions and _cache_use(before, load) >= CACHE_SHORT

    @staticmethod
    def _has_room(before: EngineLoad, load: EngineLoad) -> bool:
        num_steps = load.num_steps - before.num_steps
        if not num_steps:
            return not load.num_unfinished  # idle; what is paused for an adoption has its requests still
        full = (load.num_full_steps - before.num_full_steps) / num_steps
        return full < FULL and _cache_use(before, load) < CACHE_FULL


def _cache_use(before: EngineLoad, load: EngineLoad) -> float:
    """Mean share of the KV cache in use, 0 to 1."""
    return (load.cache_use_steps - before.cache_use_steps) / max(1, load.num_steps - before.num_steps)
