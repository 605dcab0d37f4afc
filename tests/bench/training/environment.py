"""The virtual environment that TRL runs in: beside the project's own, made once.

Shares the project's packages by links, so that torch and transformers are the very same, without those that TRL would
import only because they lie there (vLLM, DeepSpeed: memory and seconds that a user of TRL alone would not pay). On top
lie the packages of `requirements-trl.txt`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

PLACE = Path("~/.cache/ergon/bench")
REQUIREMENTS = Path(__file__).parent.parent / "requirements-trl.txt"
HIDDEN = ("vllm", "deepspeed", "ergon", "__editable__", "pip", "distutils-precedence", "_distutils_hack", "__pycache__")
ROOT = Path(__file__).parents[3]


def python(place: Path = PLACE) -> Path:
    """The interpreter of TRL's environment, made where it is missing. Raises RuntimeError with what pip said."""
    directory = place.expanduser() / f"trl-{_fingerprint()}"
    interpreter = directory / "bin" / "python"
    ready = directory / ".ready"
    if not ready.exists():
        print(f"making {directory} for TRL", file=sys.stderr)
        _run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(directory))
        target = directory / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        link_packages(Path(sysconfig.get_path("purelib")), target)
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps")
        _run(*pip, "--target", str(target), "--requirement", str(REQUIREMENTS))
        ready.touch()
    return interpreter


def link_packages(source: Path, target: Path, hidden: tuple[str, ...] = HIDDEN) -> None:
    """Link every entry of a folder of packages into another one, except those whose names begin as one in `hidden`."""
    for entry in sorted(source.iterdir()):
        if not entry.name.startswith(hidden):
            (target / entry.name).symlink_to(entry)


def environ(threads: int) -> dict[str, str]:
    """The environment variables of a trainer's process: so many threads, nothing from a hub."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **limits, **quiet, **offline}


def _fingerprint() -> str:
    """Of what the environment consists of: another one for other requirements, or another interpreter's packages."""
    parts = (REQUIREMENTS.read_text(), sys.prefix, (ROOT / "requirements.lock").read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr.strip()[-3000:]}")
