"""Counts what vLLM reports of every step, for `Engine.load`. A stat logger of vLLM's, in the process of the event loop.

Reads the reports and keeps sums, nothing else; vLLM's own metrics (`vllm:...`) are kept beside it by vLLM. Never
imports vllm: what it must be is only what it is called with.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from actors.engine import EngineLoad


class LoadMeter:
    """The sums of one engine: all of EngineLoad but `num_unfinished`, which a step that ends with an abort does not
    report. vLLM calls it as the factory of its stat logger, and then as that."""

    def __init__(self, batch: int) -> None:
        """batch: requests that the engine runs at once."""
        self.load = EngineLoad()
        self._batch = batch

    def __call__(self, _config: Any, _engine_index: int = 0) -> LoadMeter:
        """There is one engine, so there is one logger: this."""
        return self

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """One step: vLLM's SchedulerStats and IterationStats, each of which may be missing."""
        load = self.load
        changes: dict[str, Any] = {}
        if scheduler_stats is not None:
            running, prefixes = scheduler_stats.num_running_reqs, scheduler_stats.prefix_cache_stats
            waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            changes |= {
                "num_steps": load.num_steps + 1,
                "num_full_steps": load.num_full_steps + (waiting > 0 or running >= self._batch),
                "cache_use_steps": load.cache_use_steps + scheduler_stats.kv_cache_usage,
                "num_prefix_tokens": load.num_prefix_tokens + prefixes.queries,
                "num_prefix_hits": load.num_prefix_hits + prefixes.hits,
            }
        if iteration_stats is not None:
            ended = iteration_stats.finished_requests
            changes |= {
                "num_preemptions": load.num_preemptions + iteration_stats.num_preempted_reqs,
                "num_turns": load.num_turns + len(ended),
                # One that is aborted in the queue was never taken out of it.
                "queue_s": load.queue_s + sum(max(0.0, each.queued_time) for each in ended),
                "sampling_s": load.sampling_s + sum(each.inference_time for each in ended if each.queued_time >= 0),
                "num_sampled": load.num_sampled + iteration_stats.num_generation_tokens,
            }
        self.load = dataclasses.replace(load, **changes)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def log(self) -> None:
        """Nothing to say."""

    def record_sleep_state(self, *_: Any, **__: Any) -> None:
        """Engines of actors do not sleep."""
