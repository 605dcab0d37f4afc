"""A worker that fails where it is told to, once: what a full disk, no memory or a bug in a loader would do there."""

from __future__ import annotations

from typing import Any

from actors.vllm_weights import WorkerExtension

EXTENSION = "tests.integration.actors.faulty_worker.FaultyExtension"


class FaultyExtension(WorkerExtension):
    """`arm` names the points at which the next call fails: in every worker, or in the one of this rank."""

    rank: int  # the worker's own
    armed: frozenset[str] = frozenset()

    def arm(self, points: list[str], rank: int | None = None) -> None:
        if rank is None or rank == self.rank:
            self.armed = frozenset(points)

    def _strikes(self, point: str) -> bool:
        strikes = point in self.armed
        self.armed -= {point}
        return strikes

    def begin_preparing(self, path: str, budget_s: float) -> str | None:
        if self._strikes("begin"):
            raise MemoryError("injected at the begin of preparing")
        return super().begin_preparing(path, budget_s)

    def go_on_preparing(self, budget_s: float) -> str | None:
        if self._strikes("prepare"):
            super().go_on_preparing(0.0)
            raise MemoryError("injected while preparing")
        digest = super().go_on_preparing(budget_s)
        if digest is not None and self._strikes("read"):
            self.prepared_digest = digest = "00" * 16
        return digest

    def switch_to_prepared(self) -> str:
        if self._strikes("switch"):
            raise RuntimeError("injected before the switch")
        preparation: Any = self.preparation
        if self._strikes("half-way"):
            # Half of the layers serve the new version, the others and the embedding's table the old one.
            preparation._pairs = preparation._pairs[: len(preparation._pairs) // 2]
            for calls in preparation._again.values():
                calls[:] = [(_fail, bound) for _, bound in calls]
            preparation.switch()
        served = super().switch_to_prepared()
        if self._strikes("switched"):
            raise RuntimeError("injected after the switch")
        if self._strikes("checksum"):
            self.served_digest = served = "11" * 16
        return served

    def reload_whole(self, path: str) -> str:
        if self._strikes("reload"):
            raise RuntimeError("injected into the reload")
        return super().reload_whole(path)

    def release_replaced(self, budget_s: float) -> bool:
        if self._strikes("release"):
            raise RuntimeError("injected while freeing")
        return super().release_replaced(budget_s)


def _fail(*_arguments: Any, **_keywords: Any) -> None:
    raise RuntimeError("injected half-way through the switch")
