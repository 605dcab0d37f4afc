"""The supervisor of a run under faults: `deploy.local`'s, which also notes what died for no fault, and mends what must
be mended before it can end the processes. Never decides what is restarted when.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection

from broker.process.settings import SupervisorSection
from deploy.local import Child, Supervisor


class Mender(Supervisor):
    """Before it ends the processes, stopped ones go on again (`mend`), so that they can end cleanly. `drained`: pids of
    those that were told to end, which may do so well, or by the signal where they were only just starting."""

    def __init__(
        self, settings: SupervisorSection, children: list[Child], mend: Callable[[], None], drained: Collection[int]
    ) -> None:
        super().__init__(settings, children)
        self._mend, self._drained = mend, drained
        self.crashes: list[str] = []  # deaths that no fault explains

    def stop(self) -> None:
        """End all children."""
        try:
            self._mend()
        finally:
            super().stop()

    def _died(self, child: Child, now: float) -> None:
        process = child.process
        code = process.returncode if process else None
        drained = process is not None and process.pid in self._drained and code in (0, -signal.SIGTERM)
        if code != -signal.SIGKILL and not drained:
            self.crashes.append(f"{child.name} died by itself, exit code {code}; see {child.log}")
        super()._died(child, now)
