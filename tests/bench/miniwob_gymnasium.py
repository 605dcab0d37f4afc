"""MiniWoB++ as its own package drives it, Gymnasium with Selenium: seconds of each reset, for tests/bench/envs.py.

`python -m tests.bench.miniwob_gymnasium PAGE SEEDS` prints one line of JSON. Needs `requirements-miniwob.txt` and
Debian's chromium-driver. Its resets are of the same page in the same window: nothing is isolated, nothing loaded anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

PLACE = Path("~/.cache/ergon/bench/miniwob")
REQUIREMENTS = Path(__file__).parent / "requirements-miniwob.txt"
ROOT = Path(__file__).parents[2]


def resets(page: str, num: int) -> list[float]:
    """Seconds of each reset, in a process of its own. Raises RuntimeError with what is missing or went wrong."""
    if shutil.which("chromedriver") is None:
        raise RuntimeError("MiniWoB++ through Gymnasium needs chromedriver: type `apt-get install chromium-driver`")
    place = PLACE.expanduser()
    if not (place / "selenium").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
        subprocess.run([*pip, "--requirement", str(REQUIREMENTS)], check=True)
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(place))),
        "MINIWOB_CHROMEDRIVER": shutil.which("chromedriver") or "",
        "MINIWOB_CHROME_BINARY": shutil.which("chromium-headless-shell") or shutil.which("chromium") or "",
    }
    command = [sys.executable, "-m", "tests.bench.miniwob_gymnasium", page, str(num)]
    ended = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if ended.returncode:
        raise RuntimeError(f"MiniWoB++ through Gymnasium failed: {ended.stderr.strip()[-600:]}")
    return [float(value) for value in json.loads(ended.stdout.splitlines()[-1])]


def main() -> None:
    """Measure in this process."""
    import gymnasium
    import miniwob

    page, num = sys.argv[1], int(sys.argv[2])
    gymnasium.register_envs(miniwob)
    environment = gymnasium.make(f"miniwob/{page}-v1")
    times = []
    for seed in range(num):
        began = time.perf_counter()
        environment.reset(seed=seed)
        times.append(time.perf_counter() - began)
    environment.close()
    print(json.dumps(times))


if __name__ == "__main__":
    main()
