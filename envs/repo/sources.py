"""Gets the pinned files: from the cache, or from the package index by pip. Believes a file by its hash only.

pip makes a source distribution's metadata when it fetches one, and runs its build backend for that; it has compared the
hash before. `python -m envs.repo.sources` fetches everything ahead of time, as `make setup` does.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import gzip
import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from envs.interface import SandboxError
from envs.repo.packages import Package, Pin, kit, packages

CACHE = "~/.cache/ergon/sources"
FETCH_TIMEOUT_S = 900.0
MAX_FILE_BYTES = 4 << 20


def fetch(pins: Sequence[Pin], cache: str = CACHE) -> list[Path]:
    """Where the files lie, fetched if need be; blocks. Raises SandboxError where one is not to be had."""
    folder = Path(cache).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if not all(_is_right(folder / pin.file, pin) for pin in pins):
        with _alone(folder):
            missing = [pin for pin in pins if not _is_right(folder / pin.file, pin)]
            if missing:
                _download(missing, folder)
    return [folder / pin.file for pin in pins]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process fetches at a time, and the others find what it has fetched."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_right(path: Path, pin: Pin) -> bool:
    """Whether the file is there, and is the one; a damaged one is fetched again."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == pin.sha256


def _download(pins: Sequence[Pin], folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise _not_to_be_had(pins, folder, f"{sys.executable} has no pip to fetch them with")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wanted = Path(temporary) / "wanted.txt"
        wanted.write_text("".join(f"{pin.name}=={pin.version} --hash=sha256:{pin.sha256}\n" for pin in pins))
        sources = ",".join(pin.name for pin in pins if pin.file.endswith(".tar.gz"))
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "-q"]
        command += ["--no-deps", "--require-hashes", f"--dest={temporary}", f"--requirement={wanted}"]
        command += [f"--no-binary={sources}"] if sources else []
        try:
            ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=FETCH_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise _not_to_be_had(pins, folder, f"pip was not done after {FETCH_TIMEOUT_S:g} s") from None
        for pin in pins:
            fetched = Path(temporary) / pin.file
            if not _is_right(fetched, pin):
                reasons = [line for line in ended.stderr.splitlines() if line.strip().startswith("ERROR")]
                raise _not_to_be_had([pin], folder, reasons[-1].strip() if reasons else f"pip brought no {pin.file}")
            fetched.replace(folder / pin.file)


def _not_to_be_had(pins: Sequence[Pin], folder: Path, reason: str) -> SandboxError:
    files = ", ".join(f"{pin.file} (SHA-256 {pin.sha256})" for pin in pins)
    return SandboxError(
        f"the environment repo needs {files}, and cannot get it: {reason}. Tell pip of an index that has it "
        f"(`pip config set global.index-url URL`), or put the file into {folder}"
    )


@functools.lru_cache(maxsize=32)
def tree(package: Package, cache: str = CACHE) -> Mapping[str, bytes]:
    """The files of a source distribution, by their path below its top folder; blocks. Raises SandboxError."""
    (path,) = fetch([package.pin], cache)
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if member.isfile() and member.size <= MAX_FILE_BYTES and (file := archive.extractfile(member)):
                found[name] = file.read()
    return found


def archive(files: Mapping[str, bytes]) -> bytes:
    """A compressed tar of these files, the same bytes for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, data in sorted(files.items()):
            member = tarfile.TarInfo(path)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
    return gzip.compress(buffer.getvalue(), 6, mtime=0)


def main() -> None:
    """Fetch everything that is pinned."""
    parser = argparse.ArgumentParser(description="Fetches the source distributions of the environment `repo`.")
    parser.add_argument("--cache", default=CACHE, help="the folder they lie in")
    cache = parser.parse_args().cache
    try:
        fetch([*kit(), *(package.pin for package in packages().values())], cache)
    except SandboxError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
