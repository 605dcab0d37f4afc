"""`python -m actors`, but it can be ordered to die by SIGKILL, or to fail, in a phase of an adoption (`chaos.orders`).

Phases: `fetching` (a chunk is written), `preparing` (the worker has begun), `paused`, `switched` (sampling has not gone
on yet), and `broken`: nobody is killed, but the switch fails and so does the reload that would mend it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors import process, vllm_adoption, weights
from actors.__main__ import main
from broker.process.lifecycle import run_main
from broker.protocol.weights import Buffer
from broker.weights.basefile import BaseFile
from tests.chaos.orders import DIRECTORY, reach

PLACE = "actor-0"


def run_dir_of(staging: Path) -> Path:
    """The test keeps the staging directory in the run's folder."""
    return staging.parents[1]


class DoomedBase(BaseFile):
    def write(self, index: int, data: Buffer) -> None:
        super().write(index, data)
        reach(run_dir_of(self.path.parent), PLACE, "fetching")


class DoomedAdoption(vllm_adoption.VllmAdoption):
    run_dir = Path()

    async def _ask(self, method: str, *arguments: Any) -> list[Any]:
        order = self.run_dir / DIRECTORY / PLACE
        if method in ("switch_to_prepared", "reload_whole") and order.exists() and order.read_text() == "broken 0":
            if method == "reload_whole":
                order.unlink()
            raise RuntimeError(f"injected into {method}")
        answers = await super()._ask(method, *arguments)
        phase = {"begin_preparing": "preparing", "switch_to_prepared": "switched"}.get(method)
        if phase is not None:
            reach(self.run_dir, PLACE, phase)
        return answers

    async def _pause(self, version: Any) -> None:
        await super()._pause(version)
        reach(self.run_dir, PLACE, "paused")


class DoomedAdopter(weights.WeightAdopter):
    def __init__(self, engine: Any, subscriber: Any, staging: Path) -> None:
        super().__init__(engine, subscriber, staging)
        self._base = DoomedBase(self._base.path)
        DoomedAdoption.run_dir = run_dir_of(staging)


if __name__ == "__main__":
    import actors.vllm_engine

    actors.vllm_engine.VllmAdoption = DoomedAdoption  # type: ignore[misc]
    process.WeightAdopter = DoomedAdopter  # type: ignore[misc]
    run_main("actor", main)
