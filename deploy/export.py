"""`ergon export`: a run's checkpoint as a Hugging Face directory. Starts the learner's exporter; loads no model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from broker.process.lifecycle import EXIT_USER_ERROR, ErgonError
from deploy.run import CONFIG


def export_run(run: Path, directory: Path, checkpoint: str) -> str:
    """Write the directory; a sentence about it. `run`: the run's folder, or its TOML. Raises ErgonError."""
    config = run if run.is_file() else run / CONFIG
    if not config.is_file():
        raise ErgonError(f"{run} is no run's folder (there is no {CONFIG} in it); name one, as runs/NAME")
    command = [sys.executable, "-m", "learner.export", "--config", str(config), "--checkpoint", checkpoint]
    done = subprocess.run([*command, str(directory)], capture_output=True, text=True, check=False)
    if done.returncode == EXIT_USER_ERROR:
        raise ErgonError(done.stderr.strip().splitlines()[-1].partition(": error: ")[2])
    if done.returncode != 0:
        raise ErgonError(f"the checkpoint could not be exported:\n{done.stderr.strip()}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return f"{result['directory']}: {result['bytes'] / 1e6:.0f} MB, for transformers and vLLM"
