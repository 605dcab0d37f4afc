"""A real run, and every version that it published, kept from beside it.

`ergon run` of the main job as a user runs it, its episodes recorded. A subscriber of its relay fetches each version as
an actor would and keeps it as a Hugging Face directory; the run knows nothing of it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import msgspec

from broker.protocol.trajectory import PolicyVersion, Trajectory
from broker.weights.basefile import BaseFile
from broker.weights.subscriber import WeightSubscriber
from learner.recording import find_recordings, read_trajectories
from tests.ports import PORT_KEYS, free_ports

ROOT = Path(__file__).parents[3]
RUN = ROOT / "deploy" / "runs" / "quickstart.toml"
NAME = "exactness-run"
FETCH_TIMEOUT_S = 60.0


class Sample(msgspec.Struct, frozen=True):
    """One segment of T tokens of which N were sampled. `versions_N`: by which policy."""

    token_ids_T: list[int]
    mask_T: list[bool]
    logprobs_T: list[float]
    versions_N: list[PolicyVersion]
    temperature: float


class Keeper(threading.Thread):
    """Keeps the versions of the run whose relay is at this endpoint, until told to stop: `versions`, as directories."""

    def __init__(self, endpoint: str, model: Path, directory: Path) -> None:
        super().__init__(daemon=True, name="keeper")
        self.versions: dict[PolicyVersion, Path] = {}
        self.error: BaseException | None = None
        self._endpoint, self._model, self._directory = endpoint, model, directory
        self._finish = threading.Event()

    def run(self) -> None:
        subscriber = WeightSubscriber(self._endpoint, NAME, "keeper", role="operator")
        base = BaseFile(self._directory / "weights.safetensors")
        try:
            seen: PolicyVersion | None = None
            while not self._finish.is_set():
                version = subscriber.wait_newer(seen, 0.2)
                if version is not None:
                    subscriber.fetch_base(version, base, FETCH_TIMEOUT_S)
                    seen, self.versions[version] = version, self._keep(version, base)
        except BaseException as error:
            self.error = error
            raise
        finally:
            subscriber.close()
            base.close()

    def finish(self) -> None:
        """Stop. Raises RuntimeError where a version could not be kept."""
        self._finish.set()
        self.join()
        if self.error is not None:
            raise RuntimeError(f"the versions of the run could not be kept: {self.error}") from self.error

    def _keep(self, version: PolicyVersion, base: BaseFile) -> Path:
        place = self._directory / f"{version.lineage}.{version.version}"
        place.mkdir()
        shutil.copy(self._model / "config.json", place)
        shutil.copy(base.path, place / "model.safetensors")
        return place


def drive(
    model: Path, dtype: str, num_steps: int, directory: Path
) -> tuple[dict[PolicyVersion, Path], list[Trajectory]]:
    """The run, from its command to its end: its versions, and every training episode that counted.

    Raises RuntimeError where it fails.
    """
    place = directory / f"run-{dtype}"
    place.mkdir()
    ports = dict(zip(PORT_KEYS, free_ports(len(PORT_KEYS)), strict=True))
    wanted = {
        "run.name": NAME,
        "run.directory": place,
        "model.path": model,
        "learner.num_steps": num_steps,
        "learner.record": "all",
        "actor.dtype": dtype,
        "eval.tasks": 0,
        "eval.every": 0,
        **ports,
    }
    command = [sys.executable, "-m", "deploy", "run", str(RUN), "--plain"]
    command += [word for key, value in wanted.items() for word in ("--set", f"{key}={value}")]
    keeper = Keeper(f"tcp://127.0.0.1:{ports['weights.relay_port']}", model, place)
    keeper.start()
    try:
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
    finally:
        keeper.finish()
    if code != 0:
        raise RuntimeError(f"the run failed ({code}); its logs were in {place / NAME / 'logs'}")
    recordings = find_recordings([place / NAME / "recorded"])
    return keeper.versions, [each for file in recordings for each in read_trajectories(file)]


def samples_of_run(trajectories: list[Trajectory]) -> list[Sample]:
    """Each segment's sampled tokens, as they are scored."""
    return [
        Sample(
            segment.token_ids_T.tolist(),
            segment.loss_mask_T.tolist(),
            segment.logprobs_T.tolist(),
            [PolicyVersion(run.lineage, run.version) for run in segment.version_runs for _ in range(run.num_tokens)],
            trajectory.ticket.sampling.temperature,
        )
        for trajectory in trajectories
        for segment in trajectory.segments
    ]
